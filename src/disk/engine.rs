//! What executes host operations, and the operations.
//!
//! Owns the seam below the disk's state machine: an engine knows nothing of guests, stability or
//! policy, and hands back the kernel's own answers, short counts and errors included. The blocking
//! engine is [`super::blocking`]; tests have others.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::mem::Iov;
use crate::slab::slab_number;

/// One operation on the image, as the host's kernel knows it.
#[derive(Debug, Clone)]
pub enum HostOp {
    /// `preadv`.
    Readv {
        /// Where the bytes go.
        iov: Iov,
        /// Offset in the image, in bytes.
        offset: u64,
    },
    /// `pwritev`, or `pwritev2` with RWF_DSYNC.
    Writev {
        /// Where the bytes come from.
        iov: Iov,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Stable when it ends.
        dsync: bool,
    },
    /// `fdatasync`.
    Fdatasync,
    /// `fallocate` with FALLOC_FL_PUNCH_HOLE and KEEP_SIZE.
    PunchHole {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// For a WRITE_ZEROES: the guest counts on zeroes. For a DISCARD it counts on nothing.
        must_zero: bool,
    },
    /// `fallocate` with FALLOC_FL_ZERO_RANGE and KEEP_SIZE.
    ZeroRange {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl HostOp {
    /// Whether its success says that something is stable.
    pub fn is_sync(&self) -> bool {
        matches!(self, HostOp::Fdatasync | HostOp::Writev { dsync: true, .. })
    }
}

slab_number! {
    /// The number of a host operation of one queue, from [`Engine::submit`] to its [`Ended`].
    OpToken
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The token it was submitted with.
    pub token: OpToken,
    /// The kernel's own answer: bytes, which may be fewer than asked, or the error.
    pub result: io::Result<usize>,
}

/// What may end a wait, besides the end of an operation.
#[derive(Debug, Clone, Copy)]
pub enum Wake<'a> {
    /// This eventfd, which the engine then clears. The state machine may keep a clone, so that another
    /// queue can wake this one (`SyncLatch::ring_when_settled`). Nobody else reads it: an engine may take its
    /// O_NONBLOCK away.
    Doorbell(&'a Arc<EventFd>),
    /// Nothing: wait for an operation to end, if there is one.
    EndOnly,
    /// Everything: do not block.
    Now,
}

/// Executes host operations on one image, for one queue.
pub trait Engine: Send {
    /// Takes an operation; `Err` hands it back because the engine is full. It may be executed at
    /// any time from now on, in any order with others in flight.
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp>;

    /// Submits what was queued and waits for an end or for `wake`; appends what has ended.
    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()>;

    /// Whether a wait might end something at once, found without a system call.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// Nothing is in flight, and the doorbell of the last wait goes away: lets go of it.
    fn rest(&mut self) -> io::Result<()> {
        Ok(())
    }
}
