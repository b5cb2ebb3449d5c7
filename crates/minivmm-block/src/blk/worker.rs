//! The worker of one queue: moves requests from the ring to the disk and completes them.
//!
//! Owns the worker's thread, its parking between drivers, and what each request in flight still needs for its
//! completion. A popped chain is completed exactly once, or the ring is declared broken. Requests are kept
//! under a private number and never under the guest's head, because a hostile guest may submit the same head
//! twice (R8).

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::poll::Poller;
use super::request::{self, Frame, HEADER_BYTES, Header, ID_BYTES, Limits, Request, Status};
use super::stopwatch::Stopwatch;
use crate::disk::Image;
use crate::disk::disk_queue::{Completion, DiskQueue, Op, RequestId};
use crate::disk::engine::{Meanwhile, Wake};
use crate::doorbell;
use crate::mem::{self, Iov, Ram};
use crate::ratelimit::RateLimit;
use crate::slab::Slab;
use crate::sync::unpoisoned;
use crate::threads::{ThreadKind, Threads};
use crate::virtio::Interrupt;
use crate::virtio::queue::{Chain, Ring, RingError};
use crate::warn_limited;

/// Stack size of a worker. Its frames are small, and there may be many workers.
const STACK_BYTES: usize = 256 << 10;

/// What a worker needs to serve a queue, handed over at activation.
pub struct Job {
    /// Guest RAM.
    pub ram: Ram,
    /// The negotiated feature bits.
    pub features: u64,
    /// The queue's index.
    pub index: u16,
    /// The queue's rings.
    pub ring: Ring,
    /// The queue's doorbell.
    pub doorbell: Arc<EventFd>,
    /// Notifies the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// What is needed to complete a request that is in flight.
struct Owed {
    head: u16,
    status_addr: u64,
    /// Writable bytes before the status byte.
    room: u64,
    /// Bytes of data that the driver gets if the request succeeds.
    data_bytes: u32,
}

/// The request that is being parsed, as a private copy. Its memory is reused for the next request.
#[derive(Default)]
struct Popped {
    chain: Chain,
    frame: Frame,
    payload: Vec<u8>,
}

/// What a valid chain turned out to be.
enum Parsed {
    /// An operation for the disk. `data_bytes` is what the driver gets if it succeeds.
    Submit { op: Op, data_bytes: u32 },
    /// GET_ID needs no disk: its `data_bytes` are written already.
    Completed { data_bytes: u32 },
}

/// Serves one queue from DRIVER_OK to reset. It needs no thread of its own: tests call [`QueueWorker::turn`]
/// directly.
pub struct QueueWorker<'a> {
    job: Job,
    disk: &'a mut DiskQueue,
    image: Arc<Image>,
    pending: Slab<RequestId, Owed>,
    popped: Popped,
    errors: &'a mut RateLimit,
    poller: Poller,
    /// Requests completed since the poller was last told.
    completed: u32,
    /// `None` if latencies are not recorded.
    stopwatch: Option<Stopwatch>,
}

impl<'a> QueueWorker<'a> {
    /// Creates a worker that serves `job` on `disk`.
    ///
    /// `errors` outlives the job. Otherwise a guest that resets the device again and again could log without
    /// end (R18).
    pub fn new(job: Job, disk: &'a mut DiskQueue, errors: &'a mut RateLimit) -> Self {
        let image = Arc::clone(disk.image());
        let stopwatch = Stopwatch::begin(disk);
        Self {
            job,
            disk,
            image,
            pending: Slab::default(),
            popped: Popped::default(),
            errors,
            poller: Poller::new(Duration::ZERO),
            completed: 0,
            stopwatch,
        }
    }

    /// Makes the worker spin for at most `max` before it blocks.
    pub fn polling(mut self, max: Duration) -> Self {
        self.poller = Poller::new(max);
        self
    }

    /// Runs one round: pops available chains, completes finished requests, and waits for more of either.
    pub fn turn(&mut self) -> Result<(), TurnError> {
        self.disk.sync_if_switched_off();
        let more = self.take_available()?;
        self.complete_finished()?;
        if more {
            self.disk.wait(Wake::Now)?;
            return self.complete_finished();
        }
        let meanwhile = self.disk.meanwhile();
        if meanwhile == Meanwhile::ExecuteKept {
            let ring = &self.job.ring;
            self.disk.execute_kept(&|| ring.has_available());
            return self.complete_finished();
        }
        self.poller.waits();
        let spins = meanwhile == Meanwhile::Spin && self.poller.spins();
        let is_ready = (spins && self.spin()?) || (!self.is_full() && self.job.ring.enable_doorbell());
        let wake = if is_ready { Wake::Now } else { Wake::Doorbell(&self.job.doorbell) };
        self.disk.wait(wake)?;
        self.poller.waited(std::mem::take(&mut self.completed));
        self.complete_finished()
    }

    /// Spins for new chains or finished I/O where that pays, and returns `true` if there are any. The driver
    /// rings no doorbell meanwhile.
    fn spin(&mut self) -> Result<bool, TurnError> {
        // Submit what was popped before spinning.
        self.disk.wait(Wake::Now)?;
        self.complete_finished()?;
        let is_full = self.is_full();
        let (ring, disk) = (&self.job.ring, &mut self.disk);
        Ok(self.poller.spin(|| (!is_full && ring.has_available()) || disk.is_ready()))
    }

    /// Returns `true` if as many requests are in flight as the ring has entries. Only a driver that submits
    /// descriptors that it does not own can want more; those wait until others have completed (R23).
    fn is_full(&self) -> bool {
        self.pending.len() >= usize::from(self.job.ring.size())
    }

    /// Waits for everything in flight and completes it (virtio 2.4.1, R15).
    ///
    /// If the ring accepts no more completions, I/O on guest memory is still waited for.
    pub fn drain(&mut self) -> Result<(), TurnError> {
        let mut outcome = Ok(());
        while !self.disk.is_idle() {
            // A success held for another queue's sync has no I/O of ours; our doorbell is rung for it.
            let held = self.disk.holds_success();
            self.disk.wait(if held { Wake::Doorbell(&self.job.doorbell) } else { Wake::EndOnly })?;
            match outcome {
                Ok(()) => outcome = self.complete_finished(),
                Err(_) => self.disk.take_completions().for_each(drop),
            }
        }
        // If the ring broke during a turn, what completed before is not published yet.
        outcome.and_then(|()| self.complete_finished())
    }

    /// Returns an error if a popped chain was never completed: the guest would wait for it for ever. To be
    /// called after a drain, if the ring was never broken.
    pub fn owes_nothing(&self) -> Result<(), TurnError> {
        match self.pending.len() {
            0 => Ok(()),
            forgotten => Err(TurnError::Forgotten(forgotten)),
        }
    }

    /// Returns `true` if nothing is in flight and no finished request waits for its completion.
    pub fn is_idle(&self) -> bool {
        self.disk.is_idle()
    }

    /// Pops at most as many chains as the ring has entries, and returns `true` if there may be more. The bound
    /// keeps a flood of new requests from delaying the completion of others (R17).
    fn take_available(&mut self) -> Result<bool, RingError> {
        let mut popped = std::mem::take(&mut self.popped);
        let more = self.take_into(&mut popped);
        self.popped = popped;
        more
    }

    fn take_into(&mut self, popped: &mut Popped) -> Result<bool, RingError> {
        let size = usize::from(self.job.ring.size());
        self.job.ring.disable_doorbell();
        for _ in 0..size {
            if self.is_full() || !self.job.ring.pop_into(&mut popped.chain)? {
                return Ok(false);
            }
            self.take(popped)?;
        }
        Ok(true)
    }

    /// Turns a chain into a request to the disk, or completes it at once.
    fn take(&mut self, popped: &mut Popped) -> Result<(), RingError> {
        let head = popped.chain.head;
        if !popped.frame.take_apart(&popped.chain) {
            return Err(RingError::NoStatus(head));
        }
        let (status_addr, room) = (popped.frame.status_addr, popped.frame.data_in_bytes());
        let owed = |data_bytes| Owed { head, status_addr, room, data_bytes };
        match self.parse(popped) {
            Ok(Parsed::Submit { op, data_bytes }) => {
                self.submit(owed(data_bytes), op);
                Ok(())
            }
            Ok(Parsed::Completed { data_bytes }) => finish(&mut self.job, &owed(data_bytes), Status::Ok),
            Err(status) => finish(&mut self.job, &owed(0), status),
        }
    }

    fn submit(&mut self, owed: Owed, op: Op) {
        let id = self.pending.insert(owed);
        if let (Some(watch), Some(woke)) = (&mut self.stopwatch, self.disk.woke_at()) {
            watch.pops(id, &op, woke);
        }
        self.disk.submit(id, op);
    }

    /// Reads header and payload once, and makes an operation of them. The error is the status of a request that
    /// is refused.
    fn parse(&mut self, popped: &mut Popped) -> Result<Parsed, Status> {
        let Popped { chain, frame, payload } = popped;
        let mut bad = |why: &dyn std::fmt::Display| {
            warn_limited!(self.errors, "blk: request at descriptor {}: {why}", chain.head);
            Status::IoErr
        };
        if let Some(fault) = chain.fault {
            return Err(bad(&fault));
        }
        if !frame.has_header {
            return Err(bad(&"its header is shorter than 16 bytes"));
        }
        let ram = &self.job.ram;
        let mut bytes = [0; HEADER_BYTES];
        mem::gather(ram, &chain.readable, &mut bytes).map_err(|why| bad(&why))?;
        let header = Header::parse(&bytes);
        // Where an erase is not offered it must complete with UNSUPP, even if its amount of data is wrong. So
        // an empty payload goes on to the parser, which refuses it.
        let payload_bytes = header.payload_bytes(request::total(&frame.data_out)).unwrap_or(0);
        payload.clear();
        payload.resize(payload_bytes, 0);
        mem::gather(ram, &frame.data_out, payload).map_err(|why| bad(&why))?;
        let image = &self.image;
        let features = self.job.features;
        let limits = Limits { geometry: image.geometry(), features, readonly: image.config().readonly };
        let (op, data_bytes) = match request::parse(header, frame, payload, &limits)? {
            Request::In(range) => {
                let iov = Iov::new(ram, &frame.data_in).map_err(|why| bad(&why))?;
                // The walk has refused more than 4 GiB; the largest used length is 2^32 - 1.
                let data_bytes = u32::try_from(range.bytes()).unwrap_or(u32::MAX - 1);
                (Op::Read(range, iov), data_bytes)
            }
            Request::Out(range) => {
                let iov = Iov::new(ram, &frame.data_out).map_err(|why| bad(&why))?;
                (Op::Write(range, iov), 0)
            }
            Request::Flush => (Op::Flush, 0),
            Request::Discard(ranges) => (Op::Discard(ranges), 0),
            Request::WriteZeroes(ranges) => (Op::WriteZeroes(ranges), 0),
            Request::GetId => {
                mem::scatter(ram, &frame.data_in, image.serial()).map_err(|why| bad(&why))?;
                return Ok(Parsed::Completed { data_bytes: ID_BYTES });
            }
        };
        Ok(Parsed::Submit { op, data_bytes })
    }

    /// Completes what the disk has finished. Then publishes all of it by one store, and notifies the driver at
    /// most once.
    fn complete_finished(&mut self) -> Result<(), TurnError> {
        let heard = self.note_submitted();
        for Completion { id, result } in self.disk.take_completions() {
            let mut owed = self.pending.remove(id).ok_or(TurnError::Lost(id))?;
            let status = match result {
                Ok(()) => Status::Ok,
                Err(error) => {
                    let path = self.image.config().path.display();
                    warn_limited!(self.errors, "disk {path}: request fails: {}", Chained(&error));
                    // The driver cannot rely on what was transferred before the error; a length of 0 is always
                    // true.
                    owed.data_bytes = 0;
                    Status::IoErr
                }
            };
            finish(&mut self.job, &owed, status)?;
            self.completed += 1;
            if let (Some(watch), Some(heard)) = (&mut self.stopwatch, heard) {
                watch.completes(id, heard);
            }
        }
        if self.job.ring.publish() {
            self.job.interrupt.queue(self.job.index);
        }
        if let Some(watch) = &mut self.stopwatch {
            watch.publishes();
        }
        Ok(())
    }

    /// Notes what was handed to the host since the last call. Returns when the last wait for the engine
    /// returned; `None` if latencies are not recorded.
    fn note_submitted(&mut self) -> Option<Instant> {
        let watch = self.stopwatch.as_mut()?;
        self.disk.take_submitted().for_each(|(id, at)| watch.submits(id, at));
        self.disk.woke_at()
    }
}

/// Writes the status, then the used entry; the data was written before. The used index follows when the batch
/// is published (virtio 2.7.8.2).
fn finish(job: &mut Job, owed: &Owed, status: Status) -> Result<(), RingError> {
    mem::write_bytes(&job.ram, owed.status_addr, &[status as u8])
        .map_err(|_| RingError::NoStatus(owed.head))?;
    job.ring.push_used(owed.head, request::written(owed.data_bytes, owed.room))
}

/// Why a worker cannot continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TurnError {
    /// The driver has broken the ring.
    #[error("the driver has broken its queue")]
    Ring(#[from] RingError),
    /// Waiting for the engine failed.
    #[error("the I/O engine failed")]
    Engine(#[from] io::Error),
    /// The disk completed a request that was never submitted. This is a bug of ours, and the disk's completions
    /// can no longer be trusted.
    #[error("the disk completed request {0}, which is not in flight")]
    Lost(RequestId),
    /// The disk is idle but has not completed this many requests. This is a bug of ours, too.
    #[error("the disk has nothing in flight and has not completed {0} of its requests")]
    Forgotten(usize),
}

/// Displays an error with its causes, in one line.
struct Chained<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// The state shared by the device and its worker's thread.
struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
}

enum State {
    /// Waits for a driver.
    Parked,
    /// A driver has enabled the queue; the worker has not taken the job yet.
    Starting(Box<Job>),
    /// Serves the queue; the eventfd is the doorbell that wakes the worker.
    Working(Arc<EventFd>),
    /// Told to drain and park.
    Stopping,
    /// Told to exit, or has exited by itself.
    Ended,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        unpoisoned(self.changed.wait(guard))
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }
}

/// A worker's thread, created at start and parked until a driver enables the queue.
pub struct WorkerThread {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

/// The worker is not parked, or its thread has exited.
#[derive(Debug, thiserror::Error)]
#[error("the worker's thread has ended")]
pub struct WorkerGone;

impl WorkerThread {
    /// Starts the thread through `threads` and parks it.
    pub fn park(name: String, disk: DiskQueue, threads: &dyn Threads) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox { state: Mutex::new(State::Parked), changed: Condvar::new() });
        let theirs = Arc::clone(&mailbox);
        let builder = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
        let body = move || {
            let at_the_end = EndsWithThread(&theirs);
            work(at_the_end.0, disk);
        };
        let thread = threads.spawn(ThreadKind::Worker, builder, Box::new(body))?;
        Ok(Self { mailbox, thread: Some(thread) })
    }

    /// Hands over the queue to the worker.
    pub fn start(&self, job: Job) -> Result<(), WorkerGone> {
        match &mut *self.mailbox.lock() {
            state @ State::Parked => *state = State::Starting(Box::new(job)),
            _ => return Err(WorkerGone),
        }
        self.mailbox.changed.notify_all();
        Ok(())
    }

    /// Wakes the worker so that it checks more than its ring. Returns `false` if it will not, because it is not
    /// working.
    pub fn wake(&self) -> bool {
        match &*self.mailbox.lock() {
            State::Working(doorbell) => {
                ring(doorbell);
                true
            }
            // It checks before its first request.
            State::Starting(_) => true,
            State::Parked | State::Stopping | State::Ended => false,
        }
    }

    /// Returns once the worker has drained and parked, or has exited.
    pub fn stop(&self) {
        let mut state = self.mailbox.lock();
        if let State::Starting(_) = *state {
            *state = State::Parked;
        }
        if let State::Working(doorbell) = &*state {
            let doorbell = Arc::clone(doorbell);
            *state = State::Stopping;
            ring(&doorbell);
        }
        while matches!(*state, State::Stopping) {
            state = self.mailbox.wait(state);
        }
    }
}

impl Drop for WorkerThread {
    /// Drains, then joins: whoever starts an I/O owns it until it completes.
    fn drop(&mut self) {
        self.stop();
        self.mailbox.set(State::Ended);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("blk: a worker has panicked");
        }
    }
}

/// Marks the thread as ended however it exits, so that nobody waits for it for ever.
struct EndsWithThread<'a>(&'a Mailbox);

impl Drop for EndsWithThread<'_> {
    fn drop(&mut self) {
        self.0.set(State::Ended);
    }
}

fn ring(doorbell: &EventFd) {
    if let Err(error) = doorbell::ring(doorbell) {
        log::error!("blk: a worker cannot be woken: {error}");
    }
}

/// Runs the thread: parks, serves a queue, drains, and parks again.
///
/// The thread exits when it is told to. It also exits when waiting for its engine fails, since nothing is then
/// known about what is in flight.
fn work(mailbox: &Mailbox, mut disk: DiskQueue) {
    let mut errors = RateLimit::for_guest_errors("blk");
    let mut broken = RateLimit::for_guest_errors("blk: broken queues");
    while let Some(job) = next_job(mailbox) {
        let interrupt = Arc::clone(&job.interrupt);
        let poll = disk.image().config().poll();
        let mut worker = QueueWorker::new(job, &mut disk, &mut errors).polling(poll);
        let mut outcome = Ok(());
        while outcome.is_ok() && matches!(*mailbox.lock(), State::Working(_)) {
            outcome = worker.turn();
        }
        // The latest error is reported: only an engine's error means that I/O may still be in flight.
        let outcome = worker.drain().and(outcome).and_then(|()| worker.owes_nothing());
        drop(worker);
        let outcome = disk.rest().map_err(TurnError::from).and(outcome);
        if let Err(error) = &outcome {
            warn_limited!(broken, "blk: {}; the device needs a reset", Chained(error));
            interrupt.needs_reset();
        }
        if let Err(TurnError::Engine(_)) = outcome {
            return;
        }
        park(mailbox);
    }
}

fn next_job(mailbox: &Mailbox) -> Option<Job> {
    let mut state = mailbox.lock();
    loop {
        match std::mem::replace(&mut *state, State::Parked) {
            State::Starting(job) => {
                *state = State::Working(Arc::clone(&job.doorbell));
                return Some(*job);
            }
            State::Ended => {
                *state = State::Ended;
                return None;
            }
            _ => state = mailbox.wait(state),
        }
    }
}

/// Reports that nothing is in flight any more.
fn park(mailbox: &Mailbox) {
    match &mut *mailbox.lock() {
        State::Ended => {}
        state => *state = State::Parked,
    }
    mailbox.changed.notify_all();
}
