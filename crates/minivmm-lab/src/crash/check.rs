//! The check of one image: a command, in a process group of its own, for a limited time.
//!
//! Owns how it is started, ended and judged. By default an ext4 is recovered as at a boot, by
//! `e2fsck -p`, which replays the journal and deletes what nobody has open any more, and then `e2fsck -fn`
//! must find nothing to complain about.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::child::{Group, How};
use minivmm::files::output;
use minivmm::text::shell_word;

/// So much of a check's output is kept: its end.
const OUTPUT_MAX: u64 = 64 << 10;

/// What is run on each image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A command of the shell, in which `{}` is the image.
    Shell(String),
    /// e2fsck, this one.
    Ext4(PathBuf),
}

/// Which state it is that is checked, for the check's environment.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// How many entries had ended.
    pub entry: usize,
    /// The state's name.
    pub state: String,
    /// The last mark before it.
    pub mark: Option<String>,
}

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing wrong.
    Good,
    /// This.
    Bad {
        /// How the command has ended.
        why: String,
        /// What it said last.
        output: String,
    },
    /// It was not heard to the end.
    Interrupted,
}

/// Why no check is possible at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The shell, or e2fsck.
    #[error("cannot run the check {command}")]
    Start {
        /// What was to be run.
        command: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The shell's own answers 126 and 127, which say nothing about the image.
    #[error("the check cannot be run (status {status}): {output}")]
    NotFound {
        /// The shell's.
        status: i32,
        /// What it said.
        output: String,
    },
}

/// e2fsck, wherever the administrator's programs are.
pub fn find_e2fsck() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join("e2fsck")).find(|program| program.is_file())
}

impl Check {
    /// The commands, one after the other, and the highest exit status of each that is good.
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

    /// Runs it on `image`. Its output goes to `output`, a file that is made anew.
    pub fn run(
        &self,
        image: &Path,
        about: &About,
        output: &Path,
        limit: Duration,
        stops: &[&AtomicBool],
    ) -> Result<Verdict, CheckError> {
        let started = |source| CheckError::Start { command: self.to_string(), source };
        let deadline = Instant::now() + limit;
        for (mut command, good) in self.steps(image) {
            // What a command said that was content is not kept.
            let said = output::make_anew(output).map_err(started)?;
            command.env("MINIVMM_CRASH_ENTRY", about.entry.to_string());
            command.env("MINIVMM_CRASH_STATE", &about.state);
            command.env("MINIVMM_CRASH_MARK", about.mark.as_deref().unwrap_or_default());
            command.stdin(Stdio::null()).stdout(said.try_clone().map_err(started)?);
            let group = Group::start(command.stderr(said)).map_err(started)?;
            let why = match wait(group, deadline, stops).map_err(started)? {
                End::Interrupted => return Ok(Verdict::Interrupted),
                End::Late => format!("it was not done after {} s", limit.as_secs_f64()),
                End::Signal(signal) => format!("signal {signal} has ended it"),
                End::Status(status) if (0..=good).contains(&status) => continue,
                End::Status(status @ (126 | 127)) if matches!(self, Self::Shell(_)) => {
                    return Err(CheckError::NotFound { status, output: tail(output).trim().to_owned() });
                }
                End::Status(status) => format!("exit status {status}"),
            };
            return Ok(Verdict::Bad { why, output: tail(output) });
        }
        Ok(Verdict::Good)
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

/// How a command has ended.
enum End {
    Status(i32),
    Signal(i32),
    Late,
    Interrupted,
}

/// Until it has ended, the time is over, or all is to stop. Nothing of its group is left then.
fn wait(group: Group, deadline: Instant, stops: &[&AtomicBool]) -> io::Result<End> {
    let ended = group.watch(deadline, stops);
    let status = group.end()?;
    Ok(match (ended?, status.code()) {
        (How::Interrupted, _) => End::Interrupted,
        (How::Late, _) => End::Late,
        (How::ByItself, Some(code)) => End::Status(code),
        (How::ByItself, None) => End::Signal(status.signal().unwrap_or_default()),
    })
}

/// The end of what it said.
fn tail(output: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut said = File::open(output)?;
        let length = said.metadata()?.len();
        said.seek(io::SeekFrom::Start(length.saturating_sub(OUTPUT_MAX)))?;
        let mut bytes = Vec::new();
        said.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // What cannot be read is not worth losing the verdict.
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}
