//! The subcommands of the other binaries: their names, and what the help says of each.
//!
//! Owns the question whether a command line is theirs. Their arguments are those binaries' own.

use std::ffi::OsString;

use clap::Subcommand;

use crate::program;

/// A subcommand of another binary.
#[derive(Debug, Subcommand)]
pub(super) enum Tool {
    /// Serve disks to other VMMs over vhost-user: QEMU, cloud-hypervisor, libblkio
    Export,
    /// Display an observation (--observe) as it grows
    Top,
    /// List a write log: what was written to a disk, and what it promised to keep
    Log,
    /// Check every disk state that a power loss could have left, from a write log
    Crash,
    /// Measure a disk in several cache modes: fio in the guest and the same job on this host
    Bench,
    /// Test the claims made about disk caching in 2008, one by one
    Study,
}

impl Tool {
    /// Returns the binary that has this subcommand.
    pub(super) fn binary(&self) -> &'static str {
        match self {
            Self::Top | Self::Log | Self::Crash | Self::Bench | Self::Study => program::TOOLS,
            Self::Export => program::EXPORT,
        }
    }
}

/// Returns the subcommand of another binary that these arguments call, or whose help they ask for. Options come
/// after a subcommand, never before it.
pub(super) fn called(mut words: impl Iterator<Item = OsString>) -> Option<String> {
    let first = words.next()?;
    let name = if first == "help" { words.next()? } else { first };
    name.into_string().ok().filter(|name| Tool::has_subcommand(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_the_tools_by_its_first_word_or_by_the_help_that_it_asks_for() {
        let called = |line: &str| called(line.split_whitespace().map(OsString::from));
        for line in ["crash", "crash --help", "help crash", "help crash more", "crash x.log --base x.img"] {
            assert_eq!(called(line).as_deref(), Some("crash"), "{line}");
        }
        for line in ["", "help", "help --help", "check", "help check", "-v crash", "-- crash", "crsh"] {
            assert_eq!(called(line), None, "{line}");
        }
    }
}
