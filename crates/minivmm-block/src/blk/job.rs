//! A worker's job, and why it ends before its time.
//!
//! Owns both types, which the worker's turns and its requests share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::disk::disk_queue::RequestId;
use crate::mem::Ram;
use crate::virtio::Interrupt;
use crate::virtio::queue::{Ring, RingError};

/// What a worker needs to serve a queue, handed over at activation.
pub struct Job {
    /// Guest RAM.
    pub ram: Ram,
    /// The negotiated feature bits.
    pub features: u64,
    /// The queue's index.
    pub index: u16,
    /// The queue's rings.
    pub ring: Ring,
    /// The queue's doorbell.
    pub doorbell: Arc<EventFd>,
    /// An eventfd of another process that the driver writes in place of the doorbell; `None` if there is none.
    pub kick: Option<Arc<OwnedFd>>,
    /// Notifies the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a worker cannot continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TurnError {
    /// The driver has broken the ring.
    #[error("the driver has broken its queue")]
    Ring(#[from] RingError),
    /// Waiting for the engine failed.
    #[error("the I/O engine failed")]
    Engine(#[from] io::Error),
    /// The disk completed a request that was never submitted. This is a bug of ours, and the disk's completions
    /// can no longer be trusted.
    #[error("the disk completed request {0}, which is not in flight")]
    Lost(RequestId),
    /// The disk is idle but has not completed this many requests. This is a bug of ours, too.
    #[error("the disk has nothing in flight and has not completed {0} of its requests")]
    Forgotten(usize),
}
