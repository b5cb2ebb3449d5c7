//! The moments of requests in flight, where latencies are wanted (`--stats`).
//!
//! Owns what is known of each request until its completion is published. Without `--stats` nothing of this
//! exists and no clock is read. With it a request costs two readings of the clock, and a turn costs three.

use std::sync::Arc;
use std::time::Instant;

use crate::disk::disk_queue::{DiskQueue, Op, RequestId};
use crate::disk::latency::{RequestKind, RequestMoments};
use crate::disk::queue_stats::QueueStats;
use crate::slab::Number;

/// The stopwatch of one queue.
pub(super) struct Stopwatch {
    stats: Arc<QueueStats>,
    /// The requests in flight, by slot.
    open: Vec<Open>,
    /// Completed but not yet published.
    completed: Vec<RequestMoments>,
}

/// A request that is in flight.
#[derive(Clone, Copy)]
struct Open {
    kind: RequestKind,
    doorbell: Instant,
    popped: Instant,
    submitted: Option<Instant>,
}

impl Stopwatch {
    /// Starts a stopwatch for the queue of `disk`, which begins to work now. Returns `None` if latencies are
    /// not recorded.
    pub(super) fn begin(disk: &mut DiskQueue) -> Option<Self> {
        let stats = Arc::clone(disk.stats());
        stats.is_timed().then(|| {
            disk.woke_now();
            // Left over from an earlier driver.
            disk.take_submitted().for_each(drop);
            Self { stats, open: Vec::new(), completed: Vec::new() }
        })
    }

    /// Notes that a request was popped just now and is about to be submitted to the disk.
    pub(super) fn pops(&mut self, id: RequestId, op: &Op, doorbell: Instant) {
        let taken = Open { kind: RequestKind::of(op), doorbell, popped: Instant::now(), submitted: None };
        let slot = id.slot();
        // Slots are given out in ascending order.
        if self.open.len() <= slot {
            self.open.resize(slot + 1, taken);
        }
        self.open[slot] = taken;
    }

    /// Notes that the request's first operation was handed to the engine at `at`; the host's time begins there.
    pub(super) fn submits(&mut self, id: RequestId, at: Instant) {
        if let Some(open) = self.open.get_mut(id.slot()) {
            open.submitted.get_or_insert(at);
        }
    }

    /// Notes that the request completed. `heard` is when the last host operation was seen to end, if the
    /// request needed one.
    pub(super) fn completes(&mut self, id: RequestId, heard: Instant) {
        let Some(&Open { kind, doorbell, popped, submitted }) = self.open.get(id.slot()) else { return };
        let host_done = heard.max(submitted.unwrap_or(popped));
        self.completed.push(RequestMoments {
            kind,
            doorbell,
            popped,
            submitted,
            host_done,
            interrupt: host_done,
        });
    }

    /// Records what was completed: it is published now, and the driver was notified.
    pub(super) fn publishes(&mut self) {
        if !self.completed.is_empty() {
            let interrupt = Instant::now();
            self.stats
                .record(self.completed.drain(..).map(|moments| RequestMoments { interrupt, ..moments }));
        }
    }
}
