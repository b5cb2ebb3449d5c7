//! The orderly stop: vCPUs, then the devices' I/O, then the images; then the statistics.
//!
//! Owns the wait for each, and its limits. If the host's disk hangs, minivmm must not hang silently. Past the
//! limit it reports who still holds the I/O, and fails.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::machine::{Machine, OpenDisk};
use super::{StatsTarget, VmmError};
use crate::files::{Inventory, Opened};
use crate::kvm::run_page::RunPage;
use crate::sandbox::{Role, SandboxEntry};
use crate::signals::{Arrived, Signals};
use crate::stats::{ExitStats, Stats};
use crate::sync::unpoisoned;
use crate::vcpu::Exits;

/// How long draining I/O, or a vCPU that waits for I/O, may take if `--stop-timeout` is not given.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// After this time we print what we wait for.
const SILENT_MAX: Duration = Duration::from_secs(3);
/// How long we wait for a reader of the statistics to release its lock.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// The maximum interval between two checks.
const LOOK: Duration = Duration::from_millis(5);
/// How often a vCPU's thread is kicked again: the signal may arrive just before a system call.
const KICK_AGAIN: Duration = Duration::from_millis(20);

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
    drain: Duration,
    /// The limit for each image's last fdatasync, which may have much to write; `None` sets no limit.
    close: Option<Duration>,
}

impl Patience {
    /// Creates the limits from `--stop-timeout`; `None` if it is not given.
    pub fn new(limit: Option<Duration>) -> Self {
        Self { drain: limit.unwrap_or(DRAIN_MAX), close: limit }
    }
}

/// A vCPU's thread, and the means to stop it.
pub struct VcpuThread {
    /// The thread.
    pub thread: JoinHandle<()>,
    /// The page that the vCPU shares with KVM.
    pub page: Arc<RunPage>,
}

/// The thread that does whatever may hang during the stop, so that the main thread can report it. It is
/// started at the beginning, because the sandbox allows no new thread once the guest runs.
pub struct Ender(Sender<Box<dyn FnOnce() + Send>>);

/// A piece of work that the [`Ender`] was given.
struct Work<T> {
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

    fn begin<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
        let (done, answer) = mpsc::channel();
        // A thread that is gone drops the channel, which counts as an answer.
        let _ = self.0.send(Box::new(move || _ = done.send(work())));
        Work { answer, answered: None }
    }
}

impl<T> Work<T> {
    fn is_finished(&mut self) -> bool {
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
    fn result(self) -> Option<T> {
        self.answered.flatten()
    }
}

/// Stops the vCPUs. The caller has already set the flag that they check.
pub fn stop_vcpus(threads: &[VcpuThread], patience: Patience, signals: &Signals) -> Result<(), StopError> {
    let mut kicked: Option<Instant> = None;
    let done = || {
        if kicked.is_none_or(|at| at.elapsed() >= KICK_AGAIN) {
            kicked = Some(Instant::now());
            for vcpu in threads.iter().filter(|vcpu| !vcpu.thread.is_finished()) {
                vcpu.page.set_immediate_exit();
                // The signal is not needed if the thread has ended meanwhile.
                let _ = vcpu.thread.kill(SIGRTMIN());
            }
        }
        threads.iter().all(|vcpu| vcpu.thread.is_finished())
    };
    wait_until(done, || "the guest's CPUs".into(), Some(patience.drain), signals)
}

/// Stops every device. When this returns without an error, no I/O is in flight.
pub fn drain(
    ender: &Ender,
    machine: &Machine,
    patience: Patience,
    signals: &Signals,
) -> Result<(), StopError> {
    let mine = machine.transports.clone();
    let mut work = ender.begin(move || {
        for transport in &mine {
            unpoisoned(transport.lock()).stop();
        }
    });
    wait_until(|| work.is_finished(), || in_flight(&machine.disks), Some(patience.drain), signals)
}

/// Describes how many requests the host still holds, and for which images.
fn in_flight(disks: &[OpenDisk]) -> String {
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

/// Where the statistics are written. It is opened before the guest runs, so that a bad path is reported then
/// and not at the end.
pub enum StatsReport {
    /// Standard error, as text.
    Stderr,
    /// An open file, as JSON.
    Json(PathBuf, Opened),
}

impl StatsReport {
    /// Opens the target; a file is emptied.
    pub fn open(target: &StatsTarget, files: &Inventory) -> Result<Self, VmmError> {
        let Some(output) = target.output() else { return Ok(Self::Stderr) };
        Ok(Self::Json(output.path.clone(), files.open(&output)?))
    }

    /// Writes the disks' statistics and the counts of the CPUs' exits from KVM.
    pub fn write(&mut self, disks: &[OpenDisk], exits: &Exits) -> Result<(), VmmError> {
        let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let exits = ExitStats {
            mmio_read: at(&exits.mmio_reads),
            mmio_write: at(&exits.mmio_writes),
            port_read: at(&exits.port_reads),
            port_write: at(&exits.port_writes),
            other: at(&exits.others),
        };
        let stats = Stats::of(disks.iter().map(|disk| &*disk.image), exits);
        match self {
            Self::Stderr => {
                // The reader of standard error may be gone, which is no failure of the VM.
                let _ = io::stderr().write_all(stats.to_string().as_bytes());
                Ok(())
            }
            Self::Json(path, file) => {
                replace(file, &stats).map_err(|source| VmmError::Stats { path: path.clone(), source })
            }
        }
    }
}

/// Replaces the old statistics in the open file with new ones. The sandbox allows no other file to be
/// created, so the file is rewritten in place. A lock (flock(2)) protects readers that take it too from a
/// partial file.
fn replace(opened: &mut Opened, stats: &Stats) -> io::Result<()> {
    let Opened { file, is_ours } = opened;
    if !*is_ours {
        return stats.write_json(io::BufWriter::new(&*file));
    }
    let mut text = Vec::new();
    stats.write_json(&mut text)?;
    let locked = lock(file);
    file.set_len(0)?;
    file.rewind()?;
    let written = file.write_all(&text);
    if locked {
        let _ = rustix::fs::flock(&*file, FlockOperation::Unlock);
    }
    written
}

/// Tries to lock the file, and returns `true` on success. A reader holds its lock only for a moment. A reader
/// that keeps it, or a file system without locks, does not keep the VM from ending.
fn lock(file: &File) -> bool {
    let until = Instant::now() + LOCK_MAX;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return true,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(LOOK),
            Err(_) => return false,
        }
    }
}

/// Waits until `done`. Signals change nothing: whoever ends minivmm may send several (GNU timeout sends two,
/// a supervisor one every second). Only a key that is typed after the message which says what we wait for
/// means that the user does not want to wait.
fn wait_until(
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
