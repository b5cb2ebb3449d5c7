//! The two programs: a worker over the real ring, and a driver after virtio 1.2, 2.7.13.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minivmm_block::blk::worker::{Job, QueueWorker};
use minivmm_block::disk::cache::{POLICIES, WriteCache};
use minivmm_block::disk::disk_queue::{DiskQueue, StableBy};
use minivmm_block::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm_block::disk::geometry::{Alignment, Geometry};
use minivmm_block::disk::{DiskConfig, Image};
use minivmm_block::mem::{Ram, map_ram, write_bytes};
use minivmm_block::ratelimit::RateLimit;
use minivmm_block::sync::{AtomicU16, AtomicU32, fence};
use minivmm_block::virtio::Interrupt;
use minivmm_block::virtio::queue::{QueueConfig, Ring};
use vmm_sys_util::eventfd::EventFd;

use super::desc;
use super::explore::{DEVICE, DRIVER, Layout, Programs};
use super::fiber::{Fiber, Pause, pause};
use super::memory::{Place, SIDES};

/// Entries of the ring; a request takes two descriptors.
const SIZE: u16 = 8;
const GET_ID: u32 = 8;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
/// used.flags, and avail.flags: the other side is not to be notified.
const QUIET: u16 = 1;

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x3000;
const REQUEST_BYTES: u64 = 0x100;

/// When the driver submits its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// One behind the other, without a look at the answers.
    AtOnce,
    /// Each when the one before was answered.
    InTurn,
}

/// Interrupts, or doorbells, since this was last asked.
#[derive(Default)]
struct Rung(AtomicBool);

impl Interrupt for Rung {
    fn queue(&self, _: u16) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// Has no operation, and sleeps until the doorbell rings.
struct Idle;

impl Engine for Idle {
    fn submit(&mut self, _: OpToken, op: HostOp) -> Result<(), HostOp> {
        Err(op)
    }

    fn wait(&mut self, wake: Wake<'_>, _: &mut Vec<Ended>) -> io::Result<()> {
        if let Wake::Doorbell(_) = wake {
            pause(Pause::Sleeps);
        }
        Ok(())
    }
}

pub struct Rings {
    event_idx: bool,
    pace: Pace,
    requests: u16,
    ram: Ram,
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    doorbell: Arc<EventFd>,
    rung: [Arc<Rung>; SIDES],
    /// The two rings in this process.
    avail: *mut u8,
    used: *mut u8,
    /// The worker's state machine, for one run after the other: none of them gives it anything to do.
    disk: Rc<Cell<Option<DiskQueue>>>,
}

impl Rings {
    /// So many requests, 4 at most.
    pub fn new(event_idx: bool, pace: Pace, requests: u16) -> Self {
        let ram = map_ram(&[(0, 1 << 16)]).unwrap();
        for request in 0..requests {
            let at = REQUEST + REQUEST_BYTES * u64::from(request);
            write_bytes(&ram, at, &GET_ID.to_le_bytes()).unwrap();
            let head = 2 * request;
            for (index, desc) in [(head, (at, 16, 1, head + 1)), (head + 1, (at + 32, 21, 2, 0))] {
                write_bytes(&ram, 16 * u64::from(index), &desc::bytes(desc)).unwrap();
            }
        }
        let alignment = Alignment { memory: 512, offset: 512, found_by: "modelled" };
        let geometry = Geometry { capacity_sectors: 8, logical_block: 512, physical_block: 512, alignment };
        let options = DiskConfig { cache: &POLICIES[0], ..DiskConfig::new("modelled") };
        let image = Arc::new(Image::simulated(&options, geometry).unwrap());
        let cache = Arc::new(WriteCache::new(&POLICIES[0]));
        let disk = DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), Box::new(Idle), StableBy::Dsync);
        let host = |at| ram.host(at, 64).unwrap();
        Self {
            event_idx,
            pace,
            requests,
            avail: host(AVAIL),
            used: host(USED),
            image,
            cache,
            doorbell: Arc::new(EventFd::new(0).unwrap()),
            rung: [Arc::default(), Arc::default()],
            disk: Rc::new(Cell::new(Some(disk))),
            ram,
        }
    }

    fn device(&self) -> Fiber<Result<(), String>> {
        let config = QueueConfig { size: u32::from(SIZE), descriptors: 0, available: AVAIL, used: USED };
        let features = F_VERSION_1 | if self.event_idx { F_EVENT_IDX } else { 0 };
        let job = Job {
            ram: self.ram.clone(),
            features,
            index: 0,
            ring: Ring::new(&self.ram, &config, SIZE, features).unwrap(),
            doorbell: Arc::clone(&self.doorbell),
            kick: None,
            interrupt: Arc::clone(&self.rung[DEVICE]) as Arc<dyn Interrupt>,
        };
        let disks = Rc::clone(&self.disk);
        let (image, cache) = (Arc::clone(&self.image), Arc::clone(&self.cache));
        Fiber::new(move || {
            let new = || DiskQueue::new(image, cache, Box::new(Idle), StableBy::Dsync);
            let mut lent = Lent { disk: Some(disks.take().unwrap_or_else(new)), disks };
            let mut limit = RateLimit::for_guest_errors("blk");
            let mut worker = QueueWorker::new(job, lent.disk.as_mut().unwrap(), &mut limit);
            loop {
                worker.turn().map_err(|error| format!("error: {error}"))?;
            }
        })
    }

    fn driver(&self) -> Fiber<Result<(), String>> {
        let driver = Driver {
            event_idx: self.event_idx,
            avail: self.avail,
            used: self.used,
            doorbell: Arc::clone(&self.rung[DRIVER]),
            submitted: 0,
            seen: 0,
        };
        let (pace, requests) = (self.pace, self.requests);
        Fiber::new(move || driver.run(pace, requests))
    }

    pub fn avail_idx(&self) -> Place {
        1
    }

    pub fn used_flags(&self) -> Place {
        AVAIL_PLACES
    }

    pub fn used_idx(&self) -> Place {
        AVAIL_PLACES + 1
    }

    pub fn avail_event(&self) -> Place {
        PLACES - 2
    }
}

/// Goes back when its run is over, also where that is in the middle.
struct Lent {
    disk: Option<DiskQueue>,
    disks: Rc<Cell<Option<DiskQueue>>>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.disks.set(self.disk.take());
    }
}

/// flags, idx, ring, used_event; then flags, idx, and of the used ring each id and length, avail_event.
/// A place has two bytes.
const AVAIL_PLACES: usize = 3 + SIZE as usize;
const PLACES: usize = AVAIL_PLACES + 2 + 4 * SIZE as usize + 2;

impl Layout for Rings {
    fn places(&self) -> usize {
        PLACES
    }

    fn place(&self, address: usize) -> Option<Place> {
        let within = |from: *mut u8, places| {
            address.checked_sub(from.addr()).map(|at| at / 2).filter(|&place| place < places)
        };
        let of_used = || within(self.used, PLACES - AVAIL_PLACES).map(|place| AVAIL_PLACES + place);
        within(self.avail, AVAIL_PLACES).or_else(of_used)
    }

    fn name(&self, place: Place) -> String {
        match place {
            0 => "avail.flags".to_owned(),
            1 => "avail.idx".to_owned(),
            _ if place == AVAIL_PLACES - 1 => "used_event".to_owned(),
            _ if place < AVAIL_PLACES => format!("avail.ring[{}]", place - 2),
            _ if place == self.used_flags() => "used.flags".to_owned(),
            _ if place == self.used_idx() => "used.idx".to_owned(),
            _ if place == self.avail_event() => "avail_event".to_owned(),
            _ => {
                let field = if (place - AVAIL_PLACES - 2).is_multiple_of(4) { "id" } else { "len" };
                format!("used.ring[{}].{field}", (place - AVAIL_PLACES - 2) / 4)
            }
        }
    }

    fn is_entry(&self, place: Place) -> bool {
        let of_avail = (2..AVAIL_PLACES - 1).contains(&place);
        of_avail || (AVAIL_PLACES + 2..self.avail_event()).contains(&place)
    }
}

impl Programs for Rings {
    fn start(&self) -> [Fiber<Result<(), String>>; SIDES] {
        self.rung.iter().for_each(|rung| rung.0.store(false, Ordering::SeqCst));
        [self.device(), self.driver()]
    }

    fn took_ring(&self, side: usize) -> bool {
        self.rung[side].0.swap(false, Ordering::SeqCst)
    }
}

/// A driver, as virtio 1.2 has it in 2.7.13.
struct Driver {
    event_idx: bool,
    avail: *mut u8,
    used: *mut u8,
    doorbell: Arc<Rung>,
    submitted: u16,
    seen: u16,
}

impl Driver {
    /// The two bytes at an offset of a ring.
    fn at<'a>(ring: *mut u8, offset: usize) -> &'a AtomicU16 {
        // SAFETY: inside a ring in RAM that the test's `Rings` keeps, and at an even offset.
        unsafe { AtomicU16::from_ptr(ring.add(offset).cast()) }
    }

    fn run(mut self, pace: Pace, requests: u16) -> Result<(), String> {
        for _ in 0..requests {
            self.submit();
            if pace == Pace::InTurn {
                self.wait()?;
            }
        }
        self.wait()
    }

    /// 2.7.13.1 to 2.7.13.4.1.
    fn submit(&mut self) {
        let old = self.submitted;
        Self::at(self.avail, 4 + 2 * usize::from(old % SIZE)).store(2 * old, Ordering::Relaxed);
        self.submitted = old + 1;
        Self::at(self.avail, 2).store(self.submitted, Ordering::Release);
        fence(Ordering::SeqCst);
        let must_ring = if self.event_idx {
            let event = Self::at(self.used, 4 + 8 * usize::from(SIZE)).load(Ordering::Relaxed);
            self.submitted.wrapping_sub(event).wrapping_sub(1) < self.submitted.wrapping_sub(old)
        } else {
            Self::at(self.used, 0).load(Ordering::Relaxed) & QUIET == 0
        };
        if must_ring {
            self.doorbell.queue(0);
        }
    }

    /// 2.7.14: sleeps until all that was submitted is answered, and looks at each answer.
    fn wait(&mut self) -> Result<(), String> {
        loop {
            // No interrupts while it looks.
            if !self.event_idx {
                Self::at(self.avail, 0).store(QUIET, Ordering::Relaxed);
            }
            while Self::at(self.used, 2).load(Ordering::Acquire) != self.seen {
                self.look()?;
            }
            if self.seen == self.submitted {
                return Ok(());
            }
            if self.event_idx {
                Self::at(self.avail, 4 + 2 * usize::from(SIZE)).store(self.seen, Ordering::Relaxed);
            } else {
                Self::at(self.avail, 0).store(0, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            if Self::at(self.used, 2).load(Ordering::Acquire) == self.seen {
                pause(Pause::Sleeps);
            }
        }
    }

    fn look(&mut self) -> Result<(), String> {
        let entry = 4 + 8 * usize::from(self.seen % SIZE);
        // SAFETY: as for two bytes, and the offset is a multiple of four.
        let id = unsafe { AtomicU32::from_ptr(self.used.add(entry).cast()) }.load(Ordering::Relaxed);
        if id != u32::from(2 * self.seen) {
            return Err(format!("error: the used entry {} is of descriptor {id}", self.seen));
        }
        self.seen += 1;
        Ok(())
    }
}
