//! Guest memory, and pieces of it that the host's kernel may read and write.
//!
//! Owns the one place where a guest address becomes a host pointer ([`Ram::host`]). No Rust
//! reference ever points into guest RAM: bytes are copied in and out, or an [`Iov`] is handed to a
//! system call, because the guest may change any byte at any time (R12, R13).

mod buffer;
mod copy;
mod iov;
mod limits;
mod mapping;
mod scatter;
mod shared;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

pub use buffer::{AlignedBuffer, BufferPool};
pub use iov::Iov;
pub use limits::size;
pub use mapping::HUGE_PAGE;
use mapping::Mapping;
pub use scatter::{gather, gather_header, scatter};
use shared::SharedMapping;
pub use shared::{MemoryLoss, SharedRegion, survive_lost_memory};

/// Guest RAM. Clones share the mapping, which lives until the last clone is dropped. Cloning allocates nothing,
/// so every request may hold a clone.
#[derive(Debug, Clone)]
pub struct Ram(Arc<Regions>);

/// The regions of RAM, and the host mappings that hold them.
#[derive(Debug)]
struct Regions {
    regions: GuestMemoryMmap<()>,
    /// The same regions, for [`Ram::host`]: each request looks up five addresses, mostly in the first region.
    flat: Vec<Flat>,
    /// Dropped after the regions, which point into them.
    _mappings: Mappings,
}

/// What holds the regions of RAM in this process.
#[derive(Debug)]
enum Mappings {
    /// Mapped by the embedder, inside vm-memory's regions.
    Theirs,
    /// Mapped by [`map_ram`].
    Private(#[allow(dead_code, reason = "held so that the regions stay mapped")] Vec<Mapping>),
    /// Mapped by [`Ram::from_shared`].
    Shared(#[allow(dead_code, reason = "held so that the regions stay mapped")] Vec<SharedMapping>),
}

impl Regions {
    fn new(regions: GuestMemoryMmap<()>, mappings: Mappings) -> Self {
        let flat = regions.iter().map(Flat::new).collect();
        Self { regions, flat, _mappings: mappings }
    }

    /// Makes every later translation fail. Async-signal-safe.
    fn withdraw(&self) {
        self.flat.iter().for_each(|region| region.bytes.store(0, Ordering::Relaxed));
    }
}

/// Where a region of RAM begins for the guest and in this process.
#[derive(Debug)]
struct Flat {
    first: u64,
    /// 0 once the memory is lost.
    bytes: AtomicU64,
    host: *mut u8,
}

// SAFETY: the pointer leads to guest RAM, which is shared memory by nature; here it is only added to.
unsafe impl Send for Flat {}
// SAFETY: as above.
unsafe impl Sync for Flat {}

impl Flat {
    fn new(region: &GuestRegionMmap<()>) -> Self {
        Self { first: region.start_addr().0, bytes: region.len().into(), host: region.as_ptr() }
    }

    /// Returns the host pointer for `len` bytes, or `None` if they are not all in this region.
    fn host(&self, addr: u64, len: usize) -> Option<*mut u8> {
        // For an address below the region this wraps to a number beyond its end.
        let at = addr.wrapping_sub(self.first);
        let bytes = self.bytes.load(Ordering::Relaxed);
        let fits = at < bytes && len as u64 <= bytes - at;
        // As long as a region, which is mapped here.
        #[allow(clippy::cast_possible_truncation)]
        fits.then(|| self.host.wrapping_add(at as usize))
    }
}

/// Lets `vm_memory`'s own accessors work on guest RAM.
impl GuestMemoryBackend for Ram {
    type R = GuestRegionMmap<()>;

    fn num_regions(&self) -> usize {
        self.0.regions.num_regions()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.0.regions.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.0.regions.iter()
    }
}

impl Ram {
    /// Makes guest RAM of memory that the embedder has mapped. All of it must be plain memory that the device may
    /// read and write at any time: no ROM, no device's registers. A process that forks while a request is in
    /// flight must have excluded it from that (MADV_DONTFORK): O_DIRECT and fork do not mix (open(2)).
    pub fn from_memory(memory: GuestMemoryMmap<()>) -> Self {
        Self(Arc::new(Regions::new(memory, Mappings::Theirs)))
    }

    /// Returns the host pointer for `len` bytes at guest address `addr`. The range must lie inside one region
    /// (R3), so it crosses no hole. The pointer is valid as long as any clone of this `Ram` lives.
    pub fn host(&self, addr: u64, len: usize) -> Result<*mut u8, OutsideRam> {
        // Nearly all memory, or all of it, is in the first region.
        if let [first, others @ ..] = &*self.0.flat {
            let found =
                first.host(addr, len).or_else(|| others.iter().find_map(|region| region.host(addr, len)));
            return found.ok_or(OutsideRam { addr, len: len as u64 });
        }
        Err(OutsideRam { addr, len: len as u64 })
    }

    /// Returns the size of all RAM in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Returns the regions of RAM as (guest address, host address, bytes), for KVM's memory slots.
    pub fn regions(&self) -> Vec<(u64, u64, u64)> {
        let region =
            |region: &GuestRegionMmap<()>| (region.start_addr().0, region.as_ptr() as u64, region.len());
        self.iter().map(region).collect()
    }
}

/// A guest range is not wholly inside one region of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest address {addr:#x}, {len:#x} bytes, is not in RAM")]
pub struct OutsideRam {
    /// First guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why guest RAM could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The memory that another process shares cannot be mapped.
    #[error("cannot map the shared memory at guest address {guest:#x}, {bytes:#x} bytes: {why}")]
    Shared {
        /// First guest physical address.
        guest: u64,
        /// Length in bytes.
        bytes: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The host refused the mapping.
    #[error("cannot map {} of guest memory (--memory): {limit}", size(*bytes))]
    Map {
        /// Size of all guest RAM, in bytes.
        bytes: u64,
        /// The limit that is in the way.
        limit: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The regions are out of order, or overlap.
    #[error("the regions of guest memory do not fit together: {0}")]
    Regions(String),
}

/// Maps guest RAM in the given regions of (guest address, bytes).
///
/// The memory is private, anonymous, NORESERVE, DONTFORK (O_DIRECT and fork do not mix, open(2)) and HUGEPAGE.
/// In each region guest and host addresses agree modulo [`HUGE_PAGE`].
pub fn map_ram(regions: &[(u64, u64)]) -> Result<Ram, RamError> {
    let (mut mapped, mut mappings) = (Vec::new(), Vec::new());
    let all = regions.iter().map(|region| region.1).sum();
    for &(base, bytes) in regions {
        let (region, mapping) = map_region(base, bytes, all)?;
        mapped.push(region);
        mappings.push(mapping);
    }
    let regions = GuestMemoryMmap::from_regions(mapped).map_err(|e| RamError::Regions(e.to_string()))?;
    Ok(Ram(Arc::new(Regions::new(regions, Mappings::Private(mappings)))))
}

/// Maps one region; guest RAM has `all` bytes in total.
fn map_region(base: u64, bytes: u64, all: u64) -> Result<(GuestRegionMmap<()>, Mapping), RamError> {
    let failed = |source| RamError::Map { bytes: all, limit: limits::in_the_way(), source };
    let len = usize::try_from(bytes).map_err(|e| failed(io::Error::other(e)))?;
    let mapping = Mapping::new(base, len).map_err(failed)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the range is the RAM of `mapping`, which is kept beside the region for as long as it lives.
    let region = unsafe { MmapRegion::build_raw(mapping.ram(), len, protection, flags) };
    let region = region.map_err(|e| failed(io::Error::other(e)))?;
    GuestRegionMmap::new(region, GuestAddress(base))
        .map(|region| (region, mapping))
        .ok_or_else(|| RamError::Regions(format!("{base:#x} + {bytes:#x} wraps")))
}

/// A guest physical range, as found in a descriptor. It is unchecked until an [`Iov`] is made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// The most bytes that vm-memory copies without an ordinary `memcpy`: an aligned integer is never torn.
const INTEGER_BYTES_MAX: usize = 8;

/// Stores one byte at guest address `addr`.
#[inline]
pub fn write_byte(ram: &Ram, addr: u64, byte: u8) -> Result<(), OutsideRam> {
    let to = ram.host(addr, 1)?;
    // SAFETY: the guest's byte was checked just now and `ram` keeps it; no reference to it exists.
    unsafe { to.write_volatile(byte) };
    Ok(())
}

/// Copies `data` to guest address `addr`.
pub fn write_bytes(ram: &Ram, addr: u64, data: &[u8]) -> Result<(), OutsideRam> {
    if let &[byte] = data {
        return write_byte(ram, addr, byte);
    }
    if data.len() <= INTEGER_BYTES_MAX {
        let outside = OutsideRam { addr, len: data.len() as u64 };
        return ram.write_slice(data, GuestAddress(addr)).map_err(|_| outside);
    }
    let to = ram.host(addr, data.len())?;
    // SAFETY: the guest's range was checked just now and `ram` keeps it; `data` is a slice.
    unsafe { copy::copy(data.as_ptr(), to, data.len()) };
    Ok(())
}

/// Copies `data.len()` bytes from guest address `addr`.
pub fn read_bytes(ram: &Ram, addr: u64, data: &mut [u8]) -> Result<(), OutsideRam> {
    if data.len() <= INTEGER_BYTES_MAX {
        let outside = OutsideRam { addr, len: data.len() as u64 };
        return ram.read_slice(data, GuestAddress(addr)).map_err(|_| outside);
    }
    let from = ram.host(addr, data.len())?;
    // SAFETY: the guest's range was checked just now and `ram` keeps it; `data` is a slice that
    // nobody else holds.
    unsafe { copy::copy(from, data.as_mut_ptr(), data.len()) };
    Ok(())
}

/// Bytes of a request's header.
const HEADER_BYTES: usize = 16;

/// Reads a request's header: each request has one, and the string instruction of [`copy::copy`] begins slowly.
#[inline]
fn read_header(ram: &Ram, addr: u64) -> Result<[u8; HEADER_BYTES], OutsideRam> {
    let from = ram.host(addr, HEADER_BYTES)?;
    let mut header = [0; HEADER_BYTES];
    if from.addr().is_multiple_of(align_of::<u64>()) {
        let words = from.cast::<u64>();
        for (which, bytes) in header.chunks_exact_mut(8).enumerate() {
            // SAFETY: two aligned words in the guest's range, which was checked just now and which `ram` keeps.
            bytes.copy_from_slice(&unsafe { words.add(which).read_volatile() }.to_ne_bytes());
        }
    } else {
        // SAFETY: the guest's range was checked just now and `ram` keeps it; `header` is our own.
        unsafe { copy::copy(from, header.as_mut_ptr(), header.len()) };
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn both_regions_of_ram_are_aligned_for_huge_pages() {
        for (below, above) in [(512 * MIB, 0), (3 * GIB, 0x5000), (3 * GIB, 4 * GIB)] {
            let wanted: Vec<_> = [(0, below), (4 * GIB, above)].into_iter().filter(|r| r.1 > 0).collect();
            let ram = map_ram(&wanted).unwrap();
            let mapped = ram.regions();
            assert_eq!(mapped.iter().map(|r| (r.0, r.2)).collect::<Vec<_>>(), wanted);
            for (guest, host, _) in mapped {
                assert_eq!(guest % HUGE_PAGE, host % HUGE_PAGE, "{guest:#x} is at {host:#x}");
            }
        }
    }
}
