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

    /// Where to crash: flushes, entries, sample=COUNT, mark=NAME, or the number of an entry (repeatable)
    ///
    /// flushes: just before each flush and each stable write completes, and at the end of the log. These points
    /// leave every state that any point can leave. entries: after each entry that changes something. sample: after
    /// COUNT of those. N: when entry N was about to complete, and all before it had. mark=NAME: the same for a mark.
    #[arg(long, value_name = "WHERE", default_value = "flushes", value_parser = at(), hide_possible_values = true, help_heading = WHERE)]
    at: Vec<At>,

    /// The most states to check at a point: all if there are no more, otherwise a random choice
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, help_heading = WHICH)]
    states: usize,

    /// The seed of random choices
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = WHICH)]
    seed: u64,

    /// Writes may be there in part, torn at sector boundaries
    #[arg(long, help_heading = WHICH)]
    torn: bool,

    /// Which completed writes are lost that no flush covers: any, all (the worst case), or nothing
    #[arg(long, value_name = "any|all|nothing", default_value = "any", hide_possible_values = true, help_heading = WHICH)]
    lose: LoseArg,

    /// The host crashes and the disk's cache survives: short for --lose nothing --at entries
    ///
    /// This is true of the modes none and directsync (O_DIRECT), for blocks that the image already has.
    #[arg(long, conflicts_with_all = ["lose", "torn", "at"], help_heading = WHICH)]
    host_crash: bool,

    /// Check only this state, named as in a report
    #[arg(long, value_name = "ENTRY:STATE", value_parser = state, help_heading = WHICH,
          conflicts_with_all = ["at", "states", "seed", "torn", "lose", "host_crash"])]
    repeat: Option<(usize, StateName)>,

    /// A shell command that checks an image; {} is the image, and status 0 means that it is good
    ///
    /// By default an ext4 is recovered as at boot (e2fsck -p), and then e2fsck -fn must find no error. The command
    /// may change its image. Its environment has MINIVMM_CRASH_ENTRY, MINIVMM_CRASH_STATE and MINIVMM_CRASH_MARK,
    /// the last mark before the crash.
    #[arg(long, value_name = "COMMAND", value_parser = check, help_heading = HOW)]
    check: Option<String>,

    /// An image whose check takes longer than this is not good
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::seconds, help_heading = HOW)]
    check_timeout: Duration,

    /// Checks that run in parallel [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = count, help_heading = HOW)]
    jobs: Option<usize>,

    /// Where to keep images that are not good [default: LOG.failed]
    #[arg(long, value_name = "DIRECTORY", help_heading = HOW)]
    keep: Option<PathBuf>,

    /// Where to make images [default: /dev/shm if it has plenty of space, else $TMPDIR or /tmp]
    #[arg(long, value_name = "DIRECTORY", help_heading = HOW)]
    scratch: Option<PathBuf>,

    /// Check nothing; write the selected state to IMAGE
    ///
    /// Select the state with --at ENTRY and --lose all or nothing, or with --repeat.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["check", "jobs", "keep"], help_heading = HOW)]
    write: Option<PathBuf>,

    /// Print the report as JSON
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
        false => Err("it needs {}, which stands for the image".to_owned()),
    }
}

fn state(text: &str) -> Result<(usize, StateName), String> {
    let wrong = || "it is ENTRY:STATE, as a report has told it: 17:none, 17:s1f0c".to_owned();
    let (entry, name) = text.split_once(':').ok_or_else(wrong)?;
    Ok((entry.parse().map_err(|_| wrong())?, name.parse()?))
}
