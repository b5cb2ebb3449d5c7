//! The engine of one queue, over the simulated storage that all share.
//!
//! Owns what is an engine's own doing: how many operations it takes, when a wait is over, and, in half of the runs,
//! that an operation which blocks and is alone is kept for the worker to make. The io_uring engine does that too
//! (`disk/uring/alone.rs`); here everything is kept that may be.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use minivmm_block::disk::engine::{Ended, Engine, HostOp, Meanwhile, OpToken, Wake};

use super::fiber::{Pause, pause};
use super::mistakes::is_made;
use super::storage::{Running, Storage};

/// Operations that a queue's engine takes at once.
const ROOM: usize = 3;

pub struct SimEngine {
    storage: Arc<Mutex<Storage>>,
    queue: usize,
    /// Whether it keeps anything for the worker.
    keeps: bool,
    kept: Option<(OpToken, HostOp)>,
    /// A kept operation that was answered before it was made (a mistake).
    answered: Option<OpToken>,
}

impl SimEngine {
    pub fn new(storage: Arc<Mutex<Storage>>, queue: usize, keeps: bool) -> Self {
        Self { storage, queue, keeps, kept: None, answered: None }
    }

    fn lock(&self) -> MutexGuard<'_, Storage> {
        self.storage.lock().unwrap()
    }

    /// Has the host begin an operation when it likes.
    fn begin(&self, token: OpToken, op: HostOp, shares: bool) {
        let mut storage = self.lock();
        if shares && matches!(op, HostOp::Fdatasync) {
            let earlier =
                |other: &&mut Running| matches!(other.op, HostOp::Fdatasync) && other.started.is_some();
            if let Some(other) = storage.running.iter_mut().find(earlier) {
                other.riders.push((self.queue, token));
                return;
            }
        }
        storage.running.push(Running::new(self.queue, token, op));
    }

    fn release_kept(&mut self) {
        if let Some((token, op)) = self.kept.take() {
            self.begin(token, op, false);
        }
    }

    /// What has ended since this was last asked.
    fn take_ended(&mut self) -> Vec<Ended> {
        let mut ended = std::mem::take(&mut self.lock().ended[self.queue]);
        ended.retain(|end| Some(end.token) != self.answered);
        ended
    }
}

impl Engine for SimEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.release_kept();
        let in_flight = self.lock().in_flight(self.queue);
        if in_flight >= ROOM {
            return Err(op);
        }
        let blocks = !matches!(op, HostOp::Readv { .. } | HostOp::Writev { dsync: false, .. });
        if self.keeps && blocks && in_flight == 0 {
            self.kept = Some((token, op));
        } else {
            self.begin(token, op, is_made("flush-shares-earlier-sync"));
        }
        // The host is quick, and so are others.
        pause(Pause::Submitted);
        Ok(())
    }

    /// As an engine does: a wait that may sleep is over when something has ended, or the doorbell rings.
    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        self.release_kept();
        loop {
            let heard = self.take_ended();
            let in_flight = self.lock().in_flight(self.queue);
            let is_awake = match wake {
                Wake::Now => true,
                Wake::EndOnly => !heard.is_empty() || in_flight == 0,
                Wake::Doorbell(doorbell) => doorbell.read().is_ok() || !heard.is_empty(),
            };
            ended.extend(heard);
            if is_awake {
                return Ok(());
            }
            pause(Pause::Sleeps);
        }
    }

    fn meanwhile(&self) -> Meanwhile {
        if self.kept.is_some() { Meanwhile::ExecuteKept } else { Meanwhile::Spin }
    }

    /// The worker sleeps in the system call; nothing but its end wakes it.
    fn execute_kept(&mut self, came: &dyn Fn() -> bool, ended: &mut Vec<Ended>) {
        if came() {
            return self.release_kept();
        }
        let Some((token, op)) = self.kept.take() else { return };
        self.begin(token, op, is_made("kept-sync-shares-another-queues"));
        if is_made("kept-completes-first") {
            self.answered = Some(token);
            return ended.push(Ended { token, result: Ok(0) });
        }
        while ended.is_empty() {
            pause(Pause::Sleeps);
            ended.extend(self.take_ended());
        }
        if is_made("kept-error-dropped") {
            for end in ended {
                end.result = end.result.as_ref().map_or(Ok(0), |&count| Ok(count));
            }
        }
    }
}
