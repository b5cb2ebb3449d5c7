//! How the device's threads are started: by the embedder.
//!
//! Owns the kinds of thread that the device has, and the way of an embedder that wants nothing special. All
//! threads are started while the device is made, none when the guest runs, so that an embedder can give up the
//! right to start threads before the guest runs.

use std::fmt::Debug;
use std::io;
use std::thread::{Builder, JoinHandle};

/// What a thread of the device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// It serves one queue: guest memory, the image's descriptor, the queue's engine.
    Worker,
    /// It sleeps, and signals eventfds at set times, for the delays of `fault=`.
    Delays,
}

/// Starts the device's threads.
pub trait Threads: Debug + Send + Sync {
    /// Starts a thread from `builder`, which has its name and the size of its stack, and runs `body` in it to
    /// its end. What the embedder does first in the thread (a system-call filter, a CPU to run on, a priority)
    /// must leave `kind` able to do its work.
    ///
    /// An error is that of the thread's start.
    fn spawn(
        &self,
        kind: ThreadKind,
        builder: Builder,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>>;
}

/// Starts threads as std does.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainThreads;

impl Threads for PlainThreads {
    fn spawn(
        &self,
        _kind: ThreadKind,
        builder: Builder,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        builder.spawn(body)
    }
}
