//! The three parts of a queue where they lie in this process (virtio 2.7.5, 2.7.6, 2.7.8).
//!
//! Owns the only raw accesses to them, and each access's memory order. Addresses are translated and checked
//! once, when the queue is enabled. Every index is brought inside its part here, so no access leaves the part,
//! whatever the caller or the guest says. Every field is read by exactly one load, and no reference to guest
//! memory outlives the load: the two-byte fields are atomics, and a descriptor is copied.

use crate::mem::{OutsideRam, Ram, Segment};
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Bytes of one descriptor.
pub const DESCRIPTOR_BYTES: u16 = 16;

/// struct virtq_desc (virtio 2.7.5), read once.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// The memory that the descriptor describes.
    pub segment: Segment,
    /// VRING_DESC_F_*.
    pub flags: u16,
    /// The next descriptor in the chain; meaningful only if the flags say so.
    pub next: u16,
}

/// A descriptor table: the queue's own, or an indirect one. It must not outlive the RAM that it was found in,
/// which the [`super::Ring`] keeps mapped.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    ptr: *mut u8,
    entries: u32,
}

// SAFETY: as for an `Area`; descriptors are copied out, and nothing is written.
unsafe impl Send for Table {}

impl Table {
    /// Returns the size in bytes of a table of `entries` descriptors.
    pub fn bytes(entries: u32) -> usize {
        usize::from(DESCRIPTOR_BYTES) * entries as usize
    }

    /// Finds the table of `entries` descriptors at a guest address. It must be wholly in RAM.
    pub fn new(ram: &Ram, addr: u64, entries: u32) -> Result<Self, OutsideRam> {
        let ptr = ram.host(addr, Self::bytes(entries))?;
        Ok(Self { ptr, entries })
    }

    /// Returns the number of descriptors. An indirect table may have more than a chain can reach.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Reads a descriptor once. Returns `None` if `index` is beyond the table.
    pub fn read(&self, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.entries {
            return None;
        }
        // SAFETY: the index is inside the table, so this is one of its descriptors.
        let at = unsafe { self.ptr.add(usize::from(DESCRIPTOR_BYTES) * usize::from(index)) };
        let (low, high) = if at.addr().is_multiple_of(align_of::<AtomicU64>()) {
            let words = at.cast::<u64>();
            // SAFETY: two aligned words of a descriptor in RAM, which outlives the table. Each
            // reference lives for one load, and an atomic may be changed by anybody at any time.
            let word = |which| unsafe { AtomicU64::from_ptr(words.add(which)) }.load(Ordering::Relaxed);
            (u64::from_le(word(0)), u64::from_le(word(1)))
        } else {
            // Only an indirect table may be unaligned.
            // SAFETY: the sixteen bytes of a descriptor in RAM; bytes need no alignment.
            let [low, high] = unsafe { at.cast::<[[u8; 8]; 2]>().read_volatile() };
            (u64::from_le_bytes(low), u64::from_le_bytes(high))
        };
        Some(Descriptor::new(low, high))
    }
}

impl Descriptor {
    /// Decodes a descriptor from its two words in memory: addr; len, flags and next.
    fn new(low: u64, high: u64) -> Self {
        Self {
            segment: Segment { addr: low, len: (high & 0xffff_ffff) as u32 },
            flags: (high >> 32 & 0xffff) as u16,
            next: (high >> 48) as u16,
        }
    }
}

/// The memory of a ring, and single accesses at offsets inside it.
struct Area {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer leads to guest RAM, which is shared memory by nature. Every user of this area holds a
// clone of the RAM, and the area is touched by atomics only.
unsafe impl Send for Area {}

impl Area {
    /// Finds `bytes` bytes at a guest address, wholly in RAM and on a multiple of `align`, 4 or 2. Guest and
    /// host pages are aligned alike, so the guest's alignment is the pointer's; it is checked all the same.
    fn new(ram: &Ram, addr: u64, bytes: usize, align: usize) -> Result<Self, OutsideRam> {
        let ptr = ram.host(addr, bytes)?;
        if !ptr.addr().is_multiple_of(align) {
            return Err(OutsideRam { addr, len: bytes as u64 });
        }
        Ok(Self { ptr, bytes })
    }

    fn load(&self, at: usize, order: Ordering) -> u16 {
        debug_assert!(at + 2 <= self.bytes && at.is_multiple_of(2));
        // SAFETY: offsets are computed below from positions brought inside the ring. The ring was checked to be
        // in RAM and aligned, and the RAM's owner outlives it. The reference lives for one load, and an atomic
        // may be changed by anybody at any time.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.ptr.add(at).cast()) }.load(order))
    }

    fn store(&self, at: usize, value: u16, order: Ordering) {
        debug_assert!(at + 2 <= self.bytes && at.is_multiple_of(2));
        // SAFETY: as for a load.
        unsafe { AtomicU16::from_ptr(self.ptr.add(at).cast()) }.store(value.to_le(), order);
    }

    fn store32(&self, at: usize, value: u32) {
        debug_assert!(at + 4 <= self.bytes && at.is_multiple_of(4));
        // SAFETY: as for a load; only the used ring has such fields, and it is aligned to 4.
        unsafe { AtomicU32::from_ptr(self.ptr.add(at).cast()) }.store(value.to_le(), Ordering::Relaxed);
    }
}

/// Returns what is ANDed to a position in a ring of `size` entries, a power of two (virtio 2.7). Should it be none, the
/// position is still inside the ring.
fn mask(size: u16) -> u16 {
    if size.is_power_of_two() { size - 1 } else { 0 }
}

/// The driver's area (virtio 2.7.6): flags, idx, `ring[size]`, used_event.
pub struct Available {
    area: Area,
    size: u16,
    /// The size is a power of two: a position is brought into the ring without a division.
    mask: u16,
}

impl Available {
    /// Returns the size in bytes of a ring of `size` entries.
    pub fn bytes(size: u16) -> usize {
        6 + 2 * usize::from(size)
    }

    /// Finds the ring at a guest address. It must be wholly in RAM.
    pub fn new(ram: &Ram, addr: u64, size: u16) -> Result<Self, OutsideRam> {
        Ok(Self { area: Area::new(ram, addr, Self::bytes(size), 2)?, size, mask: mask(size) })
    }

    pub fn flags(&self) -> u16 {
        self.area.load(0, Ordering::Relaxed)
    }

    /// Loads avail.idx. Entries and descriptors that are read after it are at least as new (virtio 2.7.13).
    pub fn idx(&self) -> u16 {
        self.area.load(2, Ordering::Acquire)
    }

    pub fn entry(&self, position: u16) -> u16 {
        self.area.load(4 + 2 * usize::from(position & self.mask), Ordering::Relaxed)
    }

    pub fn used_event(&self) -> u16 {
        self.area.load(4 + 2 * usize::from(self.size), Ordering::Relaxed)
    }
}

/// The device's area (virtio 2.7.8): flags, idx, `ring[size]` of id and length, avail_event.
pub struct Used {
    area: Area,
    size: u16,
    /// The size is a power of two: a position is brought into the ring without a division.
    mask: u16,
}

impl Used {
    /// Returns the size in bytes of a ring of `size` entries.
    pub fn bytes(size: u16) -> usize {
        6 + 8 * usize::from(size)
    }

    /// Finds the ring at a guest address. It must be wholly in RAM.
    pub fn new(ram: &Ram, addr: u64, size: u16) -> Result<Self, OutsideRam> {
        Ok(Self { area: Area::new(ram, addr, Self::bytes(size), 4)?, size, mask: mask(size) })
    }

    pub fn set_flags(&self, flags: u16) {
        self.area.store(0, flags, Ordering::Relaxed);
    }

    /// Loads used.idx, which only the device stores. A front end may have changed it all the same.
    pub fn idx(&self) -> u16 {
        self.area.load(2, Ordering::Acquire)
    }

    /// Stores used.idx. Whoever sees it also sees what was written before: data, status, entries (virtio 2.7.8.2).
    pub fn set_idx(&self, idx: u16) {
        self.area.store(2, idx, Ordering::Release);
    }

    pub fn set_entry(&self, position: u16, head: u16, len: u32) {
        let at = 4 + 8 * usize::from(position & self.mask);
        self.area.store32(at, u32::from(head));
        self.area.store32(at + 4, len);
    }

    pub fn set_avail_event(&self, event: u16) {
        self.area.store(4 + 8 * usize::from(self.size), event, Ordering::Relaxed);
    }
}
