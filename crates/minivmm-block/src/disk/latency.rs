//! Where the time of a request goes: latencies by kind of request and phase.
//!
//! Owns the phases and the sums over queues. The state machine ([`super::disk_queue::DiskQueue`]) takes two of
//! the moments: handed to the host, and host done. The queue's worker takes the others. Only the worker
//! records a queue's latencies; a report copies them.

use std::time::{Duration, Instant};

use super::op::Op;
use super::times::{Summary, Times};

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A FLUSH.
    Flush,
    /// A DISCARD.
    Discard,
    /// A WRITE_ZEROES.
    WriteZeroes,
}

impl RequestKind {
    /// All kinds, in the order of the reports.
    pub const ALL: [RequestKind; 5] = [
        RequestKind::Read,
        RequestKind::Write,
        RequestKind::Flush,
        RequestKind::Discard,
        RequestKind::WriteZeroes,
    ];

    /// Returns the kind of `op`.
    pub fn of(op: &Op) -> Self {
        match op {
            Op::Read(..) => RequestKind::Read,
            Op::Write(..) => RequestKind::Write,
            Op::Flush => RequestKind::Flush,
            Op::Discard(_) => RequestKind::Discard,
            Op::WriteZeroes(_) => RequestKind::WriteZeroes,
        }
    }
}

/// The moments of a request that has completed.
#[derive(Debug, Clone, Copy)]
pub struct RequestMoments {
    /// The kind of the request.
    pub kind: RequestKind,
    /// When the worker woke, or polling found something in the queue.
    pub doorbell: Instant,
    /// When the request was taken from the queue.
    pub popped: Instant,
    /// When its first operation was handed to the engine; `None` if it needed none.
    pub submitted: Option<Instant>,
    /// When the engine reported that the last operation had completed.
    pub host_done: Instant,
    /// When the driver could see the completion, and had been interrupted if it wanted to be.
    pub interrupt: Instant,
}

/// The number of phases, the whole included.
const PHASES: usize = 5;

impl RequestMoments {
    /// Returns the times between successive moments, and last the whole. The phases add up to the whole.
    fn phases(&self) -> [Option<Duration>; PHASES] {
        let between = |from: Instant, to: Instant| to.saturating_duration_since(from);
        // If the request did not need the host, the time up to `host_done` is all preparation.
        let prepared = self.submitted.unwrap_or(self.host_done);
        [
            Some(between(self.doorbell, self.popped)),
            Some(between(self.popped, prepared)),
            self.submitted.map(|submitted| between(submitted, self.host_done)),
            Some(between(self.host_done, self.interrupt)),
            Some(between(self.doorbell, self.interrupt)),
        ]
    }
}

/// The latencies of one queue, or of several.
#[derive(Debug, Clone, Default)]
pub struct Latencies([Phases; RequestKind::ALL.len()]);

/// The latencies of one kind of request, by phase. A phase is `None` until the first request that has it.
#[derive(Debug, Clone, Default)]
struct Phases([Option<Box<Times>>; PHASES]);

/// The figures that are reported of one kind of request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KindSummary {
    /// From the doorbell until the worker took the request from the queue.
    pub doorbell_to_popped: Summary,
    /// Until the request was handed to the engine, or was done if it did not need the host.
    pub popped_to_submitted: Summary,
    /// The host's time; `None` if no request needed the host.
    pub submitted_to_host_done: Option<Summary>,
    /// Until the driver could see the completion.
    pub host_done_to_interrupt: Summary,
    /// From the doorbell until the driver could see the completion.
    pub total: Summary,
}

impl Latencies {
    /// Adds a completed request.
    pub fn record(&mut self, moments: &RequestMoments) {
        let Phases(times) = &mut self.0[moments.kind as usize];
        for (times, took) in times.iter_mut().zip(moments.phases()) {
            if let Some(took) = took {
                times.get_or_insert_default().record(took);
            }
        }
    }

    /// Adds all latencies of `other`.
    pub fn add(&mut self, other: &Self) {
        for (Phases(mine), Phases(theirs)) in self.0.iter_mut().zip(&other.0) {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                if let Some(theirs) = theirs {
                    mine.get_or_insert_default().add(theirs);
                }
            }
        }
    }

    /// Returns the figures to report for requests of this kind, or `None` if there was none.
    pub fn summary(&self, kind: RequestKind) -> Option<KindSummary> {
        let Phases(times) = &self.0[kind as usize];
        let [first, prepared, host, last, total] = times.each_ref().map(|found| found.as_deref());
        Some(KindSummary {
            doorbell_to_popped: first?.summary(),
            popped_to_submitted: prepared?.summary(),
            submitted_to_host_done: host.map(Times::summary),
            host_done_to_interrupt: last?.summary(),
            total: total?.summary(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole_with_and_without_the_host() {
        let begin = Instant::now();
        let at = |micros| begin + Duration::from_micros(micros);
        for submitted in [Some(at(15)), None] {
            let mut latencies = Latencies::default();
            latencies.record(&RequestMoments {
                kind: RequestKind::Flush,
                doorbell: at(0),
                popped: at(5),
                submitted,
                host_done: at(115),
                interrupt: at(116),
            });
            assert_eq!(latencies.summary(RequestKind::Read), None);
            let found = latencies.summary(RequestKind::Flush).unwrap();
            let host = found.submitted_to_host_done.as_ref();
            assert_eq!(host.map(|found| found.max), submitted.map(|_| Duration::from_micros(100)));
            let sum = found.doorbell_to_popped.max
                + found.popped_to_submitted.max
                + host.map_or(Duration::ZERO, |found| found.max)
                + found.host_done_to_interrupt.max;
            assert_eq!((sum, found.total.count), (found.total.max, 1));
        }
    }
}
