//! A DISCARD or WRITE_ZEROES as a sequence of host operations.
//!
//! Owns the choice between punching a hole, ZERO_RANGE and overwriting with zeroes, range by range.
//! [`super::disk_queue`] decides what follows the last range: a sync or the completion.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::engine::HostOp;
use super::geometry::{Alignment, SectorRange};
use super::op::{DiskError, ZeroedRange};
use super::transfer::BOUNCE_MAX;
use crate::mem::{AlignedBuffer, Iov};

/// The ranges that are still to be erased, and the progress of the first of them.
pub(super) struct Erase {
    /// The ranges that are not empty. The first is in progress.
    ranges: VecDeque<ZeroedRange>,
    /// `true` for WRITE_ZEROES, where the content matters. `false` for DISCARD: it succeeds even if the host
    /// cannot do it.
    must_zero: bool,
    /// How the first range is being erased.
    method: EraseBy,
    /// Bytes of the first range already overwritten with zeroes.
    filled: u64,
    /// Bytes that the operation in flight was asked to overwrite.
    asked: u64,
    alignment: Alignment,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EraseBy {
    Punch,
    ZeroRange,
    Overwrite,
}

impl Erase {
    pub(super) fn new(ranges: &[ZeroedRange], must_zero: bool, alignment: Alignment) -> Self {
        let ranges = ranges.iter().copied().filter(|erased| erased.range.bytes() > 0).collect();
        Self { ranges, must_zero, method: EraseBy::Punch, filled: 0, asked: 0, alignment }
    }

    /// Returns the first operation for the next range, or `None` when no range is left.
    pub(super) fn begin_range(&mut self) -> Option<HostOp> {
        let &ZeroedRange { range, unmap } = self.ranges.front()?;
        let (offset, len) = (range.offset(), range.bytes());
        let (method, op) = if unmap {
            (EraseBy::Punch, HostOp::PunchHole { offset, len, must_zero: self.must_zero })
        } else {
            (EraseBy::ZeroRange, HostOp::ZeroRange { offset, len })
        };
        (self.method, self.filled) = (method, 0);
        Some(op)
    }

    /// Returns the operation in flight once more, or `None` if no range is left.
    pub(super) fn again(&mut self) -> Result<Option<HostOp>, DiskError> {
        let Some(&ZeroedRange { range, .. }) = self.ranges.front() else { return Ok(None) };
        let (offset, len) = (range.offset(), range.bytes());
        Ok(Some(match self.method {
            EraseBy::Punch => HostOp::PunchHole { offset, len, must_zero: self.must_zero },
            EraseBy::ZeroRange => HostOp::ZeroRange { offset, len },
            EraseBy::Overwrite => self.overwrite(range)?,
        }))
    }

    fn next_range(&mut self) -> Option<HostOp> {
        self.ranges.pop_front();
        self.begin_range()
    }

    /// Judges the result of an operation. Returns the next operation, or `None` when everything is erased.
    pub(super) fn judge(&mut self, result: io::Result<usize>) -> Result<Option<HostOp>, DiskError> {
        let Some(&ZeroedRange { range, .. }) = self.ranges.front() else { return Ok(None) };
        match (result, self.method) {
            (Ok(count), EraseBy::Overwrite) => self.judge_overwrite(range, count as u64),
            (Ok(_), _) => Ok(self.next_range()),
            (Err(source), EraseBy::Overwrite) => {
                Err(DiskError::Host { what: "overwriting with zeroes", source })
            }
            (Err(error), method) if may_fall_back(&error) => self.fall_back(range, method),
            (Err(source), _) => Err(DiskError::Host { what: "fallocate", source }),
        }
    }

    fn fall_back(&mut self, range: SectorRange, from: EraseBy) -> Result<Option<HostOp>, DiskError> {
        if !self.must_zero {
            // DISCARD is advice (virtio 5.2.6.2), which the host cannot follow here.
            return Ok(self.next_range());
        }
        if from == EraseBy::Punch {
            self.method = EraseBy::ZeroRange;
            return Ok(Some(HostOp::ZeroRange { offset: range.offset(), len: range.bytes() }));
        }
        self.method = EraseBy::Overwrite;
        self.overwrite(range).map(Some)
    }

    fn judge_overwrite(&mut self, range: SectorRange, count: u64) -> Result<Option<HostOp>, DiskError> {
        // O_DIRECT cannot continue in the middle of a block, so a partly written block is written again.
        let moved = count - count % u64::from(self.alignment.offset);
        if moved == 0 || count > self.asked {
            let (done, bytes) = (self.filled, range.bytes());
            return Err(DiskError::Short { what: "overwriting with zeroes", done, bytes });
        }
        self.filled += moved;
        if self.filled < range.bytes() {
            return self.overwrite(range).map(Some);
        }
        Ok(self.next_range())
    }

    fn overwrite(&mut self, range: SectorRange) -> Result<HostOp, DiskError> {
        let no_memory = |source| DiskError::Host { what: "allocating zeroes", source };
        self.asked = (range.bytes() - self.filled).min(BOUNCE_MAX);
        let bytes = usize::try_from(self.asked).map_err(|error| no_memory(io::Error::other(error)))?;
        let memory_align = self.alignment.memory.max(512) as usize;
        let zeroes = AlignedBuffer::new(bytes, memory_align).map_err(no_memory)?;
        let iov = Iov::from_buffer(&Arc::new(zeroes), bytes);
        Ok(HostOp::Writev { iov, offset: range.offset() + self.filled, dsync: false })
    }
}

/// Returns `true` if this error of fallocate means "not on this file" rather than "the disk has failed".
fn may_fall_back(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}
