//! The command's side of the machine: the console device with its ports, and the launcher's messages.
//!
//! Owns which port leads where, and what the launcher has reported so far. The launcher's port leads to pipes
//! whose other ends are here, so the device knows nothing of messages.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::limits::Heard;
use crate::boot::{Piece, Tail};
use crate::console::stream::{Sink, SinkError, Source};
use crate::console::{ConsoleDevice, PortConfig};
use crate::job::report::{CommandEnd, Incomplete, Message, Reader, TAKEN};
use crate::job::{Archive, Part};
use crate::terminal::{self, Input};

/// Our end of the launcher's port, and what it has reported of the command.
pub struct JobEnd {
    messages: File,
    answers: File,
    reader: Reader,
    arrived: bool,
    incomplete: Option<Incomplete>,
    started: Option<Instant>,
    ended: Option<(CommandEnd, Instant)>,
    outputs: [(&'static str, SinkError); 2],
}

/// How long the phases of a run took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// From the start of the first CPU to the start of the command.
    pub boot: Duration,
    /// From the start of the command to its end.
    pub command: Duration,
}

/// Makes the device with the command's streams and with `more`, and the end that receives the launcher's
/// messages.
pub fn console(more: Option<PortConfig>) -> io::Result<(ConsoleDevice, JobEnd)> {
    let (messages, to_us) = io::pipe()?;
    let (from_us, answers) = io::pipe()?;
    let output = |fd: OwnedFd| {
        let sink = Sink::new(fd)?;
        let error = sink.error();
        Ok::<_, io::Error>((sink, error))
    };
    let (stdout, stdout_error) = output(dup(&io::stdout())?)?;
    let (stderr, stderr_error) = output(dup(&io::stderr())?)?;
    let port = |name, source, sink, after_others| PortConfig { name, source, sink, after_others };
    let mut ports = vec![
        port("org.minivmm.stdin", Some(stdin()?), None, false),
        port("org.minivmm.stdout", None, Some(stdout), false),
        port("org.minivmm.stderr", None, Some(stderr), false),
        port("org.minivmm.control", Some(Source::new(from_us)?), Some(Sink::new(to_us)?), true),
    ];
    ports.extend(more);
    let device = ConsoleDevice::new(ports)?;
    let outputs = [("standard output", stdout_error), ("standard error", stderr_error)];
    let end = JobEnd {
        messages: OwnedFd::from(messages).into(),
        answers: OwnedFd::from(answers).into(),
        reader: Reader::default(),
        arrived: false,
        incomplete: None,
        started: None,
        ended: None,
        outputs,
    };
    Ok((device, end))
}

/// Returns the parts of a command's archive, to be appended to the initramfs.
pub fn tail(archive: &Archive) -> Tail<'_> {
    let piece = |part| match part {
        &Part::File { ref path, len } => Piece::File(path, len),
        Part::Bytes(bytes) => Piece::Bytes(bytes),
    };
    Tail { pieces: archive.parts().iter().map(piece).collect(), unpacked_bytes: archive.unpacked_bytes() }
}

fn dup(stream: &impl std::os::fd::AsFd) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}

/// Returns standard input, or an empty input if another job is in the terminal's foreground: a read would then stop
/// this process (SIGTTIN).
fn stdin() -> io::Result<Source> {
    if terminal::input() == Input::Background {
        log::warn!("minivmm is in the background of its terminal: the command's input is empty");
        return Source::new(File::open("/dev/null")?);
    }
    Source::new(io::stdin())
}

impl JobEnd {
    /// The descriptor that is readable when the launcher has sent something.
    pub fn as_raw_fd(&self) -> RawFd {
        self.messages.as_raw_fd()
    }

    /// Reads the launcher's messages and answers them. Called when there is something to read.
    pub fn listen(&mut self) {
        let mut bytes = [0; 512];
        // End of file would mean that the device is gone; then the machine is being stopped too.
        let count = self.messages.read(&mut bytes).unwrap_or(0);
        for message in self.reader.take(bytes.get(..count).unwrap_or_default()) {
            self.arrived = true;
            match message {
                Message::Arrived => {}
                Message::Incomplete(what) if self.incomplete.is_none() => {
                    self.incomplete = Some(what);
                    self.answer();
                }
                Message::Started => _ = self.started.get_or_insert_with(Instant::now),
                Message::Ended(end) if self.ended.is_none() => {
                    self.ended = Some((end, Instant::now()));
                    self.answer();
                }
                // Only the first such message counts.
                Message::Incomplete(_) | Message::Ended(_) => {}
            }
        }
    }

    /// Tells the launcher that it may end, which ends the guest. This write does not block: the pipe has
    /// room, because it is written at most twice.
    fn answer(&mut self) {
        if let Err(error) = self.answers.write_all(TAKEN) {
            log::error!("cannot answer the guest's launcher: {error}");
        }
    }

    /// Returns what the guest has reported of its command.
    pub fn heard(&self) -> Heard {
        match () {
            () if self.ended.is_some() || self.incomplete.is_some() => Heard::Ended,
            () if self.arrived => Heard::Arrived,
            () => Heard::Nothing,
        }
    }

    /// Returns which of the command's files did not arrive, if that is why the command was not started.
    pub fn incomplete(&self) -> Option<Incomplete> {
        self.incomplete
    }

    /// Returns how the command ended, or `None` if the guest has not reported it. `begin` is when the CPUs
    /// were started.
    pub fn ended(&self, begin: Instant) -> Option<(CommandEnd, Times)> {
        let (end, at) = self.ended?;
        let started = self.started.unwrap_or(at);
        let times =
            Times { boot: started.saturating_duration_since(begin), command: at.duration_since(started) };
        Some((end, times))
    }

    /// Returns the first output stream that lost data, and why; `None` if none did.
    pub fn lost_output(&self) -> Option<(&'static str, io::Error)> {
        self.outputs.iter().find_map(|(what, error)| {
            let error = error.get()?;
            let copy = error.raw_os_error().map(io::Error::from_raw_os_error);
            Some((*what, copy.unwrap_or_else(|| io::Error::from(error.kind()))))
        })
    }
}
