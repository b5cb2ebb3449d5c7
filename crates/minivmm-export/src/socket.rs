//! The sockets on which front ends find the disks.
//!
//! Owns their making and removal, and the rule that nobody's socket is taken away: a path is replaced only if it is a
//! socket on which nobody listens, and removed only while it is still the socket that was made here.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, open, statat, unlinkat};
use rustix::net::{AddressFamily, SocketType, sockopt};

/// Where the front end of a disk is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A socket that is made at this path.
    Path(PathBuf),
    /// A listening socket that whoever started us has opened under this number.
    Descriptor(RawFd),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Descriptor(number) => write!(f, "descriptor {number}"),
        }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {place}: {problem}")]
pub struct SocketError {
    place: Place,
    problem: SocketProblem,
}

/// What is wrong with a socket.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it")]
pub enum SocketProblem {
    #[error("another process listens on it already")]
    InUse,
    #[error("it exists and is no socket: remove it, or give another name")]
    NoSocket,
    #[error("it is no open descriptor")]
    NotOpen,
    #[error("it is no listening stream socket of the family AF_UNIX")]
    NoListener,
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    /// The socket itself, which does not wait.
    pub socket: UnixListener,
    made: Option<Made>,
}

/// A socket's name, which was made here.
#[derive(Debug)]
pub struct Made {
    directory: File,
    name: OsString,
    /// Device and inode of the socket.
    identity: (u64, u64),
}

impl Listener {
    /// Begins to listen. Who may connect follows from the umask, since connecting needs the permission to write.
    pub fn open(place: &Place) -> Result<Self, SocketError> {
        let opened = match place {
            Place::Path(path) => bind(path),
            Place::Descriptor(number) => adopt(*number),
        };
        opened.map_err(|problem| SocketError { place: place.clone(), problem })
    }

    /// Takes the name of the socket, if it was made here: to be removed at the end.
    pub fn take_name(&mut self) -> Option<Made> {
        self.made.take()
    }
}

impl Made {
    /// Returns the directory that the socket is in.
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// Removes the socket, unless another one has taken its name.
    pub fn remove(&self) -> io::Result<()> {
        let found = statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if found.is_ok_and(|found| (found.st_dev, found.st_ino) == self.identity) {
            unlinkat(&self.directory, &self.name, AtFlags::empty())?;
        }
        Ok(())
    }
}

fn bind(path: &Path) -> Result<Listener, SocketProblem> {
    let socket = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(SocketProblem::NoSocket);
            }
            match UnixStream::connect(path) {
                // A process that was killed leaves its socket behind.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Ok(_) => return Err(SocketProblem::InUse),
                Err(error) => return Err(error.into()),
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    socket.set_nonblocking(true)?;
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.to_owned();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = File::from(open(parent, flags, Mode::empty()).map_err(io::Error::from)?);
    let found = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
    let identity = (found.st_dev, found.st_ino);
    Ok(Listener { socket, made: Some(Made { directory, name, identity }) })
}

fn adopt(number: RawFd) -> Result<Listener, SocketProblem> {
    // SAFETY: F_SETFD touches no memory, and says whether the descriptor is open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(SocketProblem::NotOpen);
    }
    // SAFETY: open, and passed to us for this: nobody else in this process uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    if !is_listening(socket.as_fd()) {
        return Err(SocketProblem::NoListener);
    }
    let socket = UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    Ok(Listener { socket, made: None })
}

fn is_listening(socket: BorrowedFd<'_>) -> bool {
    sockopt::socket_acceptconn(socket) == Ok(true)
        && sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
}
