//! The end in order: vCPUs, then the devices' I/O, then the images; then the statistics.
//!
//! Owns the waiting for each, and its limits. A host whose disk hangs must not hang us without a
//! word: past the limit we say who still holds the I/O, and fail.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::events::{Signals, is_ending};
use super::{StatsTarget, VmmError};
use crate::disk::Image;
use crate::kvm::run_page::RunPage;
use crate::stats::{ExitStats, Stats};
use crate::vcpu::Exits;
use crate::virtio::Transport;

/// Draining I/O, or a vCPU that waits for it, may take so long.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// After so long we say what we wait for.
const SILENT_MAX: Duration = Duration::from_secs(3);
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

/// A vCPU's thread, and how to reach it.
pub struct VcpuThread {
    /// Its thread.
    pub thread: JoinHandle<()>,
    /// Its shared page.
    pub page: Arc<RunPage>,
}

/// A disk: where it is, and the image itself.
pub struct OpenDisk {
    /// For messages.
    pub path: PathBuf,
    /// The image.
    pub image: Arc<Image>,
}

/// Stops the vCPUs. The flag that they look at is set already.
pub fn stop_vcpus(threads: &[VcpuThread], signals: &Signals) -> Result<(), StopError> {
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
    wait_until(done, "the guest's CPUs", Some(DRAIN_MAX), signals)
}

/// Stops every device: when this returns without error no I/O is in flight.
pub fn drain(transports: &[Arc<Mutex<dyn Transport>>], signals: &Signals) -> Result<(), StopError> {
    let mine = transports.to_vec();
    let work = thread::Builder::new().name("drain".into()).spawn(move || {
        for transport in &mine {
            transport.lock().unwrap_or_else(PoisonError::into_inner).stop();
        }
    })?;
    wait_until(|| work.is_finished(), "the disks' I/O in flight", Some(DRAIN_MAX), signals)
}

/// Closes every image: the last fdatasync, which may have much to write and has no limit but a signal.
pub fn close(disks: &[OpenDisk], signals: &Signals) -> Result<(), StopError> {
    let mut failed = Ok(());
    for disk in disks {
        let image = Arc::clone(&disk.image);
        let work = thread::Builder::new().name("close".into()).spawn(move || image.close())?;
        let what = format!("the last fdatasync of {}", disk.path.display());
        wait_until(|| work.is_finished(), &what, None, signals)?;
        let result = work.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        log::info!("{}: {}", disk.path.display(), disk.image.counters().summary());
        if let Err(source) = result {
            log::error!("{}: the last fdatasync failed: {source}", disk.path.display());
            failed = Err(StopError::Sync { path: disk.path.clone(), source });
        }
        if let Err(source) = disk.image.close_log()
            && failed.is_ok()
        {
            failed = Err(StopError::Log { path: disk.path.clone(), source });
        }
    }
    failed
}

/// Where the statistics go, opened before the guest runs: a path that cannot be is no surprise at
/// the end.
pub enum StatsReport {
    /// As text.
    Stderr,
    /// As JSON.
    Json(PathBuf, File),
}

/// Empties the file at `path`, which may be any but a disk of this VM, if it is `free`.
pub fn open_report(path: &Path, disks: &[OpenDisk], free: fn(&File) -> io::Result<bool>) -> io::Result<File> {
    let file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
    let found = file.metadata()?;
    for disk in disks {
        let image = disk.image.file().metadata()?;
        if (image.dev(), image.ino()) == (found.dev(), found.ino()) {
            return Err(io::Error::other("it is a disk image of this VM"));
        }
    }
    if !free(&file)? {
        return Err(io::Error::other("another minivmm writes to it"));
    }
    // A pipe or a device has no length to be cut.
    if found.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}

impl StatsReport {
    /// Empties the file, if it is one and no disk.
    pub fn open(target: &StatsTarget, disks: &[OpenDisk]) -> Result<Self, VmmError> {
        let StatsTarget::Json(path) = target else { return Ok(Self::Stderr) };
        let refused = |source| VmmError::Stats { path: path.clone(), source };
        open_report(path, disks, |_| Ok(true)).map(|file| Self::Json(path.clone(), file)).map_err(refused)
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
                replace(path, file, &stats).map_err(|source| VmmError::Stats { path: path.clone(), source })
            }
        }
    }
}

/// Puts new statistics in the place of the old ones. Whoever reads the file while we write finds the one
/// or the other, whole: a new file takes the old one's name. Only where that cannot be (a pipe, a symbolic
/// link, a directory that takes no new file) is it written to as it is.
fn replace(path: &Path, file: &mut File, stats: &Stats) -> io::Result<()> {
    if !file.metadata()?.is_file() {
        return stats.write_json(io::BufWriter::new(&*file));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_link = fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    let next = tempfile::Builder::new().prefix(".minivmm-stats-").tempfile_in(parent);
    let (Ok(next), false) = (next, is_link) else {
        file.set_len(0)?;
        file.rewind()?;
        return stats.write_json(io::BufWriter::new(&*file));
    };
    next.as_file().set_permissions(file.metadata()?.permissions())?;
    stats.write_json(io::BufWriter::new(next.as_file()))?;
    *file = next.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Waits until `done`; one more signal from the user means that they do not want to wait.
fn wait_until(
    mut done: impl FnMut() -> bool,
    what: &str,
    limit: Option<Duration>,
    signals: &Signals,
) -> Result<(), StopError> {
    let begin = Instant::now();
    let mut said = false;
    while !done() {
        let waited = begin.elapsed();
        let gave_up = said && signals.take().is_some_and(is_ending);
        if gave_up || limit.is_some_and(|limit| waited >= limit) {
            return Err(StopError::Stuck { what: what.into() });
        }
        if !said && waited >= SILENT_MAX {
            said = true;
            crate::terminal::restore();
            eprintln!("minivmm: waiting for {what}; Ctrl-C, or another signal, gives up");
        }
        thread::sleep(LOOK.min(Duration::from_micros(200) + waited / 4));
    }
    Ok(())
}
