//! The io_uring engine: operations are queued, and one system call hands a whole batch to the kernel
//! and waits for the first end or the doorbell.
//!
//! Owns the ring, the memory of every operation that the kernel has, and the read of the doorbell
//! that waits in the same ring. The ring may only do what this file queues (the kernel refuses all
//! else), on one registered file and on the doorbell.
//!
//! Data that the host's page cache holds is copied at once, without the ring: for a copy of a few
//! KiB even the way through a ring is long (`docs/performance.md`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;
use super::engine::{Ended, Engine, HostOp, OpToken, Wake};
use super::image::Image;
use crate::mem::{self, Iov, Ram};
use crate::slab::Slab;

/// Largest buffer that the kernel registers as one, in bytes.
const FIXED_MAX: u64 = 1 << 30;
/// A kernel that has so many batches already gets the next with the rest of what is queued.
const BUSY_BATCHES: usize = 4;
/// The image, in the ring's table of files.
const IMAGE: Fixed = Fixed(0);
/// Numbers that the slab never gives out.
const BELL: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;
/// IORING_UNREGISTER_FILES.
const UNREGISTER_FILES: u8 = 3;
/// IOSQE_FIXED_FILE: the one flag that an entry of ours may have.
const FIXED_FILE: u8 = 1;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// The host's kernel refuses.
    #[error("{what}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The host's kernel is too old.
    #[error("this kernel's io_uring lacks {0} (Linux 5.10 has it)")]
    Lacks(&'static str),
    /// Guest memory cannot be pinned.
    #[error(
        "{bytes} bytes of guest memory cannot be registered with io_uring: raise the limit of locked memory \
         (ulimit -l, in KiB), or use buffers=plain"
    )]
    Memory {
        /// All of guest memory.
        bytes: u64,
        /// The host's answer.
        source: io::Error,
    },
}

/// Executes operations through io_uring.
pub struct UringEngine {
    ring: IoUring,
    /// Keeps the registered file, and counts the system calls.
    image: Arc<Image>,
    /// What the kernel has: the memory of an operation lives until its end is seen.
    ops: Slab<u64, (OpToken, HostOp)>,
    /// Most operations that the kernel has at once: as many as its completions have room for.
    room: usize,
    bell: Bell,
    inline: Inline,
    /// Ended without the ring.
    at_once: Vec<Ended>,
    /// Registered guest memory: (first byte, bytes), by index.
    fixed: Vec<(u64, u64)>,
    /// Operations that are queued before the kernel gets them in the midst of a batch.
    batch: usize,
    enabled: bool,
    /// The kernel says that it has ends to fetch, and when asked had none. It sets its flag after it
    /// has queued the end; if that is fetched in between, the flag stays until the next.
    cries_wolf: bool,
}

/// The doorbell's read, which waits in the ring.
struct Bell {
    /// Where the kernel puts the counter. Its own allocation, so that it stays where it is.
    counter: Box<u64>,
    waits_on: Option<RawFd>,
    /// The doorbell whose reads wait, because O_NONBLOCK was taken away.
    blocking: Option<RawFd>,
    /// Rung since it was last asked.
    rung: bool,
}

/// Whether page cache hits are tried without the ring; off when the file system says it cannot.
struct Inline {
    read: bool,
    write: bool,
}

impl UringEngine {
    /// An engine for the image's descriptor, of `entries` operations at once. With `ram`, guest
    /// memory is registered, which pins all of it.
    pub fn new(image: Arc<Image>, entries: u16, ram: Option<&Ram>) -> Result<Self, UringError> {
        let ring = build(u32::from(entries).next_power_of_two())?;
        register_file(&ring, image.file())?;
        let fixed = ram.map_or(Ok(Vec::new()), |ram| register_memory(&ring, ram))?;
        restrict(&ring)?;
        let buffered = !image.policy().direct;
        Ok(Self {
            ring,
            ops: Slab::default(),
            room: usize::from(entries),
            bell: Bell { counter: Box::new(0), waits_on: None, blocking: None, rung: false },
            inline: Inline { read: buffered, write: buffered },
            at_once: Vec::new(),
            fixed,
            batch: usize::from(image.batch()),
            image,
            enabled: false,
            cries_wolf: false,
        })
    }

    /// A ring begins to work in the thread that will use it, which becomes the only one that may.
    fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: what the entry points to is owned by `self.ops` or `self.bell` until the kernel
        // has ended it, or by the registered memory of guest RAM, which `HostOp` keeps as well.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// The one system call: submits what is queued, waits for at least `want` ends.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        self.enable()?;
        Counters::count(&self.image.beside_queues.io_uring_enters);
        match self.ring.submit_and_wait(want) {
            Ok(_) => {
                self.cries_wolf = self.ring.completion().is_empty() && self.ring.submission().taskrun();
                Ok(())
            }
            // A signal, or ends that must be taken first: both are seen to by trying again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The kernel has ends that it puts into the ring only when it is entered.
    fn has_ends_to_fetch(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Takes the ends that are there.
    fn reap(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        for end in self.ring.completion() {
            let result = end.result();
            match end.user_data() {
                CANCEL => {}
                BELL => {
                    self.bell.waits_on = None;
                    match -result {
                        libc::ECANCELED | libc::EINTR => {}
                        errno if errno > 0 => return Err(io::Error::from_raw_os_error(errno)),
                        _ => self.bell.rung = true,
                    }
                }
                number => {
                    let Some((token, op)) = self.ops.remove(number) else {
                        log::error!("disk: io_uring ended operation {number:#x}, which it was never given");
                        continue;
                    };
                    drop(op);
                    let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                    ended.push(Ended { token, result });
                }
            }
        }
        Ok(())
    }

    /// Has the doorbell's read wait in the ring.
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

    /// Tries to do it without waiting; `None` when only the ring can.
    fn try_inline(&mut self, op: &HostOp) -> Option<usize> {
        let fd = self.image.file().as_raw_fd();
        let (result, may) = match op {
            HostOp::Readv { iov, offset } if self.inline.read => {
                let (iovecs, count, offset) = vectors(iov, *offset)?;
                // SAFETY: the iovecs lead to memory that `iov` owns until after this call.
                let result = unsafe { libc::preadv2(fd, iovecs, count, offset, libc::RWF_NOWAIT) };
                (result, &mut self.inline.read)
            }
            HostOp::Writev { iov, offset, dsync: false } if self.inline.write => {
                let (iovecs, count, offset) = vectors(iov, *offset)?;
                // SAFETY: as above; the kernel only reads.
                let result = unsafe { libc::pwritev2(fd, iovecs, count, offset, libc::RWF_NOWAIT) };
                (result, &mut self.inline.write)
            }
            _ => return None,
        };
        if let Ok(moved) = usize::try_from(result) {
            return Some(moved);
        }
        // EAGAIN: not in the cache. What else there is, the ring finds as well and tells.
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
                        .build()
                }
                (&[piece], None) => opcode::Read::new(IMAGE, piece.iov_base.cast(), length(piece.iov_len)?)
                    .offset(*offset)
                    .build(),
                (pieces, _) => {
                    opcode::Readv::new(IMAGE, pieces.as_ptr(), length(pieces.len())?).offset(*offset).build()
                }
            },
            HostOp::Writev { iov, offset, dsync } => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
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

    /// The registered buffer that a piece of memory is wholly in.
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
            self.at_once.push(Ended { token, result: Ok(moved) });
            return Ok(());
        }
        if self.ops.len() >= self.room {
            return Err(op);
        }
        let entry = match self.entry(&op) {
            Ok(entry) => entry,
            Err(error) => {
                self.at_once.push(Ended { token, result: Err(error) });
                return Ok(());
            }
        };
        // Kept before the kernel hears of it.
        let number = self.ops.insert((token, op));
        if let Err(error) = self.push(&entry.user_data(number)) {
            // The kernel has not seen it.
            self.ops.remove(number);
            self.at_once.push(Ended { token, result: Err(error) });
        }
        // The disk begins with the first of a long batch while the last are still being taken apart,
        // unless it has enough to do. What fails here fails again in the wait that follows, and is
        // told there.
        let queued = self.ring.submission().len();
        if queued >= self.batch && self.ops.len().saturating_sub(queued) < BUSY_BATCHES * self.batch {
            let _ = self.enter(0);
        }
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        self.reap(ended)?;
        loop {
            if let Wake::Doorbell(doorbell) = wake {
                self.listen(doorbell)?;
            }
            ended.append(&mut self.at_once);
            let may_wait = match wake {
                Wake::Now => false,
                Wake::EndOnly => !self.ops.is_empty(),
                Wake::Doorbell(_) => !std::mem::take(&mut self.bell.rung),
            };
            let must_wait = may_wait && ended.len() == before;
            // Nothing to hand over, and nothing that would come of it.
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
        let has_ends = !self.at_once.is_empty() || !self.ring.completion().is_empty();
        // An end that comes while the flag is not believed is fetched when the worker goes to sleep.
        has_ends || !self.ring.submission().is_empty() || (self.has_ends_to_fetch() && !self.cries_wolf)
    }

    /// Takes the doorbell's read out of the ring.
    fn rest(&mut self) -> io::Result<()> {
        let mut ended = Vec::new();
        if self.bell.waits_on.is_some() {
            self.push(&opcode::AsyncCancel::new(BELL).build().user_data(CANCEL))?;
        }
        while self.bell.waits_on.is_some() {
            self.enter(1)?;
            self.reap(&mut ended)?;
        }
        (self.bell.rung, self.bell.blocking) = (false, None);
        self.at_once.append(&mut ended);
        Ok(())
    }
}

impl Drop for UringEngine {
    /// The kernel may still write into memory that is about to be freed: waits for all of it, and
    /// where it cannot be waited for, the memory is never freed.
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
        // The kernel takes a ring apart later, in its own time; the image, and the lock on it, are
        // let go of now.
        if let Err(error) = self.ring.submitter().unregister_files() {
            log::debug!("disk: io_uring keeps the image for a while: {error}");
        }
    }
}

fn build(entries: u32) -> Result<IoUring, UringError> {
    let refused = |source| UringError::Refused { what: "io_uring_setup", source };
    // The best first: ends are taken in our own thread when it asks for them, not in between.
    let mut best = IoUring::builder();
    best.setup_r_disabled().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    let mut plain = IoUring::builder();
    plain.setup_r_disabled();
    let ring = match best.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain.build(entries),
        other => other,
    }
    .map_err(refused)?;
    let features = ring.params();
    for (has, what) in [
        (features.is_feature_submit_stable(), "IORING_FEAT_SUBMIT_STABLE"),
        (features.is_feature_nodrop(), "IORING_FEAT_NODROP"),
        (features.is_feature_fast_poll(), "IORING_FEAT_FAST_POLL"),
    ] {
        if !has {
            return Err(UringError::Lacks(what));
        }
    }
    Ok(ring)
}

fn register_file(ring: &IoUring, file: &File) -> Result<(), UringError> {
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .map_err(|source| UringError::Refused { what: "registering the image with io_uring", source })
}

/// Registers all of guest memory; the buffers, by index.
fn register_memory(ring: &IoUring, ram: &Ram) -> Result<Vec<(u64, u64)>, UringError> {
    let mut buffers = Vec::new();
    for (_, host, bytes) in mem::regions(ram) {
        let mut at = 0;
        while at < bytes {
            let len = (bytes - at).min(FIXED_MAX);
            buffers.push((host + at, len));
            at += len;
        }
    }
    let iovec = |&(at, len): &(u64, u64)| libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: usize::try_from(len).unwrap_or(usize::MAX),
    };
    let iovecs: Vec<_> = buffers.iter().map(iovec).collect();
    // SAFETY: the ranges are guest RAM; the kernel pins the pages, so that they outlive even the mapping.
    unsafe { ring.submitter().register_buffers(&iovecs) }
        .map_err(|source| UringError::Memory { bytes: buffers.iter().map(|&(_, len)| len).sum(), source })?;
    Ok(buffers)
}

/// From now on the ring does only this.
fn restrict(ring: &IoUring) -> Result<(), UringError> {
    let codes = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::ReadFixed::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::AsyncCancel::CODE,
    ];
    let mut allowed: Vec<_> = codes.into_iter().map(Restriction::sqe_op).collect();
    allowed.push(Restriction::sqe_flags_allowed(FIXED_FILE));
    allowed.push(Restriction::register_op(UNREGISTER_FILES));
    ring.submitter()
        .register_restrictions(&mut allowed)
        .map_err(|source| UringError::Refused { what: "restricting the ring", source })
}

fn erase(offset: u64, len: u64, mode: libc::c_int) -> squeue::Entry {
    opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
}

fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// A read of it in the ring then waits, instead of ending with EAGAIN.
fn make_blocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFL touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: nor does F_SETFL.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What preadv2 and pwritev2 take.
fn vectors(iov: &Iov, offset: u64) -> Option<(*const libc::iovec, libc::c_int, i64)> {
    let pieces = iov.as_iovecs();
    Some((pieces.as_ptr(), libc::c_int::try_from(pieces.len()).ok()?, i64::try_from(offset).ok()?))
}

/// What an operation is in the ring, with the flags that matter, and what is tried before
/// ([`UringEngine::try_inline`]) in the modes that use the page cache.
pub fn ring_entry(op: &HostOp, buffered: bool) -> &'static str {
    match op {
        HostOp::Readv { .. } if buffered => "preadv2(RWF_NOWAIT), else IORING_OP_READ",
        HostOp::Writev { dsync: false, .. } if buffered => "pwritev2(RWF_NOWAIT), else IORING_OP_WRITE",
        HostOp::Readv { .. } => "IORING_OP_READ",
        HostOp::Writev { dsync: false, .. } => "IORING_OP_WRITE",
        HostOp::Writev { dsync: true, .. } => "IORING_OP_WRITE(RWF_DSYNC)",
        HostOp::Fdatasync => "IORING_OP_FSYNC(IORING_FSYNC_DATASYNC)",
        HostOp::PunchHole { .. } => "IORING_OP_FALLOCATE(FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE)",
        HostOp::ZeroRange { .. } => "IORING_OP_FALLOCATE(FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_does_nothing_but_a_disks_io() {
        let Ok(mut ring) = build(8) else { return println!("skipped: no io_uring here") };
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        register_file(&ring, &file).unwrap();
        restrict(&ring).unwrap();
        ring.submitter().register_enable_rings().unwrap();
        let path = c"/";
        let entries = [
            opcode::Fsync::new(IMAGE).build(),
            opcode::Nop::new().build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Fsync::new(IMAGE).build().flags(squeue::Flags::IO_DRAIN),
        ];
        for (entry, expected) in entries.into_iter().zip([0, -libc::EACCES, -libc::EACCES, -libc::EACCES]) {
            // SAFETY: the entries point to nothing but `path`, which lives on.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().map(|end| end.result()).collect::<Vec<_>>(), [expected]);
        }
        let refused = ring.submitter().register_files_update(0, &[other.as_raw_fd()]);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES), "nor takes another file");
    }
}
