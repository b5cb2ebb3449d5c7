//! The inflight region: what a front end keeps of a back end that may be killed.
//!
//! Owns the region's making and checking, and the trailer behind the queues' parts. The parts themselves are
//! [`minivmm_block::virtio::queue::inflight`]'s. The trailer keeps two bytes that a driver relies on over a restart: the
//! `writeback` byte, of which QEMU keeps a copy, and whether a sync has failed, after which no FLUSH may succeed.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use minivmm_block::mem::{MemoryLoss, OutsideRam, Ram, RamError, SharedRegion, read_bytes, write_bytes};
use minivmm_block::virtio::queue::inflight::Inflight;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The trailer's first bytes: whose it is, and its version.
const MAGIC: [u8; 8] = *b"minivmm1";
/// Bytes of the trailer: the magic number, the `writeback` byte, whether a sync has failed, then room.
const TRAILER_BYTES: u64 = 64;

/// The largest number of descriptors of a queue.
const QUEUE_SIZE_MAX: u16 = 1024;

/// A region, as a front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// Length in bytes.
    pub bytes: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Number of queues.
    pub queues: u16,
    /// Number of descriptors of each queue.
    pub queue_size: u16,
}

/// Why a region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The numbers make no sense.
    #[error(
        "an inflight region for {queues} queues of {queue_size} descriptors, where {queues_max} of at most {QUEUE_SIZE_MAX} are possible"
    )]
    Numbers {
        /// The number of queues.
        queues: u16,
        /// The number of descriptors.
        queue_size: u16,
        /// The most queues.
        queues_max: u16,
    },
    /// It is shorter than its queues' parts.
    #[error("the inflight region has {found} bytes, and its queues need {needed}")]
    Short {
        /// Its length in bytes.
        found: u64,
        /// The length that is needed.
        needed: u64,
    },
    /// The host has no memory for it.
    #[error("cannot make the inflight region")]
    Host(#[from] io::Error),
    /// Its file cannot be mapped.
    #[error(transparent)]
    Memory(#[from] RamError),
}

/// What a trailer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The `writeback` byte.
    pub writeback: bool,
    /// `true` once a sync of the image has failed.
    pub sync_failed: bool,
}

/// A mapped region. Clones share it.
#[derive(Debug, Clone)]
pub struct InflightRegion {
    ram: Ram,
    /// What it was described as.
    pub description: Description,
}

impl InflightRegion {
    /// Makes a new region, and the file that the front end keeps.
    pub fn create(
        queues: u16,
        queue_size: u16,
        queues_max: u16,
        loss: &Arc<MemoryLoss>,
    ) -> Result<(Self, File), RegionError> {
        let bytes = parts_bytes(queues, queue_size, queues_max)? + TRAILER_BYTES;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("minivmm-inflight", flags).map_err(io::Error::from)?);
        file.set_len(bytes)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
        let description = Description { bytes, offset: 0, queues, queue_size };
        Ok((Self::open(description, &file, queues_max, loss)?, file))
    }

    /// Maps a region that the front end has kept.
    pub fn open(
        description: Description,
        file: &File,
        queues_max: u16,
        loss: &Arc<MemoryLoss>,
    ) -> Result<Self, RegionError> {
        let Description { bytes, offset, queues, queue_size } = description;
        let needed = parts_bytes(queues, queue_size, queues_max)?;
        if bytes < needed {
            return Err(RegionError::Short { found: bytes, needed });
        }
        // A larger one is another back end's; what lies behind means nothing here.
        let bytes = bytes.min(needed + TRAILER_BYTES);
        let region = SharedRegion { guest: 0, bytes, file: file.as_fd(), offset };
        Ok(Self { ram: Ram::from_shared(&[region], loss)?, description })
    }

    /// Returns the notes of queue `index`.
    pub fn notes(&self, index: u16) -> Result<Inflight, OutsideRam> {
        if index >= self.description.queues {
            return Err(OutsideRam { addr: u64::from(index), len: 1 });
        }
        Inflight::new(&self.ram, index, self.description.queue_size)
    }

    /// Returns what the trailer keeps; `None` if there is no trailer of ours.
    pub fn kept(&self) -> Option<Kept> {
        let mut found = [0; MAGIC.len() + 2];
        read_bytes(&self.ram, self.trailer(), &mut found).ok()?;
        let [magic @ .., writeback, sync_failed] = found;
        (magic == MAGIC).then_some(Kept { writeback: writeback != 0, sync_failed: sync_failed != 0 })
    }

    /// Keeps these in the trailer, if there is room for one. A failed sync stays kept, whatever is told later: a queue's
    /// worker may keep its failure between the caller's look at the latch and this call.
    pub fn keep(&self, kept: Kept) {
        // The bytes are stored before the number that makes them count, and a byte is never torn.
        let at = self.trailer() + MAGIC.len() as u64;
        let stored = write_bytes(&self.ram, at, &[u8::from(kept.writeback)]);
        if kept.sync_failed {
            self.keep_sync_failure();
        }
        if stored.is_ok() {
            let _ = write_bytes(&self.ram, self.trailer(), &MAGIC);
        }
    }

    /// Keeps that a sync has failed.
    pub fn keep_sync_failure(&self) {
        // Without a trailer there is nobody to tell.
        let _ = write_bytes(&self.ram, self.trailer() + MAGIC.len() as u64 + 1, &[1]);
    }

    fn trailer(&self) -> u64 {
        let Description { queues, queue_size, .. } = self.description;
        u64::from(queues) * Inflight::bytes(queue_size) as u64
    }
}

/// Returns the size in bytes of the queues' parts.
fn parts_bytes(queues: u16, queue_size: u16, queues_max: u16) -> Result<u64, RegionError> {
    if queues == 0 || queues > queues_max || queue_size == 0 || queue_size > QUEUE_SIZE_MAX {
        return Err(RegionError::Numbers { queues, queue_size, queues_max });
    }
    Ok(u64::from(queues) * Inflight::bytes(queue_size) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minivmm_block::mem::MemoryLoss;

    #[test]
    fn a_failed_sync_stays_kept() {
        let (region, _file) = InflightRegion::create(1, 8, 1, &MemoryLoss::new().unwrap()).unwrap();
        let kept = |writeback, sync_failed| Kept { writeback, sync_failed };
        assert_eq!(region.kept(), None);
        region.keep(kept(true, false));
        assert_eq!(region.kept(), Some(kept(true, false)));
        region.keep_sync_failure();
        region.keep(kept(false, false));
        assert_eq!(region.kept(), Some(kept(false, true)));
    }
}
