//! Requests to a disk, their errors and their completions.

use std::io;

use super::geometry::SectorRange;
use crate::mem::Iov;
use crate::slab::slab_number;

slab_number! {
    /// The number of a request of one queue, from [`DiskQueue::submit`] to its [`Completion`].
    ///
    /// [`DiskQueue::submit`]: super::disk_queue::DiskQueue::submit
    RequestId
}

/// One range of a WRITE_ZEROES.
#[derive(Debug, Clone, Copy)]
pub struct ZeroedRange {
    /// The sectors.
    pub range: SectorRange,
    /// `true` if the space may be given back to the host.
    pub unmap: bool,
}

/// What a request asks of the disk.
#[derive(Debug)]
pub enum Op {
    /// Reads the range into the memory.
    Read(SectorRange, Iov),
    /// Writes the memory to the range.
    Write(SectorRange, Iov),
    /// Makes everything stable that completed before this request was submitted.
    Flush,
    /// Says that the content of these ranges is no longer wanted.
    Discard(Vec<SectorRange>),
    /// Makes these ranges read as zeroes.
    WriteZeroes(Vec<ZeroedRange>),
}

impl Op {
    /// Returns the number of bytes that the guest will see changed.
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

/// Why a request failed. A failed request is not retried.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The host reported an error for the operation.
    #[error("{what} failed")]
    Host {
        /// The operation.
        what: &'static str,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The transfer cannot continue after a short or impossible count. Usually somebody has truncated the image.
    #[error("{what} ended after {done} of {bytes} bytes: has the image been truncated?")]
    Short {
        /// The operation.
        what: &'static str,
        /// Bytes that all earlier parts of the request have moved.
        done: u64,
        /// Bytes that the request asks for.
        bytes: u64,
    },
    /// An earlier sync of this disk has failed, so nothing can be reported stable any more.
    #[error("nothing can be made stable since an earlier sync failed")]
    Latched(#[source] io::Error),
    /// The disk is read-only.
    #[error("the disk is readonly")]
    Readonly,
    /// The request is not on the block boundaries that O_DIRECT needs here. The field is their size in bytes.
    #[error("not aligned to the {0} bytes that O_DIRECT needs on this host")]
    Misaligned(u32),
}

impl DiskError {
    /// Returns a copy of the error, for another request that shared the operation.
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
    /// The number that the request was submitted with.
    pub id: RequestId,
    /// `Ok` if every byte was moved and, where the request must be stable, is stable. Otherwise the reason. Boxed,
    /// because an error is larger than all the rest.
    pub result: Result<(), Box<DiskError>>,
}
