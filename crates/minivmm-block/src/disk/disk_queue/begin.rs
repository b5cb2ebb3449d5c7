//! How a request begins: the checks before its first host operation, and the choice of that operation.
//!
//! Owns the refusals (readonly, misaligned, after a failed sync) and the first choice between the
//! ways to a stable write. [`super`] does everything that follows.

use super::DiskQueue;
use crate::disk::erase::Erase;
use crate::disk::flight::{Flight, Next, Stage};
use crate::disk::geometry::SectorRange;
use crate::disk::op::{DiskError, Op, ZeroedRange};
use crate::disk::stable::StableBy;
use crate::disk::transfer::Transfer;
use crate::mem::Iov;

/// How a transfer begins.
#[derive(Debug, Clone, Copy)]
struct Way {
    write: bool,
    dsync: bool,
    /// `true` if `decide` chooses RWF_DSYNC or a shared fdatasync once the whole batch is known.
    deferred: bool,
}

impl Way {
    const READ: Self = Self { write: false, dsync: false, deferred: false };
    /// A write that may stay volatile, or that an fdatasync makes stable.
    const WRITE: Self = Self { write: true, ..Self::READ };
}

impl DiskQueue {
    /// Puts a request into its first stage. Returns what to do first, usually a host operation.
    #[inline(always)]
    pub(super) fn begin(&mut self, flight: &mut Flight, op: Op) -> Result<Next, DiskError> {
        match op {
            Op::Read(range, iov) => self.begin_transfer(flight, range, iov, Way::READ),
            Op::Write(range, iov) => {
                self.check_writable()?;
                let stable = self.cache.write_must_be_stable(flight.wb_at_submit);
                let way = if stable { self.begin_stable(flight)? } else { Way::WRITE };
                self.begin_transfer(flight, range, iov, way)
            }
            Op::Flush if !self.cache.policy().honour_flush => {
                self.stats.count(|counters| &counters.flushes_ignored);
                Ok(Next::Done(Ok(())))
            }
            Op::Flush => {
                self.check_latch()?;
                Ok(Next::Join)
            }
            Op::Discard(ranges) => {
                let unmapped = |range| ZeroedRange { range, unmap: true };
                let ranges: Vec<_> = ranges.into_iter().map(unmapped).collect();
                self.begin_erase(flight, &ranges, false)
            }
            Op::WriteZeroes(ranges) => self.begin_erase(flight, &ranges, true),
        }
    }

    /// Checks that a write can be made stable, and chooses how.
    fn begin_stable(&self, flight: &mut Flight) -> Result<Way, DiskError> {
        self.check_latch()?;
        let (dsync, deferred) = match self.stable_by {
            _ if !self.has_dsync => (false, false),
            StableBy::Dsync => (true, false),
            StableBy::Auto => (false, self.image.file().dsync_is_one_flush()),
            StableBy::Fdatasync | StableBy::Group => (false, false),
        };
        flight.grouped = !dsync && self.shares_syncs();
        Ok(Way { dsync, deferred, ..Way::WRITE })
    }

    #[inline(always)]
    fn begin_transfer(
        &mut self,
        flight: &mut Flight,
        range: SectorRange,
        iov: Iov,
        way: Way,
    ) -> Result<Next, DiskError> {
        self.check_aligned(range)?;
        let transfer = flight.transfers(Transfer::new(range.offset(), iov, way.write, way.dsync));
        if transfer.is_empty() {
            Ok(Next::Done(Ok(())))
        } else if way.deferred {
            Ok(Next::DeferToBatch)
        } else {
            transfer.window(&mut self.windows).map(Next::Op)
        }
    }

    fn begin_erase(
        &self,
        flight: &mut Flight,
        ranges: &[ZeroedRange],
        must_zero: bool,
    ) -> Result<Next, DiskError> {
        self.check_writable()?;
        for erased in ranges {
            self.check_aligned(erased.range)?;
        }
        if self.cache.write_must_be_stable(flight.wb_at_submit) {
            self.check_latch()?;
            flight.grouped = self.shares_syncs();
        }
        let mut erase = Erase::new(ranges, must_zero, self.image.geometry().alignment);
        let next = match erase.begin_range() {
            Some(op) => Next::Op(op),
            None => Next::Done(Ok(())),
        };
        flight.stage = Stage::Erase(erase);
        Ok(next)
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
