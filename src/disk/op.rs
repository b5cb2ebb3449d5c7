//! What a disk is asked for, and what it answers.

use std::io;

use super::erase::ZeroedRange;
use super::geometry::SectorRange;
use crate::mem::Iov;
use crate::slab::slab_number;

slab_number! {
    /// The number of a request of one queue, from [`DiskQueue::submit`] to its [`Completion`].
    ///
    /// [`DiskQueue::submit`]: super::disk_queue::DiskQueue::submit
    RequestId
}

/// What a request wants of the disk.
#[derive(Debug)]
pub enum Op {
    /// Fills the memory from the image.
    Read(SectorRange, Iov),
    /// Writes the memory to the image.
    Write(SectorRange, Iov),
    /// Makes stable whatever was complete before this was submitted.
    Flush,
    /// The content of these ranges is not wanted any more.
    Discard(Vec<SectorRange>),
    /// These ranges read as zeroes afterwards.
    WriteZeroes(Vec<ZeroedRange>),
}

impl Op {
    /// Bytes that the guest will see changed.
    pub(super) fn written_bytes(&self) -> u64 {
        match self {
            Op::Read(..) | Op::Flush => 0,
            Op::Write(range, _) => range.bytes(),
            Op::Discard(ranges) => ranges.iter().fold(0, |sum, range| sum.saturating_add(range.bytes())),
            Op::WriteZeroes(ranges) => {
                ranges.iter().fold(0, |sum, zeroed| sum.saturating_add(zeroed.range.bytes()))
            }
        }
    }
}

/// Why a request failed. Nothing of it is retried.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refused the operation.
    #[error("{what} failed")]
    Host {
        /// Which one.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The image ends before the request does: somebody has truncated it.
    #[error("{what} ended after {done} of {bytes} bytes: has the image been truncated?")]
    Short {
        /// Which operation.
        what: &'static str,
        /// Bytes moved, all parts together.
        done: u64,
        /// Bytes asked for.
        bytes: u64,
    },
    /// An earlier sync has failed, so nothing can be called stable any more.
    #[error("nothing can be made stable since an earlier sync failed")]
    Latched(#[source] io::Error),
    /// The disk is read-only.
    #[error("the disk is readonly")]
    Readonly,
    /// Not on the block boundaries that O_DIRECT needs here.
    #[error("not aligned to the {0} bytes that O_DIRECT needs on this host")]
    Misaligned(u32),
}

impl DiskError {
    /// The same error, for another request that shared the operation.
    pub(super) fn again(&self) -> DiskError {
        let copy = |error: &io::Error| match error.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::new(error.kind(), error.to_string()),
        };
        match self {
            DiskError::Host { what, source } => DiskError::Host { what, source: copy(source) },
            &DiskError::Short { what, done, bytes } => DiskError::Short { what, done, bytes },
            DiskError::Latched(source) => DiskError::Latched(copy(source)),
            DiskError::Readonly => DiskError::Readonly,
            &DiskError::Misaligned(bytes) => DiskError::Misaligned(bytes),
        }
    }
}

/// A completed request.
#[derive(Debug)]
pub struct Completion {
    /// The number it was submitted with.
    pub id: RequestId,
    /// Every byte moved and, where that was asked, stable; or why not.
    pub result: Result<(), DiskError>,
}
