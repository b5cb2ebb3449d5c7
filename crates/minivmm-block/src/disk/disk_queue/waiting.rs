//! What a worker asks of its disk before it waits, and after it has stopped.
//!
//! Owns the questions. The wait itself is the state machine's.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::DiskQueue;
use crate::disk::engine::Meanwhile;

impl DiskQueue {
    /// Hands all queued operations to the engine, and returns what the calling thread may do until the next one
    /// completes.
    pub fn meanwhile(&mut self) -> Meanwhile {
        self.hand_over();
        self.engine.meanwhile()
    }

    /// Executes the operation that [`DiskQueue::meanwhile`] has asked the calling thread for ([`Engine::execute_kept`]).
    pub fn execute_kept(&mut self, came: &dyn Fn() -> bool) {
        let mut ended = std::mem::take(&mut self.ended);
        self.engine.execute_kept(came, &mut ended);
        self.take_ended(ended);
    }

    /// Returns `true` if a wait would make progress without blocking. Makes no system call.
    pub fn is_ready(&mut self) -> bool {
        let is_settled = |horizon| self.image.latch.is_settled(horizon);
        !self.done.is_empty()
            || self.group.is_due(self.in_flight.writing())
            || self.first_horizon().is_some_and(is_settled)
            || self.engine.is_ready()
    }

    /// Lets waits for the doorbell also end when `kick` is written ([`Engine::listen_to`]).
    pub fn listen_to(&mut self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        self.engine.listen_to(kick)
    }

    /// Makes the engine release the doorbell. Call this when nothing is in flight, before the doorbell goes away.
    pub fn rest(&mut self) -> io::Result<()> {
        self.engine.rest()
    }
}
