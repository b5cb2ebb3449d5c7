//! Privileges, capabilities, and the process's own limits.
//!
//! Owns which are given up, and the reason for each limit.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Makes sure that no executed program brings a privilege, and that none can be gained otherwise. Threads
/// that are started afterwards inherit this.
pub fn renounce_new() -> io::Result<()> {
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().iter() {
        // Without CAP_SETPCAP the bounding set stays, but bounds nothing that such a process could gain.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    // Unknown before Linux 4.3, which has no ambient set to clear.
    let _ = clear_ambient_capability_set();
    Ok(())
}

/// Drops all capabilities of this thread. Until then root's were needed to open files of other owners.
pub fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// Lowers the limits of the whole process.
///
/// - `RLIMIT_CORE` is 0 and the process is not dumpable. A guest's memory and its disks' data are then in no
///   core file, and no other process of the same user reads them through /proc or ptrace.
/// - `RLIMIT_NOFILE` allows `spare_descriptors` more than are open: for a VM hardly any.
///
/// `RLIMIT_NPROC` stays unchanged. The filter already forbids every call that makes a process or a thread.
/// The limit would stop only threads that the kernel makes on our behalf, and only for users other than root.
/// Those are io_uring's workers (every fdatasync of a ring needs one), and KVM's thread that recovers huge
/// pages, which a VM's first KVM_RUN starts (`kvm_mmu_start_lpage_recovery`, Linux 6.13 and some 6.12.y).
pub fn limit(spare_descriptors: u64) -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    for (resource, most) in [(Resource::Core, 0), (Resource::Nofile, descriptors()? + spare_descriptors)] {
        let now = getrlimit(resource);
        let lowered = now.maximum.map_or(most, |hard| hard.min(most));
        setrlimit(resource, Rlimit { current: Some(lowered), maximum: Some(lowered) })?;
    }
    Ok(())
}

/// Returns one more than the highest open descriptor.
fn descriptors() -> io::Result<u64> {
    let highest = (0..getrlimit(Resource::Nofile).current.unwrap_or(1024).min(1 << 16))
        .rev()
        .filter_map(|number| libc::c_int::try_from(number).ok())
        // SAFETY: the call asks for a descriptor's flags, whether it is open or not.
        .find(|descriptor| unsafe { libc::fcntl(*descriptor, libc::F_GETFD) } >= 0);
    Ok(u64::try_from(highest.unwrap_or(2)).unwrap_or(2) + 1)
}
