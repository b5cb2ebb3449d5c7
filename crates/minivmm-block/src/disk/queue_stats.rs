//! What one queue of a disk has done: its counters, its requests in flight and their latencies.
//!
//! Owns the counting. The disk's figures are sums, made when they are asked for. Only the queue's worker
//! counts here, so that no two CPUs contend for a counter. A report only reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::counters::Counters;
use super::latency::{Latencies, RequestMoments};

use crate::sync::unpoisoned;

/// The statistics of one queue.
#[derive(Debug)]
pub struct QueueStats {
    /// The queue's counters. Those that are counted for the whole disk (io_uring_enter, faults) stay 0 here.
    pub counters: Counters,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
    /// `None` unless latencies are recorded.
    latencies: Option<Mutex<Latencies>>,
}

impl QueueStats {
    /// Returns empty statistics. Latencies are recorded only if `timed` is `true`.
    pub fn new(timed: bool) -> Self {
        Self {
            counters: Counters::default(),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
            latencies: timed.then(Mutex::default),
        }
    }

    /// Adds one to a counter.
    pub(super) fn count(&self, counter: impl Fn(&Counters) -> &AtomicU64) {
        self.count_many(1, counter);
    }

    /// Adds `more` to a counter.
    pub(super) fn count_many(&self, more: u64, counter: impl Fn(&Counters) -> &AtomicU64) {
        let own = counter(&self.counters);
        // Only the worker writes, so this needs no locked instruction.
        own.store(own.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// Counts a request as in flight.
    pub(super) fn begins(&self) {
        let now = self.in_flight() + 1;
        self.in_flight.store(now, Ordering::Relaxed);
        if now > self.in_flight_max() {
            self.in_flight_max.store(now, Ordering::Relaxed);
        }
    }

    /// Counts a request as completed.
    pub(super) fn ends(&self) {
        self.in_flight.store(self.in_flight().saturating_sub(1), Ordering::Relaxed);
    }

    /// Returns the number of requests that were submitted and have not completed.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns the largest number of requests that were ever in flight at once.
    pub fn in_flight_max(&self) -> u64 {
        self.in_flight_max.load(Ordering::Relaxed)
    }

    /// Returns `true` if latencies are recorded.
    pub fn is_timed(&self) -> bool {
        self.latencies.is_some()
    }

    /// Records the latencies of completed requests. Call this once per batch: it takes a lock. Only a report takes
    /// that lock as well, for the time of a copy.
    pub fn record(&self, completed: impl IntoIterator<Item = RequestMoments>) {
        if let Some(mut latencies) = self.lock() {
            completed.into_iter().for_each(|moments| latencies.record(&moments));
        }
    }

    /// Returns a copy of the latencies so far, or `None` if they are not recorded.
    pub fn latencies(&self) -> Option<Latencies> {
        self.lock().map(|latencies| latencies.clone())
    }

    fn lock(&self) -> Option<MutexGuard<'_, Latencies>> {
        let latencies = self.latencies.as_ref()?;
        Some(unpoisoned(latencies.lock()))
    }
}
