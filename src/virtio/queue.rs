//! Split virtqueue, device side (virtio 2.7).
//!
//! Owns the checks of a queue's configuration and the walk over descriptor chains; virtio-queue
//! keeps ring indices, the used ring and EVENT_IDX. Everything read here was written by the guest
//! and is read exactly once (R13). Knows nothing of requests or files.
//!
//! Two kinds of guest errors: a ring that cannot be followed any further is a [`RingError`] and ends
//! in DEVICE_NEEDS_RESET; a chain whose structure is sound but whose content is not is handed on
//! with its [`ChainFault`], so that it is completed like any other.

use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use super::feature;
use crate::mem::{Ram, Segment};

/// Bytes of one descriptor.
const DESCRIPTOR_BYTES: u32 = 16;

/// A queue's configuration as the driver wrote it: an allegation until [`Ring::new`] accepts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueConfig {
    /// Number of descriptors.
    pub size: u32,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the driver area (available ring).
    pub available: u64,
    /// Guest address of the device area (used ring).
    pub used: u64,
}

/// Why a queue's configuration is refused (virtio 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueConfigError {
    /// Not a power of two, or beyond what the device offers.
    #[error("queue size {0} is no power of two from 1 to {1}")]
    Size(u32, u16),
    /// An address that is not on the boundary the specification wants.
    #[error("the {part} at {addr:#x} is not aligned to {align}")]
    Alignment {
        /// Which part of the queue.
        part: &'static str,
        /// Its guest address.
        addr: u64,
        /// The boundary in bytes.
        align: u64,
    },
    /// Not wholly in RAM.
    #[error("the {part} at {addr:#x} is not in RAM")]
    OutsideRam {
        /// Which part of the queue.
        part: &'static str,
        /// Its guest address.
        addr: u64,
    },
}

/// Why the ring cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More chains announced than there are descriptors (R7).
    #[error("avail.idx jumped from {next} to {idx}, more than the {size} entries of the ring")]
    AvailJump {
        /// Where we are.
        next: u16,
        /// Where the driver says it is.
        idx: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor index beyond its table (R2, R7).
    #[error("descriptor {index} is beyond the {size} of its table")]
    Index {
        /// The index.
        index: u32,
        /// Entries of the table.
        size: u32,
    },
    /// More descriptors in one chain than the queue has: a loop (R1).
    #[error("the chain at descriptor {head} is longer than the {size} descriptors of the queue: a loop")]
    Loop {
        /// First descriptor.
        head: u16,
        /// Descriptors of the queue.
        size: u16,
    },
    /// An indirect descriptor where none may be (R6).
    #[error("descriptor {0} is indirect, which {1}")]
    Indirect(u16, &'static str),
    /// An indirect table of a length that cannot be (R6).
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// A part of the queue cannot be reached: impossible after the checks at its start.
    #[error("guest address {0:#x} cannot be reached")]
    Unreachable(u64),
    /// A chain without a byte for the answer.
    #[error("the chain at descriptor {0} has nowhere to put a status")]
    NoStatus(u16),
    /// virtio-queue refused.
    #[error("the used ring cannot be written")]
    UsedRing,
}

/// Why a chain that could be followed cannot be a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// A readable descriptor behind a writable one (virtio 2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// More than 2^32 bytes (virtio 2.7.5.2).
    #[error("more than 4 GiB in one chain")]
    TooLong,
}

/// A descriptor chain, read once: private from here on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// What goes into the used ring.
    pub head: u16,
    /// What the driver has filled, in order.
    pub readable: Vec<Segment>,
    /// What the device may fill, in order.
    pub writable: Vec<Segment>,
    /// What is wrong with it.
    pub fault: Option<ChainFault>,
}

/// struct virtq_desc (virtio 2.7.5), little endian as in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct RawDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

// SAFETY: four integers without padding (8 + 4 + 2 + 2 = 16); any bytes are valid for them.
unsafe impl ByteValued for RawDescriptor {}

/// The rings of one enabled queue.
pub struct Ring {
    queue: Queue,
    indirect: bool,
}

impl Ring {
    /// Checks the whole configuration once (R14), for the queue's whole life: RAM does not change.
    pub fn new(
        ram: &Ram,
        config: &QueueConfig,
        size_max: u16,
        features: u64,
    ) -> Result<Self, QueueConfigError> {
        let size_error = QueueConfigError::Size(config.size, size_max);
        let size = u16::try_from(config.size).map_err(|_| size_error)?;
        if !size.is_power_of_two() || size > size_max {
            return Err(size_error);
        }
        let entries = u64::from(size);
        for (part, addr, align, bytes) in [
            ("descriptor table", config.descriptors, 16, u64::from(DESCRIPTOR_BYTES) * entries),
            ("available ring", config.available, 2, 6 + 2 * entries),
            ("used ring", config.used, 4, 6 + 8 * entries),
        ] {
            if !addr.is_multiple_of(align) {
                return Err(QueueConfigError::Alignment { part, addr, align });
            }
            let outside = QueueConfigError::OutsideRam { part, addr };
            let len = usize::try_from(bytes).map_err(|_| outside)?;
            ram.get_slice(GuestAddress(addr), len).map_err(|_| outside)?;
        }
        let mut queue = Queue::new(size).map_err(|_| size_error)?;
        let (low, high) = (|addr: u64| (addr & 0xffff_ffff) as u32, |addr: u64| (addr >> 32) as u32);
        queue.set_desc_table_address(Some(low(config.descriptors)), Some(high(config.descriptors)));
        queue.set_avail_ring_address(Some(low(config.available)), Some(high(config.available)));
        queue.set_used_ring_address(Some(low(config.used)), Some(high(config.used)));
        queue.set_event_idx(features & feature::EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(Self { queue, indirect: features & feature::INDIRECT_DESC != 0 })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next available chain, if there is one.
    pub fn pop(&mut self, ram: &Ram) -> Result<Option<Chain>, RingError> {
        let unreachable = |_| RingError::Unreachable(self.queue.avail_ring());
        // Acquire: the ring entry and the descriptors are read after the index (virtio 2.7.13).
        let idx = self.queue.avail_idx(ram, Ordering::Acquire).map_err(unreachable)?.0;
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        match idx.wrapping_sub(next) {
            0 => return Ok(None),
            count if count > size => return Err(RingError::AvailJump { next, idx, size }),
            _ => {}
        }
        let entry = self.queue.avail_ring() + 4 + 2 * u64::from(next % size);
        let head = u16::from_le(read(ram, entry)?);
        self.queue.set_next_avail(next.wrapping_add(1));
        self.walk(ram, head).map(Some)
    }

    /// Follows a chain: direct descriptors, then at most one indirect table (virtio 2.7.5.3.2).
    fn walk(&self, ram: &Ram, head: u16) -> Result<Chain, RingError> {
        let size = self.queue.size();
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new(), fault: None };
        let mut table = (self.queue.desc_table(), u32::from(size));
        let mut in_indirect = false;
        let mut index = head;
        let mut seen: u16 = 0;
        let mut bytes: u64 = 0;
        loop {
            if u32::from(index) >= table.1 {
                return Err(RingError::Index { index: u32::from(index), size: table.1 });
            }
            if seen == size {
                return Err(RingError::Loop { head, size });
            }
            let descriptor: RawDescriptor =
                read(ram, table.0 + u64::from(DESCRIPTOR_BYTES) * u64::from(index))?;
            let flags = u32::from(u16::from_le(descriptor.flags));
            let segment = Segment { addr: u64::from_le(descriptor.addr), len: u32::from_le(descriptor.len) };
            if flags & VRING_DESC_F_INDIRECT != 0 {
                table = self.enter_indirect(ram, index, flags, segment, in_indirect)?;
                (in_indirect, index) = (true, 0);
                continue;
            }
            seen += 1;
            bytes += u64::from(segment.len);
            chain.add(segment, flags & VRING_DESC_F_WRITE != 0);
            if flags & VRING_DESC_F_NEXT == 0 {
                break;
            }
            index = u16::from_le(descriptor.next);
        }
        if bytes > 1 << 32 {
            chain.fault = Some(ChainFault::TooLong);
        }
        Ok(chain)
    }

    fn enter_indirect(
        &self,
        ram: &Ram,
        index: u16,
        flags: u32,
        table: Segment,
        in_indirect: bool,
    ) -> Result<(u64, u32), RingError> {
        if !self.indirect {
            return Err(RingError::Indirect(index, "was not negotiated"));
        }
        if in_indirect {
            return Err(RingError::Indirect(index, "may not be nested"));
        }
        if flags & VRING_DESC_F_NEXT != 0 {
            return Err(RingError::Indirect(index, "may not have a next one"));
        }
        let longest = DESCRIPTOR_BYTES * u32::from(self.queue.size());
        if table.len == 0 || !table.len.is_multiple_of(DESCRIPTOR_BYTES) || table.len > longest {
            return Err(RingError::IndirectLength(table.len));
        }
        ram.get_slice(GuestAddress(table.addr), table.len as usize)
            .map_err(|_| RingError::Unreachable(table.addr))?;
        Ok((table.addr, table.len / DESCRIPTOR_BYTES))
    }

    /// Returns a chain to the driver; `written` bytes from its first writable one are really
    /// written. Everything written before is visible before (virtio 2.7.8.2).
    pub fn push_used(&mut self, ram: &Ram, head: u16, written: u32) -> Result<(), RingError> {
        self.queue.add_used(ram, head, written).map_err(|_| RingError::UsedRing)
    }

    /// Whether the driver wants to hear of what was pushed since this was last asked (virtio 2.7.7.2).
    pub fn wants_interrupt(&mut self, ram: &Ram) -> Result<bool, RingError> {
        // Begins with the full fence between used.idx and what is read now.
        let wanted = self.queue.needs_notification(ram).map_err(|_| RingError::UsedRing)?;
        if self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags = u16::from_le(read(ram, self.queue.avail_ring())?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to ring the doorbell.
    pub fn disable_doorbell(&mut self, ram: &Ram) -> Result<(), RingError> {
        self.queue.disable_notification(ram).map_err(|_| RingError::UsedRing)
    }

    /// Asks for the doorbell again; `true` if something became available meanwhile, for which it
    /// may never ring.
    pub fn enable_doorbell(&mut self, ram: &Ram) -> Result<bool, RingError> {
        self.queue.enable_notification(ram).map_err(|_| RingError::UsedRing)
    }
}

impl Chain {
    fn add(&mut self, segment: Segment, writable: bool) {
        if writable {
            self.writable.push(segment);
        } else {
            if !self.writable.is_empty() {
                self.fault = Some(ChainFault::Order);
            }
            self.readable.push(segment);
        }
    }
}

fn read<T: ByteValued>(ram: &Ram, addr: u64) -> Result<T, RingError> {
    ram.read_obj(GuestAddress(addr)).map_err(|_| RingError::Unreachable(addr))
}
