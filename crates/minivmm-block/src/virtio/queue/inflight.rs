//! Notes of the chains in flight, in memory that outlives the process (vhost-user, "Inflight I/O tracking", split
//! virtqueue).
//!
//! Owns the layout of one queue's part of the inflight region, the order of the stores, and the recovery: which
//! chains the last process had popped and not returned. The front end keeps the region, and may write anything into
//! it at any time. So nothing that is read from it is more than a number that is checked, and while a queue is
//! served nothing is read at all.
//!
//! A process may be killed between any two stores. The order of the stores decides what its successor finds:
//!
//! - A chain is noted before it can have any effect, so a chain with an effect is repeated or was returned.
//! - used.idx is stored before the notes of what it publishes are cleared, and the list of the last batch says which
//!   those are. So a chain that the driver has back is never repeated.

use crate::mem::{OutsideRam, Ram};
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::Position;

/// Offsets in `struct QueueRegionSplit`.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const DESCRIPTORS: usize = 16;
/// Bytes of one `struct DescStateSplit`, and offsets in it.
const STATE_BYTES: usize = 16;
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The version of the layout. 0 means that the part was never used.
const VERSION_1: u16 = 1;
/// Alignment of each queue's part.
const ALIGNMENT: usize = 64;

/// The notes of one queue.
pub struct Inflight {
    part: *mut u8,
    /// Number of descriptors that there is room for.
    entries: u16,
    /// The number of the next chain: the order in which chains were popped.
    counter: u64,
    /// Head of the last batch's list, as it is in the region.
    last_batch_head: u16,
    /// Heads that were returned and are not published yet.
    batch: Vec<u16>,
    /// Heads that are to be popped again, the last one first.
    to_repeat: Vec<u16>,
    /// Keeps the region mapped.
    _region: Ram,
}

// SAFETY: the pointer leads to memory that other processes share, which `_region` keeps mapped. It is touched by
// atomics only.
unsafe impl Send for Inflight {}

impl Inflight {
    /// Returns the size in bytes of one queue's part of a region for queues of `entries` descriptors.
    pub fn bytes(entries: u16) -> usize {
        (DESCRIPTORS + STATE_BYTES * usize::from(entries)).next_multiple_of(ALIGNMENT)
    }

    /// Finds the part of queue `index` in a region for queues of `entries` descriptors. The region begins at
    /// address 0 of `region`.
    pub fn new(region: &Ram, index: u16, entries: u16) -> Result<Self, OutsideRam> {
        let bytes = Self::bytes(entries);
        let addr = u64::from(index) * bytes as u64;
        let part = region.host(addr, bytes)?;
        if entries == 0 || !part.addr().is_multiple_of(align_of::<AtomicU64>()) {
            return Err(OutsideRam { addr, len: bytes as u64 });
        }
        Ok(Self {
            part,
            entries,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::with_capacity(usize::from(entries)),
            to_repeat: Vec::new(),
            _region: region.clone(),
        })
    }

    /// Finds what is to be repeated of a ring with `size` descriptors, of which `told` is said about its position
    /// and `used_idx` is used.idx. Returns the position to resume at; `None` if this is no region for such a ring.
    pub(super) fn recover(&mut self, told: Position, used_idx: u16, size: u16) -> Option<Position> {
        if size > self.entries {
            return None;
        }
        self.last_batch_head = self.u16(LAST_BATCH_HEAD).load(Ordering::Acquire);
        match self.u16(VERSION).load(Ordering::Acquire) {
            0 => {
                self.u16(DESC_NUM).store(self.entries, Ordering::Release);
                self.u16(USED_IDX).store(told.used, Ordering::Release);
                self.u16(VERSION).store(VERSION_1, Ordering::Release);
                return Some(told);
            }
            VERSION_1 => {}
            _ => return None,
        }
        self.forget_last_batch(used_idx);
        let noted = (0..size).filter(|head| self.in_flight(*head).load(Ordering::Acquire) != 0);
        let mut noted: Vec<(u64, u16)> =
            noted.map(|head| (self.counter_of(head).load(Ordering::Acquire), head)).collect();
        noted.sort_unstable();
        self.counter = noted.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.to_repeat = noted.iter().rev().map(|(_, head)| *head).collect();
        let count = u16::try_from(noted.len()).unwrap_or(u16::MAX);
        Some(Position { available: used_idx.wrapping_add(count), used: used_idx })
    }

    /// Clears the notes of chains that the driver has back, if the last process was killed before it did that.
    fn forget_last_batch(&mut self, used_idx: u16) {
        let count = used_idx.wrapping_sub(self.u16(USED_IDX).load(Ordering::Acquire));
        let mut head = self.last_batch_head;
        for _ in 0..count.min(self.entries) {
            if head >= self.entries {
                break;
            }
            self.in_flight(head).store(0, Ordering::Release);
            head = self.next_of(head).load(Ordering::Acquire);
        }
        self.u16(USED_IDX).store(used_idx, Ordering::Release);
    }

    /// Returns the next head that is to be popped again; `None` once all were.
    pub(super) fn next_to_repeat(&mut self) -> Option<u16> {
        self.to_repeat.pop()
    }

    /// Notes that the chain at `head` was popped. A head that no ring has is not noted; the ring refuses it.
    pub(super) fn begins(&mut self, head: u16) {
        if head < self.entries {
            self.counter_of(head).store(self.counter, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
            self.in_flight(head).store(1, Ordering::Release);
        }
    }

    /// Adds the chain at `head` to the batch that is published next.
    pub(super) fn is_used(&mut self, head: u16) {
        if head < self.entries {
            self.next_of(head).store(self.last_batch_head, Ordering::Release);
            self.u16(LAST_BATCH_HEAD).store(head, Ordering::Release);
            self.last_batch_head = head;
            self.batch.push(head);
        }
    }

    /// Clears the notes of the batch, which the driver has back now that used.idx is `used_idx`.
    pub(super) fn is_published(&mut self, used_idx: u16) {
        while let Some(head) = self.batch.pop() {
            self.in_flight(head).store(0, Ordering::Release);
        }
        self.u16(USED_IDX).store(used_idx, Ordering::Release);
    }

    fn u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= Self::bytes(self.entries) && at.is_multiple_of(2));
        // SAFETY: inside the part, which is mapped as long as `self` lives, and aligned as the part is. Others may
        // change an atomic at any time.
        unsafe { AtomicU16::from_ptr(self.part.add(at).cast()) }
    }

    /// Returns the offset of the state of descriptor `head`. The modulo keeps it inside the part, whatever `head` is.
    fn state(&self, head: u16) -> usize {
        DESCRIPTORS + STATE_BYTES * usize::from(head % self.entries)
    }

    fn next_of(&self, head: u16) -> &AtomicU16 {
        self.u16(self.state(head) + NEXT)
    }

    fn in_flight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `u16`.
        unsafe { AtomicU8::from_ptr(self.part.add(self.state(head) + IN_FLIGHT)) }
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `u16`; a state and its counter are aligned to 8.
        unsafe { AtomicU64::from_ptr(self.part.add(self.state(head) + COUNTER).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Chain, QueueConfig, Ring, RingError};
    use super::*;
    use crate::mem::{map_ram, read_bytes, write_bytes};

    const SIZE: u16 = 8;
    const RING: QueueConfig =
        QueueConfig { size: SIZE as u32, descriptors: 0, available: 0x1000, used: 0x2000 };

    /// A driver whose chains are one writable descriptor each, and the region that a front end keeps.
    struct Driver {
        ram: Ram,
        region: Ram,
        available: u16,
    }

    impl Driver {
        fn new() -> Self {
            let ram = map_ram(&[(0, 1 << 16)]).unwrap();
            for head in 0..SIZE {
                let mut descriptor = [0; 16];
                descriptor[8] = 1;
                descriptor[12] = 2;
                write_bytes(&ram, 16 * u64::from(head), &descriptor).unwrap();
            }
            Self { ram, region: map_ram(&[(0, 1 << 16)]).unwrap(), available: 0 }
        }

        fn submit(&mut self, heads: &[u16]) {
            for head in heads {
                let slot = RING.available + 4 + 2 * u64::from(self.available % SIZE);
                write_bytes(&self.ram, slot, &head.to_le_bytes()).unwrap();
                self.available += 1;
            }
            write_bytes(&self.ram, RING.available + 2, &self.available.to_le_bytes()).unwrap();
        }

        fn used_idx(&self) -> u16 {
            let mut idx = [0; 2];
            read_bytes(&self.ram, RING.used + 2, &mut idx).unwrap();
            u16::from_le_bytes(idx)
        }

        /// The ring as a new process finds it. QEMU tells used.idx where it does not know better.
        fn ring(&self) -> Ring {
            let told = Position { available: self.used_idx(), used: self.used_idx() };
            let ring = Ring::new(&self.ram, &RING, SIZE, 0).unwrap().resume_at(told);
            ring.tracked_by(Inflight::new(&self.region, 1, SIZE).unwrap()).unwrap()
        }

        fn note(&self, at: usize, bytes: &[u8]) {
            write_bytes(&self.region, (Inflight::bytes(SIZE) + at) as u64, bytes).unwrap();
        }
    }

    fn pop(ring: &mut Ring) -> Vec<u16> {
        std::iter::from_fn(|| ring.pop().unwrap()).map(|chain| chain.head).collect()
    }

    fn complete(ring: &mut Ring, heads: &[u16]) {
        heads.iter().for_each(|head| ring.push_used(*head, 0).unwrap());
        let _ = ring.publish();
    }

    #[test]
    fn a_killed_process_s_chains_are_repeated_in_their_order_and_then_the_ring_goes_on() {
        let mut driver = Driver::new();
        let mut ring = driver.ring();
        driver.submit(&[5, 3, 1, 2]);
        assert_eq!(pop(&mut ring), [5, 3, 1, 2]);
        complete(&mut ring, &[1, 5]);
        // The driver reuses what it has back: its new chain lies where head 5 was in the available ring.
        driver.submit(&[1, 7]);
        drop(ring);
        let mut ring = driver.ring();
        assert_eq!(ring.position(), Position { available: 4, used: 2 });
        assert_eq!(pop(&mut ring), [3, 2, 1, 7]);
        complete(&mut ring, &[7, 3, 2, 1]);
        let mut ring = driver.ring();
        assert_eq!((ring.position(), pop(&mut ring)), (Position { available: 6, used: 6 }, vec![]));
    }

    /// Takes a picture of the region before each step of a publication, and recovers from it.
    #[test]
    fn whatever_store_of_a_publication_was_the_last_nothing_published_is_repeated() {
        let mut driver = Driver::new();
        let mut ring = driver.ring();
        driver.submit(&[0, 1, 2, 3]);
        assert_eq!(pop(&mut ring), [0, 1, 2, 3]);
        complete(&mut ring, &[2]);
        let before = picture(&driver.region);
        complete(&mut ring, &[0, 3]);
        let after = picture(&driver.region);
        // The list of the batch is written before used.idx; the flags and used_idx afterwards.
        let list = |at: usize| (at >= DESCRIPTORS && (at - DESCRIPTORS) % STATE_BYTES >= NEXT) || at / 2 == 6;
        let flags = [DESCRIPTORS, DESCRIPTORS + 3 * STATE_BYTES];
        for cleared in 0..=flags.len() {
            let mut torn: Vec<u8> =
                (0..before.len()).map(|at| if list(at) { after[at] } else { before[at] }).collect();
            flags.iter().rev().take(cleared).for_each(|flag| torn[*flag] = 0);
            driver.note(0, &torn);
            let mut ring = driver.ring();
            assert_eq!(pop(&mut ring), [1], "{cleared} of the flags were cleared");
        }
    }

    fn picture(region: &Ram) -> Vec<u8> {
        let mut bytes = vec![0; Inflight::bytes(SIZE)];
        read_bytes(region, bytes.len() as u64, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_region_full_of_lies_leads_nowhere_else() {
        let mut driver = Driver::new();
        driver.submit(&[4]);
        driver.note(0, &vec![0xff; Inflight::bytes(SIZE)]);
        let fresh = || Ring::new(&driver.ram, &RING, SIZE, 0).unwrap();
        let notes = || Inflight::new(&driver.region, 1, SIZE).unwrap();
        assert!(fresh().tracked_by(notes()).is_err(), "an unknown version");
        driver.note(VERSION, &1u16.to_le_bytes());
        let mut ring = fresh().tracked_by(notes()).unwrap();
        let mut chain = Chain::default();
        for _ in 0..SIZE {
            assert_eq!(ring.pop_into(&mut chain), Ok(true));
            assert!(chain.head < SIZE);
        }
        let beyond = RingError::AvailJump { next: 8, idx: 1, size: SIZE };
        assert_eq!(ring.pop_into(&mut chain), Err(beyond), "eight in flight, of which the driver made one");
        assert!(Inflight::new(&driver.region, u16::MAX, SIZE).is_err(), "beyond the region");
        assert!(fresh().tracked_by(Inflight::new(&driver.region, 0, 4).unwrap()).is_err(), "too small");
    }
}
