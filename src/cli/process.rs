//! What both binaries do alike: start, log, print, report an error once, exit.
//!
//! Owns the prefix of a log line and of an error: `minivmm: error: ...`, `minivmm: warning: ...`.

use std::fmt::{Arguments, Display};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Answer, ExitStatus};
use crate::signals::Signals;

/// How long a stalled reader of standard error is waited for.
const READER_MAX: Duration = Duration::from_secs(3);

/// Runs a binary from its first instruction to its exit. Signals are blocked before anything else, so that
/// each stays pending until it is read. `run` gets the arguments once `parse` has parsed them; `last` is called
/// in every case.
pub fn begin<A>(
    parse: impl FnOnce() -> Result<A, Answer>,
    run: impl FnOnce(A, Signals) -> ExitStatus,
    last: impl FnOnce(),
) -> ! {
    let signals = Signals::block().context("cannot block signals");
    // A panic has already been reported.
    let status = catch_unwind(AssertUnwindSafe(|| match signals {
        Ok(signals) => with_args(parse, run, signals),
        Err(error) => report_outcome(Err(error)),
    }));
    last();
    exit_with(status.unwrap_or(ExitStatus::Failure))
}

fn with_args<A>(
    parse: impl FnOnce() -> Result<A, Answer>,
    run: impl FnOnce(A, Signals) -> ExitStatus,
    signals: Signals,
) -> ExitStatus {
    match parse() {
        Ok(args) => run(args, signals),
        Err(answer) => {
            signals.release();
            answer.give()
        }
    }
}

/// Exits. Signals stay blocked, so that one which arrives now changes nothing.
pub fn exit_with(status: ExitStatus) -> ! {
    std::process::exit(status.code())
}

/// An error in the command line that was found only after it had been parsed.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct WrongUsage(pub anyhow::Error);

/// Returns the status. An error is reported first, and gives the status of a failure or of wrong usage.
pub fn report_outcome(outcome: Result<ExitStatus>) -> ExitStatus {
    outcome.unwrap_or_else(|error| {
        say_error(format_args!("{error:#}"));
        if error.is::<WrongUsage>() { ExitStatus::Usage } else { ExitStatus::Failure }
    })
}

/// Reports all `errors`. Returns success if there are none, otherwise the last one's status.
pub fn report_errors(errors: impl Iterator<Item = anyhow::Error>) -> ExitStatus {
    errors.fold(ExitStatus::Success, |_, error| report_outcome(Err(error)))
}

/// Reports an error on standard error.
pub fn say_error(text: impl Display) {
    say(format_args!("minivmm: error: {text}"));
}

/// Writes a line to standard error. Its reader may be gone or stalled; the exit status still says what
/// happened.
pub fn say(text: Arguments<'_>) {
    let mut stderr = io::stderr().lock();
    let limit = Timespec { tv_sec: READER_MAX.as_secs().cast_signed(), tv_nsec: 0 };
    if let Ok(1..) = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&limit)) {
        let _ = stderr.write_fmt(format_args!("{text}\n"));
    }
}

/// Writes all of `text` to standard output. A reader that has gone, such as `head`, is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Starts logging to standard error.
pub fn start_logging(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|buffer, record| {
            let level = match record.level() {
                log::Level::Warn => "warning".to_owned(),
                level => level.as_str().to_lowercase(),
            };
            writeln!(buffer, "minivmm: {level}: {}", record.args())
        })
        .init();
}
