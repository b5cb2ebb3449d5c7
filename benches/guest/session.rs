//! A VMM at work: its process, what its guest says on the serial line, and when.
//!
//! Owns the time stamps (taken when the bytes have come, before they are looked at), the answers to
//! the guest, and the end of the process whatever happens.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A running VMM.
pub struct Session {
    child: Child,
    input: ChildStdin,
    lines: Receiver<(Instant, String)>,
    started: Instant,
    log: PathBuf,
    last_lines: Vec<String>,
    step_limit: Duration,
}

/// How many of the last lines an error shows.
const LAST_LINES: usize = 12;

impl Session {
    /// Starts it. What it says on standard error goes to `log`; a step may take `step_limit`.
    pub fn start(mut command: Command, log: PathBuf, step_limit: Duration) -> Result<Self> {
        let errors = std::fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let started = Instant::now();
        let child = command.spawn();
        let mut child = child.with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the VMM has no standard streams");
        };
        let (sender, lines) = channel();
        std::thread::Builder::new().name("serial".into()).spawn(move || listen(output, &sender))?;
        Ok(Self { child, input, lines, started, log, last_lines: Vec::new(), step_limit })
    }

    /// The VMM's process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest says this; how long after the VMM's start that was.
    pub fn expect(&mut self, wanted: &str) -> Result<Duration> {
        let deadline = Instant::now() + self.step_limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((when, line)) => {
                    // A kernel message may have begun the line.
                    let told = line.find("@ ").map(|at| line[at + 2..].trim().to_owned());
                    self.remember(line);
                    match told {
                        Some(told) if told == wanted => return Ok(when - self.started),
                        Some(told) if told.starts_with("failed: ") => bail!("the guest says: {told}"),
                        _ => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no \"{wanted}\" in {} s; {}", self.step_limit.as_secs(), self.last_words())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the VMM has ended before \"{wanted}\"; {}", self.last_words())
                }
            }
        }
    }

    /// Lets the guest go on.
    pub fn answer(&mut self) -> Result<()> {
        self.input.write_all(b"\n").and_then(|()| self.input.flush()).context("the VMM takes no input")
    }

    /// Waits for the VMM's own end.
    pub fn end(mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + self.step_limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the guest has not ended in {} s; {}", self.step_limit.as_secs(), self.last_words());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn remember(&mut self, line: String) {
        if self.last_lines.len() == LAST_LINES {
            self.last_lines.remove(0);
        }
        self.last_lines.push(line);
    }

    fn last_words(&self) -> String {
        let errors = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!("console: {}; standard error: {}", self.last_lines.join(" | "), errors.trim())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has ended already, or nobody waits for it any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes lines on, each with the time at which its last bytes came.
fn listen(mut output: ChildStdout, lines: &Sender<(Instant, String)>) {
    let mut chunk = [0; 4096];
    let mut rest = Vec::new();
    while let Ok(count) = output.read(&mut chunk) {
        let when = Instant::now();
        if count == 0 {
            return;
        }
        rest.extend_from_slice(&chunk[..count]);
        while let Some(at) = rest.iter().position(|&byte| byte == b'\n') {
            let line = String::from_utf8_lossy(&rest[..at]).trim().to_owned();
            rest.drain(..=at);
            if lines.send((when, line)).is_err() {
                return;
            }
        }
    }
}
