//! The front end's memory table: which of its addresses are where.
//!
//! Owns the table and the [`Ram`] that is made of it. A descriptor has guest addresses, which `Ram` translates. The
//! addresses of a ring are the front end's own, and are translated into guest addresses here.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use minivmm_block::mem::{MemoryLoss, Ram, RamError, SharedRegion};

/// The most regions that a table may have (GET_MAX_MEM_SLOTS).
pub const REGIONS_MAX: usize = 128;

/// A region of the front end's memory.
#[derive(Debug)]
pub struct Region {
    /// First guest physical address.
    pub guest: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// First address in the front end.
    pub user: u64,
    /// Where the region begins in the file.
    pub offset: u64,
    /// The file, which is mapped anew whenever the table changes.
    pub file: File,
}

/// Why a table is refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// A region cannot be mapped, or two overlap.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// There are too many regions.
    #[error("the memory table has {0} regions, and {REGIONS_MAX} at most are possible")]
    TooMany(usize),
    /// There is no such region.
    #[error("no region of {bytes:#x} bytes is at guest address {guest:#x} and front-end address {user:#x}")]
    Unknown {
        /// First guest physical address.
        guest: u64,
        /// Length in bytes.
        bytes: u64,
        /// First address in the front end.
        user: u64,
    },
}

/// The present table.
#[derive(Debug)]
pub struct MemoryTable {
    regions: Vec<Region>,
    ram: Option<Ram>,
    loss: Arc<MemoryLoss>,
}

impl MemoryTable {
    /// Creates an empty table. `loss` is told if memory of the table is lost.
    pub fn new(loss: Arc<MemoryLoss>) -> Self {
        Self { regions: Vec::new(), ram: None, loss }
    }

    /// Returns what is told if memory is lost.
    pub fn loss(&self) -> &Arc<MemoryLoss> {
        &self.loss
    }

    /// Returns the memory; `None` if the table is empty.
    pub fn ram(&self) -> Option<&Ram> {
        self.ram.as_ref()
    }

    /// Replaces the table.
    pub fn set(&mut self, regions: Vec<Region>) -> Result<(), TableError> {
        self.ram = self.map(&regions)?;
        self.regions = regions;
        Ok(())
    }

    /// Adds a region.
    pub fn add(&mut self, region: Region) -> Result<(), TableError> {
        self.regions.push(region);
        match self.map(&self.regions) {
            Ok(ram) => {
                self.ram = ram;
                Ok(())
            }
            Err(error) => {
                self.regions.pop();
                Err(error)
            }
        }
    }

    /// Removes a region.
    pub fn remove(&mut self, guest: u64, bytes: u64, user: u64) -> Result<(), TableError> {
        let is_it = |it: &Region| (it.guest, it.bytes, it.user) == (guest, bytes, user);
        let at = self.regions.iter().position(is_it).ok_or(TableError::Unknown { guest, bytes, user })?;
        self.regions.remove(at);
        self.ram = self.map(&self.regions)?;
        Ok(())
    }

    fn map(&self, regions: &[Region]) -> Result<Option<Ram>, TableError> {
        if regions.is_empty() {
            return Ok(None);
        }
        if regions.len() > REGIONS_MAX {
            return Err(TableError::TooMany(regions.len()));
        }
        let shared = |it| {
            let &Region { guest, bytes, offset, ref file, .. } = it;
            SharedRegion { guest, bytes, file: file.as_fd(), offset }
        };
        let shared: Vec<SharedRegion> = regions.iter().map(shared).collect();
        Ok(Some(Ram::from_shared(&shared, &self.loss)?))
    }

    /// Returns the guest address of a front end's address; `None` if it is in no region.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let at = user.checked_sub(region.user).filter(|at| *at < region.bytes)?;
            region.guest.checked_add(at)
        })
    }
}
