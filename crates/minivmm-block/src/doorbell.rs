//! Ringing a doorbell: an eventfd that wakes the thread which waits for it.

use std::io;

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

#[cfg(test)]
mod tests {
    use super::*;

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
