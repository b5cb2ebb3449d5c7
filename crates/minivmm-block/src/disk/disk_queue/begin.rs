//! How a request begins: the checks before its first host operation, and the choice of that operation.
//!
//! Owns the refusals (readonly, misaligned, after a failed sync) and the first choice between the
//! ways to a stable write. [`super`] does everything that follows.

use super::DiskQueue;
use crate::disk::erase::Erase;
use crate::disk::flight::{Next, Stage};
use crate::disk::geometry::SectorRange;
use crate::disk::op::{DiskError, Op, ZeroedRange};
use crate::disk::stable::StableBy;
use crate::disk::transfer::Transfer;
use crate::mem::Iov;

/// How a transfer begins. The default is a read.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    write: bool,
    dsync: bool,
    /// `true` if `decide` chooses RWF_DSYNC or a shared fdatasync once the whole batch is known.
    deferred: bool,
}

impl DiskQueue {
    /// Returns the first stage of a request and what to do first, usually a host operation.
    pub(super) fn begin(&mut self, op: Op, wb_at_submit: bool) -> Result<(Stage, Next), DiskError> {
        match op {
            Op::Read(range, iov) => self.begin_transfer(range, iov, Way::default()),
            Op::Write(range, iov) => {
                self.check_writable()?;
                let stable = self.cache.write_must_be_stable(wb_at_submit);
                if stable {
                    self.check_latch()?;
                }
                let (dsync, deferred) = match self.stable_by {
                    _ if !stable || !self.has_dsync => (false, false),
                    StableBy::Dsync => (true, false),
                    StableBy::Auto => (false, self.image.file().dsync_is_one_flush()),
                    StableBy::Fdatasync | StableBy::Group => (false, false),
                };
                self.begin_transfer(range, iov, Way { write: true, dsync, deferred })
            }
            Op::Flush if !self.cache.policy().honour_flush => {
                self.stats.count(|counters| &counters.flushes_ignored);
                Ok((Stage::Sync, Next::Done(Ok(()))))
            }
            Op::Flush => {
                self.check_latch()?;
                Ok((Stage::GroupSync, Next::Join))
            }
            Op::Discard(ranges) => {
                let unmapped = |range| ZeroedRange { range, unmap: true };
                let ranges: Vec<_> = ranges.into_iter().map(unmapped).collect();
                self.begin_erase(&ranges, false, wb_at_submit)
            }
            Op::WriteZeroes(ranges) => self.begin_erase(&ranges, true, wb_at_submit),
        }
    }

    fn begin_transfer(&mut self, range: SectorRange, iov: Iov, way: Way) -> Result<(Stage, Next), DiskError> {
        self.check_aligned(range)?;
        let mut transfer = Transfer::new(range.offset(), iov, way.write, way.dsync);
        let next = if transfer.is_empty() {
            Next::Done(Ok(()))
        } else if way.deferred {
            Next::DeferToBatch
        } else {
            Next::Op(transfer.next_window(&self.image, &self.stats, &mut self.pool)?)
        };
        Ok((Stage::Transfer(transfer), next))
    }

    fn begin_erase(
        &self,
        ranges: &[ZeroedRange],
        must_zero: bool,
        wb_at_submit: bool,
    ) -> Result<(Stage, Next), DiskError> {
        self.check_writable()?;
        for erased in ranges {
            self.check_aligned(erased.range)?;
        }
        if self.cache.write_must_be_stable(wb_at_submit) {
            self.check_latch()?;
        }
        let mut erase = Erase::new(ranges, must_zero, self.image.geometry().alignment);
        let next = match erase.begin_range() {
            Some(op) => Next::Op(op),
            None => Next::Done(Ok(())),
        };
        Ok((Stage::Erase(erase), next))
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if self.image.config().readonly { Err(DiskError::Readonly) } else { Ok(()) }
    }

    pub(super) fn check_latch(&self) -> Result<(), DiskError> {
        self.image.latch.check().map_err(DiskError::Latched)
    }

    fn check_aligned(&self, range: SectorRange) -> Result<(), DiskError> {
        let geometry = self.image.geometry();
        if geometry.is_aligned(range) {
            Ok(())
        } else {
            Err(DiskError::Misaligned(geometry.alignment.offset))
        }
    }
}
