//! One disk image in use: the open file, what was asked for, and what its queues share.
//!
//! Owns the order of the checks that run before the first byte is touched, the first sync (E3), and the final
//! fdatasync (E4). The descriptor belongs to [`ImageFile`], counters to [`ImageStats`].

mod fate;
mod file;
mod opening;
mod stats;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::config::{DiskConfig, SERIAL_MAX};
use super::contents;
use super::counters::Counters;
use super::fault::plan::Faults;
use super::format;
use super::geometry::{Geometry, SECTOR};
use super::latch::SyncLatch;
use super::lock;
use super::monitor::{Monitor, SyncEnd};
use super::problem::host;
pub use super::problem::{ImageError, ImageProblem};
use super::writelog::WriteLog;
use crate::files::locks;
use crate::threads::{PlainThreads, Threads};
pub use file::ImageFile;
use opening::{
    FileKind, check_access, check_flock, check_host_use, check_kind, open_file, open_problem, wanted_flags,
};
pub use stats::ImageStats;

/// An open, locked image and everything that its queues share: the file, what was asked for, and the state of
/// the run.
#[derive(Debug)]
pub struct Image {
    file: ImageFile,
    config: DiskConfig,
    /// The answer to GET_ID.
    serial: [u8; SERIAL_MAX],
    /// The first sync error.
    pub latch: SyncLatch,
    /// What is written and not yet stable.
    pub monitor: Monitor,
    /// What the queues and the image have done.
    pub stats: ImageStats,
    faults: Option<Arc<Faults>>,
    write_log: Option<WriteLog>,
    /// Starts the threads of the device that serves the image.
    threads: Arc<dyn Threads>,
    warnings: Vec<String>,
}

impl Image {
    /// Opens, checks, locks and probes the image. Writes nothing to it; a writable image is synced once, except in `unsafe` (E3).
    pub fn open(config: &DiskConfig) -> Result<Self, ImageError> {
        Self::try_open(config).map_err(|reason| ImageError { path: config.path.clone(), reason })
    }

    /// Lets the device that serves this image start its threads through `threads`, instead of [`PlainThreads`].
    pub fn with_threads(self, threads: Arc<dyn Threads>) -> Self {
        Self { threads, ..self }
    }

    /// Returns what starts the threads of the device.
    pub fn threads(&self) -> &dyn Threads {
        &*self.threads
    }

    /// Inspects the image that [`Image::open`] would open. It only opens it for reading, without a lock or a
    /// sync, so that nothing changes and nobody is locked out. The result is for explaining, not for running a
    /// guest.
    pub fn look(config: &DiskConfig) -> Result<Self, ImageError> {
        let looked = || {
            config.check()?;
            let kind = check_kind(&config.path)?;
            check_access(config)?;
            let direct = wanted_flags(config, kind) & libc::O_DIRECT;
            let opened =
                OpenOptions::new().read(true).custom_flags(direct | libc::O_NOCTTY).open(&config.path);
            let file = Arc::new(opened.map_err(|source| open_problem(config, kind, source))?);
            let mut image = Self::describe(config, kind, file)?;
            // A use that makes `open` fail is no warning; `refusals` reports it.
            image.warnings.extend(check_host_use(config, &host_metadata(&config.path)?).ok().flatten());
            Ok(image)
        };
        looked().map_err(|reason| ImageError { path: config.path.clone(), reason })
    }

    /// Returns the reasons for which [`Image::open`] would refuse the image that [`Image::look`] accepted: this
    /// host uses it, or somebody else has locked it.
    pub fn refusals(&self) -> Vec<ImageProblem> {
        let config = &self.config;
        let in_use = host_metadata(&config.path).and_then(|found| check_host_use(config, &found));
        let flocked = check_flock(config, self.file.descriptor());
        let is_locked = locks::stays(|| self.file.is_locked_by_another());
        let locked = is_locked.then(|| ImageProblem::Locked(io::Error::from_raw_os_error(libc::EAGAIN)));
        in_use.err().into_iter().chain(flocked.err()).chain(locked).collect()
    }

    fn try_open(config: &DiskConfig) -> Result<Self, ImageProblem> {
        config.check()?;
        let kind = check_kind(&config.path)?;
        let shared = check_host_use(config, &host_metadata(&config.path)?)?;
        let file = Arc::new(open_file(config, kind)?);
        check_flock(config, &file)?;
        lock::take(&file, config.readonly)?;
        let mut image = Self::describe(config, kind, file)?;
        image.warnings.extend(shared);
        let log = config.log_writes.as_deref().map(|path| WriteLog::create(path, image.file.descriptor()));
        image.write_log = log.transpose()?;
        if config.is_synced_at_both_ends() {
            first_sync(&image.file, config)?;
        }
        Ok(image)
    }

    /// Collects everything that can be found without changing anything.
    fn describe(config: &DiskConfig, kind: FileKind, file: Arc<File>) -> Result<Self, ImageProblem> {
        if !config.force_raw {
            format::refuse(&file, &config.path, config.readonly)?;
        }
        let file = ImageFile::probe(file, kind, config)?;
        let mut warnings = Vec::new();
        // A failure here costs only the warning. The file is reopened to read it without O_DIRECT's alignment.
        let plain = format::read_anew(file.descriptor()).ok();
        warnings.extend(plain.and_then(|plain| contents::warning(&plain, &config.path, file.geometry())));
        if config.cache.direct && file.is_on_tmpfs() {
            warnings.push(format!(
                "{}: tmpfs takes O_DIRECT but keeps everything in memory, so cache={} means nothing here",
                config.path.display(),
                config.cache.name
            ));
        }
        if !config.cache.honour_flush {
            warnings.push(format!(
                "{}: cache={} ignores the guest's FLUSH: a crash of this host loses data that the guest believes \
                 stable. This breaks virtio 5.2.6.2 on purpose; use it only for what you can make again",
                config.path.display(),
                config.cache.name
            ));
        }
        if let Some(spec) = &config.fault {
            warnings.push(format!(
                "{}: faults are made on purpose, by fault={}{}",
                config.path.display(),
                spec.text,
                if spec.lies() { "; what is lost is reported as done" } else { "" }
            ));
        }
        Ok(Self::assemble(config, file, warnings))
    }

    /// Returns an image without storage of its own, for engines that do not use the descriptor.
    pub fn simulated(config: &DiskConfig, geometry: Geometry) -> io::Result<Self> {
        config.check().map_err(io::Error::other)?;
        let file = Arc::new(File::open("/dev/null")?);
        let file = ImageFile::with_geometry(file, FileKind::File, config, geometry);
        Ok(Self::assemble(config, file, Vec::new()))
    }

    fn assemble(config: &DiskConfig, file: ImageFile, warnings: Vec<String>) -> Self {
        Self {
            file,
            config: config.clone(),
            serial: serial_bytes(config),
            latch: SyncLatch::default(),
            monitor: Monitor::default(),
            stats: ImageStats::new(config),
            faults: config.fault.clone().map(|spec| Arc::new(Faults::new(spec))),
            write_log: None,
            threads: Arc::new(PlainThreads),
            warnings,
        }
    }

    /// Returns the open file.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// Returns what was asked for.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Returns the size and the block sizes.
    pub fn geometry(&self) -> &Geometry {
        self.file.geometry()
    }

    /// Returns the answer to GET_ID: padded with NULs, without a terminator if all bytes are used.
    pub fn serial(&self) -> &[u8; SERIAL_MAX] {
        &self.serial
    }

    /// Returns the faults that are made on purpose; `None` if there are none.
    pub fn faults(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref()
    }

    /// Returns the log of the image's writes; `None` if none is kept.
    pub fn write_log(&self) -> Option<&WriteLog> {
        self.write_log.as_ref()
    }

    /// Returns what the user should know before the guest runs.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns one line about the disk, for the start of the run.
    pub fn banner(&self) -> String {
        let (geometry, policy) = (self.geometry(), self.config.cache);
        format!(
            "{}: {} MiB, cache={} ({}{}, write cache {}, FLUSH is {}), blocks of {} bytes, alignment {}/{} by {}{}",
            self.config.path.display(),
            geometry.capacity_sectors * SECTOR / (1 << 20),
            policy.name,
            self.file.open_flags(),
            if policy.drop_behind { ", RWF_DONTCACHE" } else { "" },
            if policy.write_cache { "on" } else { "off" },
            if policy.honour_flush { "fdatasync" } else { "ignored" },
            geometry.logical_block,
            geometry.alignment.memory,
            geometry.alignment.offset,
            geometry.alignment.found_by,
            if self.config.readonly { ", readonly" } else { "" },
        )
    }

    /// Does a final fdatasync if the mode honours flushes. Returns the first sync error of the run, if there
    /// was one (E4). Call it only when no I/O is in flight any more.
    pub fn close(&self) -> io::Result<()> {
        self.monitor.guest_has_ended();
        self.latch.check()?;
        if !self.config.is_synced_at_both_ends() {
            return Ok(());
        }
        Counters::count(&self.stats.beside_queues.fdatasyncs);
        let start = self.monitor.sync_starts();
        let logged = self.write_log.as_ref().map(|log| (log, log.sync_starts()));
        let result = self.file.descriptor().sync_data().inspect_err(|error| self.latch.set(error));
        self.monitor.sync_ends(start, if result.is_ok() { SyncEnd::Stable } else { SyncEnd::Failed });
        if let Some((log, sync)) = logged {
            log.sync_ends(sync, Some(result.is_ok()));
        }
        result
    }

    /// Writes the last mark of the write log, if there is one. Returns the error that ended the log, now or
    /// earlier. Call it after [`Image::close`].
    pub fn close_log(&self) -> io::Result<()> {
        self.write_log.as_ref().map_or(Ok(()), WriteLog::end)
    }
}

fn host_metadata(path: &Path) -> Result<std::fs::Metadata, ImageProblem> {
    std::fs::metadata(path).map_err(host("its metadata cannot be read"))
}

/// Syncs the image once before the guest runs, so that an earlier writeback error is not mistaken for one of
/// this run. Also syncs the directory, so that a new image's name is as stable as its content.
fn first_sync(file: &ImageFile, config: &DiskConfig) -> Result<(), ImageProblem> {
    let is_file = !file.is_device();
    let file = file.descriptor();
    file.sync_data().map_err(ImageProblem::FirstSync)?;
    // A file deleted before it was opened (through a descriptor's name) has no directory entry to make stable.
    if is_file && file.metadata().is_ok_and(|found| found.nlink() > 0) {
        let real = config.path.canonicalize().map_err(host("its real path cannot be found"))?;
        let directory = real.parent().unwrap_or(Path::new("/"));
        // If we may not open the directory, whoever made the image has synced it, or nobody has.
        if let Ok(directory) = File::open(directory)
            && let Err(error) = directory.sync_all()
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            return Err(ImageProblem::FirstSync(error));
        }
    }
    Ok(())
}

fn serial_bytes(config: &DiskConfig) -> [u8; SERIAL_MAX] {
    let name = config.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let text = config.serial.clone().or(name).unwrap_or_default();
    let mut serial = [0; SERIAL_MAX];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}
