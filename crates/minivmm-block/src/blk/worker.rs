//! The worker of one queue: its turns, and its thread.
//!
//! Owns the order of a turn (pop, complete, wait), the worker's thread and its parking between drivers. `requests`
//! moves what is popped to the disk, and completes it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

pub use super::job::{Job, TurnError};
use super::poll::Poller;
use super::requests::{Chained, Requests};
use crate::disk::disk_queue::DiskQueue;
use crate::disk::engine::{Meanwhile, Wake};
use crate::doorbell;
use crate::ratelimit::RateLimit;
use crate::sync::unpoisoned;
use crate::threads::{ThreadKind, Threads};
use crate::virtio::queue::{Chain, Position, RingError};
use crate::warn_limited;

/// Stack size of a worker. Its frames are small, and there may be many workers.
const STACK_BYTES: usize = 256 << 10;

/// Serves one queue from DRIVER_OK to reset. It needs no thread of its own: tests call [`QueueWorker::turn`]
/// directly.
pub struct QueueWorker<'a> {
    /// The chain that is being popped. Its memory is reused for the next one.
    chain: Chain,
    requests: Requests<'a>,
    poller: Poller,
}

impl<'a> QueueWorker<'a> {
    /// Creates a worker that serves `job` on `disk`.
    ///
    /// `errors` outlives the job. Otherwise a guest that resets the device again and again could log without
    /// end (R18).
    pub fn new(job: Job, disk: &'a mut DiskQueue, errors: &'a mut RateLimit) -> Self {
        Self {
            chain: Chain::default(),
            requests: Requests::new(job, disk, errors),
            poller: Poller::new(Duration::ZERO),
        }
    }

    /// Makes the worker spin for at most `max` before it blocks.
    pub fn polling(mut self, max: Duration) -> Self {
        self.poller = Poller::new(max);
        self
    }

    /// Runs one round: pops available chains, completes finished requests, and waits for more of either.
    pub fn turn(&mut self) -> Result<(), TurnError> {
        self.requests.disk.sync_if_switched_off();
        let more = self.take_available()?;
        let requests = &mut self.requests;
        requests.complete_finished()?;
        if more {
            requests.disk.wait(Wake::Now)?;
            return requests.complete_finished();
        }
        let meanwhile = requests.disk.meanwhile();
        if meanwhile == Meanwhile::ExecuteKept {
            let ring = &requests.job.ring;
            requests.disk.execute_kept(&|| ring.has_available());
            return requests.complete_finished();
        }
        self.poller.waits();
        let spins = meanwhile == Meanwhile::Spin && self.poller.spins();
        let is_ready = (spins && self.spin()?) || self.requests.enable_doorbell();
        let requests = &mut self.requests;
        requests.disk.wait(if is_ready { Wake::Now } else { Wake::Doorbell(&requests.job.doorbell) })?;
        self.poller.waited(requests.take_completed());
        requests.complete_finished()
    }

    /// Spins for new chains or finished I/O where that pays, and returns `true` if there are any. The driver
    /// rings no doorbell meanwhile.
    fn spin(&mut self) -> Result<bool, TurnError> {
        let requests = &mut self.requests;
        // Submit what was popped before spinning.
        requests.disk.wait(Wake::Now)?;
        requests.complete_finished()?;
        let has_room = requests.room() > 0;
        let (ring, disk) = (&requests.job.ring, &mut requests.disk);
        Ok(self.poller.spin(|| (has_room && ring.has_available()) || disk.is_ready()))
    }

    /// Pops at most as many chains as the ring has entries, and returns `true` if there may be more. The bound
    /// keeps a flood of new requests from delaying the completion of others (R17).
    fn take_available(&mut self) -> Result<bool, RingError> {
        let (requests, chain) = (&mut self.requests, &mut self.chain);
        requests.job.ring.disable_doorbell();
        // Each chain takes at most one of these places.
        for _ in 0..requests.room() {
            if !requests.job.ring.pop_into(chain)? {
                return Ok(false);
            }
            requests.take(chain)?;
        }
        Ok(requests.room() > 0)
    }

    /// Waits for everything in flight and completes it (virtio 2.4.1, R15).
    ///
    /// If the ring accepts no more completions, I/O on guest memory is still waited for.
    pub fn drain(&mut self) -> Result<(), TurnError> {
        let requests = &mut self.requests;
        let mut outcome = Ok(());
        while !requests.disk.is_idle() {
            // A success held for another queue's sync has no I/O of ours; our doorbell is rung for it.
            let held = requests.disk.holds_success();
            requests.disk.wait(if held { Wake::Doorbell(&requests.job.doorbell) } else { Wake::EndOnly })?;
            match outcome {
                Ok(()) => outcome = requests.complete_finished(),
                Err(_) => requests.disk.take_completions().for_each(drop),
            }
        }
        // If the ring broke during a turn, what completed before is not published yet.
        outcome.and_then(|()| requests.complete_finished())
    }

    /// Returns an error if a popped chain was never completed: the guest would wait for it for ever. To be
    /// called after a drain, if the ring was never broken.
    pub fn owes_nothing(&self) -> Result<(), TurnError> {
        match self.requests.pending() {
            0 => Ok(()),
            forgotten => Err(TurnError::Forgotten(forgotten)),
        }
    }

    /// Returns how far the ring has been served. After a drain nothing that was popped is still in flight.
    pub fn position(&self) -> Position {
        self.requests.job.ring.position()
    }

    /// Returns `true` if nothing is in flight and no finished request waits for its completion.
    pub fn is_idle(&self) -> bool {
        self.requests.disk.is_idle()
    }
}

/// The state shared by the device and its worker's thread.
struct Mailbox {
    state: Mutex<State>,
    /// Where the worker left the last ring that it has served; `None` once somebody has asked.
    left: Mutex<Option<Position>>,
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

    fn leave(&self, position: Position) {
        *unpoisoned(self.left.lock()) = Some(position);
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
        let mailbox = Arc::new(Mailbox {
            state: Mutex::new(State::Parked),
            left: Mutex::new(None),
            changed: Condvar::new(),
        });
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

    /// Returns once the worker has drained and parked, or has exited. Returns how far it has served its ring;
    /// `None` if it has had none since the last call.
    pub fn stop(&self) -> Option<Position> {
        let mut state = self.mailbox.lock();
        if let State::Starting(job) = &*state {
            self.mailbox.leave(job.ring.position());
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
        drop(state);
        unpoisoned(self.mailbox.left.lock()).take()
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
        let mut outcome = disk.listen_to(job.kick.clone()).map_err(TurnError::from);
        let mut worker = QueueWorker::new(job, &mut disk, &mut errors).polling(poll);
        while outcome.is_ok() && matches!(*mailbox.lock(), State::Working(_)) {
            outcome = worker.turn();
        }
        // The latest error is reported: only an engine's error means that I/O may still be in flight.
        let outcome = worker.drain().and(outcome).and_then(|()| worker.owes_nothing());
        mailbox.leave(worker.position());
        drop(worker);
        let outcome = disk.listen_to(None).and_then(|()| disk.rest()).map_err(TurnError::from).and(outcome);
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
