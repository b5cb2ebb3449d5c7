//! Determines where in a log the power may fail.
//!
//! Owns the syntax of `--at` and its meaning in a log. A point is a number of entries: that many entries from
//! the beginning of the log had completed, and no others.

use std::collections::BTreeSet;
use std::str::FromStr;

use super::log::Entry;
use minivmm::disk::fault::plan::mix;

/// Where the power fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// Just before each flush and each stable write completes, and at the end of the log.
    Flushes,
    /// After every entry that changes something.
    Entries,
    /// After this many of those entries, chosen at random.
    Sample(usize),
    /// Just before the entry with this index completes.
    Entry(usize),
    /// At the marks with this text.
    Mark(String),
}

/// Why there is no such point.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoPoint {
    /// The log has fewer entries.
    #[error("there is no entry {entry}: the log has {entries} (`minivmm log` lists them)")]
    Entry {
        /// The entry that was asked for.
        entry: usize,
        /// Number of entries in the log.
        entries: usize,
    },
    /// No mark has this text.
    #[error("there is no mark {name}: {there}")]
    Mark {
        /// The text that was asked for.
        name: String,
        /// The marks that the log has, in words.
        there: String,
    },
    /// The log changes nothing, so a loss of power loses nothing.
    #[error("the log changes nothing")]
    NothingChanges,
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "it is flushes, entries, sample=COUNT, mark=NAME, or the number of an entry".to_owned();
        match text.split_once('=') {
            None if text == "flushes" => Ok(Self::Flushes),
            None if text == "entries" => Ok(Self::Entries),
            None => text.parse().map(Self::Entry).map_err(|_| wrong()),
            Some(("sample", count)) => {
                count.parse().ok().filter(|&count| count > 0).map(Self::Sample).ok_or_else(wrong)
            }
            Some(("mark", name)) if !name.is_empty() => Ok(Self::Mark(name.to_owned())),
            Some(_) => Err(wrong()),
        }
    }
}

/// Returns the points that are asked for, in the order of the log. `seed` chooses the sample.
pub fn points(entries: &[Entry], places: &[At], seed: u64) -> Result<Vec<usize>, NoPoint> {
    let mut found = BTreeSet::new();
    for place in places {
        match place {
            At::Flushes => found.extend(flushes(entries)),
            At::Entries => found.extend(changes(entries)),
            At::Sample(count) => found.extend(sample(changes(entries).collect(), *count, seed)),
            &At::Entry(entry) if entry > entries.len() => {
                return Err(NoPoint::Entry { entry, entries: entries.len() });
            }
            &At::Entry(entry) => {
                found.insert(entry);
            }
            At::Mark(name) => found.extend(marks(entries, name)?),
        }
    }
    if found.is_empty() { Err(NoPoint::NothingChanges) } else { Ok(found.into_iter().collect()) }
}

/// Returns the points before each promise and at the end. Every state of a point between two of these is also a
/// state of the second. Points without a change between them are one point.
fn flushes(entries: &[Entry]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut changed = false;
    for (number, entry) in entries.iter().enumerate() {
        if changed && (entry.is_flush() || entry.is_fua()) {
            found.push(number);
            changed = false;
        }
        changed |= entry.changes();
    }
    if changed {
        found.push(entries.len());
    }
    found
}

fn changes(entries: &[Entry]) -> impl Iterator<Item = usize> + '_ {
    entries.iter().enumerate().filter(|(_, entry)| entry.changes()).map(|(number, _)| number + 1)
}

fn sample(mut all: Vec<usize>, count: usize, seed: u64) -> Vec<usize> {
    all.sort_by_cached_key(|&point| mix(seed, point as u64));
    all.truncate(count);
    all
}

fn marks(entries: &[Entry], name: &str) -> Result<Vec<usize>, NoPoint> {
    let is_meant = |(_, entry): &(usize, &Entry)| entry.mark.as_deref() == Some(name);
    let found: Vec<usize> = entries.iter().enumerate().filter(is_meant).map(|(number, _)| number).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let others: BTreeSet<&str> = entries.iter().filter_map(|entry| entry.mark.as_deref()).collect();
    let there = match others.is_empty() {
        true => "the log has none".to_owned(),
        false => format!("the log has {}", others.into_iter().collect::<Vec<_>>().join(", ")),
    };
    Err(NoPoint::Mark { name: name.to_owned(), there })
}

#[cfg(test)]
mod tests {
    use super::*;
    use minivmm::disk::writelog::format::{FLUSH, FUA};

    fn entry(flags: u64, bytes: u64) -> Entry {
        Entry { offset: 0, bytes, flags, data_at: (bytes > 0).then_some(512), mark: None }
    }

    fn log() -> Vec<Entry> {
        let mark = Entry { mark: Some("half".into()), ..entry(8, 0) };
        // 0 W, 1 F, 2 F, 3 W, 4 mark, 5 W+FUA, 6 F, 7 W
        [entry(0, 512), entry(FLUSH, 0), entry(FLUSH, 0), entry(0, 512)]
            .into_iter()
            .chain([mark, entry(FUA, 512), entry(FLUSH, 0), entry(0, 512)])
            .collect()
    }

    #[test]
    fn words_mean_places() {
        for (word, expected) in [
            ("flushes", vec![1, 5, 6, 8]),
            ("entries", vec![1, 4, 6, 8]),
            ("0", vec![0]),
            ("8", vec![8]),
            ("mark=half", vec![4]),
            ("sample=100", vec![1, 4, 6, 8]),
        ] {
            assert_eq!(points(&log(), &[word.parse().unwrap()], 1), Ok(expected), "{word}");
        }
        let two = [At::Entry(3), At::Flushes, At::Entry(1)];
        assert_eq!(points(&log(), &two, 1), Ok(vec![1, 3, 5, 6, 8]));
        let some = points(&log(), &[At::Sample(2)], 5).unwrap();
        assert_eq!(some.len(), 2);
        assert_eq!(points(&log(), &[At::Sample(2)], 5).unwrap(), some, "the same seed");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let error = |place: &str| points(&log(), &[place.parse().unwrap()], 1).unwrap_err().to_string();
        assert!(error("9").contains("the log has 8"));
        assert!(error("mark=x").contains("the log has half"));
        assert_eq!(points(&[entry(FLUSH, 0)], &[At::Flushes], 1), Err(NoPoint::NothingChanges));
        for wrong in ["", "all", "-1", "sample=0", "sample=x", "mark=", "seed=1"] {
            assert!(wrong.parse::<At>().is_err(), "{wrong}");
        }
    }
}
