//! What the user has typed wrongly, and what they may have meant; help and version.
//!
//! Owns the answers that end a process before it does anything, and how they are printed: help on standard output,
//! errors on standard error with minivmm's prefix.

use std::io::{self, IsTerminal};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::ExitStatus;
use super::process::{print, say, told};
use crate::disk::DiskOptions;

/// What ends the process instead of a task: help, the version, or an error in the arguments.
#[derive(Debug)]
pub struct Answer(clap::Error);

impl Answer {
    /// With what the user may have meant.
    pub(super) fn new(error: clap::Error) -> Self {
        Self(improve(error))
    }

    /// Prints it.
    pub fn give(&self) -> ExitStatus {
        let text = self.0.render();
        let styled = |is_terminal: bool| match is_terminal && std::env::var_os("NO_COLOR").is_none() {
            true => text.ansi().to_string(),
            false => text.to_string(),
        };
        if self.0.use_stderr() {
            say(format_args!("minivmm: {}", styled(io::stderr().is_terminal()).trim_end()));
            return ExitStatus::Usage;
        }
        told(print(&styled(io::stdout().is_terminal())).map(|()| ExitStatus::Success))
    }
}

/// A word where clap expects none: a key of a disk, most likely, or a disk if there is such a file, or
/// else a command for the guest.
fn improve(mut error: clap::Error) -> clap::Error {
    let place = match error.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return error,
    };
    let Some(ContextValue::String(word)) = error.get(place) else { return error };
    let tip = if let Some(name) = word.strip_prefix("--") {
        if !is_disk_key(name) {
            return error;
        }
        format!("{name} is a key of --disk: --disk IMAGE,{name}=VALUE")
    } else if word.starts_with('-') {
        return error;
    } else if Path::new(word).exists() {
        format!("to give the guest a disk: --disk {word}")
    } else {
        format!(
            "a command for the guest stands behind --: minivmm [OPTIONS] -- {word}; minivmm's own are 'bench', 'check', 'crash', 'log' and 'top'"
        )
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

fn is_disk_key(name: &str) -> bool {
    let key = format!("  {name}=");
    !name.is_empty() && DiskOptions::keys_help().lines().any(|line| line.starts_with(&key))
}
