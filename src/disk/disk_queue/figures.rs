//! What the state machine counts, and the moments that it sees.
//!
//! Owns both for one queue. Nothing is decided by them, and no clock is read unless latencies are wanted.

use std::sync::Arc;
use std::time::Instant;

use super::DiskQueue;
use crate::disk::engine::OpToken;
use crate::disk::flight::{Flight, Stage};
use crate::disk::op::{Op, RequestId};
use crate::disk::queue_stats::QueueStats;

/// What the clock said, where latencies are wanted.
pub(super) struct Moments {
    /// When the engine's last wait was over.
    woke: Instant,
    /// Requests of which an operation was handed to the engine, and when.
    submitted: Vec<(RequestId, Instant)>,
}

impl Moments {
    pub(super) fn begin() -> Self {
        Self { woke: Instant::now(), submitted: Vec::new() }
    }
}

impl DiskQueue {
    /// The figures of its queue.
    pub fn stats(&self) -> &Arc<QueueStats> {
        &self.stats
    }

    /// The queue begins to work.
    pub fn woke_now(&mut self) {
        if let Some(moments) = &mut self.moments {
            moments.woke = Instant::now();
        }
    }

    /// When the last wait was over, and with it the operations whose ends were heard of; `None` where
    /// latencies are not wanted.
    pub fn woke_at(&self) -> Option<Instant> {
        self.moments.as_ref().map(|moments| moments.woke)
    }

    /// The requests of which an operation was handed to the engine since this was last asked, and when.
    pub fn take_submitted(&mut self) -> impl Iterator<Item = (RequestId, Instant)> + '_ {
        self.moments.iter_mut().flat_map(|moments| moments.submitted.drain(..))
    }

    /// A request has come.
    pub(super) fn count(&self, op: &Op) {
        self.stats.begins();
        self.stats.count(|counters| match op {
            Op::Read(..) => &counters.reads,
            Op::Write(..) => &counters.writes,
            Op::Flush => &counters.flushes,
            Op::Discard(_) => &counters.discards,
            Op::WriteZeroes(_) => &counters.write_zeroes,
        });
        match op {
            Op::Read(range, _) => self.stats.count_many(range.bytes(), |counters| &counters.read_bytes),
            Op::Write(range, _) => self.stats.count_many(range.bytes(), |counters| &counters.write_bytes),
            Op::Flush => {}
            Op::Discard(_) => self.stats.count_many(op.written_bytes(), |counters| &counters.discard_bytes),
            Op::WriteZeroes(_) => {
                self.stats.count_many(op.written_bytes(), |counters| &counters.write_zeroes_bytes);
            }
        }
    }

    /// Whose operation was handed to the engine at this time.
    pub(super) fn note_submitted(&mut self, token: OpToken, at: Option<Instant>) {
        let (Some(moments), Some(at)) = (&mut self.moments, at) else { return };
        match self.in_flight.get(token) {
            Some(Flight { stage: Stage::GroupSync, .. }) => {
                moments.submitted.extend(self.group.running().map(|id| (id, at)));
            }
            Some(Flight { id: Some(id), .. }) => moments.submitted.push((*id, at)),
            _ => {}
        }
    }
}
