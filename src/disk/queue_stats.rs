//! What one queue of a disk has done: its counters, its requests in flight and their latencies.
//!
//! Owns the counting; the disk's figures are sums, made when somebody asks. The worker of the queue is the only one that counts here, so that
//! no two CPUs contend for it; whoever reports looks at it from outside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::counters::Counters;
use super::latency::{Latencies, Moments};

use crate::sync::unpoisoned;

/// The figures of one queue.
#[derive(Debug)]
pub struct QueueStats {
    /// Its own counters. Those of what is not a queue's business (io_uring_enter, faults) stay 0 here.
    pub counters: Counters,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
    latencies: Option<Mutex<Latencies>>,
}

impl QueueStats {
    /// Nothing yet; `timed` if latencies are wanted.
    pub fn new(timed: bool) -> Self {
        Self {
            counters: Counters::default(),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
            latencies: timed.then(Mutex::default),
        }
    }

    /// One more.
    pub(super) fn count(&self, counter: impl Fn(&Counters) -> &AtomicU64) {
        self.count_many(1, counter);
    }

    /// So many more.
    pub(super) fn count_many(&self, more: u64, counter: impl Fn(&Counters) -> &AtomicU64) {
        let own = counter(&self.counters);
        // One writer: no need for the processor's lock.
        own.store(own.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// A request has come.
    pub(super) fn begins(&self) {
        let now = self.in_flight() + 1;
        self.in_flight.store(now, Ordering::Relaxed);
        if now > self.in_flight_max() {
            self.in_flight_max.store(now, Ordering::Relaxed);
        }
    }

    /// One is done.
    pub(super) fn ends(&self) {
        self.in_flight.store(self.in_flight().saturating_sub(1), Ordering::Relaxed);
    }

    /// Requests that the disk has, and has not answered.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The most that there ever were.
    pub fn in_flight_max(&self) -> u64 {
        self.in_flight_max.load(Ordering::Relaxed)
    }

    /// Whether latencies are wanted.
    pub fn is_timed(&self) -> bool {
        self.latencies.is_some()
    }

    /// Requests have been answered. Once for a whole batch; nobody else takes this lock but a report,
    /// for the time of a copy.
    pub fn record(&self, answered: impl IntoIterator<Item = Moments>) {
        if let Some(mut latencies) = self.lock() {
            answered.into_iter().for_each(|moments| latencies.record(&moments));
        }
    }

    /// The latencies so far, if they are wanted.
    pub fn latencies(&self) -> Option<Latencies> {
        self.lock().map(|latencies| latencies.clone())
    }

    fn lock(&self) -> Option<MutexGuard<'_, Latencies>> {
        let latencies = self.latencies.as_ref()?;
        Some(unpoisoned(latencies.lock()))
    }
}
