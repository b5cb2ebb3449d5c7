//! Locks that somebody else has on a file.
//!
//! Owns the probes, which hold no lock for longer than a call. On images, minivmm, QEMU, cloud-hypervisor and
//! libvirt use record locks (POSIX and OFD). crosvm, and `flock` in scripts, use flock(2).

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::identity::FileId;

/// How long to wait for a foreign lock. After a VMM is killed, the kernel takes a moment to dismantle its
/// io_uring. A reader of a report holds its lock for a moment.
pub const LOCK_WAIT: Duration = Duration::from_millis(500);
const LOCK_STEP: Duration = Duration::from_millis(10);

/// Returns `true` if somebody else has a record lock on any byte of `file` that keeps a writer out. With
/// `readonly`, only a lock that keeps a reader out counts.
pub fn is_locked(file: &File, readonly: bool) -> bool {
    let mut wanted = whole_file(readonly);
    // SAFETY: `wanted` is a valid flock, which the kernel may write to, for the length of the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut wanted) };
    result == 0 && libc::c_int::from(wanted.l_type) != libc::F_UNLCK
}

/// Returns the description of a lock on all bytes of a file.
pub fn whole_file(readonly: bool) -> libc::flock {
    // SAFETY: flock is plain numbers, for which all zeroes are valid.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    // The constants, like SEEK_SET, are all 0, 1 or 2.
    #[allow(clippy::cast_possible_truncation)]
    {
        wanted.l_type = kind as libc::c_short;
        wanted.l_whence = libc::SEEK_SET as libc::c_short;
    }
    wanted
}

/// Returns `true` if somebody else's flock(2) on the file would make a writer wait, or a reader if `readonly`.
/// A file system without flock has no such locks.
pub fn is_flocked(file: &File, readonly: bool) -> bool {
    let how = match readonly {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, how) {
        Ok(()) => {
            // Held only to ask the question.
            let _ = rustix::fs::flock(file, FlockOperation::Unlock);
            false
        }
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    }
}

/// Waits up to [`LOCK_WAIT`] until `is_held` returns `false`. Returns `true` if it never did.
pub fn stays(is_held: impl Fn() -> bool) -> bool {
    let since = Instant::now();
    while is_held() {
        if since.elapsed() >= LOCK_WAIT {
            return true;
        }
        std::thread::sleep(LOCK_STEP);
    }
    false
}

/// Returns the processes that hold a flock(2) on `file`, as far as this user may see: "process 17 (sleep)".
/// /proc/locks is no help: the process that took the lock may be gone, and a child may have inherited it.
pub fn flock_holders(file: &File) -> Option<String> {
    let wanted = FileId::of(&file.metadata().ok()?);
    let is_number = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let processes = fs::read_dir("/proc").ok()?.flatten().filter_map(|it| it.file_name().into_string().ok());
    let holders = processes.filter(|name| is_number(name) && has_by_flock(name, wanted)).map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("process {pid} ({})", name.trim())
    });
    let holders: Vec<_> = holders.collect();
    (!holders.is_empty()).then(|| holders.join(", "))
}

fn has_by_flock(pid: &str, wanted: FileId) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        let number = descriptor.file_name();
        let is_it = fs::metadata(descriptor.path()).is_ok_and(|found| FileId::of(&found) == wanted);
        let info = || fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.display()));
        is_it && info().is_ok_and(|info| info.contains(" FLOCK "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_locks_and_flocks_of_others_are_seen_and_left_alone() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (theirs, ours) = (open(), open());
        let set = |kind: libc::c_int, start: i64, len: i64| {
            let mut lock = whole_file(true);
            lock.l_type = libc::c_short::try_from(kind).unwrap();
            (lock.l_start, lock.l_len) = (start, len);
            // SAFETY: `lock` is a valid flock for the length of the call.
            assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
        };
        assert!(!is_locked(&ours, false) && !is_locked(&ours, true));
        // As QEMU locks: single bytes from 100 on, shared.
        set(libc::F_RDLCK, 100, 1);
        assert!(is_locked(&ours, false) && !is_locked(&ours, true));
        set(libc::F_WRLCK, 0, 0);
        assert!(is_locked(&ours, false) && is_locked(&ours, true));
        set(libc::F_UNLCK, 0, 0);
        assert!(!is_locked(&ours, false));

        assert!(!is_flocked(&ours, false));
        rustix::fs::flock(&theirs, FlockOperation::LockShared).unwrap();
        assert!(is_flocked(&ours, false) && !is_flocked(&ours, true));
        rustix::fs::flock(&theirs, FlockOperation::LockExclusive).unwrap();
        assert!(is_flocked(&ours, true));
        let us = format!("process {} (", std::process::id());
        assert!(flock_holders(&ours).unwrap().starts_with(&us));
        drop(theirs);
        assert!(!is_flocked(&ours, false));
        assert_eq!(flock_holders(&ours), None);
    }
}
