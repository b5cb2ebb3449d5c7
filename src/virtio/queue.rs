//! Split virtqueue, device side (virtio 2.7).
//!
//! Owns the checks of a queue's configuration (virtio-queue's own among them), the walk over
//! descriptor chains, the indices and EVENT_IDX; [`memory`] has the accesses to the rings, which are
//! translated once. Everything read here was written by the guest and is read exactly once (R13).
//! Knows nothing of requests or files.
//!
//! Two kinds of guest errors: a ring that cannot be followed any further is a [`RingError`] and ends
//! in DEVICE_NEEDS_RESET; a chain whose structure is sound but whose content is not is handed on
//! with its [`ChainFault`], so that it is completed like any other.

mod memory;

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::feature;
use crate::mem::{Ram, Segment};
use crate::sync::{Ordering, fence};
use memory::{Available, DESCRIPTOR_BYTES, Table, Used};

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
    /// virtio-queue finds something that our own checks do not.
    #[error("virtio-queue does not accept it")]
    Refused,
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
    #[error("an indirect table of {0} bytes, which is no number of whole descriptors from 1 on")]
    IndirectLength(u32),
    /// An indirect table that is not wholly in RAM (R3).
    #[error("the indirect table at {0:#x} is not in RAM")]
    Unreachable(u64),
    /// A chain without a byte for the answer.
    #[error("the chain at descriptor {0} has nowhere to put a status")]
    NoStatus(u16),
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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

/// The rings of one enabled queue.
pub struct Ring {
    descriptors: Table,
    available: Available,
    used: Used,
    /// The next entry of the available ring to be taken.
    next_available: u16,
    /// avail.idx when it was last read, and found to be at most a ring's length ahead.
    seen_available: u16,
    /// The next entry of the used ring to be written.
    next_used: u16,
    /// used.idx as the driver sees it.
    published: u16,
    /// used.idx when it was last decided whether to notify.
    judged: u16,
    /// Without EVENT_IDX: used.flags asks for no doorbell.
    is_quiet: bool,
    size: u16,
    indirect: bool,
    event_idx: bool,
    /// As the driver has said it.
    config: QueueConfig,
    /// Where indirect tables are found; and it keeps what the three parts point to.
    ram: Ram,
}

impl Ring {
    /// Checks the whole configuration once (R14) and translates it, for the queue's whole life: RAM
    /// does not change.
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
        for (part, addr, align) in [
            ("descriptor table", config.descriptors, 16),
            ("available ring", config.available, 2),
            ("used ring", config.used, 4),
        ] {
            if !addr.is_multiple_of(align) {
                return Err(QueueConfigError::Alignment { part, addr, align });
            }
        }
        let outside = |part, addr| move |_| QueueConfigError::OutsideRam { part, addr };
        let descriptors = Table::new(ram, config.descriptors, u32::from(size))
            .map_err(outside("descriptor table", config.descriptors))?;
        let available = Available::new(ram, config.available, size)
            .map_err(outside("available ring", config.available))?;
        let used = Used::new(ram, config.used, size).map_err(outside("used ring", config.used))?;
        if !is_valid_to_virtio_queue(ram, config, size) {
            return Err(QueueConfigError::Refused);
        }
        Ok(Self {
            descriptors,
            available,
            used,
            next_available: 0,
            seen_available: 0,
            next_used: 0,
            published: 0,
            judged: 0,
            is_quiet: false,
            size,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            config: *config,
            ram: ram.clone(),
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the parts of the queue are, as the driver has said it.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// The next available chain, if there is one, in memory of its own.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        Ok(self.pop_into(&mut chain)?.then_some(chain))
    }

    /// The next available chain, in place of what was in `chain`, whose memory is used again;
    /// whether there was one.
    pub fn pop_into(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.next_available == self.seen_available && !self.look_for_more()? {
            return Ok(false);
        }
        let head = self.available.entry(self.next_available);
        self.next_available = self.next_available.wrapping_add(1);
        self.walk(head, chain)?;
        Ok(true)
    }

    /// Reads avail.idx; whether there are entries that were not taken.
    fn look_for_more(&mut self) -> Result<bool, RingError> {
        let (next, idx, size) = (self.next_available, self.available.idx(), self.size);
        if idx.wrapping_sub(next) > size {
            return Err(RingError::AvailJump { next, idx, size });
        }
        self.seen_available = idx;
        Ok(idx != next)
    }

    /// Follows a chain: direct descriptors, then at most one indirect table (virtio 2.7.5.3.2).
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.begin(head);
        let mut table = self.descriptors;
        let mut in_indirect = false;
        let mut index = head;
        let mut seen: u16 = 0;
        let mut bytes: u64 = 0;
        loop {
            let Some(descriptor) = table.read(index) else {
                return Err(RingError::Index { index: u32::from(index), size: table.entries() });
            };
            if seen == self.size {
                return Err(RingError::Loop { head, size: self.size });
            }
            let (segment, flags) = (descriptor.segment, u32::from(descriptor.flags));
            if flags & VRING_DESC_F_INDIRECT != 0 {
                table = self.enter_indirect(index, flags, segment, in_indirect)?;
                (in_indirect, index) = (true, 0);
                continue;
            }
            seen += 1;
            bytes += u64::from(segment.len);
            chain.add(segment, flags & VRING_DESC_F_WRITE != 0);
            if flags & VRING_DESC_F_NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        if bytes > 1 << 32 {
            chain.fault = Some(ChainFault::TooLong);
        }
        Ok(())
    }

    fn enter_indirect(
        &self,
        index: u16,
        flags: u32,
        table: Segment,
        in_indirect: bool,
    ) -> Result<Table, RingError> {
        if !self.indirect {
            return Err(RingError::Indirect(index, "was not negotiated"));
        }
        if in_indirect {
            return Err(RingError::Indirect(index, "may not be nested"));
        }
        if flags & VRING_DESC_F_NEXT != 0 {
            return Err(RingError::Indirect(index, "may not have a next one"));
        }
        // The queue's size bounds the chain, not the table (virtio 1.2, 2.7.5.3.1).
        let entry = u32::from(DESCRIPTOR_BYTES);
        if table.len == 0 || !table.len.is_multiple_of(entry) {
            return Err(RingError::IndirectLength(table.len));
        }
        Table::new(&self.ram, table.addr, table.len / entry).map_err(|_| RingError::Unreachable(table.addr))
    }

    /// Writes the used entry of a chain; `written` bytes from its first writable one are really
    /// written. The driver sees it after [`Ring::publish`].
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        if head >= self.size {
            return Err(RingError::Index { index: u32::from(head), size: u32::from(self.size) });
        }
        // Only a driver that has more chains outstanding than there are entries gets here: it gets
        // the older ones before they are overwritten.
        if self.next_used.wrapping_sub(self.published) == self.size {
            self.store_used_idx();
        }
        self.used.set_entry(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver everything that was pushed, by one store; whether it is to be notified
    /// (virtio 2.7.7.2), which is asked once for all of it.
    #[must_use = "a driver that wants to be notified must be"]
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.judged {
            return false;
        }
        self.store_used_idx();
        // We store used.idx, then load used_event or avail.flags. The driver stores used_event or avail.flags,
        // then loads used.idx, and sleeps if it finds nothing new (virtio 2.7.14). Without a fence on both sides
        // each load may be executed before the other side's store is seen: on x86 too, where a store waits in a
        // buffer while later loads go ahead. Then we do not interrupt, the driver sleeps, and the request is
        // never seen to be done. Two SeqCst fences have an order: the side whose fence is the later one finds
        // the other's store. So either we find that the driver wants an interrupt, or it finds our entry.
        // `tests/fences` tries every order.
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_used, std::mem::replace(&mut self.judged, self.next_used));
        if self.event_idx {
            let behind = new.wrapping_sub(self.available.used_event()).wrapping_sub(1);
            behind < new.wrapping_sub(old)
        } else {
            u32::from(self.available.flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    fn store_used_idx(&mut self) {
        self.used.set_idx(self.next_used);
        self.published = self.next_used;
    }

    /// Whether the driver has made something available that was not taken.
    pub fn has_available(&self) -> bool {
        self.available.idx() != self.next_available
    }

    /// Asks the driver not to ring the doorbell. With EVENT_IDX there is nothing to say: avail_event
    /// stays behind, so it rings no more (virtio 2.7.10).
    pub fn disable_doorbell(&mut self) {
        if !self.event_idx && !std::mem::replace(&mut self.is_quiet, true) {
            self.used.set_flags(QUIET);
        }
    }

    /// Asks for the doorbell again; `true` if something became available meanwhile, for which it
    /// may never ring.
    pub fn enable_doorbell(&mut self) -> bool {
        if self.event_idx {
            self.used.set_avail_event(self.next_available);
        } else {
            self.is_quiet = false;
            self.used.set_flags(0);
        }
        // The same with the sides exchanged. We store avail_event or used.flags, then load avail.idx, and sleep if
        // it says nothing new. The driver stores avail.idx, then loads avail_event or used.flags, and rings only if
        // they ask for it (virtio 2.7.13.4.1). The side whose fence is the later one finds the other's store: either
        // the driver rings, or we find its chain. Without this fence both may miss it, and the request is never
        // taken. `tests/fences` tries every order.
        fence(Ordering::SeqCst);
        self.available.idx() != self.next_available
    }
}

/// used.flags that ask for no doorbell.
#[allow(clippy::cast_possible_truncation, reason = "it is 1")]
const QUIET: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// What virtio-queue's own checks say.
fn is_valid_to_virtio_queue(ram: &Ram, config: &QueueConfig, size: u16) -> bool {
    let Ok(mut queue) = Queue::new(size) else { return false };
    let set = queue
        .try_set_desc_table_address(GuestAddress(config.descriptors))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(config.available)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(config.used)));
    queue.set_ready(true);
    set.is_ok() && queue.is_valid(ram)
}

impl Chain {
    /// Empty, with the room that it had.
    fn begin(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.fault = None;
    }

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
