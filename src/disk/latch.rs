//! The first sync error, kept for the life of the process.
//!
//! After a failed fdatasync the kernel has marked the lost pages clean, and the next one succeeds
//! (part 2.6 of the requirements): so an error is never retried, and from then on no FLUSH and no
//! stable write of this disk is reported OK (E1, E2), in every mode and on every queue.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

/// Remembers the first sync error of one disk.
#[derive(Debug, Default)]
pub struct SyncLatch {
    errno: AtomicI32,
}

impl SyncLatch {
    /// Keeps `error` if it is the first; logs that one.
    pub fn set(&self, error: &io::Error) {
        let errno = error.raw_os_error().filter(|&errno| errno != 0).unwrap_or(libc::EIO);
        if self.errno.compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            log::error!(
                "disk: the host could not make data stable: {error}. It may be lost, so every FLUSH and every \
                 stable write fails from now on; find the cause and start again"
            );
        }
    }

    /// `Err` with the first error, if there was one.
    pub fn check(&self) -> io::Result<()> {
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_stays() {
        let latch = SyncLatch::default();
        assert!(latch.check().is_ok());
        latch.set(&io::Error::from_raw_os_error(libc::ENOSPC));
        latch.set(&io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(latch.check().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn an_error_without_a_number_is_kept_too() {
        let latch = SyncLatch::default();
        latch.set(&io::Error::other("?"));
        assert!(latch.check().is_err());
    }
}
