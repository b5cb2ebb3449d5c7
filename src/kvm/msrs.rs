//! The few MSRs that a kernel expects set by firmware, and the local APIC's two input lines.
//!
//! Owns their values. An MSR that this host does not list, or refuses, is left out: hosts differ,
//! and none of them is worth a guest that does not start.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets the MSRs of one CPU.
pub fn set_up(kvm: &Kvm, vcpu: &VcpuFd, has_mtrrs: bool) -> Result<(), KvmError> {
    let list = kvm.get_msr_index_list().map_err(|error| KvmError::Refused("the list of MSRs", error))?;
    let mut wanted =
        vec![(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS, list.as_slice().contains(&IA32_MISC_ENABLE))];
    // KVM lists no MTRR, and has them wherever CPUID shows them. All memory is ordinary memory.
    wanted.push((IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK, has_mtrrs));
    for (index, data, there) in wanted {
        if there {
            set_one(vcpu, index, data);
        }
    }
    Ok(())
}

fn set_one(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let set = Msrs::from_entries(&[entry]).map(|msrs| vcpu.set_msrs(&msrs));
    if !matches!(set, Ok(Ok(1))) {
        log::debug!("this host does not take MSR {index:#x}; it stays as it is");
    }
}

/// Registers of the local APIC, by offset.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

/// LINT0 takes the 8259's interrupts, LINT1 the NMI, as firmware leaves them.
pub fn set_up_lapic(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let refused = |error| KvmError::Refused("the local APIC's state", error);
    let mut lapic = vcpu.get_lapic().map_err(refused)?;
    put(&mut lapic, LVT_LINT0, DELIVER_EXTINT);
    put(&mut lapic, LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(refused)
}

fn put(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *register = byte.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_is_written_little_endian_at_its_offset() {
        let mut lapic = kvm_lapic_state::default();
        put(&mut lapic, LVT_LINT0, 0x8102_0384);
        let bytes: Vec<u8> = lapic.regs[0x34f..0x355].iter().map(|b| b.cast_unsigned()).collect();
        assert_eq!(bytes, [0, 0x84, 0x03, 0x02, 0x81, 0]);
    }
}
