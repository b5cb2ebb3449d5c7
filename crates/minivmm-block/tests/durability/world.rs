//! One run of a plan: the driver on one side, the simulated storage on the other, the real workers
//! and the real state machine between them; and the invariants at every step.
//!
//! Everything runs on one thread, the same in every run of the same plan. A worker is a fiber: it stops
//! in front of each access to what queues share, and the plan says who goes on.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use minivmm_block::blk::worker::QueueWorker;
use minivmm_block::disk::DiskConfig;
use minivmm_block::disk::Image;
use minivmm_block::disk::cache::{Negotiated, POLICIES, WriteCache};
use minivmm_block::disk::disk_queue::DiskQueue;
use minivmm_block::disk::geometry::{Alignment, Geometry};
use minivmm_block::mem::Ram;
use minivmm_block::ratelimit::RateLimit;
use minivmm_block::sync::observed::{self, Access};

use super::driver::{Manners, QUEUE_SIZE, Queue, Request, UNTOUCHED};
use super::engine::SimEngine;
use super::fiber::{Fiber, Pause, Resumed, pause};
use super::images::{self, Images};
use super::plan::{Ask, Plan, Step};
use super::promise::{Change, Promises};
use super::storage::{Claim, SECTORS, Storage, Tag, ZEROES, name, read_tag};

/// Pauses in which whatever is left must come to rest; a run has some thousand.
const PAUSES_MAX: usize = 200_000;

/// What was found wrong, by the name of its invariant.
pub type Violation = String;

pub struct World<'a> {
    plan: &'a Plan,
    ram: Ram,
    storage: Arc<Mutex<Storage>>,
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    promises: Promises,
    /// The disks of workers that have ended.
    drained: Vec<Option<DiskQueue>>,
    images: Images,
    queues: Vec<Queue>,
    workers: Vec<Worker>,
    next_tag: Tag,
    acked: Negotiated,
    writeback: bool,
    /// Since when the byte is 0.
    through_since: u64,
    /// The driver has set it to 0, and nobody has shown yet that what was volatile then is stable.
    switched_off: Option<u64>,
    /// FLUSHes and writes that completed OK; so that a run can be seen to have tried something.
    pub completed_ok: u64,
}

/// A queue's worker, as its thread would run it (`blk/worker.rs`, `work`).
struct Worker {
    fiber: Fiber<Result<DiskQueue, Violation>>,
    /// Told to drain and end.
    stops: Rc<Cell<bool>>,
    sleeps: bool,
}

impl Worker {
    fn new(mut disk: DiskQueue, job: minivmm_block::blk::worker::Job) -> Self {
        let stops = Rc::new(Cell::new(false));
        let told = Rc::clone(&stops);
        let fiber = Fiber::new(move || {
            let mut limit = RateLimit::for_guest_errors("blk");
            let mut worker = QueueWorker::new(job, &mut disk, &mut limit);
            let mut outcome = Ok(());
            while outcome.is_ok() && !told.get() {
                outcome = worker.turn();
                pause(Pause::Turned);
            }
            let outcome = worker.drain().and(outcome).and_then(|()| worker.owes_nothing());
            outcome.map_err(|error| format!("the worker failed: {error}"))?;
            if !worker.is_idle() {
                return Err("R15: a drain is over with requests in flight".to_owned());
            }
            drop(worker);
            Ok(disk)
        });
        Self { fiber, stops, sleeps: false }
    }
}

/// Has this thread's fibers stop in front of what queues share, and counts the heads they take.
fn observe(ram: &Ram, queues: &[Queue]) {
    let count: Vec<_> = queues.iter().map(Queue::counts_heads).collect();
    let guest = ram.regions();
    let is_guests = move |at: usize| {
        let at = u64::try_from(at).unwrap();
        guest.iter().any(|&(_, host, len)| (host..host + len).contains(&at))
    };
    observed::observe(Some(Rc::new(move |access| {
        match access {
            // The rings are between a queue and its driver; `fences` is about them.
            Access::Load { at, .. } | Access::Store { at, .. } if is_guests(at) => {
                count.iter().for_each(|count| count(access));
            }
            _ => pause(Pause::Access(access)),
        }
        None
    })));
}

/// Runs a plan; its trace in words comes back with what was violated.
pub fn run(plan: &Plan, ram: &Ram, with_trace: bool) -> Result<u64, (Violation, Vec<String>)> {
    let mut world = World::new(plan, ram);
    if with_trace {
        world.storage.lock().unwrap().trace = Some(Vec::new());
    }
    world.say(|| {
        let mode = POLICIES[plan.mode].name;
        format!(
            "cache={mode}, {} queues, FLUSH {}, CONFIG_WCE {}, stable by {}, blocks of {}, faults {:?}, of syncs {:?}",
            plan.queues,
            plan.flush,
            plan.config_wce,
            plan.stable.name(),
            if plan.blocks_of_4096 { 4096 } else { 512 },
            plan.faults,
            plan.sync_faults
        )
    });
    let outcome = world.run();
    // Fibers that are left unwind without pauses.
    observed::observe(None);
    world.workers.clear();
    outcome.map_err(|violation| {
        let trace = world.storage.lock().unwrap().trace.take().unwrap_or_default();
        (violation, trace)
    })?;
    Ok(world.completed_ok)
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
        let options = DiskConfig {
            cache: policy,
            queue_size: QUEUE_SIZE,
            bounce_always: plan.bounce_always,
            ..DiskConfig::new("simulated")
        };
        let faults = [plan.faults.clone(), plan.sync_faults.clone()];
        let storage = Storage::new(plan.queues, policy.direct, faults, plan.dice, ram.clone());
        let manners = Manners {
            event_idx: plan.event_idx,
            waits_for_interrupts: plan.waits_for_interrupts,
            rings_always: plan.rings_always,
        };
        Self {
            plan,
            ram: ram.clone(),
            storage: Arc::new(Mutex::new(storage)),
            image: Arc::new(Image::simulated(&options, geometry).unwrap()),
            cache: Arc::new(WriteCache::new(policy)),
            promises: Promises::new(),
            drained: (0..plan.queues).map(|_| None).collect(),
            images: Images::new(plan.dice),
            queues: (0..plan.queues).map(|queue| Queue::new(ram, queue, manners)).collect(),
            workers: Vec::new(),
            next_tag: 2,
            acked: Negotiated { flush: plan.flush, config_wce: plan.config_wce },
            writeback: policy.write_cache,
            through_since: 0,
            switched_off: None,
            completed_ok: 0,
        }
    }

    fn say(&self, line: impl FnOnce() -> String) {
        self.storage.lock().unwrap().say(line);
    }

    /// All steps, from activation to activation.
    fn run(&mut self) -> Result<(), Violation> {
        let stable_by = self.plan.stable;
        let engine = |queue| {
            Box::new(SimEngine::new(Arc::clone(&self.storage), queue, self.plan.keeps_what_is_alone()))
        };
        let disk = |queue| {
            DiskQueue::new(Arc::clone(&self.image), Arc::clone(&self.cache), engine(queue), stable_by)
        };
        let mut disks: Vec<DiskQueue> = (0..self.plan.queues).map(disk).collect();
        observe(&self.ram, &self.queues);
        let mut steps = self.plan.steps.iter();
        loop {
            self.negotiate();
            for (index, disk) in disks.drain(..).enumerate() {
                let job = self.queues[index].job(index);
                self.workers.push(Worker::new(disk, job));
            }
            let next = self.live(&mut steps)?;
            disks = self.drain()?;
            self.forget_driver()?;
            let Some((flush, config_wce)) = next else { return Ok(()) };
            self.acked = Negotiated { flush, config_wce };
        }
    }

    /// From DRIVER_OK to reset, or to the end; what is negotiated next.
    fn live(&mut self, steps: &mut std::slice::Iter<'_, Step>) -> Result<Option<(bool, bool)>, Violation> {
        for &step in steps.by_ref() {
            self.storage.lock().unwrap().tick();
            match step {
                Step::Submit { queue, ask } => self.submit(queue % self.plan.queues, ask),
                Step::Turn { queue } => self.turn(queue % self.plan.queues)?,
                Step::Move { queue, pauses } => self.go_on(queue % self.plan.queues, pauses)?,
                Step::Progress => {
                    self.storage.lock().unwrap().progress(None);
                }
                Step::Serve { queue, times } => {
                    let mut storage = self.storage.lock().unwrap();
                    for _ in 0..times {
                        storage.progress(Some(queue % self.plan.queues));
                    }
                }
                Step::WriteBack { sector } => self.storage.lock().unwrap().write_back(sector),
                Step::Rest => self.come_to_rest()?,
                Step::SetWriteback { on } => self.set_writeback(on),
                Step::Reset { flush, config_wce } => return Ok(Some((flush, config_wce))),
            }
            self.check_floors()?;
        }
        self.come_to_rest()?;
        Ok(None)
    }

    /// A worker goes on, at most so many pauses, or until it sleeps.
    fn go_on(&mut self, queue: usize, pauses: usize) -> Result<(), Violation> {
        for _ in 0..pauses {
            match self.resume(queue)? {
                Some(Pause::Sleeps) | None => break,
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// A worker does the rest of its round. It sleeps only in an operation that it makes itself.
    fn turn(&mut self, queue: usize) -> Result<(), Violation> {
        // A doorbell that nobody needed is nothing wrong (virtio 2.7.10.2).
        self.queues[queue].ring();
        while !matches!(self.resume(queue)?, Some(Pause::Turned | Pause::Sleeps) | None) {}
        Ok(())
    }

    /// A worker goes on to its next pause; `None` at its end. The driver looks.
    fn resume(&mut self, queue: usize) -> Result<Option<Pause>, Violation> {
        let worker = &mut self.workers[queue];
        if worker.fiber.is_done() {
            return Ok(None);
        }
        let paused = match worker.fiber.resume() {
            Resumed::Paused(pause) => Some(pause),
            Resumed::Done(result) => {
                self.drained[queue] = Some(result?);
                None
            }
        };
        self.workers[queue].sleeps = paused == Some(Pause::Sleeps);
        self.collect(queue)?;
        Ok(paused)
    }

    /// Nobody submits any more: workers and host go on, in any order, until nothing moves. Then every
    /// request must have been completed.
    fn come_to_rest(&mut self) -> Result<(), Violation> {
        self.run_dry()?;
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.missed_an_interrupt() {
                return Err(format!("the end: queue {index} has an answer that the driver was not told of"));
            }
            if let Some(request) = queue.in_flight().next() {
                return Err(format!("the end: queue {index}: {:?} is never completed", request.ask));
            }
        }
        self.check_rest()
    }

    /// What is so when nothing moves.
    fn check_rest(&self) -> Result<(), Violation> {
        if self.image.latch.open_now().is_some() {
            return Err("the end: a sync is open that nobody has in flight".to_owned());
        }
        let storage = self.storage.lock().unwrap();
        let is_promised = POLICIES[self.plan.mode].honour_flush && storage.first_failure.is_none();
        match self.switched_off {
            Some(at) if is_promised && !storage.syncs.iter().any(|sync| sync.ok && sync.started >= at) => {
                Err("the end: the driver has set writeback to 0, and nothing was synced since".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Workers and host go on until nothing moves.
    fn run_dry(&mut self) -> Result<(), Violation> {
        for _ in 0..PAUSES_MAX {
            let (who, pauses) = {
                let mut storage = self.storage.lock().unwrap();
                (storage.roll(self.plan.queues + 1), 1 + storage.roll(12))
            };
            if who < self.plan.queues {
                self.go_on(who, pauses)?;
            } else if !self.storage.lock().unwrap().progress(None) && self.is_at_rest()? {
                return Ok(());
            }
            self.check_floors()?;
        }
        Err("the end: the workers go on for ever".to_owned())
    }

    /// Nothing is with the host; whether every worker sleeps, or has ended, and stays so.
    ///
    /// A worker that only now goes to sleep, or ends, may have rung for another that this loop has already
    /// seen asleep: it counts as a worker that moved.
    fn is_at_rest(&mut self) -> Result<bool, Violation> {
        for queue in 0..self.plan.queues {
            let worker = &self.workers[queue];
            let was_at_rest = worker.sleeps || worker.fiber.is_done();
            let is_at_rest = matches!(self.resume(queue)?, Some(Pause::Sleeps) | None);
            if !was_at_rest || !is_at_rest {
                return Ok(false);
            }
        }
        Ok(self.storage.lock().unwrap().is_idle())
    }

    /// A reset, or the end: whatever is in flight is waited for, by workers that go on side by side, or
    /// that are stopped one after the other, as the device does it.
    fn drain(&mut self) -> Result<Vec<DiskQueue>, Violation> {
        let all_at_once = self.storage.lock().unwrap().roll(2) == 0;
        for queue in 0..self.plan.queues {
            self.workers[queue].stops.set(true);
            self.queues[queue].ring();
            if !all_at_once {
                self.run_dry()?;
            }
        }
        self.run_dry()?;
        self.workers.clear();
        let mut disks = Vec::new();
        for (index, disk) in self.drained.iter_mut().enumerate() {
            disks.push(disk.take().ok_or(format!("R15: the drain of queue {index} sleeps for ever"))?);
            match self.queues[index].unanswered() {
                0 => {}
                // Told or not: after a reset the driver looks for itself.
                some => return Err(format!("R15: queue {index} was drained and owes {some} answers")),
            }
        }
        Ok(disks)
    }

    fn negotiate(&mut self) {
        let (acked, default) = (self.acked, POLICIES[self.plan.mode].write_cache);
        self.say(|| format!("driver: negotiates {acked:?}"));
        self.cache.negotiate(acked);
        self.writeback = default && (acked.flush || !acked.config_wce);
        self.through_since = self.storage.lock().unwrap().now;
        self.switched_off = None;
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
            // A request that was never taken is nobody's promise.
            for change in self.queues[queue].forget().filter_map(|request| request.change) {
                self.promises.completed(change, now, false, false);
            }
        }
        self.storage.lock().unwrap().claims.clear();
        Ok(())
    }

    fn set_writeback(&mut self, on: bool) {
        self.say(|| format!("driver: writeback = {}", u8::from(on)));
        if self.cache.guest_sets_writeback(on) {
            // As the device does: any worker that works sees to it.
            let first = self.storage.lock().unwrap().roll(self.plan.queues);
            self.queues[first].ring();
            self.switched_off = Some(self.storage.lock().unwrap().now);
        }
        if self.acked.config_wce && (self.acked.flush || !on) {
            if self.writeback && !on {
                self.through_since = self.storage.lock().unwrap().now;
            }
            self.writeback = on;
        }
    }

    fn submit(&mut self, queue: usize, ask: Ask) {
        let Some(slot) = self.queues[queue].free_slot() else { return };
        let submitted = self.storage.lock().unwrap().now;
        let (sector, sectors, writes) = match ask {
            Ask::Read { sector, sectors } => (sector, sectors, None),
            Ask::Write { sector, sectors } => (sector, sectors, Some(self.next_tag)),
            Ask::WriteFarAway { sector } => (sector, 1, None),
            Ask::Flush => (0, 0, None),
            Ask::Discard { sector, sectors } | Ask::WriteZeroes { sector, sectors, .. } => {
                (sector, sectors, Some(ZEROES))
            }
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
        let request = Request { ask, submitted, change, tag: writes.unwrap_or(number) };
        self.queues[queue].submit(slot, request, number);
    }

    /// The driver looks at the used ring.
    fn collect(&mut self, queue: usize) -> Result<(), Violation> {
        while let Some(slot) = self.queues[queue].next_done() {
            let Some(request) = self.queues[queue].slots.get_mut(slot).and_then(Option::take) else {
                return Err(format!("queue {queue}: slot {slot} is completed, and nothing was in flight"));
            };
            let (status, data) = self.queues[queue].answer(slot);
            self.completed(queue, request, status, data)?;
        }
        Ok(())
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
                    let found = self.queues[queue].peek(data + 512 * u64::try_from(index).unwrap());
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
