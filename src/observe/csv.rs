//! The file of an observation: a header, and one line for each disk and sample.
//!
//! Owns the columns and their order, which docs/reference/observe-csv.md explains, and the parser of such a
//! file. No value contains a comma or a quote, so none is quoted. An unknown value is empty, never 0.

use std::collections::HashMap;
use std::fmt::Display;

use super::cache::Residency;
use super::sample::{DiskSample, Sample};
use crate::files::Content;

/// A column: its name, and the function that formats its value.
type Column = (&'static str, fn(&Sample, &DiskSample) -> String);

/// The content of the file for the checks before it is written: only an older observation may be replaced.
pub const CONTENT: Content =
    Content { name: "an older observation (CSV)", is_older: |first| first.starts_with(b"time_s,disk,") };

fn known(value: Option<impl Display>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn pages(disk: &DiskSample, which: fn(&Residency) -> Option<u64>) -> String {
    known(disk.residency.and_then(|found| which(&found).map(|pages| found.bytes(pages))))
}

fn share(value: Option<f64>) -> String {
    value.map(|value| format!("{value:.4}")).unwrap_or_default()
}

/// All columns, in order.
static COLUMNS: [Column; 36] = [
    ("time_s", |sample, _| format!("{:.3}", sample.at.as_secs_f64())),
    ("disk", |_, disk| disk.name.clone()),
    ("cache", |_, disk| disk.cache.to_owned()),
    ("host_cached_bytes", |_, disk| pages(disk, |found| Some(found.cached))),
    ("host_dirty_bytes", |_, disk| pages(disk, |found| found.dirty)),
    ("host_writeback_bytes", |_, disk| pages(disk, |found| found.writeback)),
    ("host_evicted_bytes", |_, disk| pages(disk, |found| found.evicted)),
    ("host_recently_evicted_bytes", |_, disk| pages(disk, |found| found.recently_evicted)),
    ("reads", |_, disk| disk.requests.reads.to_string()),
    ("read_bytes", |_, disk| disk.requests.read_bytes.to_string()),
    ("writes", |_, disk| disk.requests.writes.to_string()),
    ("written_bytes", |_, disk| disk.requests.written_bytes.to_string()),
    ("flushes", |_, disk| disk.requests.flushes.to_string()),
    ("fdatasyncs", |_, disk| disk.syncs.to_string()),
    ("bytes_at_risk", |_, disk| disk.at_risk_bytes.to_string()),
    ("process_read_bytes", |sample, _| known(sample.process.map(|io| io.read_bytes))),
    ("process_written_bytes", |sample, _| known(sample.process.map(|io| io.written_bytes))),
    ("host_disk", |_, disk| disk.host_disk.clone().unwrap_or_default()),
    ("host_disk_reads", |_, disk| known(disk.host_io.map(|io| io.reads))),
    ("host_disk_read_bytes", |_, disk| known(disk.host_io.map(|io| io.read_bytes))),
    ("host_disk_writes", |_, disk| known(disk.host_io.map(|io| io.writes))),
    ("host_disk_written_bytes", |_, disk| known(disk.host_io.map(|io| io.written_bytes))),
    ("host_disk_flushes", |_, disk| known(disk.host_io.and_then(|io| io.flushes))),
    ("guest_age_s", |sample, _| {
        known(sample.guest.as_ref().map(|guest| format!("{:.3}", guest.age.as_secs_f64())))
    }),
    ("guest_cached_bytes", |sample, _| known(sample.guest.as_ref().map(|guest| guest.view.cached_bytes))),
    ("guest_buffers_bytes", |sample, _| known(sample.guest.as_ref().map(|guest| guest.view.buffers_bytes))),
    ("guest_dirty_bytes", |sample, _| known(sample.guest.as_ref().map(|guest| guest.view.dirty_bytes))),
    ("guest_writeback_bytes", |sample, _| {
        known(sample.guest.as_ref().map(|guest| guest.view.writeback_bytes))
    }),
    ("guest_cache_growth_bytes", |sample, _| {
        known(sample.guest.as_ref().map(|guest| guest.page_cache_growth_bytes))
    }),
    ("guest_reads", |_, disk| known(disk.guest.as_ref().map(|guest| guest.reads))),
    ("guest_read_bytes", |_, disk| known(disk.guest.as_ref().map(|guest| guest.read_bytes))),
    ("guest_writes", |_, disk| known(disk.guest.as_ref().map(|guest| guest.writes))),
    ("guest_flushes", |_, disk| known(disk.guest.as_ref().and_then(|guest| guest.flushes))),
    ("double_cached_bytes", |_, disk| known(disk.double_cached_bytes)),
    ("host_hit_share", |sample, _| share(sample.host_hit_share)),
    ("flush_amplification", |_, disk| share(disk.flush_amplification)),
];

/// Returns the names of all columns, in order.
pub fn columns() -> impl Iterator<Item = &'static str> {
    COLUMNS.iter().map(|(name, _)| *name)
}

/// Returns the first line.
pub fn header() -> String {
    columns().collect::<Vec<_>>().join(",") + "\n"
}

/// Returns the lines of a sample, one per disk.
pub fn lines(sample: &Sample) -> String {
    let line = |disk: &DiskSample| {
        COLUMNS.iter().map(|(_, value)| value(sample, disk)).collect::<Vec<_>>().join(",") + "\n"
    };
    sample.disks.iter().map(line).collect()
}

/// A parsed line: values by the names of their columns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row(HashMap<String, String>);

impl Row {
    /// Parses a line that stands below `header`. Returns `None` if their numbers of fields differ.
    pub fn parse(header: &str, line: &str) -> Option<Self> {
        let names = header.trim_end().split(',');
        let values: Vec<&str> = line.trim_end().split(',').collect();
        let row: HashMap<_, _> =
            names.clone().map(str::to_owned).zip(values.iter().map(|value| (*value).to_owned())).collect();
        (names.count() == values.len()).then_some(Self(row))
    }

    /// Returns the text of a column; empty if it is unknown or missing.
    pub fn text(&self, column: &str) -> &str {
        self.0.get(column).map_or("", String::as_str)
    }

    /// Returns the number in a column; `None` if it is unknown or not a number.
    pub fn number(&self, column: &str) -> Option<f64> {
        self.text(column).parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_have_names_of_their_own() {
        let mut names: Vec<_> = columns().collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COLUMNS.len());
    }

    #[test]
    fn a_row_is_read_as_it_was_written() {
        let row = Row::parse("time_s,disk,host_cached_bytes,x\n", "0.500,vda,4096,\n").unwrap();
        assert_eq!((row.number("time_s"), row.text("disk")), (Some(0.5), "vda"));
        assert_eq!(
            (row.number("host_cached_bytes"), row.number("x"), row.number("y")),
            (Some(4096.0), None, None)
        );
        assert_eq!(Row::parse("a,b", "1"), None);
    }
}
