//! The simulated host below the device: storage in memory, and operations that end when the input says.
//!
//! Owns what is asked of a host, and the checks of it (no operation beyond the image, none on memory
//! that is neither RAM nor the device's own, none misaligned); and the knowledge whether a worker sleeps,
//! so that a run is a sequence of steps although every queue has its thread.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::disk::geometry::{Alignment, Geometry};
use minivmm::mem::Iov;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// So long a worker may work at one step.
const PATIENCE: Duration = Duration::from_secs(20);
/// So often a worker may come back to its engine in one step, for each operation that it is given.
const WAITS_MAX: u64 = 8;

/// What a worker's thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posture {
    /// It has no driver.
    Parked,
    Working,
    /// In a wait for its doorbell.
    Asleep,
}

struct Operation {
    token: OpToken,
    op: HostOp,
    /// It does not end by itself.
    held: bool,
    decision: u8,
}

struct Queue {
    posture: Posture,
    /// Entries, while there is a driver.
    size: usize,
    operations: Vec<Operation>,
    decisions: VecDeque<u8>,
    wake: Arc<EventFd>,
    doorbell: Option<Arc<EventFd>>,
    /// Waits and operations since the step began.
    waits: u64,
    given: u64,
}

/// What there is of a host.
pub struct State {
    pub storage: Vec<u8>,
    queues: Vec<Queue>,
    /// No operation is held any more: somebody waits for all of them.
    pub draining: bool,
    /// A sync was made to fail: nothing can be made stable from then on.
    pub sync_failed: bool,
    violation: Option<String>,
    ram: Vec<Range<usize>>,
    capacity: u64,
    alignment: Option<Alignment>,
    readonly: bool,
    /// Operations that an engine takes.
    room: usize,
    /// A worker has come to its engine since it was last looked.
    pub ran: bool,
}

/// The host that all queues of a device share.
pub struct Host {
    state: Mutex<State>,
    changed: Condvar,
}

impl Host {
    pub fn new(
        ram: Vec<Range<usize>>,
        geometry: &Geometry,
        direct: bool,
        readonly: bool,
        room: usize,
    ) -> Self {
        let capacity = geometry.capacity_sectors * 512;
        let state = State {
            storage: vec![0; usize::try_from(capacity).unwrap()],
            queues: Vec::new(),
            draining: false,
            sync_failed: false,
            violation: None,
            ram,
            capacity,
            alignment: direct.then_some(geometry.alignment),
            readonly,
            room,
            ran: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// An engine for one more queue.
    pub fn engine(self: &Arc<Self>) -> Box<dyn Engine> {
        let mut state = self.lock();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queue = state.queues.len();
        state.queues.push(Queue {
            posture: Posture::Parked,
            size: 0,
            operations: Vec::new(),
            decisions: VecDeque::new(),
            wake: Arc::clone(&wake),
            doorbell: None,
            waits: 0,
            given: 0,
        });
        Box::new(Simulated { host: Arc::clone(self), queue, wake })
    }

    /// Queue `queue`, of so many entries, is handed over, or was not.
    pub fn starts(&self, queue: usize, size: u32, does: bool) {
        let queue = &mut self.lock().queues[queue];
        queue.posture = if does { Posture::Working } else { Posture::Parked };
        queue.size = size as usize;
    }

    /// Waits until no worker works; what each is at.
    pub fn settle(&self) -> Vec<Posture> {
        let begun = Instant::now();
        let mut state = self.lock();
        while !state.queues.iter().all(Queue::is_quiet) {
            let waited = self.changed.wait_timeout(state, Duration::from_secs(1)).unwrap();
            state = waited.0;
            if begun.elapsed() > PATIENCE {
                let postures: Vec<_> = state.queues.iter().map(|queue| queue.posture).collect();
                panic!("a worker hangs: {postures:?}, {:?}", state.violation);
            }
        }
        if let Some(violation) = state.violation.take() {
            panic!("{violation}");
        }
        let postures = state.queues.iter().map(|queue| queue.posture).collect();
        for queue in &mut state.queues {
            let fair = WAITS_MAX * (queue.given + 4);
            assert!(queue.waits <= fair, "R17: {} waits for {} operations", queue.waits, queue.given);
            (queue.waits, queue.given) = (0, 0);
        }
        postures
    }
}

impl State {
    /// What becomes of the next operations of a queue, in their order.
    pub fn decide(&mut self, queue: usize, decisions: &[u8]) {
        let queue = queue % self.queues.len();
        self.queues[queue].decisions.extend(decisions);
    }

    /// Whether an operation of any queue is in flight.
    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| queue.operations.len()).sum()
    }

    /// A held operation of a queue ends now.
    pub fn release(&mut self, queue: usize, which: usize, decision: u8) {
        let queue = queue % self.queues.len();
        let queue = &mut self.queues[queue];
        let held: Vec<_> = queue.operations.iter_mut().filter(|operation| operation.held).collect();
        let count = held.len();
        if let Some(operation) = held.into_iter().nth(which % count.max(1)) {
            operation.held = false;
            operation.decision = decision & !HELD;
            queue.wake.write(1).unwrap();
        }
    }

    /// All that is held ends well, and nothing more is decided.
    pub fn release_all(&mut self) {
        for queue in &mut self.queues {
            queue.decisions.clear();
            queue.operations.iter_mut().for_each(|operation| operation.held = false);
            queue.wake.write(1).unwrap();
        }
    }

    fn violated(&mut self, what: impl FnOnce() -> String) {
        self.violation.get_or_insert_with(what);
    }

    fn check(&mut self, op: &HostOp) {
        let (offset, len, iov, writes) = match op {
            HostOp::Readv { iov, offset } => (*offset, iov.bytes(), Some(iov), false),
            HostOp::Writev { iov, offset, .. } => (*offset, iov.bytes(), Some(iov), true),
            HostOp::PunchHole { offset, len, .. } | HostOp::ZeroRange { offset, len } => {
                (*offset, *len, None, true)
            }
            HostOp::Fdatasync => return,
        };
        if offset.checked_add(len).is_none_or(|end| end > self.capacity) || len == 0 {
            let capacity = self.capacity;
            self.violated(|| format!("R22: {op:?} on a disk of {capacity} bytes"));
        }
        if writes && self.readonly {
            self.violated(|| format!("B9: {op:?} on a readonly disk"));
        }
        if let (Some(alignment), Some(iov)) = (self.alignment, iov)
            && !(iov.is_aligned(alignment.memory, alignment.offset)
                && (offset | len).is_multiple_of(alignment.offset.into()))
        {
            self.violated(|| format!("O_DIRECT would refuse {op:?}, which wants {alignment:?}"));
        }
        if iov.is_some_and(|iov| iov.as_iovecs().len() > 1024) {
            self.violated(|| format!("IOV_MAX: {op:?}"));
        }
        if self.alignment.is_none() && matches!(op, HostOp::Readv { .. }) {
            self.check_in_ram(iov.unwrap());
        }
    }

    /// Without O_DIRECT nothing is bounced, so what is read goes into RAM itself (R3).
    fn check_in_ram(&mut self, iov: &Iov) {
        let is_inside = |piece: &libc::iovec| {
            let (from, to) = (piece.iov_base as usize, piece.iov_base as usize + piece.iov_len);
            self.ram.iter().any(|region| region.start <= from && to <= region.end)
        };
        if !iov.as_iovecs().iter().all(is_inside) {
            self.violated(|| format!("R3: {iov:?} is not in RAM"));
        }
    }

    /// What the kernel would do and say.
    fn execute(&mut self, op: &HostOp, decision: u8) -> io::Result<usize> {
        let error = |errno| Err(io::Error::from_raw_os_error(errno));
        let fails = match decision & 0xf {
            8 => Some(libc::EIO),
            9 => Some(libc::ENOSPC),
            10 => Some(libc::EINTR),
            11 => Some(libc::EOPNOTSUPP),
            12 => Some(libc::EINVAL),
            _ => None,
        };
        if let Some(errno) = fails {
            self.sync_failed |= op.is_sync() && errno != libc::EINTR;
            return error(errno);
        }
        let share = if decision & 0xf == 13 { u64::from(decision >> 4 & 7) } else { 8 };
        match op {
            HostOp::Fdatasync => Ok(0),
            HostOp::PunchHole { offset, len, .. } | HostOp::ZeroRange { offset, len } => {
                let (from, to) = (usize::try_from(*offset).unwrap(), usize::try_from(offset + len).unwrap());
                self.storage[from..to].fill(0);
                Ok(0)
            }
            HostOp::Readv { iov, offset } => Ok(self.transfer(iov, *offset, share, false)),
            HostOp::Writev { iov, offset, .. } => Ok(self.transfer(iov, *offset, share, true)),
        }
    }

    fn transfer(&mut self, iov: &Iov, offset: u64, share: u64, write: bool) -> usize {
        // O_DIRECT moves whole blocks.
        let step = self.alignment.map_or(1, |alignment| u64::from(alignment.offset));
        let wanted = iov.bytes() / 8 * share / step * step;
        let mut left = usize::try_from(if share == 8 { iov.bytes() } else { wanted }).unwrap();
        let moved = left;
        let mut at = usize::try_from(offset).unwrap();
        for piece in iov.as_iovecs() {
            let count = piece.iov_len.min(left);
            let storage = self.storage[at..at + count].as_mut_ptr();
            let memory = piece.iov_base.cast::<u8>();
            // SAFETY: the storage's range was just taken out of it; the memory is guest RAM or the
            // device's own, as the engine was promised, which AddressSanitizer looks at here.
            unsafe {
                if write {
                    std::ptr::copy(memory, storage, count);
                } else {
                    std::ptr::copy(storage, memory, count);
                }
            }
            at += count;
            left -= count;
        }
        moved
    }

    /// Ends what may end of one queue.
    fn run(&mut self, queue: usize, ended: &mut Vec<Ended>, is_wanted: impl Fn(&Operation) -> bool) {
        while let Some(at) = self.queues[queue].operations.iter().position(&is_wanted) {
            let Operation { token, op, decision, .. } = self.queues[queue].operations.remove(at);
            let result = self.execute(&op, decision);
            ended.push(Ended { token, result });
        }
    }
}

impl Queue {
    fn is_quiet(&self) -> bool {
        match self.posture {
            Posture::Parked => true,
            Posture::Working => false,
            Posture::Asleep => {
                let rings = self.doorbell.as_deref().is_some_and(is_readable);
                !rings && !is_readable(&self.wake)
            }
        }
    }
}

fn is_readable(event: &EventFd) -> bool {
    poll(&[event], Duration::ZERO)
}

/// Whether one of them is signalled within that time.
fn poll(events: &[&EventFd], limit: Duration) -> bool {
    let asked = |event: &&EventFd| libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<_> = events.iter().map(asked).collect();
    let limit = libc::c_int::try_from(limit.as_millis()).unwrap();
    // SAFETY: the pointer and the count are those of one array.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) > 0 }
}

/// Of a decision: the operation does not end before it is released.
pub const HELD: u8 = 0x80;

struct Simulated {
    host: Arc<Host>,
    queue: usize,
    wake: Arc<EventFd>,
}

impl Engine for Simulated {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let mut state = self.host.lock();
        let room = state.room;
        let queue = &mut state.queues[self.queue];
        if queue.operations.len() >= room {
            return Err(op);
        }
        let decision = queue.decisions.pop_front().unwrap_or(0);
        queue.given += 1;
        // One a request, and a sync that several share.
        let is_crowded = queue.operations.len() > queue.size + 1;
        queue.operations.push(Operation { token, op: op.clone(), held: decision & HELD != 0, decision });
        if is_crowded {
            state.violated(|| "R23: more operations in flight than the queue has entries".into());
        }
        state.check(&op);
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        let mut state = self.host.lock();
        state.ran = true;
        state.queues[self.queue].posture = Posture::Working;
        state.queues[self.queue].waits += 1;
        loop {
            let draining = state.draining;
            state.run(self.queue, ended, |operation| draining || !operation.held);
            if ended.len() > before {
                return Ok(());
            }
            let doorbell = match wake {
                Wake::Now => return Ok(()),
                Wake::EndOnly => {
                    // Whoever waits for nothing else waits for an end.
                    if let Some(first) = state.queues[self.queue].operations.first().map(|op| op.token) {
                        state.run(self.queue, ended, |operation| operation.token == first);
                    }
                    return Ok(());
                }
                Wake::Doorbell(doorbell) => doorbell,
            };
            if draining {
                // It may be another queue's operation that this one waits for.
                for queue in state.queues.iter().filter(|queue| !queue.operations.is_empty()) {
                    queue.wake.write(1).unwrap();
                }
            }
            state.queues[self.queue].posture = Posture::Asleep;
            state.queues[self.queue].doorbell = Some(Arc::clone(doorbell));
            drop(state);
            self.host.changed.notify_all();
            poll(&[doorbell, &self.wake], PATIENCE * 2);
            state = self.host.lock();
            state.queues[self.queue].posture = Posture::Working;
            let _ = self.wake.read();
            if doorbell.read().is_ok() {
                let draining = state.draining;
                state.run(self.queue, ended, |operation| draining || !operation.held);
                return Ok(());
            }
        }
    }

    fn is_ready(&mut self) -> bool {
        self.host.lock().queues[self.queue].operations.iter().any(|operation| !operation.held)
    }

    fn rest(&mut self) -> io::Result<()> {
        let mut state = self.host.lock();
        let left = state.queues[self.queue].operations.len();
        if left > 0 {
            state.violated(|| format!("R15: {left} operations are in flight when a worker parks"));
        }
        state.ran = true;
        state.queues[self.queue].posture = Posture::Parked;
        state.queues[self.queue].doorbell = None;
        drop(state);
        self.host.changed.notify_all();
        Ok(())
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        if let Ok(mut state) = self.host.state.lock() {
            let left = state.queues[self.queue].operations.len();
            if left > 0 {
                state.violated(|| format!("{left} operations are in flight when the engine goes"));
            }
        }
    }
}
