//! What is reported of disks: their statistics, and the observation of the caches.
//!
//! Owns the files, which are opened before anything runs, and how they are written. What is in them is
//! [`crate::stats`]'s and [`crate::observe`]'s.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::OpenDisk;
use crate::files::{Inventory, Opened, Output, OutputRefused, output};
use crate::observe::guest::GuestEnd;
use crate::observe::sample::Sampler;
use crate::observe::{Observer, csv, follow};
use crate::stats::{ExitStats, Stats};

/// How long we wait for a reader of the statistics to release its lock.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// The maximum interval between two checks.
const LOOK: Duration = Duration::from_millis(5);

/// Why something cannot be reported.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it")]
pub enum ReportError {
    #[error(transparent)]
    File(#[from] OutputRefused),
    #[error("cannot write the statistics to {path}")]
    Stats { path: PathBuf, source: io::Error },
    #[error("cannot write the observation to {path}")]
    Observe { path: PathBuf, source: io::Error },
}

/// Where the statistics are written at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatsTarget {
    /// To standard error, as text.
    Stderr,
    /// To a file as JSON; the file is emptied first.
    Json(PathBuf),
}

/// Where an observation is written, and how often it samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObserveTarget {
    /// The CSV file, which is emptied first.
    pub path: PathBuf,
    /// The time between two samples.
    pub interval: Duration,
}

impl StatsTarget {
    /// Returns the output file, or `None` for standard error.
    pub fn output(&self) -> Option<Output> {
        match self {
            Self::Stderr => None,
            Self::Json(path) => Some(Output::text("--stats", path)),
        }
    }
}

impl ObserveTarget {
    /// Returns the output file.
    pub fn output(&self) -> Output {
        Output { option: "--observe", path: self.path.clone(), content: csv::CONTENT }
    }
}

/// Where the statistics are written. It is opened before the guest runs, so that a bad path is reported then
/// and not at the end.
pub enum StatsReport {
    /// Standard error, as text.
    Stderr,
    /// An open file, as JSON.
    Json(PathBuf, Opened),
}

impl StatsReport {
    /// Opens the target; a file is emptied.
    pub fn open(target: &StatsTarget, files: &Inventory) -> Result<Self, OutputRefused> {
        let Some(output) = target.output() else { return Ok(Self::Stderr) };
        Ok(Self::Json(output.path.clone(), files.open(&output)?))
    }

    /// Writes the disks' statistics and the counts of the CPUs' exits from KVM.
    pub fn write(&mut self, disks: &[OpenDisk], exits: ExitStats) -> Result<(), ReportError> {
        let stats = Stats::of(disks.iter().map(|disk| &*disk.image), exits);
        match self {
            Self::Stderr => {
                // The reader of standard error may be gone, which is no failure of the VM.
                let _ = io::stderr().write_all(stats.to_string().as_bytes());
                Ok(())
            }
            Self::Json(path, file) => {
                replace(file, &stats).map_err(|source| ReportError::Stats { path: path.clone(), source })
            }
        }
    }
}

/// Replaces the old statistics in the open file with new ones. The sandbox allows no other file to be
/// created, so the file is rewritten in place. A lock (flock(2)) protects readers that take it too from a
/// partial file.
fn replace(opened: &mut Opened, stats: &Stats) -> io::Result<()> {
    let Opened { file, is_ours } = opened;
    if !*is_ours {
        return stats.write_json(io::BufWriter::new(&*file));
    }
    let mut text = Vec::new();
    stats.write_json(&mut text)?;
    let locked = lock(file);
    file.set_len(0)?;
    file.rewind()?;
    let written = file.write_all(&text);
    if locked {
        let _ = rustix::fs::flock(&*file, FlockOperation::Unlock);
    }
    written
}

/// Tries to lock the file, and returns `true` on success. A reader holds its lock only for a moment. A reader
/// that keeps it, or a file system without locks, does not keep the VM from ending.
fn lock(file: &File) -> bool {
    let until = Instant::now() + LOCK_MAX;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return true,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(LOOK),
            Err(_) => return false,
        }
    }
}

/// A running observation of disks.
pub struct Watch {
    path: PathBuf,
    observer: Observer,
}

impl Watch {
    /// Begins the observation; called before the guest runs. `guest` is our end of the port through which it is
    /// asked; `None` if it is not.
    pub fn begin(
        target: &ObserveTarget,
        files: &Inventory,
        disks: &[OpenDisk],
        guest: Option<GuestEnd>,
    ) -> Result<Self, ReportError> {
        let path = target.path.clone();
        let refused = |source| ReportError::Observe { path: path.clone(), source };
        let opened = files.open_unchanged(&target.output())?;
        if !follow::lock_as_writer(&opened.file).map_err(refused)? {
            return Err(refused(io::Error::other("another minivmm writes to it")));
        }
        let file = output::emptied(opened).map_err(refused)?;
        let images = disks.iter().map(|disk| Arc::clone(&disk.image));
        let sampler = Sampler::begin(images, guest);
        let observer = Observer::start(sampler, file, target.interval).map_err(refused)?;
        Ok(Self { path, observer })
    }

    /// Ends the observation after a last sample.
    pub fn end(self) -> Result<(), ReportError> {
        let Self { path, observer } = self;
        observer.finish().map_err(|source| ReportError::Observe { path, source })
    }
}
