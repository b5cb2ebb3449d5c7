//! The thread of one socket: waits for a front end, serves its messages, and waits for the next.
//!
//! Owns a connection's life. However it ends, the rings are stopped after their I/O in flight, and the disk is ready
//! for the next front end; other disks do not notice.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use minivmm::sandbox::{self, Role, SandboxEntry};
use minivmm_block::ratelimit::RateLimit;
use minivmm_block::sync::unpoisoned;
use minivmm_block::warn_limited;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::Backend;
use crate::message::{self, Arrived};

/// How long the rest of a message may take.
const REST_MAX: Duration = Duration::from_secs(5);
/// How often we look for the rest of a message.
const LOOK: Duration = Duration::from_millis(1);

/// What the main thread shares with a socket's thread, to end it.
#[derive(Debug)]
struct Ending {
    wanted: AtomicBool,
    wake: EventFd,
    /// The present connection.
    connection: Mutex<Option<UnixStream>>,
}

/// A socket's thread.
#[derive(Debug)]
pub struct SocketThread {
    thread: JoinHandle<()>,
    ending: Arc<Ending>,
}

impl SocketThread {
    /// Starts the thread. It serves nobody before every thread is in the sandbox.
    pub fn start(name: String, listener: UnixListener, backend: Backend) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let ending = Arc::new(Ending { wanted: AtomicBool::new(false), wake, connection: Mutex::new(None) });
        let server = Server {
            path: backend.image().config().path.display().to_string(),
            listener,
            backend: Arc::new(Mutex::new(backend)),
            ending: Arc::clone(&ending),
            errors: RateLimit::for_guest_errors("export"),
        };
        let entry = SandboxEntry::new(Role::Socket);
        let thread = Builder::new().name(name).spawn(move || {
            entry.enter();
            sandbox::wait_for_all();
            server.run();
        })?;
        Ok(Self { thread, ending })
    }

    /// Asks the thread to end, after the I/O in flight.
    pub fn end(&self) {
        self.ending.wanted.store(true, Ordering::SeqCst);
        // The counter cannot be full: this is written once.
        let _ = self.ending.wake.write(1);
        // A front end that sends half a message, or takes no reply, is not waited for.
        if let Some(connection) = &*unpoisoned(self.ending.connection.lock()) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Returns `true` once the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Ending {
    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }
}

/// The messages of one connection.
pub struct Messages {
    handler: BackendReqHandler<Mutex<Backend>>,
    /// The same connection, to look at what has arrived.
    seen: UnixStream,
    /// When the first part of the present message was seen; `None` if there is none.
    half_since: Option<Instant>,
}

/// What a look for the next message has led to.
pub enum Next {
    /// A message was handled, and another may be there.
    Handled,
    /// No whole message is there.
    Waiting,
    /// The connection is to end.
    Ended(End),
}

impl Messages {
    /// Takes the messages of `connection` to `backend`.
    pub fn new(connection: UnixStream, backend: Arc<Mutex<Backend>>) -> io::Result<Self> {
        let seen = connection.try_clone()?;
        Ok(Self { handler: BackendReqHandler::from_stream(connection, backend), seen, half_since: None })
    }

    /// Handles the next message, if it is there as a whole.
    pub fn handle_next(&mut self) -> io::Result<Next> {
        match message::look(&self.seen)? {
            Arrived::Part if self.half_since.get_or_insert_with(Instant::now).elapsed() > REST_MAX => {
                return Ok(Next::Ended(End::HalfMessage));
            }
            Arrived::Part => return Ok(Next::Waiting),
            Arrived::TooManyDescriptors => return Ok(Next::Ended(End::TooManyDescriptors)),
            Arrived::Whole | Arrived::End => self.half_since = None,
        }
        Ok(match self.handler.handle_request() {
            Ok(()) | Err(Error::SocketRetry(_)) => Next::Handled,
            Err(Error::Disconnected | Error::SocketBroken(_)) => Next::Ended(End::Closed),
            Err(error) => Next::Ended(End::Refused(error)),
        })
    }
}

impl AsRawFd for Messages {
    fn as_raw_fd(&self) -> RawFd {
        self.seen.as_raw_fd()
    }
}

/// One socket, its disk, and the present front end.
struct Server {
    /// Path of the image, for messages.
    path: String,
    listener: UnixListener,
    backend: Arc<Mutex<Backend>>,
    ending: Arc<Ending>,
    errors: RateLimit,
}

/// How a connection has ended.
pub enum End {
    /// The front end has closed it.
    Closed,
    /// The front end has broken the protocol, or asked for what cannot be.
    Refused(Error),
    /// The front end has sent only a part of a message.
    HalfMessage,
    /// The front end has sent more descriptors than any message may have.
    TooManyDescriptors,
    /// The front end has truncated memory that it shares.
    MemoryLost,
    /// We are to end.
    Wanted,
}

impl Server {
    fn run(mut self) {
        while !self.ending.is_wanted() {
            let waits = [self.listener.as_raw_fd(), self.ending.wake.as_raw_fd()];
            if let Err(error) = wait(waits) {
                log::error!("{}: cannot wait for a front end: {error}", self.path);
                return;
            }
            match self.listener.accept() {
                Ok((connection, _)) => self.serve(connection),
                Err(error) if is_transient(&error) => {}
                Err(error) => {
                    warn_limited!(self.errors, "{}: cannot accept a front end: {error}", self.path);
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn serve(&mut self, connection: UnixStream) {
        log::info!("{}: a front end has connected", self.path);
        let served = self.serve_until_end(connection);
        unpoisoned(self.backend.lock()).end();
        *unpoisoned(self.ending.connection.lock()) = None;
        let path = &self.path;
        match served {
            Ok(End::Closed) => log::info!("{path}: the front end has disconnected"),
            Ok(End::Wanted) => {}
            Ok(End::Refused(error)) => {
                warn_limited!(self.errors, "{path}: the front end is disconnected: {}", Chained(&error));
            }
            Ok(End::HalfMessage) => warn_limited!(
                self.errors,
                "{path}: the front end is disconnected: in {} s it has sent only a part of a message",
                REST_MAX.as_secs()
            ),
            Ok(End::TooManyDescriptors) => warn_limited!(
                self.errors,
                "{path}: the front end is disconnected: it has sent more descriptors than a message may have"
            ),
            Ok(End::MemoryLost) => warn_limited!(
                self.errors,
                "{path}: the front end is disconnected: it has truncated memory that it shares"
            ),
            Err(error) => warn_limited!(self.errors, "{path}: the front end cannot be served: {error}"),
        }
    }

    fn serve_until_end(&self, connection: UnixStream) -> io::Result<End> {
        let loss = unpoisoned(self.backend.lock()).begin()?;
        *unpoisoned(self.ending.connection.lock()) = Some(connection.try_clone()?);
        let mut messages = Messages::new(connection, Arc::clone(&self.backend))?;
        loop {
            let [message, ..] = wait([messages.as_raw_fd(), self.ending.wake.as_raw_fd(), loss.as_raw_fd()])?;
            if self.ending.is_wanted() {
                return Ok(End::Wanted);
            }
            if loss.is_lost() {
                return Ok(End::MemoryLost);
            }
            if !message {
                continue;
            }
            match messages.handle_next()? {
                Next::Handled => {}
                Next::Waiting => std::thread::sleep(LOOK),
                Next::Ended(_) if self.ending.is_wanted() => return Ok(End::Wanted),
                Next::Ended(end) => return Ok(end),
            }
        }
    }
}

/// Returns `true` if accept(2) has failed because a front end changed its mind.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | ConnectionAborted | Interrupted)
}

/// Waits until one of the descriptors can be read or is at its end. Returns which are.
fn wait<const N: usize>(fds: [RawFd; N]) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let count = libc::nfds_t::try_from(N).map_err(io::Error::other)?;
    // SAFETY: the pointer and the count are those of one array.
    if unsafe { libc::poll(polled.as_mut_ptr(), count, -1) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|fd| fd.revents != 0))
}

/// Displays an error of `vhost` with the causes that it wraps, in one line.
struct Chained<'a>(&'a Error);

impl std::fmt::Display for Chained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Error::ReqHandlerError(error) = self.0 else { return self.0.fmt(f) };
        write!(f, "{error}")?;
        let mut cause = error.get_ref().and_then(|error| error.source());
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
