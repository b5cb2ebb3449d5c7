//! The lock on an image: one writer, or readers.
//!
//! Owns OFD locks on the whole file, which go with the descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::image::{ImageProblem, host};

/// How long a lock is waited for: a VMM that was killed a moment ago still has its io_uring taken
/// apart by the kernel, and with it the image.
const LOCK_WAIT: Duration = Duration::from_millis(500);
const LOCK_STEP: Duration = Duration::from_millis(10);

/// An OFD lock on the whole image: exclusive for a writer, shared for readers.
pub(super) fn take(file: &File, readonly: bool) -> Result<(), ImageProblem> {
    let since = Instant::now();
    loop {
        match try_lock(file, readonly) {
            Err(ImageProblem::Locked(_)) if since.elapsed() < LOCK_WAIT => std::thread::sleep(LOCK_STEP),
            other => return other,
        }
    }
}

/// Whether somebody else has a lock that stands against ours.
pub(super) fn is_taken(file: &File, readonly: bool) -> bool {
    let mut wanted = whole_file_lock(readonly);
    // SAFETY: `wanted` is a valid flock, which the kernel may write to, for the length of the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut wanted) };
    result == 0 && libc::c_int::from(wanted.l_type) != libc::F_UNLCK
}

fn try_lock(file: &File, readonly: bool) -> Result<(), ImageProblem> {
    let wanted = whole_file_lock(readonly);
    // SAFETY: `wanted` is a valid flock for the length of the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(ImageProblem::Locked(error)),
        _ => Err(host("it cannot be locked")(error)),
    }
}

fn whole_file_lock(readonly: bool) -> libc::flock {
    // SAFETY: flock is plain numbers, for which all zeroes are valid.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    // Both constants and SEEK_SET are 0, 1 or 2.
    #[allow(clippy::cast_possible_truncation)]
    {
        wanted.l_type = kind as libc::c_short;
        wanted.l_whence = libc::SEEK_SET as libc::c_short;
    }
    wanted
}
