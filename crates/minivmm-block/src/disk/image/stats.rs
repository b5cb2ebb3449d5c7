//! What the queues of an image have done, and the image beside them.
//!
//! Owns the list of the queues' statistics and the name of the engine that was chosen.

use std::sync::{Arc, Mutex, OnceLock};

use crate::disk::config::{DiskConfig, EngineChoice};
use crate::disk::counters::Counters;
use crate::disk::queue_stats::QueueStats;
use crate::sync::unpoisoned;

/// The statistics of an image, over all its queues.
#[derive(Debug)]
pub struct ImageStats {
    /// Counters that belong to no queue: the ring's calls, faults, the final sync.
    pub(in crate::disk) beside_queues: Counters,
    queues: Mutex<Vec<Arc<QueueStats>>>,
    /// `true` if queues record latencies.
    timed: bool,
    asked: EngineChoice,
    /// The engine that does the I/O; unset until it is chosen.
    engine: OnceLock<&'static str>,
}

impl ImageStats {
    pub(super) fn new(config: &DiskConfig) -> Self {
        Self {
            beside_queues: Counters::default(),
            queues: Mutex::default(),
            timed: config.timed,
            asked: config.engine,
            engine: OnceLock::new(),
        }
    }

    /// Returns the name of the engine that does the I/O. Until it is chosen, this is the name of what was asked
    /// for.
    pub fn engine(&self) -> &'static str {
        self.engine.get().copied().unwrap_or(match self.asked {
            EngineChoice::Auto => "auto",
            EngineChoice::Uring => "io_uring",
            EngineChoice::Blocking => "sync",
        })
    }

    /// Records the engine that was chosen for all queues.
    pub(in crate::disk) fn engine_is(&self, name: &'static str) {
        let _ = self.engine.set(name);
    }

    /// Adds a queue and returns its statistics. Queues are numbered in the order of these calls.
    pub(in crate::disk) fn add_queue(&self) -> Arc<QueueStats> {
        let stats = Arc::new(QueueStats::new(self.timed));
        unpoisoned(self.queues.lock()).push(Arc::clone(&stats));
        stats
    }

    /// Returns the sum of what all queues and the image itself have done so far.
    pub fn counters(&self) -> Counters {
        let sum = Counters::default();
        sum.add(&self.beside_queues);
        self.queues().iter().for_each(|queue| sum.add(&queue.counters));
        sum
    }

    /// Returns the statistics of each queue, in queue order.
    pub fn queues(&self) -> Vec<Arc<QueueStats>> {
        unpoisoned(self.queues.lock()).clone()
    }
}
