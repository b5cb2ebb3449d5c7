//! The moments of requests in flight, where latencies are wanted (`--stats`).
//!
//! Owns what is known of each request until its answer is published. Nothing here is there, and no
//! clock is read, without `--stats`; with it a request costs two looks at the clock, and a turn three.

use std::sync::Arc;
use std::time::Instant;

use crate::disk::disk_queue::{DiskQueue, Op, RequestId};
use crate::disk::latency::{Kind, Moments};
use crate::disk::queue_stats::QueueStats;
use crate::slab::Number;

/// The stopwatch of one queue.
pub(super) struct Stopwatch {
    stats: Arc<QueueStats>,
    /// Of what is in flight, by its slot.
    open: Vec<Open>,
    /// Answered, and not yet published.
    answered: Vec<Moments>,
}

/// A request that is in flight.
#[derive(Clone, Copy)]
struct Open {
    kind: Kind,
    doorbell: Instant,
    popped: Instant,
    submitted: Option<Instant>,
}

impl Stopwatch {
    /// One for the queue of `disk`, which begins to work now; `None` if nobody wants to know.
    pub(super) fn begin(disk: &mut DiskQueue) -> Option<Self> {
        let stats = Arc::clone(disk.stats());
        stats.is_timed().then(|| {
            disk.woke_now();
            // Of a driver that is gone.
            disk.take_submitted().for_each(drop);
            Self { stats, open: Vec::new(), answered: Vec::new() }
        })
    }

    /// A request was taken from the queue, just now, and is about to be handed to the disk.
    pub(super) fn pops(&mut self, id: RequestId, op: &Op, doorbell: Instant) {
        let taken = Open { kind: Kind::of(op), doorbell, popped: Instant::now(), submitted: None };
        let slot = id.slot();
        // Slots are given out one after another.
        if self.open.len() <= slot {
            self.open.resize(slot + 1, taken);
        }
        self.open[slot] = taken;
    }

    /// Its first operation was handed to the engine then; what follows is the host's time.
    pub(super) fn submits(&mut self, id: RequestId, at: Instant) {
        if let Some(open) = self.open.get_mut(id.slot()) {
            open.submitted.get_or_insert(at);
        }
    }

    /// It is done, and the last end was heard of then, if it was the host's.
    pub(super) fn answers(&mut self, id: RequestId, heard: Instant) {
        let Some(&Open { kind, doorbell, popped, submitted }) = self.open.get(id.slot()) else { return };
        let host_done = heard.max(submitted.unwrap_or(popped));
        self.answered.push(Moments { kind, doorbell, popped, submitted, host_done, interrupt: host_done });
    }

    /// What was answered is published, and the driver told.
    pub(super) fn publishes(&mut self) {
        if !self.answered.is_empty() {
            let interrupt = Instant::now();
            self.stats.record(self.answered.drain(..).map(|moments| Moments { interrupt, ..moments }));
        }
    }
}
