//! One open image: flags, lock, size, geometry and shutdown.
//!
//! Owns the descriptor, which stays open for the life of the process (E3). Owns also the checks that run before
//! the first byte is touched, and the final fdatasync (E4).

mod fate;
mod opening;
mod problem;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use super::cache::CachePolicy;
use super::config::{DiskConfig, EngineChoice, POLL_US, SERIAL_MAX};
use super::contents;
use super::counters::Counters;
use super::fault::plan::Faults;
use super::format;
use super::geometry::{self, BUFFERED, Geometry, SECTOR};
use super::latch::SyncLatch;
use super::lock;
use super::monitor::{Monitor, SyncEnd};
use super::queue_stats::QueueStats;
use super::stable::StableBy;
use super::writelog::WriteLog;
use crate::files::locks;
use crate::sync::unpoisoned;
use crate::text::shell_word;
use crate::threads::{PlainThreads, Threads};
use fate::Fate;
use opening::{
    Kind, check_access, check_flock, check_host_use, check_kind, flags_in_words, open_file, open_problem,
    wanted_flags,
};
pub use problem::{ImageError, ImageProblem};

/// An open, locked image and everything that its queues share.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    kind: Kind,
    wanted_flags: libc::c_int,
    path: PathBuf,
    policy: &'static CachePolicy,
    geometry: Geometry,
    readonly: bool,
    serial: [u8; SERIAL_MAX],
    queue_size: u16,
    queues: u16,
    discard: bool,
    bounce_always: bool,
    engine: EngineChoice,
    stable: StableBy,
    fixed_buffers: bool,
    poll: Duration,
    batch: u16,
    dsync_is_one_flush: bool,
    /// The engine that does the I/O; unset until it is chosen.
    engine_in_use: OnceLock<&'static str>,
    /// Counters that belong to no queue: the ring's calls, faults, the final sync.
    pub(super) beside_queues: Counters,
    /// What each queue has done.
    queue_stats: Mutex<Vec<Arc<QueueStats>>>,
    timed: bool,
    /// The first sync error.
    pub latch: SyncLatch,
    /// What is written and not yet stable.
    pub monitor: Monitor,
    faults: Option<Arc<Faults>>,
    write_log: Option<WriteLog>,
    /// Starts the threads of the device that serves the image.
    threads: Arc<dyn Threads>,
    warnings: Vec<String>,
    fate: Fate,
}

impl Image {
    /// Opens, checks, locks and probes the image. Writes nothing to it; a writable image is synced once (E3).
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
    pub fn refusals(&self, config: &DiskConfig) -> Vec<ImageProblem> {
        let in_use = host_metadata(&config.path).and_then(|found| check_host_use(config, &found));
        let flocked = check_flock(config, &self.file);
        let is_locked = locks::stays(|| self.is_locked_by_another());
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
        let log = config.log_writes.as_deref().map(|path| WriteLog::create(path, &image.file));
        image.write_log = log.transpose()?;
        if image.is_synced_at_both_ends() {
            first_sync(&image.file, config, kind)?;
        }
        Ok(image)
    }

    /// Collects everything that can be found without changing anything.
    fn describe(config: &DiskConfig, kind: Kind, file: Arc<File>) -> Result<Self, ImageProblem> {
        if !config.force_raw {
            format::refuse(&file, &config.path, config.readonly)?;
        }
        let mut warnings = Vec::new();
        let geometry = find_geometry(&file, config, kind)?;
        // A failure here costs only the warning. The file is reopened to read it without O_DIRECT's alignment.
        let plain = format::read_anew(&file).ok();
        warnings.extend(plain.and_then(|plain| contents::warning(&plain, &config.path, &geometry)));
        // Only for files: a device's node usually lies in a tmpfs too.
        if config.cache.direct && kind == Kind::File && is_tmpfs(&file) {
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
        Ok(Self::assemble(config, kind, file, geometry, warnings))
    }

    /// Returns an image without storage of its own, for engines that do not use the descriptor.
    pub fn simulated(config: &DiskConfig, geometry: Geometry) -> io::Result<Self> {
        config.check().map_err(io::Error::other)?;
        let file = Arc::new(File::open("/dev/null")?);
        Ok(Self::assemble(config, Kind::File, file, geometry, Vec::new()))
    }

    fn assemble(
        config: &DiskConfig,
        kind: Kind,
        file: Arc<File>,
        geometry: Geometry,
        warnings: Vec<String>,
    ) -> Self {
        let fate = Fate::of(&file, kind);
        // On a raw device without FUA, pwritev2 with RWF_DSYNC flushes the disk twice (H3).
        let dsync_is_one_flush = kind == Kind::File || geometry::has_fua(&file).unwrap_or(true);
        Self {
            file,
            kind,
            wanted_flags: wanted_flags(config, kind),
            path: config.path.clone(),
            policy: config.cache,
            geometry,
            readonly: config.readonly,
            serial: serial_bytes(config),
            queue_size: config.queue_size,
            queues: config.queues.unwrap_or(1),
            discard: config.discard && !config.readonly,
            bounce_always: config.bounce_always,
            engine: config.engine,
            stable: config.stable,
            fixed_buffers: config.fixed_buffers,
            batch: config.batch,
            poll: Duration::from_micros(u64::from(config.poll_us.unwrap_or(POLL_US))),
            dsync_is_one_flush,
            engine_in_use: OnceLock::new(),
            beside_queues: Counters::default(),
            queue_stats: Mutex::default(),
            timed: config.timed,
            latch: SyncLatch::default(),
            monitor: Monitor::default(),
            faults: config.fault.clone().map(|spec| Arc::new(Faults::new(spec))),
            write_log: None,
            threads: Arc::new(PlainThreads),
            warnings,
            fate,
        }
    }

    /// Returns the descriptor, for engines.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the path as named on the command line.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the row of the cache mode.
    pub fn policy(&self) -> &'static CachePolicy {
        self.policy
    }

    /// Returns the size and the block sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Returns `true` if nothing is ever written to the image.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Returns the answer to GET_ID: padded with NULs, without a terminator if all bytes are used.
    pub fn serial(&self) -> &[u8; SERIAL_MAX] {
        &self.serial
    }

    /// Returns the number of descriptors in each virtqueue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Returns how many virtqueues the device is to have.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Returns `true` if the device offers DISCARD.
    pub fn discard(&self) -> bool {
        self.discard
    }

    /// Returns `true` if every direct transfer is bounced.
    pub fn bounce_always(&self) -> bool {
        self.bounce_always
    }

    /// Returns the engine that was asked for.
    pub fn engine(&self) -> EngineChoice {
        self.engine
    }

    /// Returns the name of the engine that does the I/O. Until it is chosen, this is the name of what was asked
    /// for.
    pub fn engine_in_use(&self) -> &'static str {
        self.engine_in_use.get().copied().unwrap_or(match self.engine {
            EngineChoice::Auto => "auto",
            EngineChoice::Uring => "io_uring",
            EngineChoice::Blocking => "sync",
        })
    }

    /// Records the engine that was chosen for all queues.
    pub(super) fn engine_is(&self, name: &'static str) {
        let _ = self.engine_in_use.set(name);
    }

    /// Adds a queue and returns its statistics. Queues are numbered in the order of these calls.
    pub(super) fn add_queue(&self) -> Arc<QueueStats> {
        let stats = Arc::new(QueueStats::new(self.timed));
        unpoisoned(self.queue_stats.lock()).push(Arc::clone(&stats));
        stats
    }

    /// Returns the sum of what all queues and the image itself have done so far.
    pub fn counters(&self) -> Counters {
        let sum = Counters::default();
        sum.add(&self.beside_queues);
        self.queue_stats().iter().for_each(|queue| sum.add(&queue.counters));
        sum
    }

    /// Returns the statistics of each queue, in queue order.
    pub fn queue_stats(&self) -> Vec<Arc<QueueStats>> {
        unpoisoned(self.queue_stats.lock()).clone()
    }

    /// Returns how writes are made stable.
    pub fn stable(&self) -> StableBy {
        self.stable
    }

    /// Returns how many operations are queued before io_uring is entered in the middle of a batch.
    pub fn batch(&self) -> u16 {
        self.batch
    }

    /// Returns the faults that are made on purpose; `None` if there are none.
    pub fn faults(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref()
    }

    /// Returns the log of the image's writes; `None` if none is kept.
    pub fn write_log(&self) -> Option<&WriteLog> {
        self.write_log.as_ref()
    }

    /// Returns how long a worker spins before it blocks.
    pub fn poll(&self) -> Duration {
        self.poll
    }

    /// Returns `true` if guest RAM is to be registered with io_uring.
    pub fn fixed_buffers(&self) -> bool {
        self.fixed_buffers
    }

    /// Returns `true` if a write with RWF_DSYNC costs the host's disk no more flushes than an fdatasync.
    pub fn dsync_is_one_flush(&self) -> bool {
        self.dsync_is_one_flush
    }

    /// Returns `true` if the image is a file on tmpfs, which is memory that nothing makes stable. A device is
    /// excluded: its node lies on a tmpfs too, which says nothing about the device.
    pub fn is_on_tmpfs(&self) -> bool {
        self.kind == Kind::File && is_tmpfs(&self.file)
    }

    /// Returns what the user should know before the guest runs.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns, in words, the flags that the image is open with, as the kernel reports them.
    pub fn open_flags(&self) -> String {
        // SAFETY: F_GETFL takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL) };
        flags_in_words(flags)
    }

    /// Returns, in words, the flags that [`Image::open`] asks for.
    pub fn wanted_flags(&self) -> String {
        flags_in_words(self.wanted_flags)
    }

    /// Returns `true` for a block device, `false` for a regular file.
    pub fn is_device(&self) -> bool {
        self.kind == Kind::Device
    }

    /// Returns `true` if the file has lost its last name since it was opened: it was deleted, or another file
    /// took its name. What is written to it is then lost when the last descriptor is closed.
    pub fn is_deleted(&self) -> bool {
        self.fate.is_deleted(&self.file)
    }

    /// Returns (size in bytes when the file was opened, smallest size seen since) if the second is less.
    /// Somebody has then truncated the file, and the data beyond is lost.
    pub fn cut(&self) -> Option<(u64, u64)> {
        self.fate.cut(&self.file)
    }

    /// Returns `true` if somebody else holds a lock that would make [`Image::open`] fail.
    pub fn is_locked_by_another(&self) -> bool {
        locks::is_locked(&self.file, self.readonly)
    }

    /// Returns `true` if the image is synced at the start and at the end: it is writable, and the mode honours
    /// flushes.
    pub fn is_synced_at_both_ends(&self) -> bool {
        !self.readonly && self.policy.honour_flush
    }

    /// Returns one line about the disk, for the start of the run.
    pub fn banner(&self) -> String {
        let geometry = &self.geometry;
        format!(
            "{}: {} MiB, cache={} ({}, write cache {}, FLUSH is {}), blocks of {} bytes, alignment {}/{} by {}{}",
            self.path.display(),
            geometry.capacity_sectors * SECTOR / (1 << 20),
            self.policy.name,
            self.open_flags(),
            if self.policy.write_cache { "on" } else { "off" },
            if self.policy.honour_flush { "fdatasync" } else { "ignored" },
            geometry.logical_block,
            geometry.alignment.memory,
            geometry.alignment.offset,
            geometry.alignment.found_by,
            if self.readonly { ", readonly" } else { "" },
        )
    }

    /// Does a final fdatasync if the mode honours flushes. Returns the first sync error of the run, if there
    /// was one (E4). Call it only when no I/O is in flight any more.
    pub fn close(&self) -> io::Result<()> {
        self.monitor.guest_has_ended();
        self.latch.check()?;
        if !self.is_synced_at_both_ends() {
            return Ok(());
        }
        Counters::count(&self.beside_queues.fdatasyncs);
        let start = self.monitor.sync_starts();
        let logged = self.write_log.as_ref().map(|log| (log, log.sync_starts()));
        let result = self.file.sync_data().inspect_err(|error| self.latch.set(error));
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

pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> ImageProblem {
    move |source| ImageProblem::Host { what, source }
}

fn host_metadata(path: &Path) -> Result<std::fs::Metadata, ImageProblem> {
    std::fs::metadata(path).map_err(host("it cannot be looked at"))
}

fn find_geometry(file: &Arc<File>, config: &DiskConfig, kind: Kind) -> Result<Geometry, ImageProblem> {
    let bytes = (&**file).seek(SeekFrom::End(0)).map_err(host("its size cannot be found"))?;
    let path = shell_word(&config.path);
    if bytes == 0 {
        return Err(ImageProblem::Empty(path));
    }
    let alignment = if config.cache.direct {
        geometry::probe_direct_alignment(file)
            .map_err(host("its alignment for O_DIRECT cannot be found"))?
            .ok_or(ImageProblem::NoDirect { mode: config.cache.name })?
    } else {
        BUFFERED
    };
    let needed = alignment.offset;
    let logical_block = match config.block_size {
        Some(asked) if asked < needed => return Err(ImageProblem::BlockTooSmall { asked, needed }),
        Some(asked) => asked,
        None => needed.max(geometry::logical_block_of_device(file).unwrap_or(512)),
    };
    if logical_block > 4096 {
        return Err(ImageProblem::BlockTooLarge(logical_block));
    }
    if !bytes.is_multiple_of(u64::from(logical_block)) {
        return Err(ImageProblem::PartialBlock { bytes, block: logical_block, path });
    }
    let physical_block = physical_block(file, kind).clamp(logical_block, 65536);
    Ok(Geometry { capacity_sectors: bytes / SECTOR, logical_block, physical_block, alignment })
}

/// Returns the unit in bytes that the host rewrites as a whole: the device's physical block, or the file
/// system's block.
fn physical_block(file: &File, kind: Kind) -> u32 {
    let found = match kind {
        Kind::Device => geometry::physical_block_of_device(file),
        Kind::File => file.metadata().ok().and_then(|found| u32::try_from(found.blksize()).ok()),
    };
    found.filter(|bytes| bytes.is_power_of_two()).unwrap_or(512)
}

fn is_tmpfs(file: &File) -> bool {
    // SAFETY: statfs is plain numbers, for which all zeroes are valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is valid for writes.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) };
    result == 0 && found.f_type == libc::TMPFS_MAGIC
}

/// Syncs the image once before the guest runs, so that an earlier writeback error is not mistaken for one of
/// this run. Also syncs the directory, so that a new image's name is as stable as its content.
fn first_sync(file: &File, config: &DiskConfig, kind: Kind) -> Result<(), ImageProblem> {
    file.sync_data().map_err(ImageProblem::FirstSync)?;
    // A file deleted before it was opened (through a descriptor's name) has no directory entry to make stable.
    if kind == Kind::File && file.metadata().is_ok_and(|found| found.nlink() > 0) {
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
