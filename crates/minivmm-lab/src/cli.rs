//! The arguments of minivmm-tools: the subcommands, and minivmm's command line with them.
//!
//! Owns their names and help. What may stand before or instead of a subcommand is minivmm's own
//! ([`minivmm::cli::Args`]): with it, an error or a help text is the same whichever binary writes it. Manual page and
//! completions are generated from the whole (`examples/manual.rs`).

mod bench;
mod crash;
mod study;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Command, CommandFactory, FromArgMatches, Subcommand};
use minivmm::cli::{Answer, Args};
use minivmm::program;

pub use bench::BenchArgs;
pub use crash::CrashArgs;
pub use study::StudyArgs;

/// What the user asked a tool to do.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Display an observation (--observe) as it grows
    ///
    /// On a terminal, until q is pressed. Otherwise one line for each disk and interval, up to the end of FILE.
    Top {
        /// The file that --observe writes
        #[arg(value_name = "FILE")]
        observation: PathBuf,
    },
    /// List a write log: what was written to a disk, and what it promised to keep
    ///
    /// The log was made by a disk's key log-writes, by the kernel's dm-log-writes or by QEMU's blklogwrites.
    Log {
        /// The log, a file or a block device
        #[arg(value_name = "FILE")]
        log: PathBuf,

        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check every disk state that a power loss could have left, from a write log
    ///
    /// At each point of the log, any write that no flush covers may be on the disk or not. Each such state
    /// is built in a scratch file and checked. Exit status: 0 if all were good, 1 if some were not.
    Crash(Box<CrashArgs>),
    /// Measure a disk in several cache modes: fio in the guest and the same job on this host
    ///
    /// Each run begins with a fully written image and a host cache in a known state. Each job that writes
    /// ends with a sync. Figures that cannot be the disk's are marked, with the reason (docs/benchmarking.md).
    Bench(Box<BenchArgs>),
    /// Test the claims made about disk caching in 2008, one by one
    ///
    /// Boots the test guest many times, with disks in all modes. A full run takes an hour or more, a quick one
    /// ten minutes. Writes a page (study.html) and JSON (study.json), even if a signal interrupts it; the same
    /// command then resumes. See docs/study.md.
    Study(StudyArgs),
}

impl Task {
    /// Parses the arguments of this process, as minivmm was called with them. `None` if they call none of the
    /// tools. The error is the answer if they are wrong or ask for help.
    pub fn of_process() -> Result<Option<Self>, Answer> {
        let words = std::env::args_os().skip(1);
        let matches = command()
            .try_get_matches_from(std::iter::once(OsString::from(program::VMM)).chain(words))
            .map_err(Answer::new)?;
        let is_tool = matches.subcommand_name().is_some_and(Self::has_subcommand);
        is_tool.then(|| Self::from_arg_matches(&matches).map_err(Answer::new)).transpose()
    }
}

/// Returns minivmm's command line with the arguments of all subcommands. minivmm itself knows no more of the
/// tools than their names.
pub fn command() -> Command {
    let tools = Task::augment_subcommands(Command::new(program::TOOLS));
    tools
        .get_subcommands()
        .fold(Args::command(), |whole, tool| whole.mut_subcommand(tool.get_name(), |_| tool.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn minivmm_lists_the_tools_with_the_same_words_and_in_the_same_order() {
        let listed = |command: Command| -> Vec<(String, Option<String>)> {
            let about = |it: &Command| it.get_about().map(ToString::to_string);
            command.get_subcommands().map(|it| (it.get_name().to_owned(), about(it))).collect()
        };
        assert_eq!(listed(Args::command()), listed(command()));
    }
}
