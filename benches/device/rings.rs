//! The driver's side of one split virtqueue (virtio 2.7), as Linux's driver has it: indirect
//! descriptors, EVENT_IDX on both sides, nothing allocated for an I/O.
//!
//! Owns the layout in guest RAM and the driver's indices. Knows nothing of threads, time or files:
//! the benchmark turns it on a thread of its own, the test of instructions on the worker's.

use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use minivmm::mem::{self, Ram};
use minivmm::virtio::feature;
use minivmm::virtio::queue::QueueConfig;

use crate::random::Random;

/// What the driver takes of what the device offers: FLUSH, CONFIG_WCE and DISCARD, and what makes it fast.
pub const FEATURES: u64 =
    feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | 1 << 9 | 1 << 11 | 1 << 13;
/// Descriptors of the queue; with indirect tables, also the most requests in flight.
pub const QUEUE_SIZE: u16 = 256;

const DESCRIPTOR_BYTES: u64 = 16;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const UNTOUCHED: u8 = 0xff;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD of one block.
    Discard,
}

/// Why the benchmark must not go on: a figure for wrong answers is no figure.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// Guest RAM could not be mapped.
    #[error("no memory for the rings and buffers")]
    Ram(#[from] mem::RamError),
    /// More in flight than the queue has room for, or blocks cut too finely.
    #[error("depth {depth} with {pieces} pieces of data a request does not fit a queue of {QUEUE_SIZE}")]
    Shape {
        /// Requests in flight.
        depth: u16,
        /// Data descriptors of one request.
        pieces: u64,
    },
    /// The device returned a head that was never made available.
    #[error("the device returned descriptor {0}, which it never got")]
    Head(u32),
    /// A request failed.
    #[error("a request in slot {slot} ended with status {status:#x} and length {len}")]
    Status {
        /// The slot.
        slot: u16,
        /// Its status byte.
        status: u8,
        /// The used length.
        len: u32,
    },
}

/// Guest addresses. RAM begins at 0, so an address is an offset into the mapping.
#[derive(Debug, Clone, Copy)]
struct Layout {
    descriptors: u64,
    available: u64,
    used: u64,
    tables: u64,
    table_stride: u64,
    headers: u64,
    statuses: u64,
    data: u64,
    end: u64,
}

impl Layout {
    /// Everything on lines of its own; data on huge pages, as a guest's own allocator would have it.
    fn new(depth: u16, block_bytes: u64, pieces: u64) -> Self {
        let table_stride = (DESCRIPTOR_BYTES * (pieces + 2)).next_multiple_of(64);
        let slots = u64::from(depth);
        let (descriptors, available, used) = (0x1000, 0x3000, 0x5000);
        let tables = 0x8000;
        let headers = (tables + slots * table_stride).next_multiple_of(0x1000);
        let statuses = (headers + slots * 64).next_multiple_of(0x1000);
        let data = (statuses + slots * 64).next_multiple_of(HUGE_PAGE_BYTES);
        let end = (data + slots * block_bytes).next_multiple_of(HUGE_PAGE_BYTES);
        Self { descriptors, available, used, tables, table_stride, headers, statuses, data, end }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// A range to discard (virtio 5.2.6).
#[derive(Clone, Copy)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// The rings, a request's slot for each in flight, and the driver's indices.
pub struct Rings {
    ram: Ram,
    base: *mut u8,
    layout: Layout,
    depth: u16,
    block_bytes: u32,
    segment_bytes: u32,
    avail_idx: u16,
    last_used: u16,
    /// Made available since the last look at avail_event.
    added: u16,
}

// SAFETY: `base` is the mapping that `ram` owns for as long as this lives; it is reached only
// through volatile and atomic accesses, because the device's thread reads and writes it too.
unsafe impl Send for Rings {}

impl Rings {
    /// RAM for `depth` requests of `block_bytes`, handed over in pieces of `segment_bytes`.
    pub fn new(depth: u16, block_bytes: u32, segment_bytes: u32) -> Result<Self, DriverError> {
        let pieces = u64::from(block_bytes.div_ceil(segment_bytes));
        if depth == 0 || depth > QUEUE_SIZE || pieces + 2 > u64::from(QUEUE_SIZE) {
            return Err(DriverError::Shape { depth, pieces });
        }
        let layout = Layout::new(depth, u64::from(block_bytes), pieces);
        let ram = mem::map_ram(&[(0, layout.end)])?;
        let base = ram.regions()[0].1 as *mut u8;
        let rings = Self {
            ram,
            base,
            layout,
            depth,
            block_bytes,
            segment_bytes,
            avail_idx: 0,
            last_used: 0,
            added: 0,
        };
        rings.prefault();
        Ok(rings)
    }

    /// Touches all of RAM, so that no page fault is measured; data gets bytes that do not compress.
    fn prefault(&self) {
        let mut random = Random::new(0x6d69_6e69);
        for word in (0..self.layout.end).step_by(8) {
            let value = if word < self.layout.data { 0 } else { random.next() };
            self.put(word, value);
        }
    }

    /// Guest RAM, for the device.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Where the rings are, as a driver would write it to the registers.
    pub fn config(&self) -> QueueConfig {
        QueueConfig {
            size: u32::from(QUEUE_SIZE),
            descriptors: self.layout.descriptors,
            available: self.layout.available,
            used: self.layout.used,
        }
    }

    /// Host address of the used index, for a breakpoint that counts its stores.
    pub fn used_idx_address(&self) -> u64 {
        self.base as u64 + self.layout.used + 2
    }

    /// Host addresses of all of RAM.
    pub fn host_range(&self) -> Range<u64> {
        self.base as u64..self.base as u64 + self.layout.end
    }

    /// A slot's data.
    pub fn data(&self, slot: u16) -> Vec<u8> {
        let at = self.data_address(slot);
        let mut bytes = vec![0; self.block_bytes as usize];
        // The range was laid out inside RAM: it cannot be outside.
        let _ = mem::read_bytes(&self.ram, at, &mut bytes);
        bytes
    }

    fn data_address(&self, slot: u16) -> u64 {
        self.layout.data + u64::from(slot) * u64::from(self.block_bytes)
    }

    fn put<T: Copy>(&self, addr: u64, value: T) {
        // SAFETY: every address is computed from `layout`, for a slot below `depth` or a ring index
        // below QUEUE_SIZE, and so lies inside the mapping, aligned for its type.
        unsafe { self.base.wrapping_add(addr as usize).cast::<T>().write_volatile(value) }
    }

    fn get<T: Copy>(&self, addr: u64) -> T {
        // SAFETY: as in `put`.
        unsafe { self.base.wrapping_add(addr as usize).cast::<T>().read_volatile() }
    }

    fn index(&self, addr: u64) -> &AtomicU16 {
        // SAFETY: as in `put`; both sides access indices atomically.
        unsafe { AtomicU16::from_ptr(self.base.wrapping_add(addr as usize).cast()) }
    }

    /// Makes a request available in `slot`, which must be free. The doorbell is another matter.
    pub fn submit(&mut self, slot: u16, kind: Kind, offset_bytes: u64) {
        let wire = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
            Kind::Discard => 11,
        };
        let header = self.layout.headers + u64::from(slot) * 64;
        let sector = offset_bytes / 512;
        if kind == Kind::Discard {
            self.put(self.data_address(slot), Segment { sector, sectors: self.block_bytes / 512, flags: 0 });
        }
        let sector = if kind == Kind::Discard { 0 } else { sector };
        self.put(header, Header { kind: wire, reserved: 0, sector });
        let status = self.layout.statuses + u64::from(slot) * 64;
        self.put(status, UNTOUCHED);
        let table = self.layout.tables + u64::from(slot) * self.layout.table_stride;
        let entries = self.fill_table(table, slot, kind, (header, status));
        let indirect = Descriptor {
            addr: table,
            len: u32::from(entries) * DESCRIPTOR_BYTES as u32,
            flags: INDIRECT,
            next: 0,
        };
        self.put(self.layout.descriptors + DESCRIPTOR_BYTES * u64::from(slot), indirect);
        self.put(self.layout.available + 4 + 2 * u64::from(self.avail_idx % QUEUE_SIZE), slot);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.added += 1;
        // Linux publishes each request as it is added; only the doorbell waits for the batch.
        self.index(self.layout.available + 2).store(self.avail_idx, Ordering::Release);
    }

    /// Header, data in pieces, status; the number of entries.
    fn fill_table(&self, table: u64, slot: u16, kind: Kind, (header, status): (u64, u64)) -> u16 {
        let mut entries = 0;
        let mut add = |addr, len, flags| {
            let next = entries + 1;
            self.put(table + DESCRIPTOR_BYTES * u64::from(entries), Descriptor { addr, len, flags, next });
            entries = next;
        };
        add(header, 16, NEXT);
        let data_bytes = match kind {
            Kind::Read | Kind::Write => self.block_bytes,
            Kind::Flush => 0,
            Kind::Discard => size_of::<Segment>() as u32,
        };
        let flags = if kind == Kind::Read { NEXT | WRITE } else { NEXT };
        let mut done = 0;
        while done < data_bytes {
            let len = self.segment_bytes.min(data_bytes - done);
            add(self.data_address(slot) + u64::from(done), len, flags);
            done += len;
        }
        add(status, 1, WRITE);
        entries
    }

    /// Whether the device wants its doorbell rung for what was made available since this was last
    /// asked (virtio 2.7.10.1).
    pub fn wants_doorbell(&mut self) -> bool {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return false;
        }
        fence(Ordering::SeqCst);
        let avail_event = self.layout.used + 4 + 8 * u64::from(QUEUE_SIZE);
        let event = self.index(avail_event).load(Ordering::Relaxed);
        self.avail_idx.wrapping_sub(event).wrapping_sub(1) < added
    }

    /// The slot of the next request that has ended, checked.
    pub fn reap(&mut self) -> Result<Option<u16>, DriverError> {
        if !self.has_used() {
            return Ok(None);
        }
        let entry = self.layout.used + 4 + 8 * u64::from(self.last_used % QUEUE_SIZE);
        let (head, len): (u32, u32) = (self.get(entry), self.get(entry + 4));
        self.last_used = self.last_used.wrapping_add(1);
        let slot =
            u16::try_from(head).ok().filter(|&slot| slot < self.depth).ok_or(DriverError::Head(head))?;
        let status: u8 = self.get(self.layout.statuses + u64::from(slot) * 64);
        // IN returns data and status, the others the status alone.
        if status != 0 || len != 1 && len != self.block_bytes + 1 {
            return Err(DriverError::Status { slot, status, len });
        }
        Ok(Some(slot))
    }

    /// Whether something has ended that was not reaped.
    pub fn has_used(&self) -> bool {
        self.index(self.layout.used + 2).load(Ordering::Acquire) != self.last_used
    }

    /// Asks for an interrupt with the next end (virtio 2.7.7.1). `false` if something has ended
    /// meanwhile, for which none may come.
    pub fn ask_for_interrupt(&self) -> bool {
        let used_event = self.layout.available + 4 + 2 * u64::from(QUEUE_SIZE);
        self.index(used_event).store(self.last_used, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.has_used()
    }
}
