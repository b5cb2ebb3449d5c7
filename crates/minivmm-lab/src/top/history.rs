//! The samples of an observation so far, and what follows from the last two of a disk.
//!
//! Owns the rates, and the text of a sample as one line.

use std::collections::VecDeque;

use minivmm::observe::csv::Row;

use super::figures::{count, factor, percent, size};

/// Most samples that a curve shows.
const SAMPLES_MAX: usize = 512;

/// The samples of all disks so far.
#[derive(Debug, Default)]
pub struct History {
    /// The disks, in the order of their first rows.
    pub(super) disks: Vec<Disk>,
    lines: Vec<String>,
}

/// The samples of one disk so far.
#[derive(Debug, Default)]
pub struct Disk {
    name: String,
    last: Row,
    before: Option<Row>,
    /// The samples, oldest first: seconds, and bytes in the host's page cache.
    pub(super) cached: VecDeque<(f64, u64)>,
}

impl History {
    /// Adds a row.
    pub fn take(&mut self, row: Row) {
        let name = row.text("disk").to_owned();
        let at = self.disks.iter().position(|disk| disk.name == name).unwrap_or_else(|| {
            self.disks.push(Disk { name, ..Disk::default() });
            self.disks.len() - 1
        });
        let Some(disk) = self.disks.get_mut(at) else { return };
        disk.take(row);
        self.lines.push(disk.line());
    }

    /// Returns the hit share, defined as `host_hit_share`, of what was read between the last two samples.
    pub(super) fn lately(&self) -> Option<f64> {
        let asked: f64 = self.disks.iter().filter_map(|disk| disk.growth("read_bytes")).sum();
        let from_disk = self.disks.first()?.growth("process_read_bytes")?;
        (asked > 0.0).then(|| 1.0 - from_disk.min(asked) / asked)
    }

    /// Returns the lines of the rows that were added since the last call.
    pub fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }
}

impl Disk {
    fn take(&mut self, row: Row) {
        if self.cached.len() == SAMPLES_MAX {
            self.cached.pop_front();
        }
        let seconds = row.number("time_s").unwrap_or_default();
        self.cached.push_back((seconds, row.text("host_cached_bytes").parse().unwrap_or(0)));
        let before = std::mem::replace(&mut self.last, row);
        self.before = (!before.text("disk").is_empty()).then_some(before);
    }

    /// Returns the name of the disk in the guest.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the newest row.
    pub fn last(&self) -> &Row {
        &self.last
    }

    /// Formats a column of bytes in the newest row.
    pub fn bytes(&self, column: &str) -> String {
        size(self.last.number(column))
    }

    /// Returns the growth of a column per second.
    pub fn rate(&self, column: &str) -> Option<f64> {
        let before = self.before.as_ref()?;
        let seconds = self.last.number("time_s")? - before.number("time_s")?;
        let grown = self.growth(column)?;
        (seconds > 0.0 && grown >= 0.0).then_some(grown / seconds)
    }

    /// Returns the share of all bytes read so far that the host's page cache supplied. It is the same for all
    /// disks.
    pub(super) fn hit_share(&self) -> Option<f64> {
        self.last.number("host_hit_share")
    }

    /// Returns the growth of a column since the previous row.
    fn growth(&self, column: &str) -> Option<f64> {
        Some(self.last.number(column)? - self.before.as_ref()?.number(column)?)
    }

    fn line(&self) -> String {
        format!(
            "{:>8.1} s {} {}: host {} (dirty {}, writeback {}), guest {}, both {}; {} r/s {}/s, {} w/s {}/s, {} FLUSH/s; \
             hits {}, FLUSHes x{}, at risk {}",
            self.last.number("time_s").unwrap_or_default(),
            self.name,
            self.last.text("cache"),
            self.bytes("host_cached_bytes"),
            self.bytes("host_dirty_bytes"),
            self.bytes("host_writeback_bytes"),
            self.bytes("guest_cache_growth_bytes"),
            self.bytes("double_cached_bytes"),
            count(self.rate("reads")),
            size(self.rate("read_bytes")),
            count(self.rate("writes")),
            size(self.rate("written_bytes")),
            count(self.rate("flushes")),
            percent(self.hit_share()),
            factor(self.last.number("flush_amplification")),
            self.bytes("bytes_at_risk"),
        )
    }
}
