//! The statistics as text for people.
//!
//! Owns the words, and the rounding of bytes and times. The figures belong to [`super`].

use std::fmt::{self, Write};

use super::{DiskStats, Durability, Faults, LatencyFigures, QueueFigures, Stats, Times};

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
        let deleted = if self.deleted { ", its file deleted" } else { "" };
        let cut = self.cut_to_bytes.map_or(String::new(), |bytes| format!(", its file cut to {bytes} bytes"));
        let (engine, stable, queues) = (self.engine, self.stable, self.queues);
        writeln!(
            f,
            "{}: {}, cache={}, engine={engine}, stable={stable}, queues={queues}{readonly}{deleted}{cut}",
            self.name, self.path, self.cache
        )?;
        let asked = &self.requests;
        writeln!(
            f,
            "  requests       {} reads, {} writes, {} FLUSHes, {} discards, {} write-zeroes; {} failed",
            asked.read, asked.write, asked.flush, asked.discard, asked.write_zeroes, asked.errors
        )?;
        let bytes = &self.bytes;
        if bytes.read + bytes.write + bytes.discard + bytes.write_zeroes > 0 {
            writeln!(
                f,
                "  bytes asked    {} read, {} written, {} discarded, {} zeroed",
                Bytes(bytes.read),
                Bytes(bytes.write),
                Bytes(bytes.discard),
                Bytes(bytes.write_zeroes)
            )?;
        }
        writeln!(f, "  in flight      {} now, {} at most", self.in_flight.now, self.in_flight.max)?;
        if self.per_queue.len() > 1 {
            writeln!(f, "  by queue       {}", by_queue(&self.per_queue))?;
        }
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
        writeln!(f, "  bytes at risk  {}", at_risk(&self.durability, self.cache)?)?;
        self.latency_ns.as_ref().map_or(Ok(()), |found| latency_table(f, found))
    }
}

/// Returns how many requests each queue got, in queue order.
fn by_queue(queues: &[QueueFigures]) -> String {
    let one = |queue: &QueueFigures| {
        let asked = &queue.requests;
        let all = asked.read + asked.write + asked.flush + asked.discard + asked.write_zeroes;
        format!("{all} requests, {} at most in flight", queue.in_flight.max)
    };
    queues.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Prints latencies by kind of request: the total first, then its phases.
fn latency_table(f: &mut fmt::Formatter<'_>, found: &LatencyFigures) -> fmt::Result {
    if found.kinds().iter().any(|(_, found)| found.is_some()) {
        writeln!(
            f,
            "  latency           {:>9} {:>9} {:>9} {:>9} {:>9}",
            "count", "p50", "p99", "p99.9", "max"
        )?;
    }
    for (name, found) in found.kinds() {
        let Some(found) = found else { continue };
        row(f, &format!("  {name}"), &found.total)?;
        row(f, "    until popped", &found.doorbell_to_popped)?;
        row(f, "    until submitted", &found.popped_to_submitted)?;
        if let Some(host) = &found.submitted_to_host_done {
            row(f, "    by the host", host)?;
        }
        row(f, "    until told", &found.host_done_to_interrupt)?;
    }
    Ok(())
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, found: &Times) -> fmt::Result {
    let [p50, p99, p99_9, max] =
        [found.p50, found.p99, found.p99_9, found.max].map(|nanos| Time(nanos).to_string());
    writeln!(f, "{name:<20}{:>9} {p50:>9} {p99:>9} {p99_9:>9} {max:>9}", found.count)
}

/// Returns what is at risk, and whether that can ever shrink.
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
        let &Self { count, min, mean, p50, p99, max, .. } = self;
        let [min, mean, p50, p99, max] = [min, mean, p50, p99, max].map(Time);
        write!(f, "{count} timed: min {min}, mean {mean}, p50 {p50}, p99 {p99}, max {max}")
    }
}

/// A number of bytes, for people.
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
                // Rounded up, so that what is at risk never looks smaller than it is.
                let tenths = (u128::from(self.0) * 10).div_ceil(1 << shift);
                write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
            }
        }
    }
}

/// Nanoseconds, with about three digits.
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
