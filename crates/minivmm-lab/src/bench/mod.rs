//! `minivmm bench`: fio in a guest in several cache modes, beside the same job on the host, so that the
//! figures are a disk's or are said not to be (docs/benchmarking.md).
//!
//! Owns the protocol: which jobs it takes ([`jobs`]), who runs them ([`who`]), what is refused before anything
//! runs ([`prepare`]), in which order and state all runs ([`run`]), which figures cannot be a disk's
//! ([`warn`]), and how it is told ([`report`], [`table`]).

pub mod jobs;
mod prepare;
pub mod report;
pub mod run;
mod table;
#[cfg(test)]
mod tests;
pub mod warn;
pub mod who;

use std::path::PathBuf;

use minivmm::disk::DiskOptions;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::options::HostCache;
use minivmm::files::{Input, Inventory, Output};

pub use jobs::{Job, JobError};
pub use prepare::PrepareError;
pub use report::Report;
pub use run::BenchError;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// The image, and what its keys mean.
    pub disk: DiskOptions,
    /// The same keys as they were given, for minivmm.
    pub keys: Vec<String>,
    /// The cache modes.
    pub modes: Vec<&'static CachePolicy>,
    /// A job file of fio's; ours where there is none.
    pub jobs: Option<PathBuf>,
    /// Only the jobs of these names; all where there are none.
    pub only: Vec<String>,
    /// How large the image is to be where there is none yet.
    pub size_bytes: Option<u64>,
    /// Gaps of the image may be written to, with the zeroes that they read as.
    pub fill: bool,
    /// Jobs may write over what is in the image.
    pub destroy: bool,
    /// How often everything runs.
    pub rounds: usize,
    /// How long a job runs, in seconds; what the job file says where not given, or ten.
    pub seconds: Option<u64>,
    /// What the host's cache has of the image before each run.
    pub host_cache: HostCache,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Its CPUs.
    pub cpus: u8,
    /// Where the report goes as JSON, besides.
    pub json: Option<PathBuf>,
}

impl Options {
    /// Refuses a name that no built-in job has. (A job file may be a pipe, and is read once, later.)
    pub fn check_names(&self) -> Result<(), JobError> {
        if self.jobs.is_none() {
            jobs::read(None, &self.only)?;
        }
        Ok(())
    }

    /// The report as a file.
    pub fn report(&self) -> Option<Output> {
        self.json.as_ref().map(|path| Output::text("--json", path))
    }

    /// All files that the command names.
    pub fn files(&self) -> Inventory {
        let disk = Input { option: "--disk", path: self.disk.path.clone() };
        let jobs = self.jobs.iter().map(|path| Input { option: "--jobs", path: path.clone() });
        Inventory {
            inputs: std::iter::once(disk).chain(jobs).collect(),
            outputs: self.report().into_iter().collect(),
        }
    }
}
