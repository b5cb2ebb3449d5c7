//! The few MSRs that a kernel expects firmware to have set, and the local APIC's two input lines.
//!
//! Owns their values. An MSR that this host does not list, or refuses, is left out: hosts differ, and a guest
//! that starts is worth more than any of these MSRs.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
/// Performance monitoring is available.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// Branch trace storage and precise event sampling are *not* available.
const MISC_ENABLE_BTS_UNAVAIL: u64 = 1 << 11;
const MISC_ENABLE_PEBS_UNAVAIL: u64 = 1 << 12;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets the MSRs of one CPU.
pub fn set_up(kvm: &Kvm, vcpu: &VcpuFd, has_mtrrs: bool) -> Result<(), KvmError> {
    let list = kvm.get_msr_index_list().map_err(|error| KvmError::Refused("the list of MSRs", error))?;
    let has_misc_enable = list.as_slice().contains(&IA32_MISC_ENABLE);
    let misc_enable = misc_enable(if has_misc_enable { read(vcpu, IA32_MISC_ENABLE) } else { 0 });
    // KVM lists no MTRRs, but has them wherever CPUID shows them. All memory is write-back.
    let wanted = [
        (IA32_MISC_ENABLE, misc_enable, has_misc_enable),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK, has_mtrrs),
    ];
    for (index, data, there) in wanted {
        if there {
            set_one(vcpu, index, data);
        }
    }
    Ok(())
}

/// Returns the value for IA32_MISC_ENABLE: fast strings on, performance counters off, and KVM's bits for the
/// rest.
fn misc_enable(kvms: u64) -> u64 {
    (kvms | MISC_ENABLE_FAST_STRINGS | MISC_ENABLE_BTS_UNAVAIL | MISC_ENABLE_PEBS_UNAVAIL) & !MISC_ENABLE_EMON
}

/// Returns the value of an MSR, or 0 if this host does not report it.
fn read(vcpu: &VcpuFd, index: u32) -> u64 {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return 0 };
    match (vcpu.get_msrs(&mut msrs), msrs.as_slice()) {
        (Ok(1), [entry]) => entry.data,
        _ => 0,
    }
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

/// Connects LINT0 to the 8259's interrupts and LINT1 to the NMI, as firmware does.
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
    use crate::kvm::cpuid::{Place, Supported};
    use crate::kvm::{create_vcpu, create_vm, open_device};
    use crate::mem;

    #[test]
    fn misc_enable_says_that_bts_and_pebs_are_unavailable_and_keeps_the_rest() {
        for (kvms, ours) in [(0, 0x1801), (0x1800, 0x1801), (0x4_0080, 0x4_1801), (0x85_0089, 0x85_1809)] {
            assert_eq!(misc_enable(kvms), ours, "{kvms:#x}");
        }
    }

    #[test]
    fn this_hosts_kvm_takes_the_msrs() {
        let Ok(kvm) = open_device() else {
            return println!("skipped: no /dev/kvm here that this user may open");
        };
        let ram = mem::map_ram(&[(0, 1 << 20)]).unwrap();
        let vm = create_vm(&kvm, &ram).unwrap();
        let vcpu = create_vcpu(&vm, 0).unwrap();
        let has_mtrrs = Supported::by(&kvm).unwrap().set_up(&vcpu, Place { id: 0, cpus: 1 }).unwrap();
        set_up(&kvm, &vcpu, has_mtrrs).unwrap();
        if kvm.get_msr_index_list().unwrap().as_slice().contains(&IA32_MISC_ENABLE) {
            assert_eq!(read(&vcpu, IA32_MISC_ENABLE) & 0x1881, 0x1801);
        }
        if has_mtrrs {
            assert_eq!(read(&vcpu, IA32_MTRR_DEF_TYPE), MTRR_ENABLE | MTRR_WRITE_BACK);
        }
    }

    #[test]
    fn a_register_is_written_little_endian_at_its_offset() {
        let mut lapic = kvm_lapic_state::default();
        put(&mut lapic, LVT_LINT0, 0x8102_0384);
        let bytes: Vec<u8> = lapic.regs[0x34f..0x355].iter().map(|b| b.cast_unsigned()).collect();
        assert_eq!(bytes, [0, 0x84, 0x03, 0x02, 0x81, 0]);
    }
}
