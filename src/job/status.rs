//! The status file (`--status-file`): how a run ended, for programs.
//!
//! Owns its schema, which docs/reference/status-file.md describes. `version` changes when a field changes its
//! meaning or is removed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::report::{CommandEnd, signal_name};

/// The schema's version.
const VERSION: u32 = 1;

/// The file, opened before anything is started (`files::output`), so that a path that cannot be written is
/// reported at once.
#[derive(Debug)]
pub struct StatusFile(File, PathBuf);

/// How a run ended.
#[derive(Debug, Serialize)]
pub struct Status {
    version: u32,
    /// minivmm's exit status.
    pub exit_status: i32,
    /// The kind of the end.
    pub cause: &'static str,
    /// The same in words.
    pub message: String,
    /// The last lines that the guest's kernel printed; null if they do not matter for this end.
    pub kernel_messages: Option<Vec<String>>,
    /// How the command ended; null if it did not.
    pub command: Option<CommandStatus>,
    /// How long the phases of the run took.
    pub seconds: Seconds,
}

/// How the command ended. Fields that do not apply are null.
#[derive(Debug, Serialize)]
pub struct CommandStatus {
    /// Its own exit status.
    pub exit_status: Option<u8>,
    /// The signal that killed it.
    pub signal: Option<u8>,
    /// The signal's name.
    pub signal_name: Option<&'static str>,
    /// The errno with which it failed to start.
    pub errno: Option<i32>,
}

/// Durations in seconds; null if that phase was not reached or did not end.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct Seconds {
    /// From the start of the first CPU to the start of the command.
    pub boot: Option<f64>,
    /// From the start of the command to its end, including the delivery of all its output.
    pub command: Option<f64>,
    /// From the start of minivmm to its end.
    pub total: f64,
}

impl Seconds {
    /// Converts to seconds, rounded to the microsecond.
    pub fn of(duration: Duration) -> f64 {
        (duration.as_secs_f64() * 1e6).round() / 1e6
    }
}

impl From<CommandEnd> for CommandStatus {
    fn from(end: CommandEnd) -> Self {
        let mut status = Self { exit_status: None, signal: None, signal_name: None, errno: None };
        match end {
            CommandEnd::Exited(code) => status.exit_status = Some(code),
            CommandEnd::Killed(signal) => {
                status.signal = Some(signal);
                status.signal_name = signal_name(signal);
            }
            CommandEnd::NotFound => status.errno = Some(libc::ENOENT),
            CommandEnd::NotStarted(_, errno) => status.errno = Some(errno),
        }
        status
    }
}

impl Status {
    /// Creates the status of an end for which no command's end is known.
    pub fn new(exit_status: i32, cause: &'static str, message: String) -> Self {
        Self {
            version: VERSION,
            exit_status,
            cause,
            message,
            kernel_messages: None,
            command: None,
            seconds: Seconds::default(),
        }
    }
}

impl StatusFile {
    /// Takes the open file, which must be empty, and its path.
    pub fn new(file: File, path: &Path) -> Self {
        Self(file, path.to_owned())
    }

    /// Writes the status. An error names the file.
    pub fn write(mut self, status: &Status) -> io::Result<()> {
        let written = serde_json::to_vec_pretty(status).map_err(io::Error::other).and_then(|mut text| {
            text.push(b'\n');
            self.0.write_all(&text)
        });
        written.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.1.display())))
    }
}
