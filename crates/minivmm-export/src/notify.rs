//! A ring's way to the driver: the front end's call and err eventfds.
//!
//! Owns the two descriptors, which the front end may replace while the ring is served, and the rule that writing them
//! never waits for the front end.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, OnceLock};

use minivmm_block::sync::unpoisoned;
use minivmm_block::virtio::Interrupt;
use vmm_sys_util::eventfd::EventFd;

/// The call and err eventfds of one ring.
#[derive(Debug, Default)]
pub struct Notify {
    call: Mutex<Option<ForeignEvent>>,
    err: Mutex<Option<ForeignEvent>>,
}

impl Notify {
    /// Replaces the call eventfd. It is written once: what the driver was to be told through the previous one, or
    /// by a process that was killed, may be lost.
    pub fn set_call(&self, event: Option<ForeignEvent>) {
        let mut call = unpoisoned(self.call.lock());
        *call = event;
        call.iter().for_each(ForeignEvent::write);
    }

    /// Replaces the err eventfd.
    pub fn set_err(&self, event: Option<ForeignEvent>) {
        *unpoisoned(self.err.lock()) = event;
    }
}

impl Interrupt for Notify {
    fn queue(&self, _index: u16) {
        unpoisoned(self.call.lock()).iter().for_each(ForeignEvent::write);
    }

    /// The configuration space changes only when the front end changes it.
    fn config(&self) {}

    fn needs_reset(&self) {
        unpoisoned(self.err.lock()).iter().for_each(ForeignEvent::write);
    }
}

/// An eventfd of another process.
#[derive(Debug)]
pub struct ForeignEvent {
    fd: OwnedFd,
    /// `true` if a write of a full counter would wait for the other process.
    waits: bool,
}

/// A descriptor is no eventfd.
#[derive(Debug, thiserror::Error)]
#[error("a descriptor that must be an eventfd is none")]
pub struct NoEvent;

impl ForeignEvent {
    /// Accepts a descriptor that the front end has sent, if it is an eventfd. Anything else could make its writer
    /// wait.
    pub fn new(file: File) -> Result<Self, NoEvent> {
        if !is_event(&file) {
            return Err(NoEvent);
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|_| NoEvent)?;
        Ok(Self { waits: !flags.contains(rustix::fs::OFlags::NONBLOCK), fd: file.into() })
    }

    /// Returns the descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Writes the eventfd. A full counter says what it is to say already.
    fn write(&self) {
        if self.waits && !is_writable(&self.fd) {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}

fn is_writable(fd: &OwnedFd) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `polled` is one valid pollfd for the length of the call.
    unsafe { libc::poll(&raw mut polled, 1, 0) == 1 }
}

/// Returns `true` if `file` is an eventfd, or behaves as one. All files without a file system have one inode in
/// common. Of those, an eventfd refuses the largest number (eventfd(2)) and changes nothing.
fn is_event(file: &File) -> bool {
    static INODE: OnceLock<Option<(u64, u64)>> = OnceLock::new();
    let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).ok().map(|found| (found.st_dev, found.st_ino));
    let ours = || {
        let own = EventFd::new(libc::EFD_CLOEXEC).ok()?;
        // SAFETY: `own` stays open until after the call.
        inode(unsafe { BorrowedFd::borrow_raw(own.as_raw_fd()) })
    };
    let found = inode(file.as_fd());
    if found.is_none() || *INODE.get_or_init(ours) != found {
        return false;
    }
    rustix::io::write(file, &u64::MAX.to_ne_bytes()) == Err(rustix::io::Errno::INVAL)
}
