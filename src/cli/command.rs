//! The options of `minivmm ... -- COMMAND`, and the report of every run's end.
//!
//! Owns what the options mean for the machine (its console, its kernel parameters), and the words and causes
//! of each end. What is sent to the guest is `job`'s.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::ExitStatus;
use super::process::{say, say_error};
use crate::job::report::CommandEnd;
use crate::job::status::{Seconds, Status, StatusFile};
use crate::job::{Add, Job};
use crate::sync::unpoisoned;
use crate::vmm::{BootTimeout, ConsoleTarget, Ending};

/// A command for the guest.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Running a command")]
pub struct CommandArgs {
    /// Run COMMAND in the guest as its only job: `minivmm -- sh -c 'uname -r'`
    ///
    /// Its standard streams and its exit status are minivmm's (see below). Kernel messages are discarded,
    /// unless -v sends them to standard error or --console elsewhere. When COMMAND ends, the guest ends,
    /// and with it whatever COMMAND left in the background.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,

    /// Copy a file or directory into the guest (repeatable); a program comes with its shared libraries
    ///
    /// Without GUEST, an absolute HOST has the same path in the guest, and a relative one is placed in `/`.
    /// A GUEST that ends with `/` is the directory to place it in.
    #[arg(long = "add", value_name = "HOST[:GUEST]", value_parser = OsStringValueParser::new().try_map(|text| Add::parse(&text)), requires = "command")]
    adds: Vec<Add>,

    /// Set an environment variable of the command (repeatable); without =VALUE, copy it from here
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = OsStringValueParser::new().try_map(variable), requires = "command")]
    env: Vec<OsString>,

    /// Start the command in this directory of the guest [default: /]
    #[arg(long, value_name = "DIR", requires = "command")]
    workdir: Option<PathBuf>,

    /// End a guest whose init has not reported within this many seconds; 0: never [default: 60]
    ///
    /// The test guest's init reports before it starts COMMAND. A guest that does not report is ended, with status 125
    /// and the kernel's last lines. --timeout limits how long COMMAND itself may run. The default is longer on an
    /// emulated machine.
    #[arg(long, value_name = "SECONDS", value_parser = boot_timeout, requires = "command")]
    boot_timeout: Option<BootTimeout>,

    /// Write how the run ended to this file, as JSON
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
}

fn variable(text: OsString) -> Result<OsString, String> {
    let at = text.as_bytes().iter().position(|&byte| byte == b'=');
    if text.is_empty() || at == Some(0) {
        return Err("expected NAME=VALUE, or NAME for the value that it has here".into());
    }
    if at.is_some() {
        return Ok(text);
    }
    let value = std::env::var_os(&text).ok_or_else(|| {
        let name = text.to_string_lossy();
        format!("{name} is not set here: give {name}=VALUE")
    })?;
    let mut both = text;
    both.push("=");
    both.push(value);
    Ok(both)
}

fn boot_timeout(text: &str) -> Result<BootTimeout, String> {
    let wrong = || "expected a number of seconds, such as 120, or 0 for no limit".to_string();
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) if seconds <= 0.0 => Ok(BootTimeout::Never),
        Ok(duration) if !duration.is_zero() => Ok(BootTimeout::Given(duration)),
        _ => Err(wrong()),
    }
}

/// The requested console would mix with the command's output.
#[derive(Debug, thiserror::Error)]
#[error("with a COMMAND, standard output belongs to the command: use --console stderr, off or file=PATH")]
pub struct ConsoleTaken;

impl CommandArgs {
    /// Returns `true` if there is a command.
    pub fn is_given(&self) -> bool {
        !self.command.is_empty()
    }

    /// Returns the command and its arguments.
    pub fn words(&self) -> &[OsString] {
        &self.command
    }

    /// Returns the name of the command, for messages.
    pub fn name(&self) -> String {
        self.command.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Returns the path of the status file, or `None` if none was asked for.
    pub fn status_file(&self) -> Option<&Path> {
        self.status_file.as_deref()
    }

    /// Returns the files and folders of this host that are added to the guest.
    pub fn added(&self) -> impl Iterator<Item = &Path> {
        self.adds.iter().map(|add| add.host.as_path())
    }

    /// Returns where kernel messages go.
    pub fn console(
        &self,
        asked: Option<ConsoleTarget>,
        verbose: bool,
    ) -> Result<ConsoleTarget, ConsoleTaken> {
        match (self.is_given(), asked) {
            (false, asked) => Ok(asked.unwrap_or(ConsoleTarget::Stdio)),
            (true, Some(ConsoleTarget::Stdio)) => Err(ConsoleTaken),
            (true, Some(asked)) => Ok(asked),
            (true, None) if verbose => Ok(ConsoleTarget::Stderr),
            (true, None) => Ok(ConsoleTarget::Off),
        }
    }

    /// Returns how long the guest's init may take to report.
    pub fn boot_timeout(&self) -> BootTimeout {
        self.boot_timeout.unwrap_or(BootTimeout::Default)
    }

    /// Returns what is sent to the guest, or `None` if there is no command.
    pub fn into_job(self) -> Option<Job> {
        let job = Job { argv: self.command, env: self.env, workdir: self.workdir, adds: self.adds };
        (!job.argv.is_empty()).then_some(job)
    }
}

/// How a run ended, in words.
#[derive(Debug)]
pub struct End {
    /// How it ended, or the message of its failure.
    pub outcome: Result<Ending, String>,
    /// The last lines that the guest's kernel printed; `None` if they do not matter.
    pub kernel_lines: Option<Vec<String>>,
    /// `true` if the user has already seen these lines.
    pub lines_were_shown: bool,
}

impl End {
    /// Describes a run that failed before it had a guest.
    pub fn failed(message: String) -> Self {
        Self { outcome: Err(message), kernel_lines: None, lines_were_shown: false }
    }

    /// Describes a run that a signal ended before it had a machine.
    pub fn signal(number: i32) -> Self {
        Self { outcome: Ok(Ending::Signal(number)), kernel_lines: None, lines_were_shown: false }
    }
}

/// A run whose end is to be reported.
pub struct RunReporter {
    began: Instant,
    command: String,
    quiet: bool,
    file: Mutex<Option<StatusFile>>,
}

impl RunReporter {
    /// Starts the run's clock.
    pub fn begin(command: String, quiet: bool) -> Self {
        Self { began: Instant::now(), command, quiet, file: Mutex::new(None) }
    }

    /// Sets the file to which the end of the run is written.
    pub fn keep_in(&self, file: Option<StatusFile>) {
        *unpoisoned(self.file.lock()) = file;
    }

    /// Reports how the run ended, and returns the exit status. The status file gets everything; standard
    /// error gets what the exit status does not say by itself. The file is written first, because nobody may
    /// read standard error.
    pub fn tell(&self, end: &End) -> ExitStatus {
        let outcome = &end.outcome;
        let exit_status = match outcome {
            Ok(ending) => ExitStatus::from(*ending),
            Err(_) => ExitStatus::Failure,
        };
        let (cause, message) = self.cause(outcome);
        let written = self.write_status(end, exit_status, cause, message.clone());
        let is_error = exit_status == ExitStatus::Failure;
        if let Some(lines) = &end.kernel_lines
            && !lines.is_empty()
            && !end.lines_were_shown
            && (is_error || !self.quiet)
        {
            let lines: String = lines.iter().map(|line| format!("  {line}\n")).collect();
            say(format_args!(
                "minivmm: the last lines of the guest's console:\n{}",
                lines.trim_end_matches('\n')
            ));
        }
        match outcome {
            _ if is_error => say_error(&message),
            Ok(ending) if !self.quiet && self.is_worth_a_word(*ending) => {
                say(format_args!("minivmm: {message}"));
            }
            _ => log::info!("{message}"),
        }
        match written {
            Ok(()) => exit_status,
            Err(error) => {
                say_error(format_args!("cannot write the status file: {error}"));
                ExitStatus::Failure
            }
        }
    }

    fn write_status(
        &self,
        end: &End,
        exit_status: ExitStatus,
        cause: &'static str,
        message: String,
    ) -> std::io::Result<()> {
        let file = unpoisoned(self.file.lock()).take();
        let Some(file) = file else { return Ok(()) };
        let mut status = Status::new(exit_status.code(), cause, message);
        status.kernel_messages.clone_from(&end.kernel_lines);
        if let Ok(Ending::Command(command, times)) = &end.outcome {
            status.command = Some((*command).into());
            status.seconds.boot = Some(Seconds::of(times.boot));
            status.seconds.command = Some(Seconds::of(times.command));
        }
        status.seconds.total = Seconds::of(self.began.elapsed());
        file.write(&status)
    }

    /// Returns `true` if the exit status alone could be mistaken for the command's.
    fn is_worth_a_word(&self, ending: Ending) -> bool {
        match ending {
            Ending::Command(end, _) => end.in_words(&self.command).is_some(),
            _ => !self.command.is_empty(),
        }
    }

    fn cause(&self, outcome: &Result<Ending, String>) -> (&'static str, String) {
        let command = &self.command;
        let ending = match outcome {
            Ok(ending) => *ending,
            Err(message) => return ("failure", message.clone()),
        };
        match ending {
            Ending::PowerOff => ("power-off", "the guest has powered off".into()),
            Ending::Reset => ("reset", "the guest has reset".into()),
            Ending::Quit => ("quit", "the user has ended the VM".into()),
            Ending::GuestPanic => ("guest-panic", "the guest's kernel has panicked".into()),
            Ending::Timeout => ("timeout", "--timeout has passed, and the VM was ended".into()),
            Ending::Signal(signal) => ("signal", format!("signal {signal} has ended the VM")),
            Ending::ExitPort(value) => {
                ("exit-port", format!("the guest has written {value:#x} to the exit port"))
            }
            Ending::NoReport => (
                "no-report",
                format!(
                    "the guest has ended without reporting how {command} ended (-v shows its kernel's messages; \
                     an --initrd of your own needs the test guest's init and its minivmm-job)"
                ),
            ),
            Ending::Incomplete(what) => (
                "incomplete",
                format!(
                    "the guest has not started {command}: {} of the {} files that were to come with it are missing \
                     or cut, because its kernel had too little memory to unpack them; give it more --memory",
                    what.missing, what.promised
                ),
            ),
            Ending::BootTimeout(limit) => (
                "boot-timeout",
                format!(
                    "the guest has not reported within {} s, and was ended: its init must start minivmm-job, which \
                     reports on a port of virtio-console. An --initrd of your own needs both, and a kernel with \
                     virtio-console (docs/running-commands.md); -v shows the kernel's messages, and --boot-timeout \
                     SECONDS waits longer",
                    limit.as_secs_f64()
                ),
            ),
            Ending::Command(end, _) => {
                let words = end.in_words(command);
                match end {
                    CommandEnd::Exited(status) => {
                        let plain = || format!("{command} exited with status {status}");
                        ("command-exited", words.unwrap_or_else(plain))
                    }
                    CommandEnd::Killed(_) => ("command-killed", words.unwrap_or_default()),
                    CommandEnd::NotFound => {
                        let hint = self.hint().unwrap_or_default();
                        ("command-not-found", words.unwrap_or_default() + &hint)
                    }
                    CommandEnd::NotStarted(..) => ("command-not-started", words.unwrap_or_default()),
                }
            }
        }
    }

    /// Returns a hint if a command of this name exists on this host.
    fn hint(&self) -> Option<String> {
        let here = if self.command.contains('/') {
            Some(PathBuf::from(&self.command))
        } else {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|directory| directory.join(&self.command)).find(|p| p.is_file())
        };
        let here = here.filter(|path| path.is_file())?;
        Some(format!("; this host's can be brought along: --add {}", here.display()))
    }
}
