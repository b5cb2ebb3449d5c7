//! `minivmm log`: prints a write log as a table or as JSON.
//!
//! Owns the two formats. [`super::log`] reads the log.

use std::fmt::Write;

use serde::Serialize;

use super::log::{Entry, WriteLog};

/// The JSON form of a log.
#[derive(Debug, Serialize)]
struct JsonLog<'a> {
    log: String,
    sector_bytes: u32,
    entries: Vec<JsonEntry<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonEntry<'a> {
    entry: usize,
    kind: String,
    flush: bool,
    fua: bool,
    discard: bool,
    offset_bytes: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mark: Option<&'a str>,
}

/// Returns the log as JSON: an object with a list of entries.
pub fn to_json(log: &WriteLog) -> serde_json::Result<String> {
    let as_json = |(entry, it): (usize, &Entry)| JsonEntry {
        entry,
        kind: it.kind(),
        flush: it.is_flush(),
        fua: it.is_fua(),
        discard: it.is_discard(),
        offset_bytes: it.offset,
        bytes: it.bytes,
        mark: log.entries.get(entry).and_then(|it| it.mark.as_deref()),
    };
    let entries = log.entries.iter().enumerate().map(as_json).collect();
    let sector_bytes = log.sector_bytes;
    serde_json::to_string_pretty(&JsonLog { log: log.path().display().to_string(), sector_bytes, entries })
}

/// Returns the log as a table with one line per entry, and a summary.
pub fn to_text(log: &WriteLog) -> String {
    let mut text = String::from(" entry  kind                  sector  sectors\n");
    for (number, entry) in log.entries.iter().enumerate() {
        let unit = u64::from(log.sector_bytes);
        let (sector, sectors) = (entry.offset / unit, entry.bytes / unit);
        // Writing to a String cannot fail.
        let _ = match (&entry.mark, entry.bytes) {
            (Some(mark), _) => writeln!(text, "{number:6}  {:<18} {mark}", entry.kind()),
            (None, 0) => writeln!(text, "{number:6}  {}", entry.kind()),
            (None, _) => writeln!(text, "{number:6}  {:<18} {sector:9} {sectors:8}", entry.kind()),
        };
    }
    let count = |wanted: fn(&Entry) -> bool| log.entries.iter().filter(|entry| wanted(entry)).count();
    let bytes: u64 =
        log.entries.iter().filter(|entry| entry.data_at.is_some()).map(|entry| entry.bytes).sum();
    let _ = write!(
        text,
        "{} entries in sectors of {} bytes: {} writes of {bytes} bytes, {} stable by themselves, {} discards, \
         {} flushes, {} marks",
        log.entries.len(),
        log.sector_bytes,
        count(|entry| entry.data_at.is_some()),
        count(Entry::is_fua),
        count(Entry::is_discard),
        count(Entry::is_flush),
        count(|entry| entry.mark.is_some()),
    );
    text
}
