//! Ringing a doorbell: an eventfd that wakes the thread which waits for it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// Rings `doorbell`, which must be non-blocking. Fails only if its descriptor cannot be written.
///
/// EAGAIN means that the counter is full. A full counter wakes the reader as well, so that is success.
pub fn ring(doorbell: &EventFd) -> io::Result<()> {
    match doorbell.write(1) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        result => result,
    }
}

/// Sets the counter of an eventfd to 0 without waiting, whatever its flags are.
pub fn clear(fd: &OwnedFd) {
    let mut counter = 0u64;
    let piece = libc::iovec { iov_base: (&raw mut counter).cast(), iov_len: size_of::<u64>() };
    // SAFETY: reads eight bytes into `counter`. An error means that there is nothing to clear.
    unsafe { libc::preadv2(fd.as_raw_fd(), &raw const piece, 1, -1, libc::RWF_NOWAIT) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn an_eventfd_that_blocks_is_cleared_without_waiting() {
        let blocking = EventFd::new(0).unwrap();
        blocking.write(3).unwrap();
        // SAFETY: the descriptor is a new one, which nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::dup(blocking.as_raw_fd())) };
        clear(&fd);
        clear(&fd);
        blocking.write(1).unwrap();
        assert_eq!(blocking.read().unwrap(), 1);
    }

    #[test]
    fn a_full_counter_is_a_ring_too() {
        let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        doorbell.write(u64::MAX - 1).unwrap();
        assert!(ring(&doorbell).is_ok());
        assert_eq!(doorbell.read().unwrap(), u64::MAX - 1);
        assert!(ring(&doorbell).is_ok());
        assert_eq!(doorbell.read().unwrap(), 1);
    }
}
