//! The check of one image: a command in a process group of its own, with a time limit.
//!
//! Owns how the check is started, ended and judged. By default an ext4 is recovered as at a boot: `e2fsck -p`
//! replays the journal and deletes orphaned inodes. Then `e2fsck -fn` must find nothing wrong.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::child::{EndCause, Group};
use minivmm::files::output;
use minivmm::text::shell_word;

/// Bytes of a check's output that are kept, from its end.
const OUTPUT_MAX: u64 = 64 << 10;

/// The command that is run on each image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A shell command, in which `{}` stands for the image.
    Shell(String),
    /// The path of e2fsck.
    Ext4(PathBuf),
}

/// The state that is checked, as the environment of the check describes it.
#[derive(Debug, Clone, Default)]
pub struct CheckedState {
    /// Number of entries that had completed.
    pub entry: usize,
    /// Name of the state.
    pub state: String,
    /// The last mark before the crash; `None` if there is none.
    pub mark: Option<String>,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckOutcome {
    /// The image is good.
    Good,
    /// The image is bad, or the check failed.
    Bad {
        /// How the command ended.
        why: String,
        /// The end of its output.
        output: String,
    },
    /// The check was interrupted.
    Interrupted,
}

/// Why no image can be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The command cannot be started.
    #[error("cannot run the check {command}")]
    Start {
        /// The command.
        command: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The shell returned 126 or 127, so it could not run the command. That says nothing about the image.
    #[error("the check cannot be run (status {status}): {output}")]
    NotFound {
        /// The exit status of the shell.
        status: i32,
        /// The output of the shell.
        output: String,
    },
}

/// Returns the path of e2fsck. It is looked for in PATH and where system administration programs usually are.
pub fn find_e2fsck() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join("e2fsck")).find(|program| program.is_file())
}

impl Check {
    /// Returns the commands in order, each with the highest exit status that means success.
    fn steps(&self, image: &Path) -> Vec<(Command, i32)> {
        match self {
            Self::Shell(command) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(command.replace("{}", &shell_word(image)));
                vec![(shell, 0)]
            }
            Self::Ext4(e2fsck) => [("-p", 1), ("-fn", 0)]
                .map(|(how, good)| {
                    let mut command = Command::new(e2fsck);
                    command.arg(how).arg(image);
                    (command, good)
                })
                .into(),
        }
    }

    /// Runs the check on `image`. The file `output` is replaced and receives the output of the command.
    pub fn run(
        &self,
        image: &Path,
        about: &CheckedState,
        output: &Path,
        limit: Duration,
        stops: &[&AtomicBool],
    ) -> Result<CheckOutcome, CheckError> {
        let started = |source| CheckError::Start { command: self.to_string(), source };
        let deadline = Instant::now() + limit;
        for (mut command, good) in self.steps(image) {
            // The output of a command that succeeded is discarded.
            let said = output::make_anew(output).map_err(started)?;
            command.env("MINIVMM_CRASH_ENTRY", about.entry.to_string());
            command.env("MINIVMM_CRASH_STATE", &about.state);
            command.env("MINIVMM_CRASH_MARK", about.mark.as_deref().unwrap_or_default());
            command.stdin(Stdio::null()).stdout(said.try_clone().map_err(started)?);
            let group = Group::start(command.stderr(said)).map_err(started)?;
            let why = match wait(group, deadline, stops).map_err(started)? {
                CommandEnd::Interrupted => return Ok(CheckOutcome::Interrupted),
                CommandEnd::Late => format!("it was not done after {} s", limit.as_secs_f64()),
                CommandEnd::Signal(signal) => format!("signal {signal} has ended it"),
                CommandEnd::Status(status) if (0..=good).contains(&status) => continue,
                CommandEnd::Status(status @ (126 | 127)) if matches!(self, Self::Shell(_)) => {
                    return Err(CheckError::NotFound { status, output: tail(output).trim().to_owned() });
                }
                CommandEnd::Status(status) => format!("exit status {status}"),
            };
            return Ok(CheckOutcome::Bad { why, output: tail(output) });
        }
        Ok(CheckOutcome::Good)
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shell(command) => f.write_str(command),
            Self::Ext4(_) => f.write_str("e2fsck -p {}, then e2fsck -fn {}"),
        }
    }
}

/// How a command ended.
enum CommandEnd {
    Status(i32),
    Signal(i32),
    Late,
    Interrupted,
}

/// Waits until the command ends, the deadline passes or a stop is requested. No process of the group is left
/// afterwards.
fn wait(group: Group, deadline: Instant, stops: &[&AtomicBool]) -> io::Result<CommandEnd> {
    let ended = group.watch(deadline, stops);
    let status = group.end()?;
    Ok(match (ended?, status.code()) {
        (EndCause::Interrupted, _) => CommandEnd::Interrupted,
        (EndCause::Late, _) => CommandEnd::Late,
        (EndCause::ByItself, Some(code)) => CommandEnd::Status(code),
        (EndCause::ByItself, None) => CommandEnd::Signal(status.signal().unwrap_or_default()),
    })
}

/// Returns the end of the output.
fn tail(output: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut said = File::open(output)?;
        let length = said.metadata()?.len();
        said.seek(io::SeekFrom::Start(length.saturating_sub(OUTPUT_MAX)))?;
        let mut bytes = Vec::new();
        said.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // An unreadable output is no reason to lose the verdict.
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}
