//! The host's ends of a port: a descriptor that is read or written without ever blocking.
//!
//! Owns how that is done. Standard streams are shared with other processes, which O_NONBLOCK on their open
//! file description would surprise. Pipes and terminals are therefore reopened through /proc/self/fd. What
//! cannot be reopened is checked with poll(2) before each transfer. Such a transfer is then at most as long
//! as what a pipe takes whole (pipe(7), PIPE_BUF).

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use crate::mem::Iov;

/// The maximum number of bytes in one system call.
const TRANSFER_BYTES_MAX: u64 = 64 * 1024;
/// The same for a descriptor on which only poll(2) keeps us from blocking.
const POLLED_BYTES_MAX: u64 = 4096;
/// The maximum number of pieces of guest memory in one system call.
const PIECES_MAX: usize = 64;

/// A descriptor on which no call blocks.
struct Unwaiting {
    file: File,
    bytes_max: u64,
    /// `true` if a transfer could block, so that poll(2) must be asked before it.
    ask: bool,
}

impl Unwaiting {
    fn new(fd: OwnedFd, write: bool) -> io::Result<Self> {
        let file = File::from(fd);
        if file.metadata()?.is_file() {
            // A regular file is always ready, and its offset and O_APPEND must stay those of the description
            // that was passed to us.
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

    /// Returns an error if poll(2) must be asked and the descriptor is not ready for a transfer.
    fn check(&self, events: i16) -> io::Result<()> {
        if !self.ask {
            return Ok(());
        }
        let mut asked = libc::pollfd { fd: self.file.as_raw_fd(), events, revents: 0 };
        // SAFETY: the pointer is to one valid pollfd.
        match unsafe { libc::poll(&raw mut asked, 1, 0) } {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

/// Returns `true` for a pipe or a terminal. A pseudo terminal's master is excluded: opening it makes another
/// one.
fn can_be_opened_anew(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    metadata.file_type().is_fifo() || file.is_terminal() && metadata.rdev() != libc::makedev(5, 2)
}

fn pieces(iov: &Iov) -> libc::c_int {
    // At most PIECES_MAX pieces, by `Iov::part`.
    libc::c_int::try_from(iov.as_iovecs().len()).unwrap_or(libc::c_int::MAX)
}

fn outcome(result: isize) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The result of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// This many bytes were moved, at least one.
    Bytes(u64),
    /// No bytes for now: wait for the descriptor.
    Later,
    /// No bytes any more.
    End,
}

/// The source of a guest's input.
pub struct Source {
    from: Unwaiting,
    at_end: bool,
}

impl Source {
    /// Creates a source that reads `fd`.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self { from: Unwaiting::new(fd.as_fd().try_clone_to_owned()?, false)?, at_end: false })
    }

    /// Returns the descriptor to wait for, or `None` once it is at its end.
    pub fn fd(&self) -> Option<RawFd> {
        (!self.at_end).then(|| self.from.file.as_raw_fd())
    }

    /// Reads available input into guest memory, as far as there is room. An error counts as the end of the
    /// input.
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
        // SAFETY: the pieces are guest RAM that `part` keeps mapped. If the guest changes it meanwhile, that
        // harms only the guest.
        outcome(unsafe { libc::readv(self.from.file.as_raw_fd(), part.as_iovecs().as_ptr(), pieces(&part)) })
    }
}

/// The first error of a sink, for whoever must report it: bytes were lost.
pub type SinkError = Arc<OnceLock<io::Error>>;

/// The destination of a guest's output.
pub struct Sink {
    to: Unwaiting,
    closed: bool,
    error: SinkError,
}

impl Sink {
    /// Creates a sink that writes to `fd`.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        let to = Unwaiting::new(fd.as_fd().try_clone_to_owned()?, true)?;
        Ok(Self { to, closed: false, error: SinkError::default() })
    }

    /// Returns where the sink's first error is stored. A reader that went away is no error.
    pub fn error(&self) -> SinkError {
        Arc::clone(&self.error)
    }

    /// Returns the descriptor to wait for, or `None` once nothing can be written any more.
    pub fn fd(&self) -> Option<RawFd> {
        (!self.closed).then(|| self.to.file.as_raw_fd())
    }

    /// Writes guest memory from byte `done` on, as far as the descriptor has room.
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
