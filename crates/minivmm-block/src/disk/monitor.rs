//! The durability monitor: bytes that the guest was told are written and the host may still lose.
//!
//! Owns that count for one image, all its queues together, and the times of its fdatasyncs. Decides
//! nothing: no request ever waits for, or depends on, what is counted here.
//!
//! Acknowledged bytes form one line, in the order of their acknowledgement. An fdatasync makes stable what
//! completed before it was handed to the engine, which is always a prefix of that line. One number is
//! therefore enough: how far the line is stable. It is right in whatever order the syncs complete, and needs no
//! search through requests or memory.
//!
//! The price is that a byte written twice counts twice until the next sync. The count may be too high, and is
//! never too low (`docs/statistics.md`).

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::times::{Summary, Times};

use crate::sync::unpoisoned;

/// Largest number of spans whose ages are kept apart. With more syncs in flight an age may be reported too high.
const SPANS_MAX: usize = 64;

/// The monitor of one image. All queues of the image report to it.
#[derive(Debug, Default)]
pub struct Monitor(Mutex<Line>);

/// The start of an fdatasync, and what the sync will have made stable.
///
/// Dropping a `SyncStart` without calling [`Monitor::sync_ends`] is allowed; its writes then stay at risk.
#[derive(Debug, Clone, Copy)]
pub struct SyncStart {
    at: Instant,
    /// The sync covers the line up to this position.
    position: u128,
    /// How far the line was stable when the sync started.
    stable: u128,
    /// When the oldest byte that was not stable then had been acknowledged; `None` if there was none.
    oldest: Option<Instant>,
}

/// The outcome of an fdatasync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncEnd {
    /// What the sync covers is stable.
    Stable,
    /// The host could not make it stable.
    Failed,
    /// The result means nothing: the sync was interrupted, or a latched error makes its success worthless.
    Void,
}

/// The monitor's figures at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes that were acknowledged before they were stable, since the start.
    pub acknowledged_bytes: u64,
    /// Those of the acknowledged bytes that are not stable yet.
    pub at_risk_bytes: u64,
    /// The largest value that `at_risk_bytes` ever had.
    pub at_risk_bytes_max: u64,
    /// Age of the oldest byte at risk; `None` if there is none.
    pub oldest: Option<Duration>,
    /// The largest value that `oldest` ever had.
    pub oldest_max: Duration,
    /// Bytes at risk when the last sync of the run was about to begin; `None` before that.
    pub at_risk_bytes_at_end: Option<u64>,
    /// `true` if a sync has failed. What is at risk then stays at risk, and may be lost already.
    pub sync_failed: bool,
    /// Times of the fdatasyncs that succeeded or failed, each from being handed to the engine to its completion.
    /// `None` if there was none.
    pub syncs: Option<Summary>,
}

impl Monitor {
    /// Counts a completed write of `bytes` bytes that is not stable. Call this before the guest is told: a sync that
    /// starts after the acknowledgement then always covers the write.
    pub fn acknowledges(&self, bytes: u64) {
        if bytes > 0 {
            self.lock().acknowledges(bytes, Instant::now);
        }
    }

    /// Records that an fdatasync is about to be handed to the engine.
    pub fn sync_starts(&self) -> SyncStart {
        self.lock().sync_starts(Instant::now())
    }

    /// Records the outcome of the fdatasync that `start` stands for.
    pub fn sync_ends(&self, start: SyncStart, end: SyncEnd) {
        self.lock().sync_ends(start, end, Instant::now());
    }

    /// Stores the bytes at risk at the end of the run. Call this when nothing is in flight any more, before the last
    /// sync of the run, if the mode has one.
    pub fn guest_has_ended(&self) {
        let mut line = self.lock();
        line.at_risk_at_end = Some(line.at_risk());
    }

    /// Returns the current figures.
    pub fn snapshot(&self) -> Snapshot {
        self.lock().snapshot(Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        unpoisoned(self.0.lock())
    }
}

/// The line of acknowledged bytes. Positions have 128 bits, because a guest that discards a huge disk again and
/// again exceeds 64.
#[derive(Debug)]
struct Line {
    /// The line's length.
    acknowledged: u128,
    /// The line is stable up to this position.
    stable: u128,
    at_risk_max: u128,
    at_risk_at_end: Option<u128>,
    /// The part that is not stable, cut where syncs started, because each sync may make one more piece stable.
    spans: VecDeque<Span>,
    /// `true` if no sync has started since the last span began.
    last_is_open: bool,
    oldest_max: Duration,
    sync_failed: bool,
    times: Option<Times>,
}

/// A piece of the line.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// The position where the piece ends.
    end: u128,
    /// When its first byte was acknowledged.
    first: Instant,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            acknowledged: 0,
            stable: 0,
            at_risk_max: 0,
            at_risk_at_end: None,
            spans: VecDeque::with_capacity(SPANS_MAX),
            last_is_open: false,
            oldest_max: Duration::ZERO,
            sync_failed: false,
            times: None,
        }
    }
}

impl Line {
    fn at_risk(&self) -> u128 {
        self.acknowledged.saturating_sub(self.stable)
    }

    fn oldest(&self) -> Option<Instant> {
        self.spans.front().map(|span| span.first)
    }

    /// Adds `bytes` to the line. Reads the clock only for the first write after a sync has started.
    fn acknowledges(&mut self, bytes: u64, now: impl FnOnce() -> Instant) {
        self.acknowledged = self.acknowledged.saturating_add(u128::from(bytes));
        let end = self.acknowledged;
        let is_full = self.spans.len() == SPANS_MAX;
        match self.spans.back_mut() {
            // If the spans are full, the bytes join an older span and look older than they are.
            Some(last) if self.last_is_open || is_full => last.end = end,
            _ => {
                self.spans.push_back(Span { end, first: now() });
                self.last_is_open = true;
            }
        }
        self.at_risk_max = self.at_risk_max.max(self.at_risk());
    }

    fn sync_starts(&mut self, now: Instant) -> SyncStart {
        self.last_is_open = false;
        SyncStart { at: now, position: self.acknowledged, stable: self.stable, oldest: self.oldest() }
    }

    fn sync_ends(&mut self, start: SyncStart, end: SyncEnd, now: Instant) {
        if end != SyncEnd::Void {
            let times = self.times.get_or_insert_default();
            times.record(now.saturating_duration_since(start.at));
        }
        match end {
            SyncEnd::Stable if !self.sync_failed => self.is_stable_to(start.position, now),
            SyncEnd::Failed => self.distrusts(start),
            SyncEnd::Stable | SyncEnd::Void => {}
        }
    }

    fn is_stable_to(&mut self, position: u128, now: Instant) {
        if position <= self.stable {
            return;
        }
        self.note_age(now);
        self.stable = position;
        while self.spans.front().is_some_and(|span| span.end <= position) {
            self.spans.pop_front();
        }
    }

    /// Handles a failed sync. Nothing becomes stable any more after it.
    ///
    /// The host's kernel reports an error only once. A sync that succeeded while this one was in flight may have
    /// succeeded only because this one took the error of both. What that sync covered is therefore at risk again.
    fn distrusts(&mut self, failed: SyncStart) {
        self.sync_failed = true;
        if failed.stable < self.stable {
            self.stable = failed.stable;
            let first = failed.oldest.unwrap_or(failed.at);
            match self.spans.front_mut() {
                Some(span) => span.first = first,
                None => self.spans.push_back(Span { end: self.acknowledged, first }),
            }
        }
        self.at_risk_max = self.at_risk_max.max(self.at_risk());
    }

    fn note_age(&mut self, now: Instant) {
        if let Some(oldest) = self.oldest() {
            self.oldest_max = self.oldest_max.max(now.saturating_duration_since(oldest));
        }
    }

    fn snapshot(&mut self, now: Instant) -> Snapshot {
        self.note_age(now);
        let bytes = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
        Snapshot {
            acknowledged_bytes: bytes(self.acknowledged),
            at_risk_bytes: bytes(self.at_risk()),
            at_risk_bytes_max: bytes(self.at_risk_max),
            oldest: self.oldest().map(|oldest| now.saturating_duration_since(oldest)),
            oldest_max: self.oldest_max,
            at_risk_bytes_at_end: self.at_risk_at_end.map(bytes),
            sync_failed: self.sync_failed,
            syncs: self.times.as_ref().map(Times::summary),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens to a line, in order.
    enum Event {
        /// This many bytes are acknowledged.
        Ack(u64),
        /// The sync of this number starts.
        Start(usize),
        /// The sync of this number completes.
        End(usize, SyncEnd),
        /// Checks the bytes at risk, and the age of the oldest in events.
        Is(u64, Option<u64>),
    }

    use Event::{Ack, End, Is, Start};
    use SyncEnd::{Failed, Stable, Void};

    /// Plays the events, one per second, and returns the figures at the end.
    fn play(what: &str, events: &[Event]) -> Snapshot {
        let begin = Instant::now();
        let (mut line, mut starts, mut at) = (Line::default(), Vec::new(), begin);
        for (number, event) in (0u64..).zip(events) {
            at = begin + Duration::from_secs(number);
            match *event {
                Ack(bytes) => line.acknowledges(bytes, || at),
                Start(sync) => {
                    starts.resize(starts.len().max(sync + 1), None);
                    starts[sync] = Some(line.sync_starts(at));
                }
                End(sync, end) => line.sync_ends(starts[sync].unwrap(), end, at),
                Is(bytes, age) => {
                    let found = line.snapshot(at);
                    let age = age.map(Duration::from_secs);
                    assert_eq!((found.at_risk_bytes, found.oldest), (bytes, age), "{what}, event {number}");
                }
            }
        }
        line.snapshot(at)
    }

    #[test]
    fn a_sync_covers_what_was_acknowledged_before_it_started_whatever_others_do() {
        let cases: [(&str, &[Event]); 12] = [
            ("nothing yet", &[Is(0, None), Start(0), End(0, Stable), Is(0, None)]),
            ("a write and its sync", &[Ack(5), Is(5, Some(1)), Start(0), End(0, Stable), Is(0, None)]),
            (
                "the age is the oldest one's",
                &[
                    Ack(5),
                    Ack(6),
                    Is(11, Some(2)),
                    Start(0),
                    Ack(7),
                    Is(18, Some(5)),
                    End(0, Stable),
                    Is(7, Some(3)),
                ],
            ),
            ("a write during the sync", &[Start(0), Ack(5), End(0, Stable), Is(5, Some(2))]),
            (
                "the later sync ends first",
                &[
                    Ack(1),
                    Start(0),
                    Ack(2),
                    Start(1),
                    Ack(4),
                    End(1, Stable),
                    Is(4, Some(2)),
                    End(0, Stable),
                    Is(4, Some(4)),
                ],
            ),
            (
                "in order",
                &[
                    Ack(1),
                    Start(0),
                    Ack(2),
                    Start(1),
                    End(0, Stable),
                    Is(2, Some(3)),
                    End(1, Stable),
                    Is(0, None),
                ],
            ),
            (
                "an interrupted sync removes nothing, its repetition does",
                &[
                    Ack(1),
                    Start(0),
                    End(0, Void),
                    Is(1, Some(3)),
                    Ack(2),
                    Start(0),
                    End(0, Stable),
                    Is(0, None),
                ],
            ),
            ("a failed sync removes nothing", &[Ack(1), Start(0), End(0, Failed), Is(1, Some(3))]),
            (
                "and no sync after it does",
                &[Ack(1), Start(0), End(0, Failed), Ack(2), Start(1), End(1, Stable), Is(3, Some(6))],
            ),
            (
                "a sync that ended well during a failed one may have been robbed of its error",
                &[
                    Ack(1),
                    Start(0),
                    Ack(2),
                    Start(1),
                    End(1, Stable),
                    Is(0, None),
                    End(0, Failed),
                    Is(3, Some(7)),
                ],
            ),
            (
                "one that ended well before the failed one began was not",
                &[Ack(1), Start(0), End(0, Stable), Ack(2), Start(1), End(1, Failed), Is(2, Some(3))],
            ),
            (
                "two syncs of the same, one fails after the other ended well",
                &[Start(0), Ack(4), Start(1), End(1, Stable), Is(0, None), End(0, Failed), Is(4, Some(6))],
            ),
        ];
        for (what, events) in cases {
            play(what, events);
        }
    }

    #[test]
    fn maxima_stay() {
        let found = play("", &[Ack(5), Ack(6), Start(0), End(0, Stable), Ack(1), Start(1), End(1, Stable)]);
        assert_eq!((found.acknowledged_bytes, found.at_risk_bytes, found.at_risk_bytes_max), (12, 0, 11));
        assert_eq!((found.oldest, found.oldest_max), (None, Duration::from_secs(3)));
    }

    #[test]
    fn more_syncs_in_flight_than_spans_cost_nothing_but_the_exact_age() {
        let begin = Instant::now();
        let mut line = Line::default();
        let mut starts = Vec::new();
        for second in 0..1000 {
            let at = begin + Duration::from_secs(second);
            line.acknowledges(1, || at);
            starts.push(line.sync_starts(at));
        }
        let end = begin + Duration::from_secs(1000);
        assert_eq!(line.spans.len(), SPANS_MAX);
        assert_eq!(line.spans.capacity(), SPANS_MAX, "nothing was allocated");
        for (sync, left) in [(2, 997), (500, 499), (3, 499), (999, 0)] {
            line.sync_ends(starts[sync], Stable, end);
            let found = line.snapshot(end);
            assert_eq!(found.at_risk_bytes, left);
            // The byte acknowledged in second n is n seconds younger than the first one.
            assert!(found.oldest.is_none_or(|age| age >= Duration::from_secs(left)), "{sync}: {found:?}");
            assert_eq!(found.oldest.is_some(), left > 0);
        }
    }

    #[test]
    fn no_guest_gets_to_the_end_of_the_numbers() {
        let mut line = Line::default();
        for _ in 0..5 {
            line.acknowledges(u64::MAX, Instant::now);
        }
        assert_eq!(line.snapshot(Instant::now()).at_risk_bytes, u64::MAX);
        let start = line.sync_starts(Instant::now());
        line.acknowledges(7, Instant::now);
        line.sync_ends(start, Stable, Instant::now());
        let found = line.snapshot(Instant::now());
        assert_eq!((found.at_risk_bytes, found.at_risk_bytes_max), (7, u64::MAX));
    }
}
