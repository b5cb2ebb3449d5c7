//! What both binaries do alike: log, print, tell an error once.
//!
//! Owns the words of a log line and of an error.

use std::io::Write;

use anyhow::{Context, Result};

use super::ExitStatus;

/// The status; of an error, once it is told.
pub fn told(outcome: Result<ExitStatus>) -> ExitStatus {
    outcome.unwrap_or_else(|error| {
        // Whoever reads it may be gone; the status still says it.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitStatus::Failure
    })
}

/// To standard output, all of it. A reader that has gone, as `head` does, is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Log lines go to standard error.
pub fn start_logging(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|buffer, record| {
            writeln!(buffer, "minivmm: {}: {}", record.level().as_str().to_lowercase(), record.args())
        })
        .init();
}
