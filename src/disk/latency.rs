//! Where the time of a request goes: latencies by kind of request and phase.
//!
//! Owns the phases and the sums over queues. The moments are found by the state machine
//! ([`super::disk_queue::DiskQueue`]: handed to the host, host done) and by the queue's worker (all others).
//! A queue's latencies are recorded by its worker alone; whoever reports copies them.

use std::time::{Duration, Instant};

use super::op::Op;
use super::times::{Summary, Times};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
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

impl Kind {
    /// All, in the order of the reports.
    pub const ALL: [Kind; 5] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard, Kind::WriteZeroes];

    /// That of an operation.
    pub fn of(op: &Op) -> Self {
        match op {
            Op::Read(..) => Kind::Read,
            Op::Write(..) => Kind::Write,
            Op::Flush => Kind::Flush,
            Op::Discard(_) => Kind::Discard,
            Op::WriteZeroes(_) => Kind::WriteZeroes,
        }
    }
}

/// The moments of a request that has been answered.
#[derive(Debug, Clone, Copy)]
pub struct Moments {
    /// What it asked for.
    pub kind: Kind,
    /// The worker woke, or looked, and found something in the queue.
    pub doorbell: Instant,
    /// It was taken from the queue.
    pub popped: Instant,
    /// Its first operation was handed to the engine; `None` if it needed none.
    pub submitted: Option<Instant>,
    /// The end of its last operation was heard of.
    pub host_done: Instant,
    /// The driver can see the answer, and has been told if it wanted to be.
    pub interrupt: Instant,
}

/// The parts of a request's time.
const PHASES: usize = 5;

impl Moments {
    /// From moment to moment, and the whole: the phases add up to it.
    fn phases(&self) -> [Option<Duration>; PHASES] {
        let between = |from: Instant, to: Instant| to.saturating_duration_since(from);
        // Without the host all but the first and the last is the preparation.
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

/// Latencies of one queue, or of several.
#[derive(Debug, Clone, Default)]
pub struct Latencies([Phases; Kind::ALL.len()]);

/// Those of one kind; a phase is there from its first request on.
#[derive(Debug, Clone, Default)]
struct Phases([Option<Box<Times>>; PHASES]);

/// What is told of one kind of request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KindSummary {
    /// Until the worker came to it.
    pub doorbell_to_popped: Summary,
    /// Until it was handed to the engine; until it was done, where it needed no host.
    pub popped_to_submitted: Summary,
    /// The host's time; `None` if no request needed it.
    pub submitted_to_host_done: Option<Summary>,
    /// Until the driver could see the answer.
    pub host_done_to_interrupt: Summary,
    /// The whole.
    pub total: Summary,
}

impl Latencies {
    /// A request has been answered.
    pub fn record(&mut self, moments: &Moments) {
        let Phases(times) = &mut self.0[moments.kind as usize];
        for (times, took) in times.iter_mut().zip(moments.phases()) {
            if let Some(took) = took {
                times.get_or_insert_default().record(took);
            }
        }
    }

    /// Those of `other` too.
    pub fn add(&mut self, other: &Self) {
        for (Phases(mine), Phases(theirs)) in self.0.iter_mut().zip(&other.0) {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                if let Some(theirs) = theirs {
                    mine.get_or_insert_default().add(theirs);
                }
            }
        }
    }

    /// What is told of requests of this kind; `None` if there was none.
    pub fn summary(&self, kind: Kind) -> Option<KindSummary> {
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
            latencies.record(&Moments {
                kind: Kind::Flush,
                doorbell: at(0),
                popped: at(5),
                submitted,
                host_done: at(115),
                interrupt: at(116),
            });
            assert_eq!(latencies.summary(Kind::Read), None);
            let found = latencies.summary(Kind::Flush).unwrap();
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
