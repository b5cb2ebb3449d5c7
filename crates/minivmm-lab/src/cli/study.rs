//! The arguments of `minivmm study`.
//!
//! Owns their names and help; `study` decides what they mean.

use std::path::PathBuf;

use clap::Args;

use crate::study::run::StudyOptions;
use minivmm::cli::values;
use minivmm::hosts::{Asked, HostChoice};

/// A study, as the user types it.
#[derive(Debug, Clone, Args)]
pub struct StudyArgs {
    /// Where the guests run: auto, direct, or emulated, as for `minivmm` itself
    #[arg(long, value_name = "auto|direct|emulated", value_parser = values::host(), hide_possible_values = true)]
    host: Option<HostChoice>,

    /// Run small jobs, and as many repetitions as ten minutes allow
    #[arg(long)]
    quick: bool,

    /// Directory for the page, the JSON, the record of the steps and the images; resumes an interrupted run
    #[arg(long, value_name = "DIR", default_value = "study")]
    out: PathBuf,

    /// Run only these experiments: T1,T9
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    only: Vec<String>,

    /// Repetitions of each step [default: 5; with --quick up to 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
}

impl StudyArgs {
    /// Returns what decides where the guests run.
    pub fn asked(&self) -> Asked<'static> {
        Asked::for_tool(self.host.unwrap_or_default())
    }

    /// Converts the arguments into options.
    pub fn options(self) -> StudyOptions {
        StudyOptions { out: self.out, quick: self.quick, rounds: self.rounds, only: self.only }
    }
}
