//! A read or write as a sequence of host operations.
//!
//! Owns continuation of short transfers and bounce buffers. [`super::disk_queue`] decides what an error means,
//! and what follows the last byte.

use std::io;
use std::sync::Arc;

use super::engine::HostOp;
use super::image::Image;
use super::op::DiskError;
use super::queue_stats::QueueStats;
use crate::mem::{BufferPool, Iov};

/// Largest host transfer through a bounce buffer, in bytes. Longer requests need several.
pub const BOUNCE_MAX: u64 = 256 << 10;
/// Largest host transfer, in bytes: Linux moves no more at once (MAX_RW_COUNT). It is a whole number of blocks.
const TRANSFER_MAX: u64 = 0x7fff_f000;
/// Largest number of pieces in one host transfer (IOV_MAX).
const PIECES_MAX: usize = 1024;

/// A read or write, and its progress.
pub(super) struct Transfer {
    pub(super) write: bool,
    /// `true` if each part is written with RWF_DSYNC and so is stable when it completes.
    pub(super) dsync: bool,
    iov: Iov,
    /// Offset of the first byte in the image, in bytes.
    offset: u64,
    /// Bytes moved so far.
    done: u64,
    /// The bounce buffer of the operation in flight; `None` if that operation uses guest memory.
    bounce: Option<Iov>,
    /// Bytes that the operation in flight was asked to move.
    asked: u64,
}

impl Transfer {
    pub(super) fn new(offset: u64, iov: Iov, write: bool, dsync: bool) -> Self {
        Self { write, dsync, iov, offset, done: 0, bounce: None, asked: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.iov.bytes() == 0
    }

    pub(super) fn what(&self) -> &'static str {
        match (self.write, self.dsync) {
            (false, _) => "preadv",
            (true, false) => "pwritev",
            (true, true) => "pwritev2 with RWF_DSYNC",
        }
    }

    /// Records that the operation in flight has moved `count` bytes. Returns the next operation, or `None` after
    /// the last byte.
    pub(super) fn advance(&mut self, count: u64, windows: &mut Windows) -> Result<Option<HostOp>, DiskError> {
        let bytes = self.iov.bytes();
        // O_DIRECT cannot continue in the middle of a block, so a partly moved block is moved again.
        let moved = if count == self.asked { count } else { count - count % windows.step };
        if moved == 0 || count > self.asked {
            return Err(DiskError::Short { what: self.what(), done: self.done, bytes });
        }
        if let (Some(bounce), false) = (&self.bounce, self.write) {
            bounce.part(0, moved, 1).copy_to(&self.iov.part(self.done, moved, usize::MAX));
        }
        if moved < self.asked {
            windows.stats.count(|counters| &counters.continued);
        }
        self.done += moved;
        if self.done == bytes {
            return Ok(None);
        }
        self.next_window(windows).map(Some)
    }

    /// Returns the host operation for the next part. It uses a bounce buffer only if it must.
    pub(super) fn next_window(&mut self, windows: &mut Windows) -> Result<HostOp, DiskError> {
        self.window(windows)
    }

    /// [`Transfer::next_window`] for the one caller that every request passes through.
    #[inline(always)]
    pub(super) fn window(&mut self, windows: &mut Windows) -> Result<HostOp, DiskError> {
        let mut window = self.iov.part(self.done, TRANSFER_MAX, PIECES_MAX);
        if windows.must_bounce(self.write, &window) {
            window = windows.bounce(&self.iov, self.done, self.write)?;
            self.bounce = Some(window.clone());
        } else if self.bounce.is_some() {
            self.bounce = None;
        }
        self.asked = window.bytes();
        let offset = self.offset + self.done;
        Ok(if self.write {
            HostOp::Writev { iov: window, offset, dsync: self.dsync }
        } else {
            HostOp::Readv { iov: window, offset }
        })
    }
}

/// How the transfers of one queue are cut into host operations, and the queue's bounce buffers.
pub(super) struct Windows {
    /// `true` if every write goes through a bounce buffer.
    bounce_writes: bool,
    /// `true` if every read goes through a bounce buffer.
    bounce_reads: bool,
    /// `true` if a transfer whose memory is not aligned goes through a bounce buffer: O_DIRECT.
    direct: bool,
    /// The alignment of each piece's address, in bytes.
    memory_align: u32,
    /// The alignment of each piece's length, in bytes.
    length_align: u32,
    /// After a short transfer, the next one begins at a multiple of this many bytes.
    step: u64,
    stats: Arc<QueueStats>,
    /// The pool keeps a few buffers; more are allocated while they are needed.
    pool: BufferPool,
}

impl Windows {
    pub(super) fn new(image: &Image, stats: &Arc<QueueStats>) -> Self {
        const KEPT: usize = 8;
        // 256 KiB fits in every usize.
        #[allow(clippy::cast_possible_truncation)]
        let bytes = BOUNCE_MAX as usize;
        let alignment = image.geometry().alignment;
        let direct = image.config().cache.direct;
        let always = direct && image.config().bounce_always;
        Self {
            // The write log must record exactly what is written, even if the guest changes its memory meanwhile.
            bounce_writes: always || image.write_log().is_some(),
            bounce_reads: always,
            direct,
            memory_align: alignment.memory,
            length_align: alignment.offset,
            step: u64::from(alignment.offset),
            stats: Arc::clone(stats),
            pool: BufferPool::new(bytes, alignment.memory.max(512) as usize, KEPT),
        }
    }

    #[inline]
    fn must_bounce(&self, write: bool, window: &Iov) -> bool {
        let always = if write { self.bounce_writes } else { self.bounce_reads };
        always || self.direct && !window.is_aligned(self.memory_align, self.length_align)
    }

    /// Returns a bounce buffer for the part of `iov` from byte `done` on.
    #[cold]
    fn bounce(&mut self, iov: &Iov, done: u64, write: bool) -> Result<Iov, DiskError> {
        let part = iov.part(done, BOUNCE_MAX, usize::MAX);
        let copy = if write {
            self.pool.take_copy(&part)
        } else {
            let bytes = usize::try_from(part.bytes()).map_err(io::Error::other);
            bytes.and_then(|bytes| self.pool.take_zeroed(bytes))
        };
        let bounce = copy.map_err(|source| DiskError::Host { what: "allocating a bounce buffer", source })?;
        self.stats.count(|counters| &counters.bounces);
        Ok(bounce)
    }
}
