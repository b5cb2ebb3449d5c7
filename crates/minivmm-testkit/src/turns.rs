//! A worker without a thread of its own: the test makes chains available, lets it turn, and looks.
//! The engine ends everything it was given at the next wait, so what the worker submits together
//! comes back together.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minivmm::blk::worker::{Job, QueueWorker};
use minivmm::disk::Image;
use minivmm::disk::cache::{Negotiated, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, StableBy};
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::mem::{self, Ram};
use minivmm::ratelimit::RateLimit;
use minivmm::virtio::Interrupt;
use minivmm::virtio::queue::{QueueConfig, Ring};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::*;

/// Ends everything at once and well, without a file.
#[derive(Default)]
struct AtOnce(Vec<Ended>);

impl Engine for AtOnce {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let bytes = match &op {
            HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => iov.bytes(),
            _ => 0,
        };
        self.0.push(Ended { token, result: Ok(bytes as usize) });
        Ok(())
    }

    fn wait(&mut self, _: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        ended.append(&mut self.0);
        Ok(())
    }
}

/// Counts notifications, and remembers used.idx as the driver would have seen it at the last one.
#[derive(Clone)]
struct Counting {
    told: Arc<AtomicU64>,
}

impl Interrupt for Counting {
    fn queue(&self, _: u16) {
        self.told.fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {}

    fn needs_reset(&self) {}
}

/// The driver's side of one queue, and the machine below the worker.
pub struct Turns {
    /// The guest's memory.
    pub ram: Ram,
    /// Entries of the queue.
    pub size: u16,
    /// The driver's index of the available ring.
    pub avail: u16,
    /// The disk's side of the queue.
    pub disk: DiskQueue,
    /// What the driver rings.
    pub doorbell: Arc<EventFd>,
    told: Arc<AtomicU64>,
    limit: RateLimit,
    features: u64,
}

impl Turns {
    /// A queue of `size` entries in `image`'s mode, over an engine that ends everything at once.
    pub fn new(image: Arc<Image>, size: u16, features: u64) -> Self {
        Self::with_engine(image, size, features, Box::new(AtOnce::default()))
    }

    /// Makes a queue over this engine, with writes that are stable by RWF_DSYNC.
    pub fn with_engine(image: Arc<Image>, size: u16, features: u64, engine: Box<dyn Engine>) -> Self {
        Self::with_way(image, size, features, engine, StableBy::Dsync)
    }

    /// The same, with writes that become stable in this way.
    pub fn with_way(
        image: Arc<Image>,
        size: u16,
        features: u64,
        engine: Box<dyn Engine>,
        stable_by: StableBy,
    ) -> Self {
        let cache = Arc::new(WriteCache::new(image.config().cache));
        cache.negotiate(Negotiated { flush: true, config_wce: false });
        Self {
            ram: mem::map_ram(&[(0, RAM_BYTES)]).unwrap(),
            size,
            avail: 0,
            disk: DiskQueue::new(image, cache, engine, stable_by),
            doorbell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            told: Arc::default(),
            limit: RateLimit::for_guest_errors("blk"),
            features: features | F_VERSION_1 | F_FLUSH,
        }
    }

    /// Lets `drive` work with a live worker and the driver's side of its queue.
    pub fn run<T>(&mut self, drive: impl FnOnce(&mut QueueWorker<'_>, &mut Driver<'_>) -> T) -> T {
        let config =
            QueueConfig { size: u32::from(self.size), descriptors: DESC, available: AVAIL, used: USED };
        let job = Job {
            ram: self.ram.clone(),
            features: self.features,
            index: 0,
            ring: Ring::new(&self.ram, &config, self.size, self.features).unwrap(),
            doorbell: Arc::clone(&self.doorbell),
            kick: None,
            interrupt: Arc::new(Counting { told: Arc::clone(&self.told) }),
        };
        let mut worker = QueueWorker::new(job, &mut self.disk, &mut self.limit);
        let mut driver = Driver {
            ram: &self.ram,
            size: self.size,
            avail: &mut self.avail,
            doorbell: &self.doorbell,
            told: &self.told,
        };
        drive(&mut worker, &mut driver)
    }
}

/// What a driver does to its rings.
pub struct Driver<'a> {
    /// The guest's memory.
    pub ram: &'a Ram,
    size: u16,
    avail: &'a mut u16,
    doorbell: &'a EventFd,
    told: &'a AtomicU64,
}

impl Driver<'_> {
    /// Writes to the guest's memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        mem::write_bytes(self.ram, addr, bytes).unwrap();
    }

    /// Reads a little-endian number from the guest's memory.
    pub fn peek16(&self, addr: u64) -> u16 {
        let mut bytes = [0; 2];
        mem::read_bytes(self.ram, addr, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Writes a descriptor into a table.
    pub fn put_desc(&self, table: u64, index: u16, desc: Desc) {
        self.poke(table + 16 * u64::from(index), &desc::bytes(desc));
    }

    /// A header for the request in slot `slot`.
    pub fn put_header(&self, slot: u16, kind: u32, sector: u64) -> u64 {
        let at = HEADER + 64 * u64::from(slot);
        self.poke(at, &kind.to_le_bytes());
        self.poke(at + 8, &sector.to_le_bytes());
        at
    }

    /// Makes the chains at `heads` available and rings the doorbell.
    pub fn submit(&mut self, heads: impl IntoIterator<Item = u16>) {
        for head in heads {
            self.poke(AVAIL + 4 + 2 * u64::from(*self.avail % self.size), &head.to_le_bytes());
            *self.avail = self.avail.wrapping_add(1);
        }
        self.poke(AVAIL + 2, &self.avail.to_le_bytes());
        self.doorbell.write(1).unwrap();
    }

    /// Returns the used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.peek16(USED + 2)
    }

    /// Writes used_event, the index at which the driver wants to be told.
    pub fn set_used_event(&self, event: u16) {
        self.poke(AVAIL + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
    }

    /// Notifications since this was last asked.
    pub fn told(&self) -> u64 {
        self.told.swap(0, Ordering::Relaxed)
    }
}
