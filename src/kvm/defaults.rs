//! KVM's defaults for a VM that minivmm's guests do without.
//!
//! Owns three switches. The first is reinjection of the interval timer's lost ticks, which keeps KVM from
//! using AVIC and APICv's posted interrupts. The others are virtual performance counters and the lines of the
//! legacy interrupt controllers. An older KVM lacks some of these switches; guests run there all the same.

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PMU_CAP_DISABLE, KVMIO,
    kvm_enable_cap, kvm_irqchip, kvm_reinject_control,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

vmm_sys_util::ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);

/// Switches these defaults off in `vm`, which must have its interval timer and no CPU yet. Returns the names
/// of those that KVM has a switch for but did not switch off.
pub fn switch_off(vm: &VmFd) -> Vec<&'static str> {
    let mut left = Vec::new();
    for (what, done) in [
        ("the timer's reinjection", reinjection(vm)),
        ("performance counters", counters(vm)),
        ("the lines of the 8259s", old_controllers(vm)),
    ] {
        if let Err(error) = done {
            log::debug!("KVM leaves {what} on: {error}");
            left.push(what);
        }
    }
    left
}

/// Lets ticks of the interval timer be lost when the guest is too slow for them, as on hardware. Linux keeps
/// time by other means as soon as it has booted.
fn reinjection(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    if !vm.check_extension(Cap::ReinjectControl) {
        return Ok(());
    }
    let off = kvm_reinject_control { pit_reinject: 0, ..Default::default() };
    // SAFETY: KVM reads the structure, which is the one of this request, and keeps no pointer to it.
    match unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL(), &off) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Switches off the performance counters' MSRs (Linux 5.18). CPUID hides the counters too (`cpuid`).
fn counters(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let offered = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(offered).unwrap_or_default() & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut off = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    off.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&off)
}

/// Masks all lines of the two 8259s, as firmware leaves them. KVM's let every line through from the start, to
/// the vectors of exceptions. A kernel that uses the 8259s programs them first. A kernel with
/// hardware-reduced ACPI never does, and with `noapic` it would take the serial port's interrupt for an
/// overflow exception.
fn old_controllers(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip)?;
        chip.chip.pic.imr = u8::MAX;
        vm.set_irqchip(&chip)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{create_vcpu, create_vm, open_device};
    use crate::mem;

    #[test]
    fn this_hosts_kvm_switches_off_what_it_has_a_switch_for() {
        let Ok(kvm) = open_device() else {
            return println!("skipped: no /dev/kvm here that this user may open");
        };
        let ram = mem::map_ram(&[(0, 1 << 20)]).unwrap();
        let vm = create_vm(&kvm, &ram).unwrap();
        assert_eq!(switch_off(&vm), [""; 0]);
        // The counters can only be switched off before the first CPU exists, which is when `create_vm` does
        // it.
        let _cpu = create_vcpu(&vm, 0).unwrap();
        let offered = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        assert_eq!(counters(&vm).is_err(), offered > 0, "KVM_CAP_PMU_CAPABILITY is {offered:#x}");
    }
    #[test]
    fn no_line_of_the_old_controllers_is_let_through_before_a_guest_asks_for_it() {
        let Ok(kvm) = open_device() else {
            return println!("skipped: no /dev/kvm here that this user may open");
        };
        let ram = mem::map_ram(&[(0, 1 << 20)]).unwrap();
        let vm = create_vm(&kvm, &ram).unwrap();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).unwrap();
            // SAFETY: KVM fills this part of the union for these two controllers.
            assert_eq!(unsafe { chip.chip.pic.imr }, u8::MAX, "controller {chip_id}");
        }
    }
}
