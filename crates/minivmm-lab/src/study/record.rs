//! The record of a run, one line for each finished step, so that an interrupted run can be continued.
//!
//! Owns `steps.jsonl`. Its first line describes the machine and the run. A record of another machine or run is
//! refused, because the figures would be mixed. An incomplete last line is discarded.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::figures::StepRecord;
use super::machine::Identity;
use minivmm::files::output;

/// Name of the file in the directory of a run.
pub const FILE: &str = "steps.jsonl";

/// The first line of a record, which identifies the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Format of the file, [`VERSION`].
    pub version: u32,
    /// True for a quick run, whose jobs are smaller.
    pub quick: bool,
    /// Ids of the experiments.
    pub experiments: Vec<String>,
    /// The machine that was measured.
    pub machine: Identity,
}

/// The current format of the file. Format 1 had no figures of dontcache.
pub const VERSION: u32 = 2;

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The host reports an error.
    #[error("cannot {what} {path}")]
    Host {
        /// The operation that failed.
        what: &'static str,
        /// The file that it was tried on.
        path: PathBuf,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The record belongs to another run.
    #[error(
        "{path} is of another run, whose figures cannot be mixed with this one's ({differences}): give another --out"
    )]
    Other {
        /// The record.
        path: PathBuf,
        /// How the runs differ.
        differences: String,
    },
    /// A line of the record cannot be parsed.
    #[error(
        "line {line} of {path} is not a line of a study's record: give another --out, or remove the file"
    )]
    Damaged {
        /// The record.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// Another study runs in this directory.
    #[error("another study is running in {0}")]
    Busy(PathBuf),
}

/// An open and locked record.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// The steps that were run, failed attempts included.
    pub steps: Vec<StepRecord>,
}

impl Journal {
    /// Opens the record in `directory`, or creates one. Fails if its run is not the one that `header`
    /// describes.
    pub fn open(directory: &Path, header: &Header) -> Result<Self, RecordError> {
        let path = directory.join(FILE);
        let failed = |what| {
            let path = path.clone();
            move |source| RecordError::Host { what, path, source }
        };
        let mut file = output::open_record(&path).map_err(failed("open"))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(RecordError::Busy(directory.to_owned()));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed("read"))?;
        // An incomplete line is from a step that was being recorded when the process died. That step is
        // measured again.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(failed("cut"))?;
            text.truncate(whole);
        }
        let mut journal = Self { file, path, steps: Vec::new() };
        let mut lines = text.lines().enumerate();
        match lines.next() {
            None => journal.append(header)?,
            Some((_, first)) => journal.compare(first, header)?,
        }
        for (at, line) in lines {
            let step = serde_json::from_str(line).map_err(|source| journal.damaged(at, source))?;
            journal.steps.push(step);
        }
        Ok(journal)
    }

    fn damaged(&self, at: usize, source: serde_json::Error) -> RecordError {
        RecordError::Damaged { path: self.path.clone(), line: at + 1, source }
    }

    fn compare(&self, first: &str, now: &Header) -> Result<(), RecordError> {
        let then: Header = serde_json::from_str(first).map_err(|source| self.damaged(0, source))?;
        let mut differences = then.machine.differences(&now.machine);
        for (name, then, now) in [
            ("form of the record", then.version.to_string(), now.version.to_string()),
            ("--quick", then.quick.to_string(), now.quick.to_string()),
            ("experiments", then.experiments.join(" "), now.experiments.join(" ")),
        ] {
            if then != now {
                differences.push(format!("{name}: then {then}, now {now}"));
            }
        }
        match differences.is_empty() {
            true => Ok(()),
            false => Err(RecordError::Other { path: self.path.clone(), differences: differences.join("; ") }),
        }
    }

    /// Appends a step, and returns once the file is synced.
    pub fn add(&mut self, step: StepRecord) -> Result<(), RecordError> {
        self.append(&step)?;
        self.steps.push(step);
        Ok(())
    }

    /// Returns `true` if the step succeeded in this repetition.
    pub fn has(&self, step: &str, round: u32) -> bool {
        self.steps.iter().any(|done| done.step == step && done.round == round && done.error.is_none())
    }

    /// Returns the last attempt of each step and repetition.
    pub fn newest(&self) -> Vec<StepRecord> {
        let later = |at: usize, step: &StepRecord| {
            self.steps.iter().skip(at + 1).any(|other| (&other.step, other.round) == (&step.step, step.round))
        };
        let newest = self.steps.iter().enumerate().filter(|(at, step)| !later(*at, step));
        newest.map(|(_, step)| step.clone()).collect()
    }

    fn append(&mut self, line: &impl Serialize) -> Result<(), RecordError> {
        let failed = |source| RecordError::Host { what: "write", path: self.path.clone(), source };
        let mut text = serde_json::to_string(line).map_err(|error| failed(error.into()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kernel: &str, quick: bool) -> Header {
        let machine = Identity {
            minivmm: "1".into(),
            kernel: kernel.into(),
            cpu: "1 of x".into(),
            memory_bytes: Some(5),
            place: "ext4 on /dev/vda".into(),
        };
        Header { version: VERSION, quick, experiments: vec!["T1".into()], machine }
    }

    #[test]
    fn a_run_goes_on_where_it_was_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), &header("a", true)).unwrap();
        assert!(matches!(Journal::open(dir.path(), &header("a", true)), Err(RecordError::Busy(_))));
        let mut step = StepRecord::new("dirty", 1);
        step.put("T9.pages", 2048.0);
        step.put("T9.pages", 2047.0);
        journal.add(step.clone()).unwrap();
        journal.add(StepRecord { error: Some("no".into()), ..StepRecord::new("reads", 1) }).unwrap();
        drop(journal);
        // The writer was killed in the middle of a line.
        let path = dir.path().join(FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole.clone() + "{\"step\":\"wri").unwrap();
        let mut journal = Journal::open(dir.path(), &header("a", true)).unwrap();
        assert_eq!(journal.steps[0], step);
        assert!(journal.has("dirty", 1) && !journal.has("dirty", 2) && !journal.has("reads", 1));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        journal.add(StepRecord::new("reads", 1)).unwrap();
        assert!(journal.has("reads", 1));
        assert_eq!(journal.newest().len(), 2, "the failed try is gone");
    }

    #[test]
    fn another_machines_figures_are_not_mixed_in() {
        let dir = tempfile::tempdir().unwrap();
        drop(Journal::open(dir.path(), &header("6.12", true)).unwrap());
        for (other, word) in
            [(header("6.1", true), "kernel: then 6.12, now 6.1"), (header("6.12", false), "--quick")]
        {
            let error = Journal::open(dir.path(), &other).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("--out"), "{error}");
        }
        std::fs::write(dir.path().join(FILE), "what\n").unwrap();
        let error = Journal::open(dir.path(), &header("6.12", true)).unwrap_err();
        assert!(matches!(error, RecordError::Damaged { line: 1, .. }), "{error}");
    }
}
