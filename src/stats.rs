//! Statistics of a run: the same figures as JSON for programs and as text for people.
//!
//! Owns the schema and its version (`docs/reference/statistics-json.md`); [`mod@print`] owns the words. The figures
//! are counted in [`crate::disk`]. Fields may be added under the same version. Removing a field, or changing
//! its meaning, requires a higher version.

mod print;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::disk::Image;
use crate::disk::counters::Counters;
use crate::disk::latency::{KindSummary, Latencies, RequestKind};
use crate::disk::queue_stats::QueueStats;
use crate::disk::times::Summary;

/// The version of the schema.
pub const SCHEMA_VERSION: u32 = 1;

/// Everything that `--stats` shows.
#[derive(Debug, Serialize)]
pub struct Stats {
    schema: &'static str,
    version: u32,
    minivmm: &'static str,
    exits: ExitStats,
    disks: Vec<DiskStats>,
}

/// How often the guest's vCPUs exited from KVM to this process.
#[derive(Debug, Default, Serialize)]
pub struct ExitStats {
    /// Reads of memory-mapped registers.
    pub mmio_read: u64,
    /// Writes of memory-mapped registers.
    pub mmio_write: u64,
    /// Reads of ports.
    pub port_read: u64,
    /// Writes of ports.
    pub port_write: u64,
    /// All other exits.
    pub other: u64,
}

/// One disk.
#[derive(Debug, Serialize)]
struct DiskStats {
    name: String,
    path: String,
    cache: &'static str,
    readonly: bool,
    /// `true` if the image's file has lost its last name since it was opened.
    deleted: bool,
    /// The smallest size in bytes that the file has had since the start; `None` if it was never smaller than
    /// then.
    cut_to_bytes: Option<u64>,
    engine: &'static str,
    stable: &'static str,
    queues: u16,
    requests: Requests,
    bytes: AskedBytes,
    in_flight: InFlight,
    host_calls: HostCalls,
    shared_syncs: u64,
    transfers: Transfers,
    durability: Durability,
    faults: Faults,
    write_log: Option<Log>,
    /// `None` if latencies were not measured.
    latency_ns: Option<LatencyFigures>,
    per_queue: Vec<QueueFigures>,
}

/// One queue of a disk.
#[derive(Debug, Serialize)]
struct QueueFigures {
    index: usize,
    requests: Requests,
    bytes: AskedBytes,
    in_flight: InFlight,
    host_operations: HostOperations,
    shared_syncs: u64,
    transfers: Transfers,
    latency_ns: Option<LatencyFigures>,
}

/// Requests by kind, as the guest sent them.
#[derive(Debug, Serialize)]
struct Requests {
    read: u64,
    write: u64,
    flush: u64,
    discard: u64,
    write_zeroes: u64,
    errors: u64,
}

/// Bytes of the requests, as the guest asked for them.
#[derive(Debug, Serialize)]
struct AskedBytes {
    read: u64,
    write: u64,
    discard: u64,
    write_zeroes: u64,
}

/// Requests that the disk has received and not yet completed.
#[derive(Debug, Serialize)]
struct InFlight {
    now: u64,
    max: u64,
}

/// Host operations done for a queue's requests.
#[derive(Debug, Serialize)]
struct HostOperations {
    preadv: u64,
    pwritev: u64,
    pwritev_dsync: u64,
    fdatasync: u64,
    fallocate: u64,
}

/// Host calls for the disk, including the syncs at the start and the end.
#[derive(Debug, Serialize)]
struct HostCalls {
    preadv: u64,
    pwritev: u64,
    pwritev_dsync: u64,
    fdatasync: u64,
    fallocate: u64,
    io_uring_enter: u64,
    /// Of the calls above, those of a ring's engine that block: who made them.
    blocking: Blocking,
}

/// Operations that block, of an engine with a ring.
#[derive(Debug, Serialize)]
struct Blocking {
    by_worker: u64,
    by_kernel_thread: u64,
}

#[derive(Debug, Serialize)]
struct Transfers {
    bounced: u64,
    continued: u64,
}

/// Operations that suffered an injected fault, by what was done to them.
#[derive(Debug, Serialize)]
struct Faults {
    failed: u64,
    delayed: u64,
    shortened: u64,
    torn: u64,
    lost: u64,
}

/// The write log of a disk that has one.
#[derive(Debug, Serialize)]
struct Log {
    path: String,
    entries: u64,
    /// Why recording stopped too early; `None` if it did not.
    error: Option<String>,
}

/// What the guest believes is written, and what a host crash may cost.
#[derive(Debug, Serialize)]
struct Durability {
    honours_flush: bool,
    flushes_asked: u64,
    flushes_ignored: u64,
    volatile_bytes_acknowledged: u64,
    bytes_at_risk: u64,
    bytes_at_risk_max: u64,
    bytes_at_risk_at_guest_end: Option<u64>,
    oldest_at_risk_ns: Option<u64>,
    oldest_at_risk_ns_max: u64,
    /// The first failed sync; nothing becomes stable after it. `None` if no sync failed.
    sync_error: Option<String>,
    fdatasync_ns: Option<Times>,
}

/// A distribution of times in nanoseconds; `count` is how many there were.
#[derive(Debug, Serialize)]
struct Times {
    count: u64,
    min: u64,
    mean: u64,
    p10: u64,
    p25: u64,
    p50: u64,
    p75: u64,
    p90: u64,
    p99: u64,
    p99_9: u64,
    max: u64,
}

/// Latencies by kind of request.
#[derive(Debug, Serialize)]
struct LatencyFigures {
    read: Option<PhaseFigures>,
    write: Option<PhaseFigures>,
    flush: Option<PhaseFigures>,
    discard: Option<PhaseFigures>,
    write_zeroes: Option<PhaseFigures>,
}

/// Latencies of one kind of request: each phase, and the total.
#[derive(Debug, Serialize)]
struct PhaseFigures {
    doorbell_to_popped: Times,
    popped_to_submitted: Times,
    submitted_to_host_done: Option<Times>,
    host_done_to_interrupt: Times,
    total: Times,
}

impl LatencyFigures {
    fn of(found: &Latencies) -> Self {
        let of = |kind| found.summary(kind).as_ref().map(phases);
        Self {
            read: of(RequestKind::Read),
            write: of(RequestKind::Write),
            flush: of(RequestKind::Flush),
            discard: of(RequestKind::Discard),
            write_zeroes: of(RequestKind::WriteZeroes),
        }
    }

    fn kinds(&self) -> [(&'static str, Option<&PhaseFigures>); 5] {
        [
            ("read", self.read.as_ref()),
            ("write", self.write.as_ref()),
            ("FLUSH", self.flush.as_ref()),
            ("discard", self.discard.as_ref()),
            ("write-zeroes", self.write_zeroes.as_ref()),
        ]
    }
}

impl Stats {
    /// Returns the present figures of these disks, which are named vda, vdb, ... in this order.
    pub fn of<'a>(images: impl Iterator<Item = &'a Image>, exits: ExitStats) -> Self {
        let disks = images.zip('a'..='z').map(|(image, letter)| disk(format!("vd{letter}"), image)).collect();
        Self {
            schema: "minivmm-statistics",
            version: SCHEMA_VERSION,
            minivmm: env!("CARGO_PKG_VERSION"),
            exits,
            disks,
        }
    }

    /// Writes the figures as JSON, followed by a newline.
    pub fn write_json(&self, mut to: impl io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut to, self)?;
        to.write_all(b"\n")?;
        to.flush()
    }
}

fn at(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn disk(name: String, image: &Image) -> DiskStats {
    let counters = &image.stats.counters();
    let queues = image.stats.queues();
    DiskStats {
        name,
        path: image.config().path.display().to_string(),
        cache: image.config().cache.name,
        readonly: image.config().readonly,
        deleted: image.file().is_deleted(),
        cut_to_bytes: image.file().cut().map(|(_, least)| least),
        engine: image.stats.engine(),
        stable: image.config().stable.name(),
        queues: image.config().queue_count(),
        requests: requests(counters),
        bytes: bytes(counters),
        in_flight: InFlight {
            now: queues.iter().map(|queue| queue.in_flight()).sum(),
            max: queues.iter().map(|queue| queue.in_flight_max()).sum(),
        },
        host_calls: HostCalls {
            preadv: at(&counters.preadvs),
            pwritev: at(&counters.pwritevs),
            pwritev_dsync: at(&counters.pwritevs_dsync),
            // The sync at the start happens before the counters exist.
            fdatasync: at(&counters.fdatasyncs) + u64::from(image.config().is_synced_at_both_ends()),
            fallocate: at(&counters.fallocates),
            io_uring_enter: at(&counters.io_uring_enters),
            blocking: Blocking {
                by_worker: at(&counters.blocking_by_worker),
                by_kernel_thread: at(&counters.blocking_by_kernel_thread),
            },
        },
        shared_syncs: at(&counters.shared_syncs),
        transfers: transfers(counters),
        durability: durability(image),
        faults: Faults {
            failed: at(&counters.faults_failed),
            delayed: at(&counters.faults_delayed),
            shortened: at(&counters.faults_shortened),
            torn: at(&counters.faults_torn),
            lost: at(&counters.faults_lost),
        },
        write_log: image.write_log().map(|log| Log {
            path: log.path().display().to_string(),
            entries: log.entries(),
            error: log.error().map(|error| error.to_string()),
        }),
        latency_ns: latencies_of_all(&queues).as_ref().map(LatencyFigures::of),
        per_queue: queues.iter().enumerate().map(|(index, stats)| queue(index, stats)).collect(),
    }
}

fn latencies_of_all(queues: &[Arc<QueueStats>]) -> Option<Latencies> {
    queues.iter().filter_map(|queue| queue.latencies()).reduce(|mut sum, more| {
        sum.add(&more);
        sum
    })
}

fn queue(index: usize, stats: &QueueStats) -> QueueFigures {
    let counters = &stats.counters;
    QueueFigures {
        index,
        requests: requests(counters),
        bytes: bytes(counters),
        in_flight: InFlight { now: stats.in_flight(), max: stats.in_flight_max() },
        host_operations: HostOperations {
            preadv: at(&counters.preadvs),
            pwritev: at(&counters.pwritevs),
            pwritev_dsync: at(&counters.pwritevs_dsync),
            fdatasync: at(&counters.fdatasyncs),
            fallocate: at(&counters.fallocates),
        },
        shared_syncs: at(&counters.shared_syncs),
        transfers: transfers(counters),
        latency_ns: stats.latencies().as_ref().map(LatencyFigures::of),
    }
}

fn requests(counters: &Counters) -> Requests {
    Requests {
        read: at(&counters.reads),
        write: at(&counters.writes),
        flush: at(&counters.flushes),
        discard: at(&counters.discards),
        write_zeroes: at(&counters.write_zeroes),
        errors: at(&counters.errors),
    }
}

fn bytes(counters: &Counters) -> AskedBytes {
    AskedBytes {
        read: at(&counters.read_bytes),
        write: at(&counters.write_bytes),
        discard: at(&counters.discard_bytes),
        write_zeroes: at(&counters.write_zeroes_bytes),
    }
}

fn transfers(counters: &Counters) -> Transfers {
    Transfers { bounced: at(&counters.bounces), continued: at(&counters.continued) }
}

fn phases(found: &KindSummary) -> PhaseFigures {
    PhaseFigures {
        doorbell_to_popped: times(&found.doorbell_to_popped),
        popped_to_submitted: times(&found.popped_to_submitted),
        submitted_to_host_done: found.submitted_to_host_done.as_ref().map(times),
        host_done_to_interrupt: times(&found.host_done_to_interrupt),
        total: times(&found.total),
    }
}

fn durability(image: &Image) -> Durability {
    let (found, counters) = (image.monitor.snapshot(), image.stats.counters());
    Durability {
        honours_flush: image.config().cache.honour_flush,
        flushes_asked: at(&counters.flushes),
        flushes_ignored: at(&counters.flushes_ignored),
        volatile_bytes_acknowledged: found.acknowledged_bytes,
        bytes_at_risk: found.at_risk_bytes,
        bytes_at_risk_max: found.at_risk_bytes_max,
        bytes_at_risk_at_guest_end: found.at_risk_bytes_at_end,
        oldest_at_risk_ns: found.oldest.map(nanos),
        oldest_at_risk_ns_max: nanos(found.oldest_max),
        sync_error: image.latch.check().err().map(|error| error.to_string()),
        fdatasync_ns: found.syncs.as_ref().map(times),
    }
}

fn times(found: &Summary) -> Times {
    let &Summary { count, min, mean, p10, p25, p50, p75, p90, p99, p99_9, max } = found;
    let [min, mean, p10, p25, p50, p75, p90, p99, p99_9, max] =
        [min, mean, p10, p25, p50, p75, p90, p99, p99_9, max].map(nanos);
    Times { count, min, mean, p10, p25, p50, p75, p90, p99, p99_9, max }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
