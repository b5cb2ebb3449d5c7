//! The engines, which execute host operations, and those operations.
//!
//! Owns the seam below the disk's state machine. An engine knows nothing of guests, stability or
//! policy. It hands back the kernel's own answers, including short counts and errors. They are
//! [`super::uring`] and [`super::blocking`]; the write log and faults wrap either; tests have others.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::mem::Iov;
use crate::slab::slab_number;

/// One operation on the image, in terms of the host's kernel.
#[derive(Debug, Clone)]
pub enum HostOp {
    /// `preadv`.
    Readv {
        /// The memory to read into.
        iov: Iov,
        /// Offset in the image, in bytes.
        offset: u64,
    },
    /// `pwritev`, or `pwritev2` with RWF_DSYNC.
    Writev {
        /// The memory to write from.
        iov: Iov,
        /// Offset in the image, in bytes.
        offset: u64,
        /// `true` if the bytes must be stable when the operation completes.
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
        /// `true` for a WRITE_ZEROES: the guest relies on zeroes. `false` for a DISCARD: it relies on nothing.
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
    /// Returns `true` if success of this operation means that data is stable.
    pub fn is_sync(&self) -> bool {
        matches!(self, HostOp::Fdatasync | HostOp::Writev { dsync: true, .. })
    }
}

slab_number! {
    /// The number of a host operation of one queue, from [`Engine::submit`] to its [`Ended`].
    OpToken
}

/// An operation that has completed.
#[derive(Debug)]
pub struct Ended {
    /// The token that the operation was submitted with.
    pub token: OpToken,
    /// The kernel's own answer: the number of bytes, which may be fewer than asked for, or the error.
    pub result: io::Result<usize>,
}

/// What may end a wait, besides the completion of an operation.
#[derive(Debug, Clone, Copy)]
pub enum Wake<'a> {
    /// This eventfd. The engine clears it when it is rung. The state machine may keep a clone, so that another
    /// queue can wake this one (`SyncLatch::ring_when_settled`). Nobody else may read the eventfd, because an
    /// engine may clear its O_NONBLOCK.
    Doorbell(&'a Arc<EventFd>),
    /// Nothing. The wait blocks until an operation completes, if one is in flight.
    EndOnly,
    /// The wait does not block.
    Now,
}

/// What the thread that waits for an engine may do meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meanwhile {
    /// Spin until [`Engine::is_ready`], if it likes.
    Spin,
    /// Nothing: a thread of the kernel executes what is waited for, and needs a CPU.
    Sleep,
    /// Execute the operation that the engine has kept back for it ([`Engine::execute_kept`]).
    ExecuteKept,
}

/// Executes host operations on one image, for one queue.
pub trait Engine: Send {
    /// Takes an operation, or hands it back as `Err` if the engine is full. The engine may execute the operation
    /// at any time from now on, in any order with others in flight.
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp>;

    /// Submits what is queued and waits until an operation completes or `wake` ends the wait. Appends the
    /// completed operations to `ended`.
    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()>;

    /// Returns `true` if a wait might complete something at once. Makes no system call.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// Returns what the calling thread may do until the next operation completes.
    fn meanwhile(&self) -> Meanwhile {
        Meanwhile::Spin
    }

    /// Executes the operation that was kept back for the calling thread. It may block as long as that takes. Appends
    /// the completed operation to `ended`. `came` tells whether the driver has made more requests available. If it has
    /// before the operation begins, the engine begins the operation elsewhere.
    fn execute_kept(&mut self, _came: &dyn Fn() -> bool, _ended: &mut Vec<Ended>) {}

    /// Lets a wait for the doorbell also end when `kick`, an eventfd of another process, is written; `None` ends
    /// that. The engine changes nothing about `kick`, and may read its counter. Nothing is in flight. An engine that
    /// cannot do it ignores the call.
    fn listen_to(&mut self, _kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        Ok(())
    }

    /// Releases the doorbell of the last wait, which is about to go away. Nothing is in flight.
    fn rest(&mut self) -> io::Result<()> {
        Ok(())
    }
}
