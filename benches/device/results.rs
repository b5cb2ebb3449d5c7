//! What came out: figures of a run, medians over rounds, ratios, and their JSON.
//!
//! Owns the arithmetic. A ratio is that of the medians; its spread is the smallest and the largest
//! ratio of one round, whose two runs were neighbours in time.

use serde::Serialize;

use crate::device::Run;
use crate::driver::Times;
use crate::fio::Fio;
use crate::load::{Contest, FioEngine, Load, Who};
use crate::median::median;

/// The figures of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Reads or writes a second.
    pub iops: f64,
    /// The same in MiB.
    pub mib_s: f64,
    /// Times of a read or write.
    pub times: Times,
    /// Times of a FLUSH.
    pub flush_times: Option<Times>,
    /// CPU seconds for a million reads or writes: fio's job, or the process without the driver.
    pub cpu_s_per_million: f64,
    /// The same of the driver's thread.
    pub driver_cpu_s_per_million: Option<f64>,
    /// FLUSHes a read or write.
    pub flushes_per_io: Option<f64>,
    /// Doorbells a read or write.
    pub doorbells_per_io: Option<f64>,
    /// Interrupts a read or write.
    pub interrupts_per_io: Option<f64>,
    /// Sleeps of the driver a read or write.
    pub sleeps_per_io: Option<f64>,
    /// The device's engine, as `--disk` calls it.
    pub engine: Option<&'static str>,
    /// MiB of buffers (fio: of all its memory) that lie on huge pages.
    pub huge_mib: Option<f64>,
    /// Pages of the image that were in the page cache before the run.
    pub resident_pages: Option<u64>,
    /// Bytes of the image that were in the page cache when the run had ended.
    pub cached_bytes_after: Option<u64>,
}

impl Figures {
    /// Of a run of fio.
    pub fn of_fio(load: &Load, fio: &Fio, resident_pages: Option<u64>) -> Self {
        Self {
            iops: fio.iops,
            mib_s: mib_s(load, fio.iops),
            times: fio.times,
            flush_times: fio.flush_times,
            cpu_s_per_million: fio.cpu_share / fio.iops.max(1.0) * 1e6,
            driver_cpu_s_per_million: None,
            flushes_per_io: None,
            doorbells_per_io: None,
            interrupts_per_io: None,
            sleeps_per_io: None,
            engine: None,
            huge_mib: fio.huge_bytes.map(mib),
            resident_pages,
            cached_bytes_after: None,
        }
    }

    /// Of a run of the device.
    pub fn of_device(load: &Load, run: &Run, resident_pages: Option<u64>) -> Self {
        let seen = &run.seen;
        let per_io = |count: f64| count / seen.ios.max(1) as f64;
        let iops = seen.ios as f64 / seen.seconds;
        Self {
            iops,
            mib_s: mib_s(load, iops),
            times: seen.times,
            flush_times: seen.flush_times,
            cpu_s_per_million: per_io(seen.device_cpu_s) * 1e6,
            driver_cpu_s_per_million: Some(per_io(seen.driver_cpu_s) * 1e6),
            flushes_per_io: Some(per_io(seen.flushes as f64)),
            doorbells_per_io: Some(per_io(seen.doorbells as f64)),
            interrupts_per_io: Some(per_io(seen.interrupts as f64)),
            sleeps_per_io: Some(per_io(seen.sleeps as f64)),
            engine: Some(run.engine),
            huge_mib: Some(mib(run.huge_bytes.0)),
            resident_pages,
            cached_bytes_after: run.cached_bytes_after,
        }
    }
}

fn mib_s(load: &Load, iops: f64) -> f64 {
    iops * f64::from(load.block_bytes) / f64::from(1 << 20)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What was counted beside runs that were not timed. Per read or write.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Counted {
    /// System calls of the worker's thread.
    pub system_calls_per_io: Option<f64>,
    /// Stores to the used index.
    pub publishes_per_io: Option<f64>,
    /// I/Os a second while system calls were counted: near the timed figure, or the count is of
    /// another load.
    pub iops_while_counting_calls: Option<f64>,
    /// I/Os a second while stores were counted.
    pub iops_while_counting_publishes: Option<f64>,
    /// Why something is missing.
    pub not_counted: Vec<String>,
    /// The disk's counters in the run whose system calls were counted, from its start to its end.
    pub disk_counters: Vec<(&'static str, u64)>,
}

/// One competitor's rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Its name.
    pub who: String,
    /// Whether it is fio.
    pub fio: bool,
    /// Why it did not run.
    pub not_measured: Option<String>,
    /// A run each.
    pub rounds: Vec<Figures>,
    /// Counted apart from them.
    pub counted: Option<Counted>,
}

impl Entry {
    /// The median of a figure over the rounds.
    pub fn median(&self, figure: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.rounds.iter().map(figure).collect())
    }

    /// The median of a figure that not every run has.
    pub fn median_of(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<f64> {
        median(self.rounds.iter().filter_map(figure).collect())
    }
}

/// The ratio of two competitors.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ratio {
    /// Of the medians.
    pub of_medians: f64,
    /// The smallest of one round.
    pub least: f64,
    /// The largest of one round.
    pub most: f64,
}

impl Ratio {
    /// `a` over `b`, of I/Os a second.
    pub fn new(a: &Entry, b: &Entry) -> Option<Self> {
        let of_medians = a.median(|f| f.iops)? / b.median(|f| f.iops)?;
        let rounds = || a.rounds.iter().zip(&b.rounds).map(|(a, b)| a.iops / b.iops);
        let least = rounds().min_by(f64::total_cmp)?;
        let most = rounds().max_by(f64::total_cmp)?;
        Some(Self { of_medians, least, most })
    }
}

/// A contest and what came out of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// What was run.
    pub load: Load,
    /// A competitor each.
    pub entries: Vec<Entry>,
}

impl Outcome {
    /// Nothing has run yet.
    pub fn new(contest: &Contest) -> Self {
        let entry = |who: &Who| Entry {
            who: who.name(),
            fio: who.is_fio(),
            not_measured: None,
            rounds: Vec::new(),
            counted: None,
        };
        let entries = contest.who.iter().map(entry).collect();
        Self { name: contest.load.name(), load: contest.load, entries }
    }

    /// The fio with the best median: there is no choosing of a weak one.
    pub fn best_fio(&self) -> Option<&Entry> {
        let iops = |entry: &&Entry| entry.median(|f| f.iops).unwrap_or(0.0);
        // Registered buffers are compared with registered buffers only.
        let fixed = FioEngine::IoUringFixed.name();
        let ran = self.entries.iter().filter(|e| e.fio && e.who != fixed && !e.rounds.is_empty());
        ran.max_by(|a, b| iops(a).total_cmp(&iops(b)))
    }

    /// The entry of this name, if it has run.
    pub fn entry(&self, who: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.who == who && !entry.rounds.is_empty())
    }
}
