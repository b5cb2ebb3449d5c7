//! The KVM side of the machine: it opens KVM, creates the VM with its interrupt controllers and memory, and
//! binds eventfds.
//!
//! Owns what is requested from KVM, and the errors that help if KVM is missing. Knows nothing of virtio or
//! disks: it binds eventfds to interrupt lines and addresses.

pub mod cpuid;
mod defaults;
pub mod doorbells;
pub mod failure;
mod memory;
pub mod msrs;
pub mod routes;
pub mod run_page;

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::mem::Ram;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm could not be opened.
    #[error("cannot open /dev/kvm: {advice}")]
    Open {
        /// What the user can do about it.
        advice: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// KVM's interface has another version.
    #[error("this KVM has version {0} of its interface, and minivmm needs {KVM_API_VERSION}")]
    Version(i32),
    /// KVM lacks this extension, which minivmm needs.
    #[error("this KVM has no {0}, which minivmm needs: use a newer kernel on the host")]
    Missing(&'static str),
    /// KVM supports fewer CPUs than were asked for.
    #[error("this host gives a VM at most {max} CPUs, --cpus asks for {asked}")]
    TooManyCpus {
        /// The number of CPUs asked for.
        asked: u8,
        /// The maximum number of CPUs.
        max: usize,
    },
    /// Another hypervisor uses the processor's virtualization.
    #[error("KVM cannot create a virtual machine: {ANOTHER_HYPERVISOR} ({STOP_IT})")]
    Busy(#[source] kvm_ioctls::Error),
    /// KVM did not get the guest's memory.
    #[error(transparent)]
    Memory(#[from] memory::MemoryRefused),
    /// KVM refused this request.
    #[error("KVM refuses {0}")]
    Refused(&'static str, #[source] kvm_ioctls::Error),
}

/// What EBUSY from KVM means.
pub const ANOTHER_HYPERVISOR: &str =
    "another hypervisor (VirtualBox, VMware) uses the processor's virtualization";
/// What the user can do about [`ANOTHER_HYPERVISOR`].
pub const STOP_IT: &str = "end its virtual machines, or unload its kernel modules: vboxdrv, vmmon";

/// How long a request to KVM is repeated if signals interrupt it.
const INTERRUPTED_MAX: Duration = Duration::from_secs(1);

/// The extensions that minivmm needs.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Pit2, "interval timer"),
    (Cap::Irqfd, "irqfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::ImmediateExit, "immediate_exit"),
    (Cap::SetTssAddr, "task segment address"),
];

/// Opens /dev/kvm, and checks that it has what minivmm needs for `cpus` CPUs.
pub fn open(cpus: u8) -> Result<Kvm, KvmError> {
    let kvm = open_device().map_err(|source| KvmError::Open { advice: advice(&source), source })?;
    version(&kvm)?;
    if let Some((name, _)) = extensions(&kvm).into_iter().find(|(_, there)| !there) {
        return Err(KvmError::Missing(name));
    }
    let max = kvm.get_max_vcpus();
    if usize::from(cpus) > max {
        return Err(KvmError::TooManyCpus { asked: cpus, max });
    }
    // Caches the answer for the message about a guest that fails.
    let _ = failure::hardware();
    Ok(kvm)
}

/// Opens /dev/kvm without further checks.
pub fn open_device() -> io::Result<Kvm> {
    Kvm::new().map_err(io::Error::from)
}

/// Returns the version of KVM's interface, or an error if it is not the one that minivmm uses.
pub fn version(kvm: &Kvm) -> Result<u32, KvmError> {
    let version = kvm.get_api_version();
    u32::try_from(version)
        .ok()
        .filter(|version| *version == KVM_API_VERSION)
        .ok_or(KvmError::Version(version))
}

/// Returns the name of each extension that minivmm needs, and `true` if this KVM has it.
pub fn extensions(kvm: &Kvm) -> Vec<(&'static str, bool)> {
    NEEDED.iter().map(|&(cap, name)| (name, kvm.check_extension(cap))).collect()
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "this machine has no KVM (is virtualization switched on, and are kvm_intel or kvm_amd loaded? `minivmm check` tells more); \
             without it Linux guests run in the emulated host, guest-images/emuhost"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "the permission is missing (mostly `sudo usermod -aG kvm $USER`, then log in anew; `minivmm check` tells \
             what it takes here)"
        }
        Some(libc::EBUSY) => {
            "another hypervisor (VirtualBox, VMware) uses the processor's virtualization: end its virtual machines, or \
             unload its kernel modules"
        }
        _ => "the host refuses it",
    }
}

/// Repeats a request that a signal has interrupted, for up to a second.
///
/// KVM_CREATE_VM is the only request known to return EINTR: `mmu_notifier_register` checks for pending
/// signals. A debugger, a stopped job, or work that io_uring has queued for this thread counts as one.
pub fn uninterrupted<T>(
    mut request: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    let begin = Instant::now();
    loop {
        match request() {
            Err(error) if error.errno() == libc::EINTR && begin.elapsed() < INTERRUPTED_MAX => {
                thread::sleep(Duration::from_millis(1));
            }
            answer => return answer,
        }
    }
}

/// Creates an empty VM.
pub fn empty_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    uninterrupted(|| kvm.create_vm()).map_err(|error| match error.errno() {
        libc::EBUSY => KvmError::Busy(error),
        _ => KvmError::Refused("a virtual machine", error),
    })
}

/// Creates a VM with interrupt controllers, timer and memory. The caller keeps `ram` mapped for as long as
/// the VM exists.
///
/// KVM_CAP_EXIT_ON_EMULATION_FAILURE stays off. With it, an instruction of an unprivileged program in the
/// guest could end the VM; without it, the program gets its exception.
pub fn create_vm(kvm: &Kvm, ram: &Ram) -> Result<VmFd, KvmError> {
    let refused = |what| move |error| KvmError::Refused(what, error);
    let vm = empty_vm(kvm)?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or_default();
    vm.set_tss_address(tss).map_err(refused("the task segment's place"))?;
    uninterrupted(|| vm.create_irq_chip()).map_err(refused("the interrupt controllers"))?;
    // The timer and, with the dummy speaker, port 0x61: a kernel without kvm-clock measures its TSC with
    // them.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    uninterrupted(|| vm.create_pit2(pit)).map_err(refused("the interval timer"))?;
    defaults::switch_off(&vm);
    memory::give(kvm, &vm, ram)?;
    Ok(vm)
}

/// Creates CPU `id` of `vm`.
pub fn create_vcpu(vm: &VmFd, id: u8) -> Result<VcpuFd, KvmError> {
    uninterrupted(|| vm.create_vcpu(u64::from(id))).map_err(|error| KvmError::Refused("one more CPU", error))
}

/// Creates an eventfd whose writes pulse interrupt line `line` (edge-triggered).
pub fn interrupt(vm: &VmFd, line: u32) -> Result<EventFd, KvmError> {
    let refused = |error| KvmError::Refused("an interrupt line (irqfd)", error);
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|error| refused(error.into()))?;
    vm.register_irqfd(&event, line).map_err(refused)?;
    Ok(event)
}

/// Makes KVM itself write `event` when the guest writes the 32-bit `value` to `address`.
pub fn bind_doorbell(vm: &VmFd, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
    vm.register_ioevent(event, &IoEventAddress::Mmio(address), value)
        .map_err(|error| KvmError::Refused("a doorbell (ioeventfd)", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_dev_kvm_is_said_with_what_to_do() {
        for (errno, word) in [
            (libc::ENOENT, "emulated host"),
            (libc::EACCES, "usermod"),
            (libc::EIO, "refuses"),
            (libc::EBUSY, "VirtualBox"),
        ] {
            assert!(advice(&io::Error::from_raw_os_error(errno)).contains(word), "{errno}");
        }
    }

    #[test]
    fn an_interrupted_request_is_repeated_and_every_other_answer_stands() {
        let mut interrupted = 3;
        let answer = uninterrupted(|| {
            interrupted -= 1;
            if interrupted > 0 { Err(kvm_ioctls::Error::new(libc::EINTR)) } else { Ok(7) }
        });
        assert_eq!(answer, Ok(7));
        let mut asked = 0;
        let answer = uninterrupted(|| {
            asked += 1;
            Err::<(), _>(kvm_ioctls::Error::new(libc::EBUSY))
        });
        assert_eq!((answer.unwrap_err().errno(), asked), (libc::EBUSY, 1));
        // Signals that never stop are reported as an error in the end.
        let answer = uninterrupted(|| Err::<(), _>(kvm_ioctls::Error::new(libc::EINTR)));
        assert_eq!(answer.unwrap_err().errno(), libc::EINTR);
    }
}
