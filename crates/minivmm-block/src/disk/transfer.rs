//! A read or write as a sequence of host operations.
//!
//! Owns continuation of short transfers and bounce buffers. [`super::disk_queue`] decides what an error means,
//! and what follows the last byte.

use std::io;

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
    pub(super) fn advance(
        &mut self,
        count: u64,
        image: &Image,
        stats: &QueueStats,
        pool: &mut BufferPool,
    ) -> Result<Option<HostOp>, DiskError> {
        let bytes = self.iov.bytes();
        let short = DiskError::Short { what: self.what(), done: self.done, bytes };
        if count == 0 || count > self.asked {
            return Err(short);
        }
        // O_DIRECT cannot continue in the middle of a block, so a partly moved block is moved again.
        let step = u64::from(image.geometry().alignment.offset);
        let moved = if count == self.asked { count } else { count - count % step };
        if moved == 0 {
            return Err(short);
        }
        if let (Some(bounce), false) = (&self.bounce, self.write) {
            bounce.part(0, moved, 1).copy_to(&self.iov.part(self.done, moved, usize::MAX));
        }
        if moved < self.asked {
            stats.count(|counters| &counters.continued);
        }
        self.done += moved;
        if self.done == bytes {
            return Ok(None);
        }
        self.next_window(image, stats, pool).map(Some)
    }

    /// Returns the host operation for the next part. It uses a bounce buffer only if it must.
    pub(super) fn next_window(
        &mut self,
        image: &Image,
        stats: &QueueStats,
        pool: &mut BufferPool,
    ) -> Result<HostOp, DiskError> {
        let alignment = image.geometry().alignment;
        let mut window = self.iov.part(self.done, TRANSFER_MAX, PIECES_MAX);
        self.bounce = None;
        let fits = window.is_aligned(alignment.memory, alignment.offset);
        // The write log must record exactly what is written, even if the guest changes its memory meanwhile.
        let recorded = self.write && image.write_log().is_some();
        if recorded || image.config().cache.direct && (image.config().bounce_always || !fits) {
            window = self.bounce(stats, pool)?;
            self.bounce = Some(window.clone());
        }
        self.asked = window.bytes();
        let offset = self.offset + self.done;
        Ok(if self.write {
            HostOp::Writev { iov: window, offset, dsync: self.dsync }
        } else {
            HostOp::Readv { iov: window, offset }
        })
    }

    fn bounce(&self, stats: &QueueStats, pool: &mut BufferPool) -> Result<Iov, DiskError> {
        let part = self.iov.part(self.done, BOUNCE_MAX, usize::MAX);
        let copy = if self.write {
            pool.take_copy(&part)
        } else {
            usize::try_from(part.bytes()).map_err(io::Error::other).and_then(|bytes| pool.take_zeroed(bytes))
        };
        let bounce = copy.map_err(|source| DiskError::Host { what: "allocating a bounce buffer", source })?;
        stats.count(|counters| &counters.bounces);
        Ok(bounce)
    }
}

/// Returns the bounce buffers of one queue. The pool keeps a few; more are allocated while they are needed.
pub(super) fn bounce_buffers(image: &Image) -> BufferPool {
    const KEPT: usize = 8;
    // 256 KiB fits in every usize.
    #[allow(clippy::cast_possible_truncation)]
    let bytes = BOUNCE_MAX as usize;
    BufferPool::new(bytes, image.geometry().alignment.memory.max(512) as usize, KEPT)
}
