//! The launcher's messages about its command (guest-images/guest/job.c), and their meaning in words and
//! numbers.
//!
//! Owns the messages: lines of at most `LINE_BYTES_MAX` bytes. They come from the guest, which may send
//! anything; what is no message is skipped.

use std::fmt;

/// The maximum length of a message; a longer line is none.
const LINE_BYTES_MAX: usize = 128;
/// The reply for which the launcher waits before it powers the guest off.
pub const TAKEN: &[u8] = b"ok\n";

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandEnd {
    /// It exited with this status.
    Exited(u8),
    /// It was killed by this signal.
    Killed(u8),
    /// It does not exist in the guest.
    NotFound,
    /// It exists, but the guest's kernel refused this step with this errno.
    NotStarted(Step, i32),
}

/// A step in starting the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Entering the working directory.
    Workdir,
    /// execve(2).
    Exec,
}

impl CommandEnd {
    /// Returns minivmm's exit status for it, by the convention of shells: 128+n for a signal, 127 for a
    /// command that did not start. As 124, 125 and 126 report what became of the VM, a command's own are
    /// mapped to 123.
    pub fn exit_status(self) -> i32 {
        match self {
            Self::Exited(124..=126) => 123,
            Self::Exited(status) => i32::from(status),
            Self::Killed(signal) => 128 + i32::from(signal),
            Self::NotFound | Self::NotStarted(..) => 127,
        }
    }

    /// Returns a message for the user, or `None` if the status says everything.
    pub fn in_words(self, command: &str) -> Option<String> {
        match self {
            Self::Exited(status @ 124..=126) => Some(format!(
                "{command} exited with status {status}, which is minivmm's own; minivmm's is 123"
            )),
            Self::Exited(_) => None,
            Self::Killed(signal) => {
                Some(format!("{command} was killed by signal {signal}{}", Named(signal_name(signal))))
            }
            Self::NotFound => Some(format!("the guest has no command {command}")),
            Self::NotStarted(Step::Workdir, errno) => {
                let why = std::io::Error::from_raw_os_error(errno);
                Some(format!("{command} was not started: the guest cannot enter --workdir: {why}"))
            }
            // The command's file exists, so what is missing is its interpreter.
            Self::NotStarted(Step::Exec, libc::ENOENT) => Some(format!(
                "{command} was not started: its interpreter (the program that its first line names, or its \
                 dynamic loader) is not in the guest; --add brings it"
            )),
            Self::NotStarted(Step::Exec, errno) => {
                let why = std::io::Error::from_raw_os_error(errno);
                Some(format!("{command} was not started: the guest's kernel refuses it: {why}"))
            }
        }
    }
}

struct Named(Option<&'static str>);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

/// Returns the name of a signal that may kill a command.
pub fn signal_name(signal: u8) -> Option<&'static str> {
    Some(match i32::from(signal) {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        _ => return None,
    })
}

/// How many of the command's files did not arrive in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incomplete {
    /// The number of files that are missing or cut short.
    pub missing: u64,
    /// The number of files that were promised, as far as the guest knows.
    pub promised: u64,
}

/// A message of the launcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// The launcher runs: the kernel has booted, and has unpacked at least the launcher.
    Arrived,
    /// The command is about to start.
    Started,
    /// The command has ended.
    Ended(CommandEnd),
    /// The command was not started, because some of its files are missing.
    Incomplete(Incomplete),
}

/// Extracts messages from a stream of bytes.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    /// `true` if the current line is longer than any message.
    too_long: bool,
}

impl Reader {
    /// Takes some bytes, and returns the messages that end in them.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.too_long |= self.line.len() == LINE_BYTES_MAX;
                if !self.too_long {
                    self.line.push(byte);
                }
                continue;
            }
            match parse(&self.line).filter(|_| !self.too_long) {
                Some(message) => messages.push(message),
                None => log::debug!("the guest's launcher said what is no message"),
            }
            self.line.clear();
            self.too_long = false;
        }
        messages
    }
}

fn parse(line: &[u8]) -> Option<Message> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let message = match (words.next()?, words.next(), words.next()) {
        ("arrived", None, None) => Message::Arrived,
        ("started", None, None) => Message::Started,
        ("incomplete", Some(missing), Some(promised)) => {
            let (missing, promised) = (missing.parse().ok()?, promised.parse().ok()?);
            Message::Incomplete(Incomplete { missing, promised })
        }
        ("exited", Some(status), None) => Message::Ended(CommandEnd::Exited(status.parse().ok()?)),
        ("killed", Some(signal), None) => {
            let signal = signal.parse().ok().filter(|signal| (1..=64).contains(signal))?;
            Message::Ended(CommandEnd::Killed(signal))
        }
        ("failed", Some(step), Some(errno)) => {
            let errno = errno.parse().ok().filter(|errno| (1..4096).contains(errno))?;
            Message::Ended(match step {
                "find" => CommandEnd::NotFound,
                "workdir" => CommandEnd::NotStarted(Step::Workdir, errno),
                "exec" => CommandEnd::NotStarted(Step::Exec, errno),
                _ => return None,
            })
        }
        _ => return None,
    };
    words.next().is_none().then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_whatever_way_they_are_cut() {
        let text =
            b"arrived\nincomplete 2 300\nincomplete 2\nincomplete -1 2\nstarted\nnonsense\nexited 7\nkilled 9\nkilled 0\nexited 256\nfailed find 2\nfailed exec 8\n";
        let expected = vec![
            Message::Arrived,
            Message::Incomplete(Incomplete { missing: 2, promised: 300 }),
            Message::Started,
            Message::Ended(CommandEnd::Exited(7)),
            Message::Ended(CommandEnd::Killed(9)),
            Message::Ended(CommandEnd::NotFound),
            Message::Ended(CommandEnd::NotStarted(Step::Exec, 8)),
        ];
        for size in 1..text.len() {
            let mut reader = Reader::default();
            let messages: Vec<_> = text.chunks(size).flat_map(|chunk| reader.take(chunk)).collect();
            assert_eq!(messages, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn a_line_without_an_end_takes_no_memory() {
        let mut reader = Reader::default();
        for _ in 0..1000 {
            assert!(reader.take(&[b'x'; 1000]).is_empty());
        }
        assert!(reader.line.capacity() <= 2 * LINE_BYTES_MAX);
        assert!(reader.take(b"\n").is_empty());
        assert_eq!(reader.take(b"started\n"), [Message::Started]);
    }

    #[test]
    fn no_status_of_a_command_looks_like_an_end_of_the_vm() {
        for status in 0..=255 {
            let ours = CommandEnd::Exited(status).exit_status();
            assert!(!(124..=126).contains(&ours));
            assert!(ours == i32::from(status) || CommandEnd::Exited(status).in_words("x").is_some());
        }
        assert_eq!(CommandEnd::Killed(9).exit_status(), 137);
    }
}
