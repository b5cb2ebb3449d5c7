//! The end in order: vCPUs, then the devices' I/O, then the images; then the statistics.
//!
//! Owns the waiting for each, and its limits. A host whose disk hangs must not hang us without a
//! word: past the limit we say who still holds the I/O, and fail.

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

use super::build::Machine;
use super::{StatsTarget, VmmError};
use crate::disk::Image;
use crate::files::{Inventory, Opened};
use crate::kvm::run_page::RunPage;
use crate::sandbox::{Role, Ticket};
use crate::signals::{Arrived, Signals};
use crate::stats::{ExitStats, Stats};
use crate::sync::unpoisoned;
use crate::vcpu::Exits;

/// Draining I/O, or a vCPU that waits for it, may take so long, where `--stop-timeout` says nothing.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// After so long we say what we wait for.
const SILENT_MAX: Duration = Duration::from_secs(3);
/// A reader of the statistics is waited for so long.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// How often we look.
const LOOK: Duration = Duration::from_millis(5);
/// How often a vCPU's thread is kicked anew: the signal may come just before a system call.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// What went wrong at the end.
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
        /// The host's answer.
        source: io::Error,
    },
    /// The image's last name has gone.
    #[error(
        "disk image {path} was deleted, or another file has taken its name, while the VM ran: what the guest wrote is lost"
    )]
    Deleted {
        /// As named on the command line.
        path: PathBuf,
    },
    /// The image's file was cut.
    #[error(
        "disk image {path} was cut by another program, from {before} to {now} bytes, while the VM ran: what lay beyond \
         is lost"
    )]
    Cut {
        /// As named on the command line.
        path: PathBuf,
        /// Its bytes at the start.
        before: u64,
        /// The least that it had since.
        now: u64,
    },
    /// What was done is not wholly in the write log.
    #[error("the write log of disk image {path} could not be written: it ends too early")]
    Log {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No thread for it.
    #[error("cannot start a thread")]
    Thread(#[from] io::Error),
}

/// How long the end may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the CPUs to stop, and again for the devices' I/O in flight.
    drain: Duration,
    /// For the last fdatasync of each image, which may have much to write; without a limit: for ever.
    close: Option<Duration>,
}

impl Patience {
    /// As `--stop-timeout` says, if it does.
    pub fn new(limit: Option<Duration>) -> Self {
        Self { drain: limit.unwrap_or(DRAIN_MAX), close: limit }
    }
}

/// A vCPU's thread, and how to reach it.
pub struct VcpuThread {
    /// Its thread.
    pub thread: JoinHandle<()>,
    /// Its shared page.
    pub page: Arc<RunPage>,
}

/// The thread that does at the end what may hang, so that the main thread can say so. It is there from the
/// beginning: a guest that runs lets no thread be started any more.
pub struct Ender(Sender<Box<dyn FnOnce() + Send>>);

/// What it has been given to do.
struct Work<T> {
    answer: Receiver<T>,
    /// Once there is one; `None` in it if the thread panicked.
    answered: Option<Option<T>>,
}

impl Ender {
    /// Starts the thread. It goes with this, or with the process if it hangs.
    pub fn start() -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let ticket = Ticket::new(Role::End);
        thread::Builder::new().name("end".into()).spawn(move || {
            ticket.enter();
            for order in received {
                order();
            }
        })?;
        Ok(Self(orders))
    }

    fn begin<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
        let (done, answer) = mpsc::channel();
        // A thread that is gone drops the channel, which is an answer.
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

    /// What came of it, when it is finished.
    fn result(self) -> Option<T> {
        self.answered.flatten()
    }
}

/// A disk: where it is, and the image itself.
pub struct OpenDisk {
    /// For messages.
    pub path: PathBuf,
    /// The image.
    pub image: Arc<Image>,
}

/// Stops the vCPUs. The flag that they look at is set already.
pub fn stop_vcpus(threads: &[VcpuThread], patience: Patience, signals: &Signals) -> Result<(), StopError> {
    let mut kicked: Option<Instant> = None;
    let done = || {
        if kicked.is_none_or(|at| at.elapsed() >= KICK_AGAIN) {
            kicked = Some(Instant::now());
            for vcpu in threads.iter().filter(|vcpu| !vcpu.thread.is_finished()) {
                vcpu.page.set_immediate_exit();
                // A thread that has ended meanwhile needs no signal.
                let _ = vcpu.thread.kill(SIGRTMIN());
            }
        }
        threads.iter().all(|vcpu| vcpu.thread.is_finished())
    };
    wait_until(done, || "the guest's CPUs".into(), Some(patience.drain), signals)
}

/// Stops every device: when this returns without error no I/O is in flight.
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

/// What the host still has, and of which image.
fn in_flight(disks: &[OpenDisk]) -> String {
    let words = disks.iter().filter_map(|disk| {
        let count: u64 = disk.image.queue_stats().iter().map(|queue| queue.in_flight()).sum();
        (count > 0).then(|| format!("{count} of {}", disk.path.display()))
    });
    match words.collect::<Vec<_>>() {
        words if words.is_empty() => "the devices to stop".into(),
        words => format!("requests in flight: {}", words.join(", ")),
    }
}

/// Closes every image. The last fdatasync may have much to write: only `--stop-timeout` limits it, and a Ctrl-C that is
/// typed when we have said that we wait.
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
        log::info!("{}: {}", disk.path.display(), disk.image.counters().summary());
        if let Err(source) = result {
            let error = StopError::Sync { path: disk.path.clone(), source };
            // One is returned; those of other disks are told here.
            if let Err(earlier) = std::mem::replace(&mut failed, Err(error)) {
                log::error!("{:#}", anyhow::Error::from(earlier));
            }
        }
        if failed.is_ok() && !disk.image.readonly() {
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

/// Whether what the guest wrote is still there for whoever opens the image next.
fn is_whole(disk: &OpenDisk) -> Result<(), StopError> {
    let path = disk.path.clone();
    if disk.image.is_deleted() {
        return Err(StopError::Deleted { path });
    }
    disk.image.cut().map_or(Ok(()), |(before, now)| Err(StopError::Cut { path, before, now }))
}

/// Where the statistics go, opened before the guest runs: a path that cannot be is no surprise at
/// the end.
pub enum StatsReport {
    /// As text.
    Stderr,
    /// As JSON.
    Json(PathBuf, Opened),
}

impl StatsReport {
    /// Empties the file, if it is one.
    pub fn open(target: &StatsTarget, files: &Inventory) -> Result<Self, VmmError> {
        let Some(output) = target.output() else { return Ok(Self::Stderr) };
        Ok(Self::Json(output.path.clone(), files.open(&output)?))
    }

    /// Tells how it stands with the disks, and what the CPUs have come out of KVM for.
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
                // Whoever reads it may be gone, which is no failure of the VM.
                let _ = io::stderr().write_all(stats.to_string().as_bytes());
                Ok(())
            }
            Self::Json(path, file) => {
                replace(file, &stats).map_err(|source| VmmError::Stats { path: path.clone(), source })
            }
        }
    }
}

/// Puts new statistics in the place of the old ones, in the file that is open: with the sandbox no other can
/// be made. A lock (flock(2)) keeps readers that take one too from half of it.
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

/// Whether there is a lock. A reader has it for a moment; one that keeps it, like a file system without locks,
/// keeps nobody from the end.
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

/// Waits until `done`. Signals change nothing: whoever ends us may send several (GNU timeout sends two, a supervisor one
/// every second). Only a key, typed after we have said what we wait for, means that the user does not want to wait.
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

/// Whether it is Ctrl-C or Ctrl-\\, typed.
fn gives_up(signal: Arrived) -> bool {
    signal.typed && matches!(signal.number, libc::SIGINT | libc::SIGQUIT)
}
