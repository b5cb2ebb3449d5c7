//! The arguments of `minivmm crash`.
//!
//! Owns their names and help; `crash` decides what they mean.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::crash::campaign::CampaignOptions;
use crate::crash::legal::StateName;
use crate::crash::plan::{Breadth, Lose};
use crate::crash::points::At;
use minivmm::cli::values;

const WHERE: &str = "Where the power fails";
const WHICH: &str = "What is lost";
const HOW: &str = "How it is checked";

/// A campaign, as the user types it.
#[derive(Debug, Clone, Args)]
pub struct CrashArgs {
    /// The write log: a disk's key log-writes, the kernel's dm-log-writes, QEMU's blklogwrites
    #[arg(value_name = "LOG")]
    log: PathBuf,

    /// The disk as it was when the log began; it is only read
    #[arg(long, value_name = "IMAGE")]
    base: PathBuf,

    /// Where: flushes, entries, sample=COUNT, mark=NAME, or the number of an entry (repeatable)
    ///
    /// flushes: just before each flush and each stable write has ended, and at the end of the log: all that can
    /// be left anywhere can be left there. entries: after each that changes something; sample: after some of
    /// them. N: when entry N was about to end, all before it had ended; mark=NAME: the same of a mark.
    #[arg(long, value_name = "WHERE", default_value = "flushes", value_parser = at(), hide_possible_values = true, help_heading = WHERE)]
    at: Vec<At>,

    /// So many states a point at most: all there are where that is enough, else some, by chance
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, help_heading = WHICH)]
    states: usize,

    /// Where chance begins
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = WHICH)]
    seed: u64,

    /// Writes can be there in part, torn at their sectors
    #[arg(long, help_heading = WHICH)]
    torn: bool,

    /// Of what had ended and no flush has spoken for: any, all (the worst), or nothing
    #[arg(long, value_name = "any|all|nothing", default_value = "any", hide_possible_values = true, help_heading = WHICH)]
    lose: LoseArg,

    /// The host has crashed, the disk's cache has survived: as --lose nothing --at entries
    ///
    /// So it is of writes in the modes none and directsync (O_DIRECT) to blocks that the image already had.
    #[arg(long, conflicts_with_all = ["lose", "torn", "at"], help_heading = WHICH)]
    host_crash: bool,

    /// Only this state, whose name a report has told
    #[arg(long, value_name = "ENTRY:STATE", value_parser = state, help_heading = WHICH,
          conflicts_with_all = ["at", "states", "seed", "torn", "lose", "host_crash"])]
    repeat: Option<(usize, StateName)>,

    /// A command of the shell for each image; {} is the image, status 0 says that it is good
    ///
    /// By default an ext4 is recovered as at a boot (e2fsck -p), and then e2fsck -fn must have no complaint.
    /// The command may change its image. It finds MINIVMM_CRASH_ENTRY, MINIVMM_CRASH_STATE and the last mark
    /// before the crash, MINIVMM_CRASH_MARK, in its environment.
    #[arg(long, value_name = "COMMAND", value_parser = check, help_heading = HOW)]
    check: Option<String>,

    /// An image whose check takes longer is not good
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::seconds, help_heading = HOW)]
    check_timeout: Duration,

    /// So many checks side by side [default: one a CPU]
    #[arg(long, value_name = "N", value_parser = count, help_heading = HOW)]
    jobs: Option<usize>,

    /// Where images that are not good are kept [default: LOG.failed]
    #[arg(long, value_name = "DIRECTORY", help_heading = HOW)]
    keep: Option<PathBuf>,

    /// Where images are made [default: /dev/shm if there is plenty of room, else $TMPDIR or /tmp]
    #[arg(long, value_name = "DIRECTORY", help_heading = HOW)]
    scratch: Option<PathBuf>,

    /// Check nothing: write the one image that is meant there
    ///
    /// With --at ENTRY and --lose all or nothing, or with --repeat.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["check", "jobs", "keep"], help_heading = HOW)]
    write: Option<PathBuf>,

    /// The report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LoseArg {
    Any,
    All,
    Nothing,
}

impl CrashArgs {
    /// Converts the arguments into options.
    pub fn options(self) -> CampaignOptions {
        let lose = match self.lose {
            _ if self.host_crash => Lose::Nothing,
            LoseArg::Any => Lose::Any,
            LoseArg::All => Lose::All,
            LoseArg::Nothing => Lose::Nothing,
        };
        CampaignOptions {
            log: self.log,
            base: self.base,
            at: if self.host_crash { vec![At::Entries] } else { self.at },
            breadth: Breadth { states: self.states, seed: self.seed, torn: self.torn, lose },
            repeat: self.repeat,
            check: self.check,
            check_timeout: self.check_timeout,
            jobs: self.jobs,
            keep: self.keep,
            scratch: self.scratch,
            write: self.write,
        }
    }
}

fn at() -> values::Suggested<At> {
    values::Suggested {
        words: &["flushes", "entries", "sample=", "mark="],
        parse: |text| text.to_string_lossy().parse(),
    }
}

pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&count| count > 0).ok_or_else(|| "it is a number from 1 on".to_owned())
}

fn check(text: &str) -> Result<String, String> {
    match text.contains("{}") {
        true => Ok(text.to_owned()),
        false => Err("there is no {} in it, which stands for the image".to_owned()),
    }
}

fn state(text: &str) -> Result<(usize, StateName), String> {
    let wrong = || "it is ENTRY:STATE, as a report has told it: 17:none, 17:s1f0c".to_owned();
    let (entry, name) = text.split_once(':').ok_or_else(wrong)?;
    Ok((entry.parse().map_err(|_| wrong())?, name.parse()?))
}
