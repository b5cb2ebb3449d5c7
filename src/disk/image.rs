//! One open image: flags, lock, size, geometry, and the end.
//!
//! Owns the descriptor, which stays open for the life of the process (E3), the checks before the
//! first byte is touched, and the final fdatasync (E4).

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
use super::contents;
use super::counters::Counters;
use super::fault::plan::Faults;
use super::format;
use super::geometry::{self, BUFFERED, Geometry, SECTOR};
use super::latch::SyncLatch;
use super::lock;
use super::monitor::{Monitor, SyncEnd};
use super::options::{DiskOptions, EngineChoice, POLL_US, SERIAL_MAX};
use super::queue_stats::QueueStats;
use super::stable::StableBy;
use super::writelog::WriteLog;
use crate::files::locks;
use crate::sync::unpoisoned;
use crate::text::shell_word;
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
    /// The engine that does the I/O, once it is chosen.
    engine_in_use: OnceLock<&'static str>,
    /// What is no queue's business: the ring's calls, faults, the last sync.
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
    warnings: Vec<String>,
    fate: Fate,
}

impl Image {
    /// Opens, checks, locks and probes. Nothing is written; a writable image is synced once (E3).
    pub fn open(options: &DiskOptions) -> Result<Self, ImageError> {
        Self::try_open(options).map_err(|reason| ImageError { path: options.path.clone(), reason })
    }

    /// Looks at what [`Image::open`] would open: for reading only, without lock or sync, so that
    /// nothing changes and nobody is kept out. It serves to explain, not to run.
    pub fn look(options: &DiskOptions) -> Result<Self, ImageError> {
        let looked = || {
            let kind = check_kind(&options.path)?;
            check_access(options)?;
            let direct = wanted_flags(options, kind) & libc::O_DIRECT;
            let opened =
                OpenOptions::new().read(true).custom_flags(direct | libc::O_NOCTTY).open(&options.path);
            let file = Arc::new(opened.map_err(|source| open_problem(options, kind, source))?);
            let mut image = Self::describe(options, kind, file)?;
            // What is refused is among the refusals.
            image.warnings.extend(check_host_use(options, &host_metadata(&options.path)?).ok().flatten());
            Ok(image)
        };
        looked().map_err(|reason| ImageError { path: options.path.clone(), reason })
    }

    /// Everything that would keep [`Image::open`] from opening what [`Image::look`] has looked at.
    pub fn refusals(&self, options: &DiskOptions) -> Vec<ImageProblem> {
        let in_use = host_metadata(&options.path).and_then(|found| check_host_use(options, &found));
        let flocked = check_flock(options, &self.file);
        let is_locked = locks::stays(|| self.is_locked_by_another());
        let locked = is_locked.then(|| ImageProblem::Locked(io::Error::from_raw_os_error(libc::EAGAIN)));
        in_use.err().into_iter().chain(flocked.err()).chain(locked).collect()
    }

    fn try_open(options: &DiskOptions) -> Result<Self, ImageProblem> {
        let kind = check_kind(&options.path)?;
        let shared = check_host_use(options, &host_metadata(&options.path)?)?;
        let file = Arc::new(open_file(options, kind)?);
        check_flock(options, &file)?;
        lock::take(&file, options.readonly)?;
        let mut image = Self::describe(options, kind, file)?;
        image.warnings.extend(shared);
        let log = options.log_writes.as_deref().map(|path| WriteLog::create(path, &image.file));
        image.write_log = log.transpose()?;
        if image.is_synced_at_both_ends() {
            first_sync(&image.file, options, kind)?;
        }
        Ok(image)
    }

    /// Everything that is found without changing anything.
    fn describe(options: &DiskOptions, kind: Kind, file: Arc<File>) -> Result<Self, ImageProblem> {
        if !options.force_raw {
            format::refuse(&file, &options.path, options.readonly)?;
        }
        let mut warnings = Vec::new();
        let geometry = find_geometry(&file, options, kind)?;
        // Not known is not worth failing: the image is read anew, without O_DIRECT's alignment.
        let plain = format::read_anew(&file).ok();
        warnings.extend(plain.and_then(|plain| contents::warning(&plain, &options.path, &geometry)));
        // A device's node lies in a tmpfs too.
        if options.cache.direct && kind == Kind::File && is_tmpfs(&file) {
            warnings.push(format!(
                "{}: tmpfs takes O_DIRECT but keeps everything in memory, so cache={} means nothing here",
                options.path.display(),
                options.cache.name
            ));
        }
        if !options.cache.honour_flush {
            warnings.push(format!(
                "{}: cache={} ignores the guest's FLUSH: a crash of this host loses data that the guest believes \
                 stable. This breaks virtio 5.2.6.2 on purpose; use it only for what you can make again",
                options.path.display(),
                options.cache.name
            ));
        }
        if let Some(spec) = &options.fault {
            warnings.push(format!(
                "{}: faults are made on purpose, by fault={}{}",
                options.path.display(),
                spec.text,
                if spec.lies() { "; what is lost is reported as done" } else { "" }
            ));
        }
        Ok(Self::assemble(options, kind, file, geometry, warnings))
    }

    /// An image without storage of its own, for engines that do not use the descriptor.
    pub fn simulated(options: &DiskOptions, geometry: Geometry) -> io::Result<Self> {
        let file = Arc::new(File::open("/dev/null")?);
        Ok(Self::assemble(options, Kind::File, file, geometry, Vec::new()))
    }

    fn assemble(
        options: &DiskOptions,
        kind: Kind,
        file: Arc<File>,
        geometry: Geometry,
        warnings: Vec<String>,
    ) -> Self {
        let fate = Fate::of(&file, kind);
        // A pwritev2 with RWF_DSYNC flushes the disk of a raw device without FUA twice (H3).
        let dsync_is_one_flush = kind == Kind::File || geometry::has_fua(&file).unwrap_or(true);
        Self {
            file,
            kind,
            wanted_flags: wanted_flags(options, kind),
            path: options.path.clone(),
            policy: options.cache,
            geometry,
            readonly: options.readonly,
            serial: serial_bytes(options),
            queue_size: options.queue_size,
            queues: options.queues.unwrap_or(1),
            discard: options.discard && !options.readonly,
            bounce_always: options.bounce_always,
            engine: options.engine,
            stable: options.stable,
            fixed_buffers: options.fixed_buffers,
            batch: options.batch,
            poll: Duration::from_micros(u64::from(options.poll_us.unwrap_or(POLL_US))),
            dsync_is_one_flush,
            engine_in_use: OnceLock::new(),
            beside_queues: Counters::default(),
            queue_stats: Mutex::default(),
            timed: options.timed,
            latch: SyncLatch::default(),
            monitor: Monitor::default(),
            faults: options.fault.clone().map(|spec| Arc::new(Faults::new(spec))),
            write_log: None,
            warnings,
            fate,
        }
    }

    /// The descriptor, for engines.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// As named on the command line.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The row of the cache mode.
    pub fn policy(&self) -> &'static CachePolicy {
        self.policy
    }

    /// Size and block sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether nothing is ever written.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// What GET_ID answers: NUL padded, without a terminator when full.
    pub fn serial(&self) -> &[u8; SERIAL_MAX] {
        &self.serial
    }

    /// Descriptors a virtqueue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// How many virtqueues its device is to have.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether DISCARD is offered.
    pub fn discard(&self) -> bool {
        self.discard
    }

    /// Whether every direct transfer is bounced.
    pub fn bounce_always(&self) -> bool {
        self.bounce_always
    }

    /// Which engine was asked for.
    pub fn engine(&self) -> EngineChoice {
        self.engine
    }

    /// The name of the engine that does the I/O; what was asked for, before it is chosen.
    pub fn engine_in_use(&self) -> &'static str {
        self.engine_in_use.get().copied().unwrap_or(match self.engine {
            EngineChoice::Auto => "auto",
            EngineChoice::Uring => "io_uring",
            EngineChoice::Blocking => "sync",
        })
    }

    /// It is chosen, for all queues.
    pub(super) fn engine_is(&self, name: &'static str) {
        let _ = self.engine_in_use.set(name);
    }

    /// The figures of one more queue, which come after those of the others.
    pub(super) fn add_queue(&self) -> Arc<QueueStats> {
        let stats = Arc::new(QueueStats::new(self.timed));
        unpoisoned(self.queue_stats.lock()).push(Arc::clone(&stats));
        stats
    }

    /// What has been done so far, by all queues.
    pub fn counters(&self) -> Counters {
        let sum = Counters::default();
        sum.add(&self.beside_queues);
        self.queue_stats().iter().for_each(|queue| sum.add(&queue.counters));
        sum
    }

    /// The figures of each queue, in their order.
    pub fn queue_stats(&self) -> Vec<Arc<QueueStats>> {
        unpoisoned(self.queue_stats.lock()).clone()
    }

    /// How writes are made stable.
    pub fn stable(&self) -> StableBy {
        self.stable
    }

    /// Operations that io_uring is handed at once.
    pub fn batch(&self) -> u16 {
        self.batch
    }

    /// The faults that are made on purpose.
    pub fn faults(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref()
    }

    /// The log of its writes.
    pub fn write_log(&self) -> Option<&WriteLog> {
        self.write_log.as_ref()
    }

    /// How long a worker looks for more before it sleeps.
    pub fn poll(&self) -> Duration {
        self.poll
    }

    /// Whether guest RAM is to be registered with io_uring.
    pub fn fixed_buffers(&self) -> bool {
        self.fixed_buffers
    }

    /// Whether a write with RWF_DSYNC costs the host's disk no more flushes than an fdatasync.
    pub fn dsync_is_one_flush(&self) -> bool {
        self.dsync_is_one_flush
    }

    /// Whether it is a file on tmpfs: memory, which nothing makes stable. (A device's node is on a
    /// tmpfs too, which says nothing of the device.)
    pub fn is_on_tmpfs(&self) -> bool {
        self.kind == Kind::File && is_tmpfs(&self.file)
    }

    /// What the user should know before the guest runs.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The flags that the image is open with, in words, from the kernel's own answer.
    pub fn open_flags(&self) -> String {
        // SAFETY: F_GETFL takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL) };
        flags_in_words(flags)
    }

    /// The flags that [`Image::open`] asks for, in words.
    pub fn wanted_flags(&self) -> String {
        flags_in_words(self.wanted_flags)
    }

    /// Whether it is a block device, not a regular file.
    pub fn is_device(&self) -> bool {
        self.kind == Kind::Device
    }

    /// Whether its last name has gone since it was opened: it was deleted, or another file has taken its name. What
    /// is written to it then goes with the last descriptor.
    pub fn is_deleted(&self) -> bool {
        self.fate.is_deleted(&self.file)
    }

    /// The size in bytes that the image's file had when it was opened, and the least that it was found to have since,
    /// where that is less: somebody has cut it, and what lay beyond is lost.
    pub fn cut(&self) -> Option<(u64, u64)> {
        self.fate.cut(&self.file)
    }

    /// Whether somebody else has locked the image so that [`Image::open`] would be refused.
    pub fn is_locked_by_another(&self) -> bool {
        locks::is_locked(&self.file, self.readonly)
    }

    /// Whether the image is synced at the start and at the end: where it may be written, and the mode
    /// honours flushes.
    pub fn is_synced_at_both_ends(&self) -> bool {
        !self.readonly && self.policy.honour_flush
    }

    /// One line about the disk, for the start.
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

    /// The end: a last fdatasync where the mode honours flushes, and the first sync error of the
    /// run, if there was one (E4). Call it when no I/O is in flight any more.
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

    /// The end of the write log, if there is one, after [`Image::close`]: its last mark, and the error
    /// that has ended it before, if one has.
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

fn find_geometry(file: &Arc<File>, options: &DiskOptions, kind: Kind) -> Result<Geometry, ImageProblem> {
    let bytes = (&**file).seek(SeekFrom::End(0)).map_err(host("its size cannot be found"))?;
    let path = shell_word(&options.path);
    if bytes == 0 {
        return Err(ImageProblem::Empty(path));
    }
    let alignment = if options.cache.direct {
        geometry::probe_direct_alignment(file)
            .map_err(host("its alignment for O_DIRECT cannot be found"))?
            .ok_or(ImageProblem::NoDirect { mode: options.cache.name })?
    } else {
        BUFFERED
    };
    let needed = alignment.offset;
    let logical_block = match options.block_size {
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

/// What the host rewrites as one: the device's physical block, or the file system's block.
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

/// Syncs once before the guest runs, so that an error of the past is not mistaken for one of ours,
/// and the directory, so that a new image's name is as stable as its content.
fn first_sync(file: &File, options: &DiskOptions, kind: Kind) -> Result<(), ImageProblem> {
    file.sync_data().map_err(ImageProblem::FirstSync)?;
    // What was deleted before it was opened (by a descriptor's name) has no place to be found again.
    if kind == Kind::File && file.metadata().is_ok_and(|found| found.nlink() > 0) {
        let real = options.path.canonicalize().map_err(host("its real path cannot be found"))?;
        let directory = real.parent().unwrap_or(Path::new("/"));
        // A directory that we may not open was synced by whoever made the image, or not at all.
        if let Ok(directory) = File::open(directory)
            && let Err(error) = directory.sync_all()
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            return Err(ImageProblem::FirstSync(error));
        }
    }
    Ok(())
}

fn serial_bytes(options: &DiskOptions) -> [u8; SERIAL_MAX] {
    let name = options.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let text = options.serial.clone().or(name).unwrap_or_default();
    let mut serial = [0; SERIAL_MAX];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}
