//! Measures how slow this machine is, for time limits that were chosen for hardware.
//!
//! Owns the measurement. A guest's instructions take longer if the host itself is emulated, as in the
//! emulated host of `guest-images/emuhost`.

use std::arch::x86_64::__cpuid;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Iterations of the measured loop. Each has three shifts and three exclusive ors that depend on each other.
const STEPS: u32 = 1 << 16;
/// What the loop takes on a slow processor: 3 ns per iteration.
const SLOW_PROCESSOR: Duration = Duration::from_nanos(3 * STEPS as u64);
/// How often the loop runs. The shortest run counts, because other load makes some longer.
const RUNS: u32 = 32;
/// The CPUID leaf in which hypervisors identify themselves (Documentation/virt/kvm/x86/cpuid.rst).
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// The signature of QEMU without KVM. It translates each instruction, and a guest's exit costs far more than
/// on hardware.
const EMULATOR: &[u8; 12] = b"TCGTCGTCGTCG";
const EMULATED: u32 = 10;
const MOST: u32 = 20;

/// Returns how many times as long as on hardware a boot may take here, from 1 to 20.
pub fn slowness() -> u32 {
    let shortest = (0..RUNS).map(|_| time_loop()).min().unwrap_or_default();
    let measured = shortest.as_nanos() / SLOW_PROCESSOR.as_nanos();
    let measured = u32::try_from(measured).unwrap_or(MOST);
    let least = if is_emulated() { EMULATED } else { 1 };
    let slowness = measured.clamp(least, MOST);
    log::info!("time limits are {slowness} times as long as on hardware (a loop takes {shortest:?})");
    slowness
}

fn time_loop() -> Duration {
    let begin = Instant::now();
    let mut value = black_box(0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..STEPS {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
    }
    black_box(value);
    begin.elapsed()
}

/// Returns `true` if the host's processor identifies itself as an emulator.
fn is_emulated() -> bool {
    if __cpuid(1).ecx & HYPERVISOR_PRESENT == 0 {
        return false;
    }
    let leaf = __cpuid(HYPERVISOR_LEAF);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).as_flattened() == EMULATOR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_factor_and_takes_little_time() {
        let begin = Instant::now();
        assert!((1..=MOST).contains(&slowness()));
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
