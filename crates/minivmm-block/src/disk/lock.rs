//! The lock on an image: one writer, or any number of readers.
//!
//! Owns OFD locks on the whole file, which end when the descriptor is closed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::problem::{ImageProblem, host};
use crate::files::locks::{LOCK_WAIT, whole_file};

const LOCK_STEP: Duration = Duration::from_millis(10);

/// Takes an OFD lock on the whole image: exclusive for a writer, shared for readers. Retries for [`LOCK_WAIT`]
/// while somebody else holds a lock.
pub(super) fn take(file: &File, readonly: bool) -> Result<(), ImageProblem> {
    let since = Instant::now();
    loop {
        match try_lock(file, readonly) {
            Err(ImageProblem::Locked(_)) if since.elapsed() < LOCK_WAIT => std::thread::sleep(LOCK_STEP),
            other => return other,
        }
    }
}

fn try_lock(file: &File, readonly: bool) -> Result<(), ImageProblem> {
    let wanted = whole_file(readonly);
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
