//! The end of disks: their I/O in flight, the last fdatasync, and whether whoever opens an image next finds what was
//! written.
//!
//! Owns the wait for each, and its limits. If the host's disk hangs, minivmm must not hang silently. Past the
//! limit it reports who still holds the I/O, and fails.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use super::OpenDisk;
use crate::sandbox::{Role, SandboxEntry};
use crate::signals::{Arrived, Signals};

/// How long draining I/O, or a vCPU that waits for I/O, may take if `--stop-timeout` is not given.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// After this time we print what we wait for.
const SILENT_MAX: Duration = Duration::from_secs(3);
/// The maximum interval between two checks.
const LOOK: Duration = Duration::from_millis(5);

/// Why the stop failed.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Something hangs in the host.
    #[error(
        "gave up waiting for {what}: the host's kernel still holds the I/O, and data that the guest has not \
         flushed may be lost"
    )]
    Stuck {
        /// What we waited for.
        what: String,
    },
    /// The last fdatasync failed.
    #[error("the last fdatasync of disk image {path} failed: what the guest wrote may be lost")]
    Sync {
        /// The image.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The image's last link is gone.
    #[error(
        "disk image {path} was deleted, or another file has taken its name, while the VM ran: what the guest wrote is lost"
    )]
    Deleted {
        /// The path as named on the command line.
        path: PathBuf,
    },
    /// The image's file was truncated.
    #[error(
        "disk image {path} was cut by another program, from {before} to {now} bytes, while the VM ran: what lay beyond \
         is lost"
    )]
    Cut {
        /// The path as named on the command line.
        path: PathBuf,
        /// Its size in bytes at the start.
        before: u64,
        /// Its smallest size in bytes since the start.
        now: u64,
    },
    /// The write log is incomplete.
    #[error("the write log of disk image {path} could not be written: it ends too early")]
    Log {
        /// The image.
        path: PathBuf,
        /// Why it could not be written.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[from] io::Error),
}

/// How long the stop may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The limit for the CPUs to stop, and again for the devices' I/O in flight.
    pub drain: Duration,
    /// The limit for each image's last fdatasync, which may have much to write; `None` sets no limit.
    pub close: Option<Duration>,
}

impl Patience {
    /// Creates the limits from `--stop-timeout`; `None` if it is not given.
    pub fn new(limit: Option<Duration>) -> Self {
        Self { drain: limit.unwrap_or(DRAIN_MAX), close: limit }
    }
}

/// The thread that does whatever may hang during the stop, so that the main thread can report it. It is
/// started at the beginning, because the sandbox allows no new thread once the guest runs.
pub struct Ender(Sender<Box<dyn FnOnce() + Send>>);

/// A piece of work that the [`Ender`] was given.
pub struct Work<T> {
    answer: Receiver<T>,
    /// `None` until the work has finished; `Some(None)` if the thread panicked.
    answered: Option<Option<T>>,
}

impl Ender {
    /// Starts the thread. It ends when this value is dropped, or with the process if it hangs.
    pub fn start() -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let entry = SandboxEntry::new(Role::End);
        thread::Builder::new().name("end".into()).spawn(move || {
            entry.enter();
            for order in received {
                order();
            }
        })?;
        Ok(Self(orders))
    }

    /// Begins `work`, which may hang.
    pub fn begin<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
        let (done, answer) = mpsc::channel();
        // A thread that is gone drops the channel, which counts as an answer.
        let _ = self.0.send(Box::new(move || _ = done.send(work())));
        Work { answer, answered: None }
    }
}

impl<T> Work<T> {
    /// Returns `true` once the work has finished.
    pub fn is_finished(&mut self) -> bool {
        if self.answered.is_none() {
            self.answered = match self.answer.try_recv() {
                Ok(answer) => Some(Some(answer)),
                Err(TryRecvError::Disconnected) => Some(None),
                Err(TryRecvError::Empty) => None,
            };
        }
        self.answered.is_some()
    }

    /// Returns the result of finished work, or `None` if the thread panicked.
    pub fn result(self) -> Option<T> {
        self.answered.flatten()
    }
}

/// Describes how many requests the host still holds, and for which images.
pub fn in_flight(disks: &[OpenDisk]) -> String {
    let words = disks.iter().filter_map(|disk| {
        let count: u64 = disk.image.stats.queues().iter().map(|queue| queue.in_flight()).sum();
        (count > 0).then(|| format!("{count} of {}", disk.path.display()))
    });
    match words.collect::<Vec<_>>() {
        words if words.is_empty() => "the devices to stop".into(),
        words => format!("requests in flight: {}", words.join(", ")),
    }
}

/// Closes every image. The last fdatasync may have much to write. Only `--stop-timeout` limits it, or a
/// Ctrl-C typed after the message that says what we wait for.
pub fn close(
    ender: &Ender,
    disks: &[OpenDisk],
    patience: Patience,
    signals: &Signals,
) -> Result<(), StopError> {
    let mut failed = Ok(());
    for disk in disks {
        let image = Arc::clone(&disk.image);
        let mut work = ender.begin(move || image.close());
        let what = || format!("the last fdatasync of {}", disk.path.display());
        wait_until(|| work.is_finished(), what, patience.close, signals)?;
        let result = work.result().unwrap_or_else(|| Err(io::Error::other("the thread panicked")));
        log::info!("{}: {}", disk.path.display(), disk.image.stats.counters().summary());
        if let Err(source) = result {
            let error = StopError::Sync { path: disk.path.clone(), source };
            // Only the last error is returned; those of other disks are reported here.
            if let Err(earlier) = std::mem::replace(&mut failed, Err(error)) {
                log::error!("{:#}", anyhow::Error::from(earlier));
            }
        }
        if failed.is_ok() && !disk.image.config().readonly {
            failed = is_whole(disk);
        }
        let image = Arc::clone(&disk.image);
        let mut work = ender.begin(move || image.close_log());
        let what = || format!("the write log of {}", disk.path.display());
        wait_until(|| work.is_finished(), what, patience.close, signals)?;
        let logged = work.result().unwrap_or_else(|| Err(io::Error::other("the thread panicked")));
        if let Err(source) = logged
            && failed.is_ok()
        {
            failed = Err(StopError::Log { path: disk.path.clone(), source });
        }
    }
    failed
}

/// Returns an error if whoever opens the image next will not find what the guest wrote.
fn is_whole(disk: &OpenDisk) -> Result<(), StopError> {
    let path = disk.path.clone();
    if disk.image.file().is_deleted() {
        return Err(StopError::Deleted { path });
    }
    disk.image.file().cut().map_or(Ok(()), |(before, now)| Err(StopError::Cut { path, before, now }))
}

/// Waits until `done`. Signals change nothing: whoever ends minivmm may send several (GNU timeout sends two,
/// a supervisor one every second). Only a key that is typed after the message which says what we wait for
/// means that the user does not want to wait.
pub fn wait_until(
    mut done: impl FnMut() -> bool,
    what: impl Fn() -> String,
    limit: Option<Duration>,
    signals: &Signals,
) -> Result<(), StopError> {
    let begin = Instant::now();
    let mut said = false;
    while !done() {
        let waited = begin.elapsed();
        let typed = std::iter::from_fn(|| signals.take()).filter(|it| gives_up(*it)).count() > 0;
        if said && typed || limit.is_some_and(|limit| waited >= limit) {
            return Err(StopError::Stuck { what: what() });
        }
        if !said && waited >= SILENT_MAX {
            said = true;
            crate::terminal::restore();
            let limit =
                limit.map_or(String::new(), |limit| format!("after {} s gives up; ", limit.as_secs_f64()));
            eprintln!("minivmm: waiting for {}; {limit}Ctrl-C on the terminal gives up now", what());
        }
        thread::sleep(LOOK.min(Duration::from_micros(200) + waited / 4));
    }
    Ok(())
}

/// Returns `true` if the signal is a typed Ctrl-C or Ctrl-\\.
fn gives_up(signal: Arrived) -> bool {
    signal.typed && matches!(signal.number, libc::SIGINT | libc::SIGQUIT)
}
