//! Privileges, capabilities, and the process's own limits.
//!
//! Owns which, and why each limit is what it is.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Descriptors that the guest may still make us open: none does, but an eventfd or two costs nothing.
const DESCRIPTORS_SPARE: u64 = 16;

/// No program that is executed brings a privilege, and none can be got in any other way. Inherited by
/// the threads that are started afterwards.
pub fn renounce_new() -> io::Result<()> {
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().iter() {
        // Those without CAP_SETPCAP keep a bounding set that bounds nothing they could have.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    // Unknown before Linux 4.3, where there is nothing to be cleared.
    let _ = clear_ambient_capability_set();
    Ok(())
}

/// This thread has no capability any more. Before, root's were needed to open what others own.
pub fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// The limits of the whole process.
///
/// - `RLIMIT_CORE` 0 and not dumpable: a guest's memory and its disks' data are in no core file, and no other
///   process of the same user reads them through /proc or ptrace.
/// - `RLIMIT_NOFILE`: hardly a descriptor more than there are.
///
/// `RLIMIT_NPROC` stays as it is. The filter already forbids every call that makes a process or a thread. The limit
/// would only stop threads that the kernel makes in our name, and only where we are not root: io_uring's workers
/// (every fdatasync of a ring needs one), and KVM's thread that recovers huge pages, which a VM's first KVM_RUN
/// starts (`kvm_mmu_start_lpage_recovery`, Linux 6.13 and some 6.12.y).
pub fn limit() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    for (resource, most) in [(Resource::Core, 0), (Resource::Nofile, descriptors()?)] {
        let now = getrlimit(resource);
        let lowered = now.maximum.map_or(most, |hard| hard.min(most));
        setrlimit(resource, Rlimit { current: Some(lowered), maximum: Some(lowered) })?;
    }
    Ok(())
}

/// One more than the highest descriptor, and the spare ones.
fn descriptors() -> io::Result<u64> {
    let highest = (0..getrlimit(Resource::Nofile).current.unwrap_or(1024).min(1 << 16))
        .rev()
        .filter_map(|number| libc::c_int::try_from(number).ok())
        // SAFETY: asks for a descriptor's flags, whether it is open or not.
        .find(|descriptor| unsafe { libc::fcntl(*descriptor, libc::F_GETFD) } >= 0);
    Ok(u64::try_from(highest.unwrap_or(2)).unwrap_or(2) + 1 + DESCRIPTORS_SPARE)
}
