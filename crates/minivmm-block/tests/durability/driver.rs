//! The driver's side of one queue: its memory, its requests in flight, and when it rings and is told.
//!
//! Knows nothing of storage, and promises nothing; that is `world.rs`.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minivmm_block::blk::worker::Job;
use minivmm_block::mem::{self, Ram};
use minivmm_block::sync::observed::Access;
use minivmm_block::virtio::Interrupt;
use minivmm_block::virtio::queue::{QueueConfig, Ring};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::desc;
use super::plan::Ask;
use super::storage::{Tag, tag_bytes};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
/// used.flags: the device wants no doorbell.
const NO_NOTIFY: u16 = 1;

pub const QUEUE_SIZE: u16 = 16;
/// Requests that a driver has in flight on a queue: three descriptors each.
pub const SLOTS: usize = 5;
pub const UNTOUCHED: u8 = 0xaa;

/// Where queue q keeps its things in RAM; the storage's scratch sector is at 0.
const QUEUE_BYTES: u64 = 0x2_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOT: u64 = 0x4000;
const SLOT_BYTES: u64 = 0x5000;
const SLOT_STATUS: u64 = 0x40;
const SLOT_DATA: u64 = 0x1000;

/// RAM enough for every run; made once a thread.
pub fn ram() -> Ram {
    mem::map_ram(&[(0, 4 * QUEUE_BYTES)]).unwrap()
}

/// A request that the driver has in flight.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    pub ask: Ask,
    pub submitted: u64,
    /// Its change, if it is one.
    pub change: Option<usize>,
    pub tag: Tag,
}

/// Interrupts that the driver has not looked at.
struct Told(Arc<AtomicBool>);

impl Interrupt for Told {
    fn queue(&self, _: u16) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// How the driver deals with its notifications.
#[derive(Debug, Clone, Copy)]
pub struct Manners {
    pub event_idx: bool,
    /// It looks at the used ring only when it was told.
    pub waits_for_interrupts: bool,
    /// It rings the doorbell of its own accord, not only when the device asks for it.
    pub rings_always: bool,
}

/// One queue, as its driver has it.
pub struct Queue {
    ram: Ram,
    base: u64,
    manners: Manners,
    pub slots: [Option<Request>; SLOTS],
    avail: u16,
    used: u16,
    doorbell: Arc<EventFd>,
    told: Arc<AtomicBool>,
    /// Heads that the device has taken from the available ring, and requests that it has answered.
    taken: Rc<Cell<u64>>,
    answered: u64,
}

fn word(value: u64) -> u16 {
    u16::try_from(value).unwrap()
}

impl Queue {
    pub fn new(ram: &Ram, queue: usize, manners: Manners) -> Self {
        Self {
            ram: ram.clone(),
            base: QUEUE_BYTES * (1 + u64::try_from(queue).unwrap()),
            manners,
            slots: [None; SLOTS],
            avail: 0,
            used: 0,
            doorbell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            told: Arc::default(),
            taken: Rc::default(),
            answered: 0,
        }
    }

    /// What a worker gets at activation; the rings are empty.
    pub fn job(&mut self, index: usize) -> Job {
        mem::write_bytes(&self.ram, self.base, &[0; 0x3000]).unwrap();
        let config = QueueConfig {
            size: u32::from(QUEUE_SIZE),
            descriptors: self.base,
            available: self.base + AVAIL,
            used: self.base + USED,
        };
        let event_idx = if self.manners.event_idx { F_EVENT_IDX } else { 0 };
        let features = F_VERSION_1 | F_DISCARD | F_WRITE_ZEROES | event_idx;
        Job {
            ram: self.ram.clone(),
            features,
            index: word(u64::try_from(index).unwrap()),
            ring: Ring::new(&self.ram, &config, QUEUE_SIZE, features).unwrap(),
            doorbell: Arc::clone(&self.doorbell),
            kick: None,
            interrupt: Arc::new(Told(Arc::clone(&self.told))),
        }
    }

    /// Counts the heads that the device takes: each is read once.
    pub fn counts_heads(&self) -> impl Fn(Access) + 'static {
        let first = self.ram.host(self.base + AVAIL + 4, 2 * usize::from(QUEUE_SIZE)).unwrap().addr();
        let heads = first..first + 2 * usize::from(QUEUE_SIZE);
        let taken = Rc::clone(&self.taken);
        move |access| {
            if let Access::Load { at, .. } = access
                && heads.contains(&at)
            {
                taken.set(taken.get() + 1);
            }
        }
    }

    pub fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Requests that the device has taken and not answered.
    pub fn unanswered(&self) -> u64 {
        self.taken.get() - self.answered
    }

    pub fn in_flight(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().flatten()
    }

    /// After a reset: what was in flight.
    pub fn forget(&mut self) -> impl Iterator<Item = Request> + '_ {
        (self.avail, self.used, self.answered) = (0, 0, 0);
        self.taken.set(0);
        self.told.store(false, Ordering::SeqCst);
        let _ = self.doorbell.read();
        self.slots.iter_mut().filter_map(Option::take)
    }

    /// Puts the request's bytes into guest memory and its head into the available ring, and rings the
    /// doorbell where that is wanted.
    pub fn submit(&mut self, slot: usize, request: Request, number: Tag) {
        let ask = request.ask;
        self.slots[slot] = Some(request);
        let at = self.base + SLOT + SLOT_BYTES * u64::try_from(slot).unwrap();
        let (kind, sector, bytes) = match ask {
            Ask::Read { sector, sectors } => (IN, sector, sectors * 512),
            Ask::Write { sector, sectors } => (OUT, sector, sectors * 512),
            Ask::WriteFarAway { sector } => (OUT, sector, 512),
            Ask::Flush => (FLUSH, 0, 0),
            Ask::Discard { .. } => (DISCARD, 0, 16),
            Ask::WriteZeroes { .. } => (WRITE_ZEROES, 0, 16),
        };
        let far = if matches!(ask, Ask::WriteFarAway { .. }) { 1 << 55 } else { 0 };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(u64::try_from(sector).unwrap() | far).to_le_bytes());
        self.poke(at, &header);
        self.poke(at + SLOT_STATUS, &[UNTOUCHED]);
        self.put_data(at + SLOT_DATA, ask, number);
        let head = word(u64::try_from(3 * slot).unwrap());
        let data_flags = if kind == IN { 3 } else { 1 };
        let next = if bytes == 0 { head + 2 } else { head + 1 };
        self.put_desc(head, (at, 16, 1, next));
        self.put_desc(head + 1, (at + SLOT_DATA, u32::try_from(bytes).unwrap(), data_flags, head + 2));
        self.put_desc(head + 2, (at + SLOT_STATUS, 1, 2, 0));
        let old = self.avail;
        self.poke(self.base + AVAIL + 4 + 2 * u64::from(old % QUEUE_SIZE), &head.to_le_bytes());
        self.avail = old.wrapping_add(1);
        self.poke(self.base + AVAIL + 2, &self.avail.to_le_bytes());
        if self.must_ring(old) {
            self.ring();
        }
    }

    fn put_data(&self, at: u64, ask: Ask, number: Tag) {
        match ask {
            Ask::Write { sector, sectors } => {
                for index in 0..sectors {
                    let to = at + 512 * u64::try_from(index).unwrap();
                    self.poke(to, &tag_bytes(number, sector + index));
                }
            }
            Ask::WriteFarAway { sector } => self.poke(at, &tag_bytes(number, sector)),
            Ask::Discard { sector, sectors } | Ask::WriteZeroes { sector, sectors, .. } => {
                let unmap = matches!(ask, Ask::WriteZeroes { unmap: true, .. });
                let mut payload = [0; 16];
                payload[..8].copy_from_slice(&u64::try_from(sector).unwrap().to_le_bytes());
                payload[8..12].copy_from_slice(&u32::try_from(sectors).unwrap().to_le_bytes());
                payload[12..].copy_from_slice(&u32::from(unmap).to_le_bytes());
                self.poke(at, &payload);
            }
            Ask::Read { sectors, .. } => {
                for index in 0..sectors {
                    self.poke(at + 512 * u64::try_from(index).unwrap(), &[UNTOUCHED; 16]);
                }
            }
            Ask::Flush => {}
        }
    }

    /// virtio 2.7.10, and 2.7.13.4.1 in an order where each side sees the other's stores at once.
    fn must_ring(&self, old: u16) -> bool {
        let avail_event = self.peek16(self.base + USED + 4 + 8 * u64::from(QUEUE_SIZE));
        if self.manners.rings_always {
            true
        } else if self.manners.event_idx {
            self.avail.wrapping_sub(avail_event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            self.peek16(self.base + USED) & NO_NOTIFY == 0
        }
    }

    pub fn ring(&self) {
        self.doorbell.write(1).unwrap();
    }

    /// The next request that the used ring says is done, by the slot that it says; `None` if the driver has
    /// seen all of it, or looks only when it is told, and was not.
    pub fn next_done(&mut self) -> Option<usize> {
        if self.used == self.used_idx() {
            return None;
        }
        if self.manners.waits_for_interrupts && !self.told.load(Ordering::SeqCst) {
            return None;
        }
        let entry = self.base + USED + 4 + 8 * u64::from(self.used % QUEUE_SIZE);
        let slot = usize::from(self.peek16(entry)) / 3;
        self.used = self.used.wrapping_add(1);
        self.answered += 1;
        if self.used == self.used_idx() {
            // Wants to hear of the next one; nothing came meanwhile, since nobody else runs.
            self.told.store(false, Ordering::SeqCst);
            self.poke(self.base + AVAIL + 4 + 2 * u64::from(QUEUE_SIZE), &self.used.to_le_bytes());
        }
        Some(slot)
    }

    /// Whether something is done that the driver was never told of.
    pub fn missed_an_interrupt(&self) -> bool {
        self.used != self.used_idx()
    }

    fn used_idx(&self) -> u16 {
        self.peek16(self.base + USED + 2)
    }

    /// A slot's status byte, and where its data is.
    pub fn answer(&self, slot: usize) -> (u8, u64) {
        let at = self.base + SLOT + SLOT_BYTES * u64::try_from(slot).unwrap();
        let [status] = self.peek(at + SLOT_STATUS);
        (status, at + SLOT_DATA)
    }

    fn put_desc(&self, index: u16, desc: desc::Desc) {
        self.poke(self.base + 16 * u64::from(index), &desc::bytes(desc));
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        mem::write_bytes(&self.ram, addr, bytes).unwrap();
    }

    pub fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        mem::read_bytes(&self.ram, addr, &mut bytes).unwrap();
        bytes
    }

    fn peek16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.peek(addr))
    }
}
