//! Statistics of a run: the same figures as JSON for programs and as text for people.
//!
//! Owns the schema and its version (`docs/statistics.md`) and the words; the figures are counted in
//! [`crate::disk`]. Fields may be added under the same version; whoever removes one or changes what
//! it means raises it.

use std::fmt::{self, Write};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::disk::Image;
use crate::disk::monitor::SyncTimes;

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

/// How often the guest's CPUs came out of KVM to us.
#[derive(Debug, Default, Serialize)]
pub struct ExitStats {
    /// For a read of a memory-mapped register.
    pub mmio_read: u64,
    /// For a write of one.
    pub mmio_write: u64,
    /// For a read of a port.
    pub port_read: u64,
    /// For a write of one.
    pub port_write: u64,
    /// For anything else.
    pub other: u64,
}

/// One disk.
#[derive(Debug, Serialize)]
struct DiskStats {
    name: String,
    path: String,
    cache: &'static str,
    readonly: bool,
    engine: &'static str,
    stable: &'static str,
    queues: u16,
    requests: Requests,
    host_calls: HostCalls,
    transfers: Transfers,
    durability: Durability,
    faults: Faults,
    write_log: Option<Log>,
}

/// As the guest asked.
#[derive(Debug, Serialize)]
struct Requests {
    read: u64,
    write: u64,
    flush: u64,
    discard: u64,
    write_zeroes: u64,
    errors: u64,
}

/// As the host was asked, the syncs of start and end included.
#[derive(Debug, Serialize)]
struct HostCalls {
    preadv: u64,
    pwritev: u64,
    pwritev_dsync: u64,
    fdatasync: u64,
    fallocate: u64,
    io_uring_enter: u64,
}

#[derive(Debug, Serialize)]
struct Transfers {
    bounced: u64,
    continued: u64,
}

/// Operations that were made to go wrong, by what was done to them.
#[derive(Debug, Serialize)]
struct Faults {
    failed: u64,
    delayed: u64,
    shortened: u64,
    torn: u64,
    lost: u64,
}

/// The log of a disk that has one.
#[derive(Debug, Serialize)]
struct Log {
    path: String,
    entries: u64,
    /// Why it ends too early.
    error: Option<String>,
}

/// What the guest believes written, and what a crash of the host may cost.
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
    /// The first failed sync, after which nothing becomes stable any more.
    sync_error: Option<String>,
    fdatasync_ns: Option<Times>,
}

/// In nanoseconds.
#[derive(Debug, Serialize)]
struct Times {
    count: u64,
    min: u64,
    mean: u64,
    p50: u64,
    p99: u64,
    max: u64,
}

impl Stats {
    /// The figures of these disks, now. They are vda, vdb, ... in this order.
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

    /// Writes them as JSON, and a newline.
    pub fn write_json(&self, mut to: impl io::Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut to, self)?;
        to.write_all(b"\n")?;
        to.flush()
    }
}

fn disk(name: String, image: &Image) -> DiskStats {
    let counters = &image.counters;
    let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    DiskStats {
        name,
        path: image.path().display().to_string(),
        cache: image.policy().name,
        readonly: image.readonly(),
        engine: image.engine_in_use(),
        stable: image.stable().name(),
        queues: image.queues(),
        requests: Requests {
            read: at(&counters.reads),
            write: at(&counters.writes),
            flush: at(&counters.flushes),
            discard: at(&counters.discards),
            write_zeroes: at(&counters.write_zeroes),
            errors: at(&counters.errors),
        },
        host_calls: HostCalls {
            preadv: at(&counters.preadvs),
            pwritev: at(&counters.pwritevs),
            pwritev_dsync: at(&counters.pwritevs_dsync),
            // The one at the start came before there was anything to count with.
            fdatasync: at(&counters.fdatasyncs) + u64::from(image.is_synced_at_both_ends()),
            fallocate: at(&counters.fallocates),
            io_uring_enter: at(&counters.io_uring_enters),
        },
        transfers: Transfers { bounced: at(&counters.bounces), continued: at(&counters.continued) },
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
    }
}

fn durability(image: &Image) -> Durability {
    let found = image.monitor.snapshot();
    Durability {
        honours_flush: image.policy().honour_flush,
        flushes_asked: image.counters.flushes.load(Ordering::Relaxed),
        flushes_ignored: image.counters.flushes_ignored.load(Ordering::Relaxed),
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

fn times(found: &SyncTimes) -> Times {
    let &SyncTimes { count, min, mean, p50, p99, max } = found;
    let [min, mean, p50, p99, max] = [min, mean, p50, p99, max].map(nanos);
    Times { count, min, mean, p50, p99, max }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.disks.is_empty() {
            f.write_str("no disks\n")?;
        }
        let exits = &self.exits;
        writeln!(
            f,
            "exits: {} reads and {} writes of registers, {} and {} of ports, {} others",
            exits.mmio_read, exits.mmio_write, exits.port_read, exits.port_write, exits.other
        )?;
        self.disks.iter().try_for_each(|disk| disk.fmt(f))
    }
}

impl fmt::Display for DiskStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let readonly = if self.readonly { ", readonly" } else { "" };
        let (engine, stable, queues) = (self.engine, self.stable, self.queues);
        writeln!(
            f,
            "{}: {}, cache={}, engine={engine}, stable={stable}, queues={queues}{readonly}",
            self.name, self.path, self.cache
        )?;
        let asked = &self.requests;
        writeln!(
            f,
            "  requests       {} reads, {} writes, {} FLUSHes, {} discards, {} write-zeroes; {} failed",
            asked.read, asked.write, asked.flush, asked.discard, asked.write_zeroes, asked.errors
        )?;
        let calls = &self.host_calls;
        writeln!(
            f,
            "  host calls     {} preadv, {} pwritev, {} with DSYNC, {} fdatasync, {} fallocate",
            calls.preadv, calls.pwritev, calls.pwritev_dsync, calls.fdatasync, calls.fallocate
        )?;
        if calls.io_uring_enter > 0 {
            writeln!(f, "  io_uring       {} calls of io_uring_enter for them", calls.io_uring_enter)?;
        }
        if let Some(times) = &self.durability.fdatasync_ns {
            writeln!(f, "  fdatasync      {times}")?;
        }
        let Faults { failed, delayed, shortened, torn, lost } = self.faults;
        if failed + delayed + shortened + torn + lost > 0 {
            writeln!(
                f,
                "  faults         {failed} failed, {delayed} delayed, {shortened} shortened, {torn} torn, {lost} lost, \
                 on purpose"
            )?;
        }
        if let Some(log) = &self.write_log {
            writeln!(f, "  write log      {} entries in {}", log.entries, log.path)?;
        }
        writeln!(f, "  bytes at risk  {}", at_risk(&self.durability, self.cache)?)
    }
}

/// What is at risk, and whether it ever ceases to be.
fn at_risk(found: &Durability, cache: &str) -> Result<String, fmt::Error> {
    let mut text = format!("{} now, {} at most", Bytes(found.bytes_at_risk), Bytes(found.bytes_at_risk_max));
    if let Some(bytes) = found.bytes_at_risk_at_guest_end {
        write!(text, ", {} when the guest ended", Bytes(bytes))?;
    }
    if found.oldest_at_risk_ns_max > 0 {
        write!(text, "; the oldest for {} at most", Time(found.oldest_at_risk_ns_max))?;
    }
    if let Some(error) = &found.sync_error {
        let bytes = Bytes(found.bytes_at_risk);
        write!(
            text,
            "\n                 A sync has failed ({error}): the {bytes} may be lost, and stay at risk"
        )?;
    }
    if !found.honours_flush && found.volatile_bytes_acknowledged > 0 {
        write!(
            text,
            "\n                 cache={cache} makes nothing stable: this only grows ({} FLUSHes were ignored)",
            found.flushes_ignored
        )?;
    }
    Ok(text)
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self { count, min, mean, p50, p99, max } = self;
        let [min, mean, p50, p99, max] = [min, mean, p50, p99, max].map(Time);
        write!(f, "{count} timed: min {min}, mean {mean}, p50 {p50}, p99 {p99}, max {max}")
    }
}

/// Bytes, as people read them.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scale = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match scale.into_iter().find(|&(_, shift)| self.0 >> shift > 0) {
            None => write!(f, "{} bytes", self.0),
            Some((unit, shift)) if self.0.is_multiple_of(1 << shift) => {
                write!(f, "{} {unit}", self.0 >> shift)
            }
            Some((unit, shift)) => {
                // Rounded up: what is at risk is never made to look less.
                let tenths = (u128::from(self.0) * 10).div_ceil(1 << shift);
                write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
            }
        }
    }
}

/// Nanoseconds, to three digits or so.
struct Time(u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(nanos) = *self;
        let (unit, scale) = match nanos {
            0..1_000 => return write!(f, "{nanos} ns"),
            1_000..1_000_000 => ("us", 1_000),
            1_000_000..1_000_000_000 => ("ms", 1_000_000),
            _ => ("s", 1_000_000_000),
        };
        let (whole, tenths) = (nanos / scale, nanos % scale * 10 / scale);
        if whole < 100 { write!(f, "{whole}.{tenths} {unit}") } else { write!(f, "{whole} {unit}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_risk_is_never_rounded_down() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (4096, "4 KiB"),
            (4097, "4.1 KiB"),
            (3 << 20, "3 MiB"),
            ((3 << 20) + 1, "3.1 MiB"),
            ((1 << 30) - 1, "1024.0 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        for (nanos, text) in [
            (999, "999 ns"),
            (1_000, "1.0 us"),
            (99_990, "99.9 us"),
            (100_000, "100 us"),
            (1_500_000, "1.5 ms"),
            (2_000_000_000, "2.0 s"),
            (u64::MAX, "18446744073 s"),
        ] {
            assert_eq!(Time(nanos).to_string(), text);
        }
    }
}
