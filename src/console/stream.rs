//! The host's ends of a port: a descriptor that is read or written without ever waiting.
//!
//! Owns how that is done. Standard streams are shared with other processes, which O_NONBLOCK on
//! their open file description would surprise; so pipes and terminals are opened anew through
//! /proc/self/fd. What cannot be opened anew is asked with poll(2) before each transfer, which is
//! then at most as long as a pipe takes whole (pipe(7), PIPE_BUF).

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use crate::mem::Iov;

/// At most so much is moved in one system call.
const TRANSFER_BYTES_MAX: u64 = 64 * 1024;
/// And so much where only poll(2) keeps us from waiting.
const POLLED_BYTES_MAX: u64 = 4096;
/// Pieces of guest memory in one system call.
const PIECES_MAX: usize = 64;

/// A descriptor on which nothing waits.
struct Unwaiting {
    file: File,
    bytes_max: u64,
    /// A transfer may wait, so poll(2) is asked before it.
    ask: bool,
}

impl Unwaiting {
    fn new(fd: OwnedFd, write: bool) -> io::Result<Self> {
        let file = File::from(fd);
        if file.metadata()?.is_file() {
            // Always ready; and its offset and O_APPEND are those of the description that we were given.
            return Ok(Self { file, bytes_max: TRANSFER_BYTES_MAX, ask: false });
        }
        if can_be_opened_anew(&file)
            && let Ok(anew) = OpenOptions::new()
                .read(!write)
                .write(write)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        {
            return Ok(Self { file: anew, bytes_max: TRANSFER_BYTES_MAX, ask: false });
        }
        Ok(Self { file, bytes_max: POLLED_BYTES_MAX, ask: true })
    }

    /// Ready for a transfer, as far as poll(2) has to be asked.
    fn check(&self, events: i16) -> io::Result<()> {
        if !self.ask {
            return Ok(());
        }
        let mut asked = libc::pollfd { fd: self.file.as_raw_fd(), events, revents: 0 };
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&raw mut asked, 1, 0) } {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

/// Pipes, and terminals but for a pseudo terminal's master, of which opening makes another one.
fn can_be_opened_anew(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    metadata.file_type().is_fifo() || file.is_terminal() && metadata.rdev() != libc::makedev(5, 2)
}

fn pieces(iov: &Iov) -> libc::c_int {
    // At most PIECES_MAX of them, by `Iov::part`.
    libc::c_int::try_from(iov.as_iovecs().len()).unwrap_or(libc::c_int::MAX)
}

fn outcome(result: isize) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What a transfer came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes, at least one.
    Bytes(u64),
    /// None for now: the descriptor is to be waited for.
    Later,
    /// None any more.
    End,
}

/// Where a guest's input comes from.
pub struct Source {
    from: Unwaiting,
    at_end: bool,
}

impl Source {
    /// Reads `fd`.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self { from: Unwaiting::new(fd.as_fd().try_clone_to_owned()?, false)?, at_end: false })
    }

    /// The descriptor to wait for; none once it is at its end.
    pub fn fd(&self) -> Option<RawFd> {
        (!self.at_end).then(|| self.from.file.as_raw_fd())
    }

    /// Reads into guest memory what there is, as far as it reaches. An error is an end.
    pub fn read(&mut self, to: &Iov) -> Moved {
        if self.at_end {
            return Moved::End;
        }
        match self.try_read(to) {
            Ok(count) if count > 0 => Moved::Bytes(count),
            Err(error) if is_later(&error) => Moved::Later,
            result => {
                if let Err(error) = result {
                    log::warn!("the guest's input ends here: {error}");
                }
                self.at_end = true;
                Moved::End
            }
        }
    }

    fn try_read(&self, to: &Iov) -> io::Result<u64> {
        self.from.check(libc::POLLIN)?;
        let part = to.part(0, self.from.bytes_max, PIECES_MAX);
        // SAFETY: the pieces are guest RAM that `part` keeps mapped; that the guest may change it
        // meanwhile is its own affair.
        outcome(unsafe { libc::readv(self.from.file.as_raw_fd(), part.as_iovecs().as_ptr(), pieces(&part)) })
    }
}

/// The first error of a sink, for whoever has to tell of it: bytes were lost.
pub type SinkError = Arc<OnceLock<io::Error>>;

/// Where a guest's output goes.
pub struct Sink {
    to: Unwaiting,
    closed: bool,
    error: SinkError,
}

impl Sink {
    /// Writes to `fd`.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        let to = Unwaiting::new(fd.as_fd().try_clone_to_owned()?, true)?;
        Ok(Self { to, closed: false, error: SinkError::default() })
    }

    /// Where its first error will be. A reader that went away is none.
    pub fn error(&self) -> SinkError {
        Arc::clone(&self.error)
    }

    /// The descriptor to wait for; none once nothing can be written any more.
    pub fn fd(&self) -> Option<RawFd> {
        (!self.closed).then(|| self.to.file.as_raw_fd())
    }

    /// Writes what is in guest memory from byte `done` on, as far as there is room.
    pub fn write(&mut self, from: &Iov, done: u64) -> Moved {
        if self.closed {
            return Moved::End;
        }
        match self.try_write(from, done) {
            Ok(count) if count > 0 => Moved::Bytes(count),
            Err(error) if is_later(&error) => Moved::Later,
            result => {
                self.closed = true;
                let error = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                if error.kind() != io::ErrorKind::BrokenPipe {
                    let _ = self.error.set(error);
                }
                Moved::End
            }
        }
    }

    fn try_write(&self, from: &Iov, done: u64) -> io::Result<u64> {
        self.to.check(libc::POLLOUT)?;
        let part = from.part(done, self.to.bytes_max, PIECES_MAX);
        // SAFETY: as in `Source::try_read`.
        outcome(unsafe { libc::writev(self.to.file.as_raw_fd(), part.as_iovecs().as_ptr(), pieces(&part)) })
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
