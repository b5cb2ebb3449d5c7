//! Split virtqueue, device side (virtio 2.7).
//!
//! Owns the checks of a queue's configuration (virtio-queue's own among them), the walk over descriptor chains,
//! the indices and EVENT_IDX. `memory` holds the accesses to the rings, whose addresses are translated once.
//! Everything read here was written by the guest and is read exactly once (R13). Knows nothing of requests or
//! files.
//!
//! There are two kinds of guest errors. A ring that cannot be followed any further is a [`RingError`] and leads
//! to DEVICE_NEEDS_RESET. A chain with sound structure but invalid content is handed on with its
//! [`ChainFault`], so that it completes like any other.

pub mod inflight;
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
use inflight::Inflight;
use memory::{Available, DESCRIPTOR_BYTES, Table, Used};

/// A queue's configuration as the driver wrote it. It is unchecked until [`Ring::new`] accepts it.
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
#[non_exhaustive]
pub enum QueueConfigError {
    /// The size is not a power of two, or exceeds what the device offers.
    #[error("queue size {0} is not a power of two from 1 to {1}")]
    Size(u32, u16),
    /// An address is not aligned as the specification demands.
    #[error("the {part} at {addr:#x} is not aligned to {align}")]
    Alignment {
        /// The part of the queue.
        part: &'static str,
        /// The part's guest address.
        addr: u64,
        /// The alignment in bytes.
        align: u64,
    },
    /// A part is not wholly in RAM.
    #[error("the {part} at {addr:#x} is not in RAM")]
    OutsideRam {
        /// The part of the queue.
        part: &'static str,
        /// The part's guest address.
        addr: u64,
    },
    /// The notes of the chains in flight are of an unknown version, or for fewer descriptors.
    #[error("the inflight region is not of version 1, or has room for fewer descriptors than the queue")]
    Notes,
    /// virtio-queue rejects the configuration although our own checks accept it.
    #[error("virtio-queue does not accept it")]
    Refused,
}

/// Why the ring cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The driver announced more chains than there are descriptors (R7).
    #[error("avail.idx jumped from {next} to {idx}, more than the {size} entries of the ring")]
    AvailJump {
        /// The next index that the device expects.
        next: u16,
        /// The index that the driver has written.
        idx: u16,
        /// Number of entries of the ring.
        size: u16,
    },
    /// A descriptor index is beyond its table (R2, R7).
    #[error("descriptor {index} is beyond the {size} of its table")]
    Index {
        /// The index.
        index: u32,
        /// Number of entries of the table.
        size: u32,
    },
    /// One chain has more descriptors than the queue: a loop (R1).
    #[error("the chain at descriptor {head} is longer than the {size} descriptors of the queue: a loop")]
    Loop {
        /// Index of the first descriptor.
        head: u16,
        /// Number of descriptors of the queue.
        size: u16,
    },
    /// An indirect descriptor is where none may be (R6).
    #[error("descriptor {0} is indirect, which {1}")]
    Indirect(u16, &'static str),
    /// An indirect table has an invalid length (R6).
    #[error("an indirect table of {0} bytes, which is not one or more whole descriptors")]
    IndirectLength(u32),
    /// An indirect table is not wholly in RAM (R3).
    #[error("the indirect table at {0:#x} is not in RAM")]
    Unreachable(u64),
    /// A chain has no writable byte for a status.
    #[error("the chain at descriptor {0} has nowhere to put a status")]
    NoStatus(u16),
}

/// Why a chain that could be followed is not a valid request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainFault {
    /// A readable descriptor follows a writable one (virtio 2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// The chain has more than 2^32 bytes (virtio 2.7.5.2).
    #[error("more than 4 GiB in one chain")]
    TooLong,
}

/// A descriptor chain that was read once. From then on it is a private copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// Index of the first descriptor, which goes into the used ring.
    pub head: u16,
    /// The segments that the driver has filled, in order.
    pub readable: Vec<Segment>,
    /// The segments that the device may fill, in order.
    pub writable: Vec<Segment>,
    /// What is wrong with the chain; `None` if nothing is.
    pub fault: Option<ChainFault>,
}

/// How far a ring has been served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// The number of chains popped so far, modulo 2^16: the next entry of the available ring.
    pub available: u16,
    /// The number of chains returned so far, modulo 2^16: the next entry of the used ring.
    pub used: u16,
}

/// The rings of one enabled queue.
pub struct Ring {
    descriptors: Table,
    available: Available,
    used: Used,
    /// The next entry of the available ring to be popped.
    next_available: u16,
    /// avail.idx when it was last read. It was then checked to be at most a ring's length ahead.
    seen_available: u16,
    /// The next entry of the used ring to be written.
    next_used: u16,
    /// used.idx as the driver sees it.
    published: u16,
    /// used.idx at the last decision whether to notify.
    judged: u16,
    /// `true` if used.flags asks for no doorbell. Used only without EVENT_IDX.
    is_quiet: bool,
    size: u16,
    /// The most descriptors that one chain may have.
    chain_max: u16,
    indirect: bool,
    event_idx: bool,
    /// Where chains in flight are noted; `None` if they are not.
    inflight: Option<Box<Inflight>>,
    /// The configuration as the driver wrote it.
    config: QueueConfig,
    /// Guest RAM, in which indirect tables are found. It also keeps the memory of the three parts mapped.
    ram: Ram,
}

impl Ring {
    /// Checks the whole configuration once (R14) and translates its addresses. The translation holds as long as
    /// the queue lives, since RAM does not change.
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
            chain_max: size,
            inflight: None,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            config: *config,
            ram: ram.clone(),
        })
    }

    /// Lets the ring go on where another one over the same memory has stopped.
    pub fn resume_at(mut self, position: Position) -> Self {
        let Position { available, used } = position;
        (self.next_available, self.seen_available) = (available, available);
        (self.next_used, self.published, self.judged) = (used, used, used);
        self
    }

    /// Notes chains in flight in `inflight`, and first pops again those that are noted there. If the notes were used
    /// before, the ring resumes as they say, whatever [`Ring::resume_at`] was told.
    ///
    /// Fails if they cannot be notes of this ring.
    pub fn tracked_by(mut self, mut inflight: Inflight) -> Result<Self, QueueConfigError> {
        let told = self.position();
        let found = inflight.recover(told, self.used.idx(), self.size);
        let position = found.ok_or(QueueConfigError::Notes)?;
        self = self.resume_at(position);
        self.inflight = Some(Box::new(inflight));
        Ok(self)
    }

    /// Accepts chains of up to `descriptors` descriptors if that is more than the ring has. virtio 2.7.5.3.1
    /// forbids such chains, but Linux makes them of indirect descriptors where seg_max permits it.
    pub fn with_chains_of(mut self, descriptors: u16) -> Self {
        self.chain_max = self.chain_max.max(descriptors);
        self
    }

    /// Returns how far the ring has been served.
    pub fn position(&self) -> Position {
        Position { available: self.next_available, used: self.next_used }
    }

    /// Returns used.idx as it is in memory: how many chains the device has returned, modulo 2^16.
    pub fn used_idx_in_memory(&self) -> u16 {
        self.used.idx()
    }

    /// Returns the number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses of the queue's parts as the driver wrote them.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Pops the next available chain into newly allocated memory. Returns `None` if there is none.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        Ok(self.pop_into(&mut chain)?.then_some(chain))
    }

    /// Pops the next available chain into `chain`, whose memory is reused. Returns `false` if there is none.
    #[inline(always)]
    pub fn pop_into(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.inflight.is_some() {
            return self.pop_tracked(chain);
        }
        if self.next_available == self.seen_available && !self.look_for_more()? {
            return Ok(false);
        }
        let head = self.available.entry(self.next_available);
        self.next_available = self.next_available.wrapping_add(1);
        self.walk(head, chain)?;
        Ok(true)
    }

    /// [`Ring::pop_into`] where chains in flight are noted: chains that are to be repeated come first.
    fn pop_tracked(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(head) = self.inflight.as_mut().and_then(|inflight| inflight.next_to_repeat()) {
            self.walk(head, chain)?;
            return Ok(true);
        }
        if self.next_available == self.seen_available && !self.look_for_more()? {
            return Ok(false);
        }
        let head = self.available.entry(self.next_available);
        self.next_available = self.next_available.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.begins(head);
        }
        self.walk(head, chain)?;
        Ok(true)
    }

    /// Reads avail.idx. Returns `true` if there are entries that were not popped yet.
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
            if seen == self.chain_max {
                return Err(RingError::Loop { head, size: self.chain_max });
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

    /// Writes the used entry of a chain, of which `written` bytes from its first writable one on were really
    /// written. The driver sees the entry after [`Ring::publish`].
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        if head >= self.size {
            return Err(RingError::Index { index: u32::from(head), size: u32::from(self.size) });
        }
        // Only a driver with more chains outstanding than the ring has entries gets here. The older entries are
        // published before they are overwritten.
        if self.next_used.wrapping_sub(self.published) == self.size {
            self.store_used_idx();
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.is_used(head);
        }
        self.used.set_entry(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Returns `true` if used entries were pushed that the driver cannot see yet.
    pub fn owes_publish(&self) -> bool {
        self.next_used != self.judged
    }

    /// Publishes everything that was pushed, by one store. Returns `true` if the driver is to be notified
    /// (virtio 2.7.7.2); this is decided once for all of it.
    #[must_use = "a driver that wants to be notified must be"]
    pub fn publish(&mut self) -> bool {
        if !self.owes_publish() {
            return false;
        }
        self.store_used_idx();
        // We store used.idx, then load used_event or avail.flags. The driver stores used_event or avail.flags,
        // then loads used.idx, and sleeps if it finds nothing new (virtio 2.7.14). Without a fence on both sides
        // each load may be executed before the other side's store is seen: on x86 too, where a store waits in a
        // buffer while later loads go ahead. Then we do not interrupt, the driver sleeps, and the request is
        // never seen to be done. Two SeqCst fences have an order: the side whose fence is the later one finds
        // the other's store. So either we find that the driver wants an interrupt, or it finds our entry.
        // `fences` tries every order.
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
        if let Some(inflight) = &mut self.inflight {
            inflight.is_published(self.next_used);
        }
    }

    /// Returns `true` if the driver has made a chain available that was not popped yet.
    pub fn has_available(&self) -> bool {
        self.available.idx() != self.next_available
    }

    /// Asks the driver not to ring the doorbell. With EVENT_IDX nothing is written: avail_event stays behind,
    /// so the driver rings no more (virtio 2.7.10).
    pub fn disable_doorbell(&mut self) {
        if !self.event_idx && !std::mem::replace(&mut self.is_quiet, true) {
            self.used.set_flags(QUIET);
        }
    }

    /// Asks for the doorbell again. Returns `true` if a chain became available meanwhile, for which the driver
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
        // taken. `fences` tries every order.
        fence(Ordering::SeqCst);
        self.available.idx() != self.next_available
    }
}

/// The value of used.flags that asks for no doorbell.
#[allow(clippy::cast_possible_truncation, reason = "it is 1")]
const QUIET: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Returns `true` if virtio-queue's own checks accept the configuration.
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
    /// Empties the chain but keeps its capacity.
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
