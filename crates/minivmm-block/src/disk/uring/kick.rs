//! A second doorbell, which belongs to another process: vhost-user's kick.
//!
//! Owns the poll of its eventfd that waits in the ring. Nothing about the eventfd may change, because the front end
//! uses it as well: with O_NONBLOCK cleared, QEMU would hang in a read of it after we have gone. So the ring polls it,
//! again and again by one entry (Linux 5.13), and reads it only where that is not known.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{cqueue, opcode, squeue};

use crate::doorbell;

/// The poll that waits in the ring.
pub(super) struct Kick {
    fd: Option<Arc<OwnedFd>>,
    is_armed: bool,
    /// `false` once the kernel has refused a poll that goes on after its first event.
    goes_on: bool,
}

impl Kick {
    pub fn new() -> Self {
        Self { fd: None, is_armed: false, goes_on: true }
    }

    /// Replaces the eventfd. The poll of the previous one has been cancelled.
    pub fn set(&mut self, fd: Option<Arc<OwnedFd>>) {
        debug_assert!(!self.is_armed, "the previous poll was cancelled by `rest`");
        self.fd = fd;
    }

    /// Returns `true` if a poll waits in the ring.
    pub fn is_armed(&self) -> bool {
        self.is_armed
    }

    /// Returns the entry that makes a poll wait in the ring, with this number; `None` if one waits, or if there is
    /// no eventfd. The entry must be submitted.
    pub fn arm(&mut self, number: u64) -> Option<squeue::Entry> {
        let fd = self.fd.as_ref().filter(|_| !self.is_armed)?;
        self.is_armed = true;
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let poll = opcode::PollAdd::new(Fd(fd.as_raw_fd()), events).multi(self.goes_on);
        Some(poll.build().user_data(number))
    }

    /// Takes an event of the poll. Returns `true` if the kick was given.
    pub fn ends(&mut self, result: i32, flags: u32) -> io::Result<bool> {
        self.is_armed = cqueue::more(flags);
        match -result {
            libc::ECANCELED | libc::EINTR => Ok(false),
            libc::EINVAL if self.goes_on => {
                self.goes_on = false;
                Ok(false)
            }
            errno if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
            _ => {
                if !self.is_armed {
                    self.clear();
                }
                Ok(true)
            }
        }
    }

    /// Sets the eventfd's counter to 0, so that a poll does not find it readable at once.
    pub fn clear(&self) {
        if let Some(fd) = &self.fd {
            doorbell::clear(fd);
        }
    }
}
