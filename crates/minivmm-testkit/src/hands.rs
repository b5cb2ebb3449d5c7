//! An engine in the test's hands: operations end when and how the test says, in any order.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};

/// An operation that the engine was given and has not ended.
pub struct HeldOp {
    /// What the state machine calls it.
    pub token: OpToken,
    /// What the host would do.
    pub op: HostOp,
    /// The clock's time when it was submitted.
    pub given: u64,
}

/// What the engine holds, in the order it was given.
#[derive(Default)]
pub struct Held {
    /// What has not ended.
    pub operations: Vec<HeldOp>,
    /// What the next wait reports.
    pub ended: Vec<Ended>,
    /// With so many operations the engine is full.
    pub room: usize,
    /// Whether the last wait was one that may sleep.
    pub slept: bool,
    /// What happens on the host, and on other queues, before the next submission returns.
    pub at_submit: Option<Box<dyn FnMut() + Send>>,
}

/// The test's side of the engine.
#[derive(Clone)]
pub struct Hands {
    held: Arc<Mutex<Held>>,
    clock: Arc<AtomicU64>,
}

impl Hands {
    /// Makes the hands of an engine with room for so many operations.
    pub fn new(room: usize) -> Self {
        Self::with_clock(room, Arc::default())
    }

    /// The same with a clock that others share, which each submission advances by one.
    pub fn with_clock(room: usize, clock: Arc<AtomicU64>) -> Self {
        Self { held: Arc::new(Mutex::new(Held { room, ..Held::default() })), clock }
    }

    /// Returns the engine.
    pub fn engine(&self) -> Box<dyn Engine> {
        Box::new(InHands(self.clone()))
    }

    /// Returns what the engine holds, locked.
    pub fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap()
    }

    /// Ends the operation at this place among those that are held; the next wait reports it.
    pub fn end(&self, at: usize, result: io::Result<usize>) {
        let mut held = self.held();
        let HeldOp { token, .. } = held.operations.remove(at);
        held.ended.push(Ended { token, result });
    }
}

struct InHands(Hands);

impl Engine for InHands {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let mut held = self.0.held();
        if held.operations.len() == held.room {
            return Err(op);
        }
        let given = self.0.clock.fetch_add(1, Ordering::SeqCst) + 1;
        held.operations.push(HeldOp { token, op, given });
        let at_submit = held.at_submit.take();
        // It may look into these hands, or submit to others.
        drop(held);
        if let Some(mut happens) = at_submit {
            happens();
        }
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let mut held = self.0.held();
        held.slept = !matches!(wake, Wake::Now);
        ended.append(&mut held.ended);
        Ok(())
    }
}
