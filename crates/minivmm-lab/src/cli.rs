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
    /// Show an observation (--observe) as it grows
    ///
    /// On a terminal until q is pressed; elsewhere a line for each disk and moment, to its end.
    Top {
        /// The file of --observe
        #[arg(value_name = "FILE")]
        observation: PathBuf,
    },
    /// List a write log: what a disk was given, and what it has promised to keep
    ///
    /// The log is of a disk's key log-writes, of the kernel's dm-log-writes or of QEMU's blklogwrites.
    Log {
        /// The log, a file or a block device
        #[arg(value_name = "FILE")]
        log: PathBuf,

        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the disks that a loss of power could have left of a write log
    ///
    /// At each point of the log, any of the writes that no flush had spoken for can be there or not. Each
    /// such disk is made, in a scratch file, and checked. Exit status: 0 where all were good, 1 where some
    /// were not.
    Crash(Box<CrashArgs>),
    /// Measure a disk in cache modes: fio in the guest, beside the same job on this host
    ///
    /// Each run begins with an image that is all written and a host's cache whose state is made for it; each
    /// job that writes ends with a sync. Figures that cannot be the disk's are told, with the reason
    /// (docs/benchmarking.md).
    Bench(Box<BenchArgs>),
    /// Measure what was said of disk caching in 2008, claim by claim
    ///
    /// Boots the test guest with disks in all modes, again and again; a full run takes an hour or more, a
    /// quick one ten minutes. Leaves a page (study.html) and JSON (study.json), also when it is ended by a
    /// signal; the same command goes on where it was. See docs/study.md.
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
