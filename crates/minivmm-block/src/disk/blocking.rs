//! The blocking engine: preadv, pwritev2, fdatasync, fallocate, one after another in the order of
//! submission, on the thread that waits.
//!
//! Owns the system calls and nothing else. It is the reference that strace can audit: every
//! operation is exactly one call.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::cache::CachePolicy;
use super::engine::{Ended, Engine, HostOp, OpToken, Wake};
use crate::doorbell;

/// Executes one operation at a time with system calls that block.
pub struct BlockingEngine {
    file: Arc<File>,
    /// The RWF_* flags of each read and write.
    rw_flags: libc::c_int,
    /// The operation for the next wait. There is no room for more: later operations stay with the state machine.
    /// The judgement of one sync therefore need not wait for the syncs that come after it.
    next: Option<(OpToken, HostOp)>,
    /// A second doorbell, of another process.
    kick: Option<Arc<OwnedFd>>,
}

impl BlockingEngine {
    /// Returns an engine for `file`, which stays open as long as the engine lives.
    pub fn new(file: Arc<File>) -> Self {
        Self::with_flags(file, 0)
    }

    /// Returns an engine for `file` whose reads and writes all have these RWF_* flags.
    pub fn with_flags(file: Arc<File>, rw_flags: libc::c_int) -> Self {
        Self { file, rw_flags, next: None, kick: None }
    }
}

/// Executes `op` on `file` with one system call, which may block. Reads and writes have the flags `rw_flags` (RWF_*).
pub(super) fn execute(file: &File, op: &HostOp, rw_flags: libc::c_int) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let result = match op {
        HostOp::Readv { iov, offset } => {
            let iovecs = iov.as_iovecs();
            let (count, offset) = (count(iovecs)?, file_offset(*offset)?);
            match rw_flags {
                // SAFETY: the iovecs point to memory that `iov` owns until after this call. The
                // kernel writes to that memory, and nothing in Rust holds a reference to it.
                0 => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, offset) },
                // SAFETY: as above.
                flags => unsafe { libc::preadv2(fd, iovecs.as_ptr(), count, offset, flags) },
            }
        }
        HostOp::Writev { iov, offset, dsync } => {
            let iovecs = iov.as_iovecs();
            let (count, offset) = (count(iovecs)?, file_offset(*offset)?);
            match rw_flags | if *dsync { libc::RWF_DSYNC } else { 0 } {
                // SAFETY: as above; the kernel only reads.
                0 => unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, offset) },
                // SAFETY: as above.
                flags => unsafe { libc::pwritev2(fd, iovecs.as_ptr(), count, offset, flags) },
            }
        }
        // SAFETY: no memory is involved.
        HostOp::Fdatasync => unsafe { libc::fdatasync(fd) as isize },
        HostOp::PunchHole { offset, len, .. } => fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE, *offset, *len)?,
        HostOp::ZeroRange { offset, len } => fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, *offset, *len)?,
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Returns the one system call that executes `op` on an image in the mode `cache`, as strace writes it.
pub fn system_call(op: &HostOp, cache: &CachePolicy) -> &'static str {
    match op {
        HostOp::Readv { .. } if cache.drop_behind => "preadv2(RWF_DONTCACHE)",
        HostOp::Writev { dsync: false, .. } if cache.drop_behind => "pwritev2(RWF_DONTCACHE)",
        HostOp::Writev { dsync: true, .. } if cache.drop_behind => "pwritev2(RWF_DSYNC|RWF_DONTCACHE)",
        HostOp::Readv { .. } => "preadv",
        HostOp::Writev { dsync: false, .. } => "pwritev",
        HostOp::Writev { dsync: true, .. } => "pwritev2(RWF_DSYNC)",
        HostOp::Fdatasync => "fdatasync",
        HostOp::PunchHole { .. } => "fallocate(FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE)",
        HostOp::ZeroRange { .. } => "fallocate(FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE)",
    }
}

fn fallocate(fd: i32, mode: i32, offset: u64, len: u64) -> io::Result<isize> {
    let (offset, len) = (file_offset(offset)?, file_offset(len)?);
    // SAFETY: no memory is involved.
    Ok(unsafe { libc::fallocate(fd, mode | libc::FALLOC_FL_KEEP_SIZE, offset, len) } as isize)
}

fn count(iovecs: &[libc::iovec]) -> io::Result<i32> {
    i32::try_from(iovecs.len()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn file_offset(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Engine for BlockingEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        if self.next.is_some() {
            return Err(op);
        }
        self.next = Some((token, op));
        Ok(())
    }

    fn listen_to(&mut self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        self.kick = kick;
        Ok(())
    }

    fn is_ready(&mut self) -> bool {
        self.next.is_some()
    }

    /// Executes the operation, or waits for the doorbell if there is none. Each call executes only one, so that
    /// its completion does not wait for others.
    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        if let Some((token, op)) = self.next.take() {
            let result = execute(&self.file, &op, self.rw_flags);
            ended.push(Ended { token, result });
            return Ok(());
        }
        let Wake::Doorbell(bell) = wake else { return Ok(()) };
        let waits = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is ignored.
        let kick = self.kick.as_ref().map_or(-1, |kick| kick.as_raw_fd());
        let mut polled = [waits(bell.as_raw_fd()), waits(kick)];
        // SAFETY: `polled` is two valid pollfds for the length of the call.
        if unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        let [rung, kicked] = polled.map(|polled| polled.revents != 0);
        if let Some(kick) = self.kick.as_ref().filter(|_| kicked) {
            doorbell::clear(kick);
        }
        if !rung {
            return Ok(());
        }
        match bell.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}
