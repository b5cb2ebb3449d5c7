//! `minivmm bench`: runs fio in a guest in several cache modes and the same job on the host, so that the report
//! can tell which figures are really those of the disk (docs/benchmarking.md).
//!
//! Owns the protocol: which jobs are accepted ([`jobs`]), who runs them ([`who`]), what is refused before
//! anything runs (`prepare`), the order and the state in which they run ([`run`]), which figures cannot be
//! those of a disk ([`warn`]), and how the result is printed ([`report`], [`table`]).

mod figures;
pub mod jobs;
mod prepare;
pub mod report;
pub mod run;
pub mod table;
#[cfg(test)]
mod tests;
pub mod warn;
pub mod warning;
pub mod who;

use std::path::PathBuf;

use minivmm::disk::DiskConfig;
use minivmm::disk::cache::CachePolicy;
use minivmm::files::{Input, Inventory, Output};
use minivmm::observe::control::HostCache;

pub use jobs::{Job, JobError};
pub use prepare::PrepareError;
pub use report::BenchReport;
pub use run::BenchError;

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The image with its parsed keys.
    pub disk: DiskConfig,
    /// The same keys as the user gave them, to be passed to minivmm.
    pub keys: Vec<String>,
    /// The cache modes.
    pub modes: Vec<&'static CachePolicy>,
    /// True if a mode that the host has not is left out, because all were asked for.
    pub only_modes_here: bool,
    /// A job file of fio; `None` for the built-in jobs.
    pub jobs: Option<PathBuf>,
    /// Names of the jobs to run; empty for all.
    pub only: Vec<String>,
    /// Size of the image to create if it does not exist.
    pub size_bytes: Option<u64>,
    /// True if gaps of the image may be filled with the zeroes that they read as.
    pub fill: bool,
    /// True if jobs may overwrite the content of the image.
    pub destroy: bool,
    /// Number of rounds.
    pub rounds: usize,
    /// Duration of a job in seconds; `None` for what the job file says, or else ten.
    pub seconds: Option<u64>,
    /// What the host's page cache holds of the image before each run.
    pub host_cache: HostCache,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// Number of CPUs of the guest.
    pub cpus: u8,
    /// File that also receives the report as JSON.
    pub json: Option<PathBuf>,
}

impl BenchOptions {
    /// Returns an error if a name is not that of a built-in job. The names of a job file are checked later,
    /// because it may be a pipe and can be read only once.
    pub fn check_names(&self) -> Result<(), JobError> {
        if self.jobs.is_none() {
            jobs::read(None, &self.only)?;
        }
        Ok(())
    }

    /// Returns the file that receives the report.
    pub fn report(&self) -> Option<Output> {
        self.json.as_ref().map(|path| Output::text("--json", path))
    }

    /// Returns all files that the command names.
    pub fn files(&self) -> Inventory {
        let disk = Input { option: "--disk", path: self.disk.path.clone() };
        let jobs = self.jobs.iter().map(|path| Input { option: "--jobs", path: path.clone() });
        Inventory {
            inputs: std::iter::once(disk).chain(jobs).collect(),
            outputs: self.report().into_iter().collect(),
        }
    }
}
