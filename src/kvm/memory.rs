//! A guest's memory, handed to KVM.
//!
//! Owns the slots, and the refusal: which size was asked for, why it was refused, and how much is possible.

use std::fs;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, uninterrupted};
use crate::layout::GIB;
use crate::mem::{Ram, size};

/// The maximum size of a slot in bytes. KVM takes less than 2^31 pages; this is a multiple of every page
/// size.
const SLOT_MAX: u64 = 4 << 40;
/// The guest bytes per byte that KVM keeps for them: 8 bytes of host memory for each page of a slot. KVM
/// allocates them at once, whether the guest uses the page or not, and whether the host has that much or not.
/// (Only newer versions with EPT or NPT do without.)
const GUEST_PER_KEPT: u64 = 4096 / 8;
/// The divisor for the part of the host's available memory that KVM may take for this. It keeps a mistyped
/// size from killing the host's other processes.
const KEPT_PART: u64 = 4;

/// Why KVM did not get a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryRefused {
    /// KVM would take too much of the host's memory.
    #[error(
        "{} of guest memory (--memory) are too much for this host: KVM keeps up to {} of the host's memory for them, and \
         {} are available; --memory {} is the most now",
        size(*asked), size(asked / GUEST_PER_KEPT), size(*available), size(most_beside(*available))
    )]
    TooMuch {
        /// The size of the guest's memory in bytes.
        asked: u64,
        /// The host's available memory in bytes.
        available: u64,
    },
    /// KVM refused the memory.
    #[error("KVM refuses {} of guest memory (--memory): {}", size(*asked), advice(source, *asked, *bits))]
    Kvm {
        /// The size of the guest's memory in bytes.
        asked: u64,
        /// The number of bits of a guest physical address on this host; `None` if KVM does not report it.
        bits: Option<u32>,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// Returns the largest guest memory, in whole MiB, for a host with `available` bytes of available memory.
fn most_beside(available: u64) -> u64 {
    (available / KEPT_PART).saturating_mul(GUEST_PER_KEPT) >> 20 << 20
}

fn advice(error: &kvm_ioctls::Error, asked: u64, bits: Option<u32>) -> String {
    // The gap below 4 GiB moves the rest of the memory up.
    let most = bits.and_then(|bits| 1_u64.checked_shl(bits)).map(|end| end.saturating_sub(GIB));
    match (error.errno(), bits, most) {
        (libc::EINVAL, Some(bits), Some(most)) if asked > most => {
            format!("a guest's addresses have {bits} bits here; --memory {} is the most", size(most))
        }
        (libc::ENOMEM, ..) => {
            "this host has no memory for what KVM keeps of each page; give the guest less".into()
        }
        _ => "give the guest less; `minivmm check` tells whether KVM works".into(),
    }
}

/// Gives `vm` the memory `ram`, which the caller keeps mapped until the VM is gone.
pub fn give(kvm: &Kvm, vm: &VmFd, ram: &Ram) -> Result<(), KvmError> {
    let asked = ram.size_bytes();
    check(asked, available(&fs::read_to_string("/proc/meminfo").unwrap_or_default()))?;
    for (slot, (guest_phys_addr, userspace_addr, memory_size)) in (0..).zip(slots(ram.regions())) {
        let region =
            kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: the range is a mapping of `ram`, which the caller keeps until the VM is gone;
        // nothing but raw copies and system calls touches it on our side (`mem`).
        uninterrupted(|| unsafe { vm.set_user_memory_region(region) })
            .map_err(|source| MemoryRefused::Kvm { asked, bits: address_bits(kvm), source })?;
    }
    Ok(())
}

fn check(asked: u64, available: Option<u64>) -> Result<(), MemoryRefused> {
    match available {
        Some(available) if asked > most_beside(available) => Err(MemoryRefused::TooMuch { asked, available }),
        _ => Ok(()),
    }
}

/// Returns the bytes of host memory that are available without swapping, from /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}

/// Returns the number of bits of a guest physical address, from KVM's CPUID.
fn address_bits(kvm: &Kvm) -> Option<u32> {
    let leaves = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?;
    let leaf = leaves.as_slice().iter().find(|leaf| leaf.function == 0x8000_0008)?;
    Some(leaf.eax & 0xff)
}

/// Splits regions of (guest address, host address, bytes) into pieces that fit a slot.
fn slots(regions: Vec<(u64, u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut slots = Vec::new();
    for (mut guest, mut host, mut left) in regions {
        while left > 0 {
            let piece = left.min(SLOT_MAX);
            slots.push((guest, host, piece));
            (guest, host, left) = (guest + piece, host + piece, left - piece);
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    #[test]
    fn what_is_more_than_a_slot_holds_becomes_several() {
        let made = slots(vec![(0, 7 << 21, 3 * GIB), (4 * GIB, 9 << 21, 9 * TIB)]);
        let expected = [
            (0, 7 << 21, 3 * GIB),
            (4 * GIB, 9 << 21, 4 * TIB),
            (4 * GIB + 4 * TIB, (9 << 21) + 4 * TIB, 4 * TIB),
            (4 * GIB + 8 * TIB, (9 << 21) + 8 * TIB, TIB),
        ];
        assert_eq!(made, expected);
    }

    #[test]
    fn kvm_does_not_take_the_hosts_memory_away() {
        let meminfo = "MemTotal:  9 kB\nMemAvailable:   25165824 kB\n";
        let host = available(meminfo);
        assert_eq!(host, Some(24 * GIB));
        assert!(check(3 * TIB, host).is_ok() && check(GIB, Some(64 << 20)).is_ok());
        assert!(check(16 * TIB, None).is_ok(), "nobody knows");
        let told = check(16 * TIB, host).unwrap_err().to_string();
        for word in ["16384G of guest memory", "up to 32G", "24G are available", "--memory 3072G is the most"]
        {
            assert!(told.contains(word), "{word}: {told}");
        }
        assert!(check(3 * TIB + GIB, host).is_err());
    }

    #[test]
    fn a_refusal_says_how_much_why_and_what_would_do() {
        let told = |asked, bits, errno| {
            MemoryRefused::Kvm { asked, bits, source: kvm_ioctls::Error::new(errno) }.to_string()
        };
        let addresses = told(TIB, Some(39), libc::EINVAL);
        assert!(addresses.contains("1024G") && addresses.contains("39 bits"), "{addresses}");
        assert!(addresses.contains("--memory 511G is the most"), "{addresses}");
        assert!(told(TIB, Some(48), libc::EINVAL).contains("less"));
        assert!(told(GIB / 2, None, libc::ENOMEM).contains("512M of guest memory"));
    }
}
