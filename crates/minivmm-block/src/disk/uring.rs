//! The io_uring engine: operations are queued. One system call hands a whole batch to the kernel
//! and waits for the first completion or the doorbell.
//!
//! Owns the ring, the memory of every operation that the kernel has, and the read of the doorbell
//! that waits in the same ring. The ring is restricted to the operations that this file queues, on one
//! registered file and on the doorbell. The kernel refuses everything else.
//!
//! Data that the host's page cache holds is copied at once, without the ring. Compared with a copy of a few
//! KiB, the way through a ring is long (`docs/performance.md`).

mod alone;
mod kick;
mod setup;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use vmm_sys_util::eventfd::EventFd;

use super::blocking;
use super::cache::CachePolicy;
use super::counters::Counters;
use super::engine::{Ended, Engine, HostOp, Meanwhile, OpToken, Wake};
use super::image::Image;
use crate::mem::{Iov, Ram};
use crate::slab::Slab;
use alone::Alone;
use kick::Kick;
pub use setup::UringError;
use setup::{IMAGE, build, register_file, register_memory, restrict};

/// With this many batches in flight, do not enter the kernel early: submit the rest of the batch together.
const BUSY_BATCHES: usize = 4;
/// The doorbell's read, the poll of a kick, and their cancellations. The slab never gives out these numbers.
const BELL: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;
const KICK: u64 = u64::MAX - 2;
/// Executes operations through io_uring.
pub struct UringEngine {
    ring: IoUring,
    /// Keeps the registered file open and counts the system calls.
    image: Arc<Image>,
    /// The operations that the kernel has. Their memory is kept until their completion is seen.
    ops: Slab<u64, Begun>,
    /// Largest number of operations in the kernel at once, so that their completions have room in the ring.
    room: usize,
    bell: Bell,
    kick: Kick,
    inline: Inline,
    alone: Alone,
    /// Operations that completed without the ring.
    without_ring: Vec<Ended>,
    /// Registered guest memory by buffer index: address of the first byte, and length in bytes.
    fixed: Vec<(u64, u64)>,
    /// With this many operations queued, enter the kernel before the rest of the batch is queued.
    batch: usize,
    /// The RWF_* flags of each read and write.
    rw_flags: libc::c_int,
    /// `true` once the ring is enabled.
    enabled: bool,
    /// `true` if IORING_SQ_TASKRUN is set although the last io_uring_enter produced no completion; ignore the flag
    /// then. The kernel sets it after it has queued a completion. If that one is fetched in between, the flag stays
    /// set until the next completion.
    stale_taskrun: bool,
}

/// An operation that the kernel has.
struct Begun {
    token: OpToken,
    op: HostOp,
    /// `true` if a thread of the kernel executes it.
    blocks: bool,
}

/// The doorbell's read, which waits in the ring.
struct Bell {
    /// Where the kernel writes the eventfd's counter. Boxed, so that its address stays the same.
    counter: Box<u64>,
    /// The doorbell that a read in the ring waits for; `None` if there is no such read.
    waits_on: Option<RawFd>,
    /// The doorbell whose O_NONBLOCK was cleared, so that its reads wait.
    blocking: Option<RawFd>,
    /// `true` if the doorbell was rung since the last wait for it checked.
    rung: bool,
}

/// Whether page cache hits are tried without the ring: until the file system answers EOPNOTSUPP to RWF_NOWAIT.
struct Inline {
    read: bool,
    write: bool,
}

impl UringEngine {
    /// Returns an engine for the image's descriptor, with room for `entries` operations at once. With `ram`, guest
    /// memory is registered, which pins all of it.
    pub fn new(image: Arc<Image>, entries: u16, ram: Option<&Ram>) -> Result<Self, UringError> {
        let ring = build(u32::from(entries).next_power_of_two())?;
        register_file(&ring, image.file().descriptor())?;
        let fixed = ram.map_or(Ok(Vec::new()), |ram| register_memory(&ring, ram))?;
        restrict(&ring)?;
        let buffered = !image.config().cache.direct;
        Ok(Self {
            ring,
            ops: Slab::default(),
            room: usize::from(entries),
            bell: Bell { counter: Box::new(0), waits_on: None, blocking: None, rung: false },
            kick: Kick::new(),
            inline: Inline { read: buffered, write: buffered },
            alone: Alone::default(),
            without_ring: Vec::new(),
            fixed,
            batch: usize::from(image.config().batch),
            rw_flags: image.config().cache.rw_flags(),
            image,
            enabled: false,
            stale_taskrun: false,
        })
    }

    /// Enables the ring on first use. The calling thread becomes the only one that may use the ring.
    fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: `self.ops` or `self.bell` owns what the entry points to until the kernel has completed
        // the entry. Registered guest RAM is kept by its `HostOp` as well.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Submits what is queued and waits for at least `want` completions, in one system call.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        self.enable()?;
        Counters::count(&self.image.stats.beside_queues.io_uring_enters);
        match self.ring.submit_and_wait(want) {
            Ok(_) => {
                self.stale_taskrun = self.ring.completion().is_empty() && self.ring.submission().taskrun();
                Ok(())
            }
            // A signal came, or completions must be taken first. The caller tries again in both cases.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Returns `true` if the kernel has completions that it puts into the ring only when it is entered.
    fn has_ends_to_fetch(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Takes the completions that are in the ring, and appends those of operations to `ended`.
    fn reap(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        for end in self.ring.completion() {
            let result = end.result();
            match end.user_data() {
                CANCEL => {}
                KICK => self.bell.rung |= self.kick.ends(result, end.flags())?,
                BELL => {
                    self.bell.waits_on = None;
                    match -result {
                        libc::ECANCELED | libc::EINTR => {}
                        errno if errno > 0 => return Err(io::Error::from_raw_os_error(errno)),
                        _ => self.bell.rung = true,
                    }
                }
                number => {
                    let Some(Begun { token, op, blocks }) = self.ops.remove(number) else {
                        log::error!("disk: io_uring ended operation {number:#x}, which it was never given");
                        continue;
                    };
                    drop(op);
                    if blocks {
                        self.alone.record_ring_completion();
                    }
                    let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                    ended.push(Ended { token, result });
                }
            }
        }
        Ok(())
    }

    /// Makes sure that a read of the doorbell waits in the ring, unless the doorbell is rung already.
    fn listen(&mut self, doorbell: &EventFd) -> io::Result<()> {
        let fd = doorbell.as_raw_fd();
        if self.bell.waits_on == Some(fd) || self.bell.rung {
            return Ok(());
        }
        if self.bell.waits_on.is_some() {
            self.rest()?;
        }
        if self.bell.blocking != Some(fd) {
            make_blocking(fd)?;
            self.bell.blocking = Some(fd);
        }
        let entry =
            opcode::Read::new(Fd(fd), (&raw mut *self.bell.counter).cast(), 8).build().user_data(BELL);
        self.push(&entry)?;
        self.bell.waits_on = Some(fd);
        Ok(())
    }

    /// Tries to execute `op` from the page cache without waiting. Returns the bytes moved, or `None` if `op` must go
    /// through the ring.
    fn try_inline(&mut self, op: &HostOp) -> Option<usize> {
        let fd = self.image.file().descriptor().as_raw_fd();
        let flags = self.rw_flags | libc::RWF_NOWAIT;
        let (result, may) = match op {
            HostOp::Readv { iov, offset } if self.inline.read => {
                let (iovecs, count, offset) = vectors(iov, *offset)?;
                // SAFETY: the iovecs point to memory that `iov` owns until after this call.
                let result = unsafe { libc::preadv2(fd, iovecs, count, offset, flags) };
                (result, &mut self.inline.read)
            }
            HostOp::Writev { iov, offset, dsync: false } if self.inline.write => {
                let (iovecs, count, offset) = vectors(iov, *offset)?;
                // SAFETY: as above; the kernel only reads.
                let result = unsafe { libc::pwritev2(fd, iovecs, count, offset, flags) };
                (result, &mut self.inline.write)
            }
            _ => return None,
        };
        if let Ok(moved) = usize::try_from(result) {
            return Some(moved);
        }
        // EAGAIN: the data is not in the page cache. Any other error recurs in the ring and is reported there.
        if io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            *may = false;
        }
        None
    }

    fn entry(&self, op: &HostOp) -> io::Result<squeue::Entry> {
        let entry = match op {
            HostOp::Readv { iov, offset } => match (iov.as_iovecs(), self.fixed_buffer(iov)) {
                (&[piece], Some(index)) => {
                    opcode::ReadFixed::new(IMAGE, piece.iov_base.cast(), length(piece.iov_len)?, index)
                        .offset(*offset)
                        .rw_flags(self.rw_flags)
                        .build()
                }
                (&[piece], None) => opcode::Read::new(IMAGE, piece.iov_base.cast(), length(piece.iov_len)?)
                    .offset(*offset)
                    .rw_flags(self.rw_flags)
                    .build(),
                // Several pieces are in an array, which stays where it is when `op` moves.
                (pieces, _) => opcode::Readv::new(IMAGE, pieces.as_ptr(), length(pieces.len())?)
                    .offset(*offset)
                    .rw_flags(self.rw_flags)
                    .build(),
            },
            HostOp::Writev { iov, offset, dsync } => {
                let flags = self.rw_flags | if *dsync { libc::RWF_DSYNC } else { 0 };
                match (iov.as_iovecs(), self.fixed_buffer(iov)) {
                    (&[piece], Some(index)) => {
                        opcode::WriteFixed::new(IMAGE, piece.iov_base.cast(), length(piece.iov_len)?, index)
                            .offset(*offset)
                            .rw_flags(flags)
                            .build()
                    }
                    (&[piece], None) => {
                        opcode::Write::new(IMAGE, piece.iov_base.cast(), length(piece.iov_len)?)
                            .offset(*offset)
                            .rw_flags(flags)
                            .build()
                    }
                    (pieces, _) => opcode::Writev::new(IMAGE, pieces.as_ptr(), length(pieces.len())?)
                        .offset(*offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            HostOp::Fdatasync => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
            HostOp::PunchHole { offset, len, .. } => erase(*offset, *len, libc::FALLOC_FL_PUNCH_HOLE),
            HostOp::ZeroRange { offset, len } => erase(*offset, *len, libc::FALLOC_FL_ZERO_RANGE),
        };
        Ok(entry)
    }

    /// Returns `true` if a thread of the kernel would have to execute `op`, because it blocks. Of a write with O_DIRECT
    /// to a hole that cannot be known beforehand.
    fn blocks(&self, op: &HostOp) -> bool {
        match op {
            HostOp::Readv { .. } => false,
            // A write to the page cache comes here only if it could not be made without waiting.
            HostOp::Writev { dsync, .. } => *dsync || !self.image.config().cache.direct,
            HostOp::Fdatasync | HostOp::PunchHole { .. } | HostOp::ZeroRange { .. } => true,
        }
    }

    /// Queues an operation for the kernel. There is room for it.
    fn queue(&mut self, token: OpToken, op: HostOp, blocks: bool) {
        let entry = match self.entry(&op) {
            Ok(entry) => entry,
            Err(error) => {
                self.without_ring.push(Ended { token, result: Err(error) });
                return;
            }
        };
        // The operation, and so its memory, is kept before the kernel sees it.
        let number = self.ops.insert(Begun { token, op, blocks });
        if let Err(error) = self.push(&entry.user_data(number)) {
            // The kernel has not seen it.
            self.ops.remove(number);
            self.without_ring.push(Ended { token, result: Err(error) });
            return;
        }
        if blocks {
            self.alone.record_ring_submit();
            Counters::count(&self.image.stats.beside_queues.blocking_by_kernel_thread);
        }
        // Unless the disk has enough to do, it begins with the first operations of a long batch while
        // the worker still parses the last ones. An error here recurs in the wait that follows, and is
        // reported there.
        let queued = self.ring.submission().len();
        if queued >= self.batch && self.ops.len().saturating_sub(queued) < BUSY_BATCHES * self.batch {
            let _ = self.enter(0);
        }
    }

    /// Queues the operation that was kept back for the kernel: it is not alone any more.
    fn release_kept(&mut self) {
        if let Some((token, op)) = self.alone.take_kept() {
            self.queue(token, op, true);
        }
    }

    /// Returns the index of the registered buffer that contains all of `iov`. `None` if there is none, or if `iov`
    /// has more than one piece.
    fn fixed_buffer(&self, iov: &Iov) -> Option<u16> {
        let &[piece] = iov.as_iovecs() else { return None };
        let (at, len) = (piece.iov_base as u64, piece.iov_len as u64);
        let holds =
            |&(first, bytes): &(u64, u64)| at >= first && at - first <= bytes && len <= bytes - (at - first);
        self.fixed.iter().position(holds).and_then(|index| u16::try_from(index).ok())
    }
}

impl Engine for UringEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        if let Some(moved) = self.try_inline(&op) {
            self.alone.record_submit(false, self.ops.len());
            self.without_ring.push(Ended { token, result: Ok(moved) });
            return Ok(());
        }
        if self.ops.len() + usize::from(self.alone.has_kept()) >= self.room {
            return Err(op);
        }
        let blocks = self.blocks(&op);
        self.alone.record_submit(blocks, self.ops.len());
        self.release_kept();
        let is_alone = blocks && self.ops.is_empty();
        let kept = if is_alone { self.alone.keep_back(token, op) } else { Err(op) };
        if let Err(op) = kept {
            self.queue(token, op, blocks);
        }
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        self.alone.record_wait();
        self.reap(ended)?;
        self.release_kept();
        loop {
            if let Wake::Doorbell(doorbell) = wake {
                self.listen(doorbell)?;
                if let Some(poll) = self.kick.arm(KICK) {
                    self.push(&poll)?;
                }
            }
            ended.append(&mut self.without_ring);
            let may_wait = match wake {
                Wake::Now => false,
                Wake::EndOnly => !self.ops.is_empty(),
                Wake::Doorbell(_) => !std::mem::take(&mut self.bell.rung),
            };
            let must_wait = may_wait && ended.len() == before;
            // There is nothing to submit and nothing to fetch: no system call is needed.
            if !must_wait && self.ring.submission().is_empty() && !self.has_ends_to_fetch() {
                return Ok(());
            }
            self.enter(usize::from(must_wait))?;
            self.reap(ended)?;
            if !must_wait {
                return Ok(());
            }
        }
    }

    fn is_ready(&mut self) -> bool {
        let has_ends = !self.without_ring.is_empty() || !self.ring.completion().is_empty();
        // A completion that arrives while the flag is ignored is fetched when the worker blocks.
        has_ends
            || self.alone.has_kept()
            || !self.ring.submission().is_empty()
            || (self.has_ends_to_fetch() && !self.stale_taskrun)
    }

    fn meanwhile(&self) -> Meanwhile {
        if self.alone.has_kept() && self.without_ring.is_empty() {
            Meanwhile::ExecuteKept
        } else if self.alone.in_ring() > 0 {
            Meanwhile::Sleep
        } else {
            Meanwhile::Spin
        }
    }

    fn execute_kept(&mut self, came: &dyn Fn() -> bool, ended: &mut Vec<Ended>) {
        let Some((token, op)) = self.alone.take_kept() else { return };
        if came() {
            return self.queue(token, op, true);
        }
        let result = blocking::execute(self.image.file().descriptor(), &op, self.rw_flags);
        Counters::count(&self.image.stats.beside_queues.blocking_by_worker);
        self.alone.record_executed(came());
        ended.push(Ended { token, result });
    }

    fn listen_to(&mut self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        self.rest()?;
        self.kick.set(kick);
        Ok(())
    }

    /// Cancels the doorbell's read in the ring and the poll of a kick, and waits until both are gone.
    fn rest(&mut self) -> io::Result<()> {
        let mut ended = Vec::new();
        if self.bell.waits_on.is_some() {
            self.push(&opcode::AsyncCancel::new(BELL).build().user_data(CANCEL))?;
        }
        if self.kick.is_armed() {
            self.push(&opcode::AsyncCancel::new(KICK).build().user_data(CANCEL))?;
        }
        while self.bell.waits_on.is_some() || self.kick.is_armed() {
            self.enter(1)?;
            self.reap(&mut ended)?;
        }
        self.kick.clear();
        (self.bell.rung, self.bell.blocking) = (false, None);
        self.without_ring.append(&mut ended);
        Ok(())
    }
}

impl Drop for UringEngine {
    /// Waits for all operations, because the kernel may still write into memory that is about to be freed. If the
    /// wait fails, the memory is never freed.
    fn drop(&mut self) {
        let mut ended = Vec::new();
        let mut outcome = self.rest();
        while outcome.is_ok() && !self.ops.is_empty() {
            outcome = self.enter(1).and_then(|()| self.reap(&mut ended));
        }
        if let Err(error) = outcome {
            log::error!("disk: io_uring cannot be waited for at the end: {error}");
            std::mem::forget(std::mem::take(&mut self.ops));
            std::mem::forget(std::mem::take(&mut self.bell.counter));
        }
        // The kernel destroys a ring some time after it is closed. This releases the image, and the lock
        // on it, at once.
        if let Err(error) = self.ring.submitter().unregister_files() {
            log::debug!("disk: io_uring keeps the image for a while: {error}");
        }
    }
}

fn erase(offset: u64, len: u64, mode: libc::c_int) -> squeue::Entry {
    opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
}

fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Clears O_NONBLOCK, so that a read of `fd` in the ring waits instead of failing with EAGAIN.
fn make_blocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFL touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: F_SETFL touches no memory.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Returns the arguments for preadv2 and pwritev2, or `None` if one is out of range.
fn vectors(iov: &Iov, offset: u64) -> Option<(*const libc::iovec, libc::c_int, i64)> {
    let pieces = iov.as_iovecs();
    Some((pieces.as_ptr(), libc::c_int::try_from(pieces.len()).ok()?, i64::try_from(offset).ok()?))
}

/// Returns the name of the ring entry for `op` on an image in the mode `cache`, with the flags that matter, and of the
/// calls that are tried first: in the modes that use the page cache what `try_inline` does, and what the worker
/// executes itself if it is alone.
pub fn ring_entry(op: &HostOp, cache: &CachePolicy) -> &'static str {
    match op {
        HostOp::Readv { .. } if cache.drop_behind => {
            "preadv2(RWF_NOWAIT|RWF_DONTCACHE), else IORING_OP_READ(RWF_DONTCACHE)"
        }
        HostOp::Writev { dsync: false, .. } if cache.drop_behind => {
            "pwritev2(RWF_NOWAIT|RWF_DONTCACHE), else pwritev2(RWF_DONTCACHE) if alone, else \
             IORING_OP_WRITE(RWF_DONTCACHE)"
        }
        HostOp::Writev { dsync: true, .. } if cache.drop_behind => {
            "pwritev2(RWF_DSYNC|RWF_DONTCACHE) if alone, else IORING_OP_WRITE(RWF_DSYNC|RWF_DONTCACHE)"
        }
        HostOp::Readv { .. } if !cache.direct => "preadv2(RWF_NOWAIT), else IORING_OP_READ",
        HostOp::Writev { dsync: false, .. } if !cache.direct => {
            "pwritev2(RWF_NOWAIT), else pwritev if alone, else IORING_OP_WRITE"
        }
        HostOp::Readv { .. } => "IORING_OP_READ",
        HostOp::Writev { dsync: false, .. } => "IORING_OP_WRITE",
        HostOp::Writev { dsync: true, .. } => "pwritev2(RWF_DSYNC) if alone, else IORING_OP_WRITE(RWF_DSYNC)",
        HostOp::Fdatasync => "fdatasync if alone, else IORING_OP_FSYNC(IORING_FSYNC_DATASYNC)",
        HostOp::PunchHole { .. } => {
            "fallocate(FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE) if alone, else IORING_OP_FALLOCATE"
        }
        HostOp::ZeroRange { .. } => {
            "fallocate(FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE) if alone, else IORING_OP_FALLOCATE"
        }
    }
}
