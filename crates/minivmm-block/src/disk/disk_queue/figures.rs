//! What the state machine counts, and the moments that it records.
//!
//! Owns both for one queue. No decision depends on them. The clock is read only if latencies are recorded.

use std::sync::Arc;
use std::time::Instant;

use super::DiskQueue;
use crate::disk::engine::OpToken;
use crate::disk::flight::{Flight, Stage};
use crate::disk::op::{Op, RequestId};
use crate::disk::queue_stats::QueueStats;

/// The moments that the latencies are made from. Kept only if latencies are recorded.
pub(super) struct QueueClock {
    /// When the engine's last wait returned.
    woke: Instant,
    /// The requests whose operations were handed to the engine, and when. One entry per operation.
    submitted: Vec<(RequestId, Instant)>,
}

impl QueueClock {
    pub(super) fn begin() -> Self {
        Self { woke: Instant::now(), submitted: Vec::new() }
    }
}

impl DiskQueue {
    /// Returns the statistics of this queue.
    pub fn stats(&self) -> &Arc<QueueStats> {
        &self.stats
    }

    /// Records that the queue begins to work now.
    pub fn woke_now(&mut self) {
        if let Some(clock) = &mut self.clock {
            clock.woke = Instant::now();
        }
    }

    /// Returns the time of the last [`DiskQueue::woke_now`]: when the last wait returned and reported the completed
    /// operations. `None` if latencies are not recorded.
    pub fn woke_at(&self) -> Option<Instant> {
        self.clock.as_ref().map(|clock| clock.woke)
    }

    /// Returns the requests whose operations were handed to the engine since the last call, and when.
    pub fn take_submitted(&mut self) -> impl Iterator<Item = (RequestId, Instant)> + '_ {
        self.clock.iter_mut().flat_map(|clock| clock.submitted.drain(..))
    }

    /// Counts a new request and its bytes.
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

    /// Records `at` for the request whose operation `token` was handed to the engine, or for all that share it.
    pub(super) fn note_submitted(&mut self, token: OpToken, at: Option<Instant>) {
        let (Some(clock), Some(at)) = (&mut self.clock, at) else { return };
        match self.in_flight.get(token) {
            Some(Flight { stage: Stage::GroupSync, .. }) => {
                clock.submitted.extend(self.group.running().map(|id| (id, at)));
            }
            Some(Flight { id: Some(id), .. }) => clock.submitted.push((*id, at)),
            _ => {}
        }
    }
}
