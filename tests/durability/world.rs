//! One run of a plan: the driver on one side, the simulated storage on the other, the real workers
//! and the real state machine between them, single threaded; and the invariants at every step.

use std::sync::{Arc, Mutex};

use minivmm::blk::worker::{Job, QueueWorker};
use minivmm::disk::cache::{Negotiated, POLICIES, WriteCache};
use minivmm::disk::geometry::{Alignment, Geometry};
use minivmm::disk::machine::Disk;
use minivmm::disk::{DiskOptions, Image};
use minivmm::mem::{self, Ram};
use minivmm::ratelimit::RateLimit;
use minivmm::virtio::Interrupt;
use minivmm::virtio::queue::{QueueConfig, Ring};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::desc;
use super::images::{self, Images};
use super::plan::{Ask, Plan, Step};
use super::promise::{Change, Promises};
use super::storage::{Claim, SECTORS, SimEngine, Storage, Tag, ZEROES, name, read_tag, tag_bytes};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_VERSION_1: u64 = 1 << 32;

const QUEUE_SIZE: u16 = 16;
/// Requests that a driver has in flight on a queue: three descriptors each.
const SLOTS: usize = 5;
const UNTOUCHED: u8 = 0xaa;

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

struct NoInterrupt;
impl Interrupt for NoInterrupt {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// A request that the driver has in flight.
#[derive(Clone, Copy)]
struct Request {
    ask: Ask,
    submitted: u64,
    /// Its change, if it is one.
    change: Option<usize>,
    tag: Tag,
}

struct Queue {
    slots: [Option<Request>; SLOTS],
    avail: u16,
    used: u16,
}

/// What was found wrong, by the name of its invariant.
pub type Violation = String;

pub struct World<'a> {
    plan: &'a Plan,
    ram: Ram,
    storage: Arc<Mutex<Storage>>,
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    promises: Promises,
    images: Images,
    queues: Vec<Queue>,
    next_tag: Tag,
    acked: Negotiated,
    writeback: bool,
    /// Since when the byte is 0.
    through_since: u64,
    /// FLUSHes and writes that completed OK; so that a run can be seen to have tried something.
    pub completed_ok: u64,
}

/// Runs a plan; its trace in words comes back with what was violated.
pub fn run(plan: &Plan, ram: &Ram, with_trace: bool) -> Result<u64, (Violation, Vec<String>)> {
    minivmm::mutants::count_sync();
    let mut world = World::new(plan, ram);
    if with_trace {
        world.storage.lock().unwrap().trace = Some(Vec::new());
    }
    world.say(|| {
        let mode = POLICIES[plan.mode].name;
        format!(
            "cache={mode}, {} queues, FLUSH {}, CONFIG_WCE {}, stable by {}, blocks of {}, faults {:?}",
            plan.queues,
            plan.flush,
            plan.config_wce,
            plan.stable.name(),
            if plan.blocks_of_4096 { 4096 } else { 512 },
            plan.faults
        )
    });
    world.run().map_err(|violation| {
        let trace = world.storage.lock().unwrap().trace.take().unwrap_or_default();
        (violation, trace)
    })?;
    Ok(world.completed_ok)
}

fn word(value: u64) -> u16 {
    u16::try_from(value).unwrap()
}

impl<'a> World<'a> {
    fn new(plan: &'a Plan, ram: &Ram) -> Self {
        let policy = &POLICIES[plan.mode];
        let offset = if plan.blocks_of_4096 { 4096 } else { 512 };
        let alignment = Alignment { memory: 512, offset, found_by: "simulated" };
        let geometry = Geometry {
            capacity_sectors: u64::try_from(SECTORS).unwrap(),
            logical_block: offset,
            physical_block: 4096,
            alignment,
        };
        let options = DiskOptions {
            cache: policy,
            queue_size: QUEUE_SIZE,
            bounce_always: plan.bounce_always,
            ..DiskOptions::new("simulated")
        };
        let storage = Storage::new(plan.queues, policy.direct, plan.faults.clone(), plan.dice, ram.clone());
        let queue = || Queue { slots: [None; SLOTS], avail: 0, used: 0 };
        Self {
            plan,
            ram: ram.clone(),
            storage: Arc::new(Mutex::new(storage)),
            image: Arc::new(Image::simulated(&options, geometry).unwrap()),
            cache: Arc::new(WriteCache::new(policy)),
            promises: Promises::new(),
            images: Images::new(plan.dice),
            queues: (0..plan.queues).map(|_| queue()).collect(),
            next_tag: 2,
            acked: Negotiated { flush: plan.flush, config_wce: plan.config_wce },
            writeback: policy.write_cache,
            through_since: 0,
            completed_ok: 0,
        }
    }

    fn say(&self, line: impl FnOnce() -> String) {
        self.storage.lock().unwrap().say(line);
    }

    /// All steps, from activation to activation.
    fn run(&mut self) -> Result<(), Violation> {
        let stable_by = self.plan.stable;
        let engine = |queue| Box::new(SimEngine { storage: Arc::clone(&self.storage), queue });
        let disk =
            |queue| Disk::new(Arc::clone(&self.image), Arc::clone(&self.cache), engine(queue), stable_by);
        let mut disks: Vec<Disk> = (0..self.plan.queues).map(disk).collect();
        let mut steps = self.plan.steps.iter();
        loop {
            let next = self.live(&mut disks, &mut steps)?;
            let Some((flush, config_wce)) = next else { return Ok(()) };
            self.acked = Negotiated { flush, config_wce };
        }
    }

    /// From DRIVER_OK to reset, or to the end; what is negotiated next.
    fn live(
        &mut self,
        disks: &mut [Disk],
        steps: &mut std::slice::Iter<'_, Step>,
    ) -> Result<Option<(bool, bool)>, Violation> {
        self.negotiate();
        let mut limits: Vec<RateLimit> = disks.iter().map(|_| RateLimit::for_guest_errors("blk")).collect();
        let mut workers: Vec<QueueWorker<'_>> = Vec::new();
        for (index, (disk, limit)) in disks.iter_mut().zip(&mut limits).enumerate() {
            workers.push(QueueWorker::new(self.job(index), disk, limit));
        }
        let mut next = None;
        for &step in steps.by_ref() {
            self.storage.lock().unwrap().tick();
            match step {
                Step::Submit { queue, ask } => self.submit(queue % self.plan.queues, ask),
                Step::Turn { queue } => {
                    let queue = queue % self.plan.queues;
                    workers[queue].turn().map_err(|error| format!("the worker failed: {error}"))?;
                    self.collect(queue)?;
                }
                Step::Progress => {
                    self.storage.lock().unwrap().progress(None);
                }
                Step::WriteBack { sector } => self.storage.lock().unwrap().write_back(sector),
                Step::SetWriteback { on } => self.set_writeback(on),
                Step::Reset { flush, config_wce } => {
                    next = Some((flush, config_wce));
                    break;
                }
            }
            self.check_floors()?;
        }
        // A reset, or the end: everything in flight is waited for, by workers that run side by side.
        while !workers.iter().all(QueueWorker::is_idle) {
            self.storage.lock().unwrap().progress(None);
            for (queue, worker) in workers.iter_mut().enumerate() {
                worker.wait_for_ends().map_err(|error| format!("the worker failed: {error}"))?;
                self.collect(queue)?;
            }
            self.check_floors()?;
        }
        for (queue, worker) in workers.iter_mut().enumerate() {
            worker.drain().map_err(|error| format!("the worker failed: {error}"))?;
            self.collect(queue)?;
            self.check_floors()?;
        }
        drop(workers);
        self.forget_driver()?;
        Ok(next)
    }

    fn negotiate(&mut self) {
        let (acked, default) = (self.acked, POLICIES[self.plan.mode].write_cache);
        self.say(|| format!("driver: negotiates {acked:?}"));
        self.cache.negotiate(acked);
        self.writeback = default && (acked.flush || !acked.config_wce);
        self.through_since = self.storage.lock().unwrap().now;
    }

    fn forget_driver(&mut self) -> Result<(), Violation> {
        let now = self.storage.lock().unwrap().tick();
        self.say(|| "driver: reset".into());
        self.cache.reset();
        for queue in 0..self.plan.queues {
            let left = self.storage.lock().unwrap().in_flight(queue);
            if left > 0 {
                return Err(format!("R15: queue {queue} has {left} operations in flight after reset"));
            }
            for slot in &mut self.queues[queue].slots {
                // A request that was never taken, or never answered, is nobody's promise.
                if let Some(change) = slot.take().and_then(|request| request.change) {
                    self.promises.completed(change, now, false, false);
                }
            }
            (self.queues[queue].avail, self.queues[queue].used) = (0, 0);
        }
        self.storage.lock().unwrap().claims.clear();
        Ok(())
    }

    fn base(queue: usize) -> u64 {
        QUEUE_BYTES * (1 + u64::try_from(queue).unwrap())
    }

    fn job(&self, queue: usize) -> Job {
        let base = Self::base(queue);
        mem::write_bytes(&self.ram, base, &[0; 0x3000]).unwrap();
        let config = QueueConfig {
            size: u32::from(QUEUE_SIZE),
            descriptors: base,
            available: base + AVAIL,
            used: base + USED,
        };
        let features = F_VERSION_1 | F_DISCARD | F_WRITE_ZEROES;
        Job {
            ram: self.ram.clone(),
            features,
            index: word(u64::try_from(queue).unwrap()),
            ring: Ring::new(&self.ram, &config, QUEUE_SIZE, features).unwrap(),
            doorbell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            interrupt: Arc::new(NoInterrupt),
        }
    }

    fn set_writeback(&mut self, on: bool) {
        self.say(|| format!("driver: writeback = {}", u8::from(on)));
        self.cache.guest_sets_writeback(on);
        if self.acked.config_wce && (self.acked.flush || !on) {
            if self.writeback && !on {
                self.through_since = self.storage.lock().unwrap().now;
            }
            self.writeback = on;
        }
    }

    fn submit(&mut self, queue: usize, ask: Ask) {
        let Some(slot) = self.queues[queue].slots.iter().position(Option::is_none) else { return };
        let submitted = self.storage.lock().unwrap().now;
        let (kind, sector, sectors, writes) = match ask {
            Ask::Read { sector, sectors } => (IN, sector, sectors, None),
            Ask::Write { sector, sectors } => (OUT, sector, sectors, Some(self.next_tag)),
            Ask::WriteFarAway { sector } => (OUT, sector, 1, None),
            Ask::Flush => (FLUSH, 0, 0, None),
            Ask::Discard { sector, sectors } => (DISCARD, sector, sectors, Some(ZEROES)),
            Ask::WriteZeroes { sector, sectors, .. } => (WRITE_ZEROES, sector, sectors, Some(ZEROES)),
        };
        let number = self.next_tag;
        self.next_tag += 1;
        self.say(|| format!("driver, queue {queue}: request {number} is {ask:?}"));
        let (from, to) = (sector, sector + sectors);
        let change = writes.map(|tag| {
            self.storage.lock().unwrap().claims.push(Claim { tag, from, to });
            let is_advice = matches!(ask, Ask::Discard { .. });
            let (completed, ok, stable) = (None, false, false);
            self.promises.submitted(Change { tag, from, to, submitted, completed, ok, is_advice, stable })
        });
        self.put_request(queue, slot, kind, ask, number);
        let request = Request { ask, submitted, change, tag: writes.unwrap_or(number) };
        self.queues[queue].slots[slot] = Some(request);
    }

    /// The request's bytes in guest memory, and its head in the available ring.
    fn put_request(&mut self, queue: usize, slot: usize, kind: u32, ask: Ask, tag: Tag) {
        let base = Self::base(queue);
        let at = base + SLOT + SLOT_BYTES * u64::try_from(slot).unwrap();
        let (sector, bytes) = match ask {
            Ask::Read { sector, sectors } | Ask::Write { sector, sectors } => (sector, sectors * 512),
            Ask::WriteFarAway { sector } => (sector, 512),
            Ask::Discard { .. } | Ask::WriteZeroes { .. } => (0, 16),
            Ask::Flush => (0, 0),
        };
        let far = if matches!(ask, Ask::WriteFarAway { .. }) { 1 << 55 } else { 0 };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(u64::try_from(sector).unwrap() | far).to_le_bytes());
        self.poke(at, &header);
        self.poke(at + SLOT_STATUS, &[UNTOUCHED]);
        match ask {
            Ask::Write { sector, sectors } => {
                for index in 0..sectors {
                    let to = at + SLOT_DATA + 512 * u64::try_from(index).unwrap();
                    self.poke(to, &tag_bytes(tag, sector + index));
                }
            }
            Ask::WriteFarAway { sector } => self.poke(at + SLOT_DATA, &tag_bytes(tag, sector)),
            Ask::Discard { sector, sectors } | Ask::WriteZeroes { sector, sectors, .. } => {
                let unmap = matches!(ask, Ask::WriteZeroes { unmap: true, .. });
                let mut payload = [0; 16];
                payload[..8].copy_from_slice(&u64::try_from(sector).unwrap().to_le_bytes());
                payload[8..12].copy_from_slice(&u32::try_from(sectors).unwrap().to_le_bytes());
                payload[12..].copy_from_slice(&u32::from(unmap).to_le_bytes());
                self.poke(at + SLOT_DATA, &payload);
            }
            Ask::Read { sectors, .. } => {
                for index in 0..sectors {
                    self.poke(at + SLOT_DATA + 512 * u64::try_from(index).unwrap(), &[UNTOUCHED; 16]);
                }
            }
            Ask::Flush => {}
        }
        let head = word(u64::try_from(3 * slot).unwrap());
        let data_flags = if kind == IN { 3 } else { 1 };
        let next = if bytes == 0 { head + 2 } else { head + 1 };
        self.put_desc(base, head, at, 16, 1, next);
        self.put_desc(base, head + 1, at + SLOT_DATA, u32::try_from(bytes).unwrap(), data_flags, head + 2);
        self.put_desc(base, head + 2, at + SLOT_STATUS, 1, 2, 0);
        let avail = self.queues[queue].avail;
        self.poke(base + AVAIL + 4 + 2 * u64::from(avail % QUEUE_SIZE), &head.to_le_bytes());
        self.queues[queue].avail = avail.wrapping_add(1);
        self.poke(base + AVAIL + 2, &self.queues[queue].avail.to_le_bytes());
    }

    fn put_desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let bytes = desc::bytes((addr, len, flags, next));
        self.poke(table + 16 * u64::from(index), &bytes);
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        mem::write_bytes(&self.ram, addr, bytes).unwrap();
    }

    fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        mem::read_bytes(&self.ram, addr, &mut bytes).unwrap();
        bytes
    }

    /// The driver looks at the used ring.
    fn collect(&mut self, queue: usize) -> Result<(), Violation> {
        let base = Self::base(queue);
        loop {
            let idx = u16::from_le_bytes(self.peek(base + USED + 2));
            let used = self.queues[queue].used;
            if idx == used {
                return Ok(());
            }
            let entry: [u8; 8] = self.peek(base + USED + 4 + 8 * u64::from(used % QUEUE_SIZE));
            self.queues[queue].used = used.wrapping_add(1);
            let slot = usize::from(entry[0]) / 3;
            let Some(request) = self.queues[queue].slots.get_mut(slot).and_then(Option::take) else {
                return Err(format!("queue {queue}: slot {slot} is completed, and nothing was in flight"));
            };
            let at = base + SLOT + SLOT_BYTES * u64::try_from(slot).unwrap();
            let [status] = self.peek(at + SLOT_STATUS);
            self.completed(queue, request, status, at + SLOT_DATA)?;
        }
    }

    fn completed(&mut self, queue: usize, request: Request, status: u8, data: u64) -> Result<(), Violation> {
        let now = self.storage.lock().unwrap().tick();
        let ok = status == 0;
        self.completed_ok += u64::from(ok);
        self.say(|| format!("device, queue {queue}: {:?} completes with status {status}", request.ask));
        if status == UNTOUCHED {
            return Err("I6: a request is completed and its status not written".into());
        }
        let Request { ask, submitted, change, tag } = request;
        self.check_errors(&request, ok)?;
        match ask {
            Ask::Read { sector, sectors } if ok => {
                for index in 0..sectors {
                    let found = self.peek(data + 512 * u64::try_from(index).unwrap());
                    self.check_read(sector + index, read_tag(&found, sector + index), submitted)?;
                }
            }
            Ask::WriteFarAway { .. } if ok => return Err("R11: a write far beyond the end is OK".into()),
            Ask::Flush if ok => {
                self.check_flush(submitted)?;
                self.promises.flushed(submitted);
                self.images.flushed(submitted);
            }
            _ => {}
        }
        let Some(change) = change else { return Ok(()) };
        if matches!(ask, Ask::Write { .. }) && self.storage.lock().unwrap().still_writes(tag) {
            return Err(format!("I6: {} is completed while its operation is in flight", name(tag)));
        }
        let stable = self.must_be_stable(submitted);
        self.promises.completed(change, now, ok, stable);
        if ok && stable {
            self.images.stable(change);
        }
        self.release_claim(ask, tag);
        Ok(())
    }

    fn release_claim(&self, ask: Ask, tag: Tag) {
        if let Ask::Write { sector, sectors }
        | Ask::Discard { sector, sectors }
        | Ask::WriteZeroes { sector, sectors, .. } = ask
        {
            let claim = Claim { tag, from: sector, to: sector + sectors };
            let claims = &mut self.storage.lock().unwrap().claims;
            if let Some(at) = claims.iter().position(|&other| other == claim) {
                claims.remove(at);
            }
        }
    }

    /// B5, from what the driver can see; and where the specification leaves it open, what the mode
    /// promises.
    fn must_be_stable(&self, submitted: u64) -> bool {
        match (self.acked.flush, self.acked.config_wce) {
            (false, _) => true,
            (true, false) => !POLICIES[self.plan.mode].write_cache,
            (true, true) => !self.writeback && self.through_since <= submitted,
        }
    }

    /// I3: a FLUSH is OK only after a successful fdatasync that started after it was submitted.
    fn check_flush(&self, submitted: u64) -> Result<(), Violation> {
        let storage = self.storage.lock().unwrap();
        let synced = storage.syncs.iter().any(|sync| sync.ok && sync.started > submitted);
        if synced {
            Ok(())
        } else {
            Err("I3: a FLUSH is OK without an fdatasync that started after it".into())
        }
    }

    /// I5: after the first sync error nothing that must be stable is OK.
    fn check_errors(&self, request: &Request, ok: bool) -> Result<(), Violation> {
        let storage = self.storage.lock().unwrap();
        let Some(failure) = storage.first_failure else { return Ok(()) };
        let promises = match request.ask {
            Ask::Flush => true,
            Ask::Write { .. } | Ask::WriteZeroes { .. } | Ask::Discard { .. } => {
                self.must_be_stable(request.submitted)
            }
            _ => false,
        };
        let nothing_to_sync = matches!(request.ask, Ask::Discard { .. });
        if ok && promises && !nothing_to_sync && request.submitted > failure {
            return Err(format!("I5: {:?} is OK though a sync has failed before", request.ask));
        }
        Ok(())
    }

    /// I2 and I4: a read finds what was written, and what was complete before it.
    fn check_read(&self, sector: usize, found: Tag, submitted: u64) -> Result<(), Violation> {
        let legal = self.promises.legal_to_read(sector, submitted);
        if legal.contains(&found) {
            return Ok(());
        }
        let legal: Vec<_> = legal.into_iter().map(name).collect();
        Err(format!("I4: a read finds {} in sector {sector}; legal is {}", name(found), legal.join(", ")))
    }

    /// I1, at this moment, for every sector: whatever the host could lose, it may lose. And the
    /// model itself: what the tiers could leave is what the host floor says.
    fn check_floors(&mut self) -> Result<(), Violation> {
        let storage = self.storage.lock().unwrap();
        if let Some(violation) = storage.violations.first() {
            return Err(violation.clone());
        }
        let mut at_risk = 0;
        for sector in 0..SECTORS {
            let host = storage.legal_after_crash(sector);
            let acknowledged = self.promises.legal_were_all_stable(sector);
            at_risk += if host.iter().all(|tag| acknowledged.contains(tag)) { 0 } else { 512 };
            if let Some(tag) =
                storage.possible_after_crash(sector).into_iter().find(|tag| !host.contains(tag))
            {
                return Err(format!(
                    "the model: sector {sector} could hold {}, below the host floor",
                    name(tag)
                ));
            }
            let promised = self.promises.legal_after_crash(sector);
            if let Some(&tag) = host.iter().find(|tag| !images::are_alone() && !promised.contains(tag)) {
                let promised: Vec<_> = promised.into_iter().map(name).collect();
                return Err(format!(
                    "I1: a crash now may leave {} in sector {sector}; promised is {}",
                    name(tag),
                    promised.join(" or ")
                ));
            }
        }
        self.images.look(&storage, &self.promises)?;
        // The monitor may overstate what a crash would lose, never understate it.
        let told = self.image.monitor.snapshot().at_risk_bytes;
        if told < at_risk {
            return Err(format!("the monitor: it tells of {told} bytes at risk, and {at_risk} are"));
        }
        Ok(())
    }
}
