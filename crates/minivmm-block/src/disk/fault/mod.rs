//! Injected faults: an engine around another engine. It fails, delays, shortens, tears or loses operations as
//! the rules of `fault=` say (`docs/crash-testing.md`).
//!
//! Owns the injection. The state machine above cannot tell it from a host that behaves so, and the write log
//! below ([`super::writelog`]) sees what was really done. [`plan`] decides which operation is hit, [`spec`]
//! owns the grammar, `alarm` keeps the time.

mod alarm;
pub mod plan;
pub mod spec;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::engine::{Ended, Engine, HostOp, Meanwhile, OpToken, Wake};
use super::image::Image;
use alarm::Alarm;
use plan::{Fate, Faults, Plan};

/// What to do with an operation.
enum Act {
    /// Submit this to the engine below.
    Run(HostOp),
    /// Submit this to the engine below, and report this errno if it succeeds.
    RunAndFail(HostOp, i32),
    /// Submit nothing: the operation has this result already.
    Ended(io::Result<usize>),
}

/// An engine that applies the rules to the operations of one queue.
pub struct FaultEngine {
    inner: Box<dyn Engine>,
    image: Arc<Image>,
    faults: Arc<Faults>,
    /// `None` if no rule delays.
    alarm: Option<Alarm>,
    /// The plan of an operation that the engine below had no room for.
    refused: Option<(OpToken, Plan)>,
    /// Operations that are delayed, the first to be due on top.
    held: BinaryHeap<Reverse<(Instant, OpToken)>>,
    /// What to do with each operation in `held` or `due`.
    held_acts: HashMap<OpToken, Act>,
    /// Operations whose delay is over, not yet submitted.
    due: VecDeque<OpToken>,
    /// Operations that fail with this errno if the engine below completes them successfully.
    to_fail: HashMap<OpToken, i32>,
    /// How many operations the engine below has.
    below: usize,
    /// Operations that ended without the engine below. The next wait reports them.
    without_io: Vec<Ended>,
}

impl FaultEngine {
    /// Wraps `inner` in the rules of `image`, if it has any. The error is that of the start of the thread that
    /// delays need. It starts here and never later: once the guest runs, an embedder may forbid new threads.
    pub fn wrap(inner: Box<dyn Engine>, image: &Arc<Image>) -> io::Result<Box<dyn Engine>> {
        let Some(faults) = image.faults() else { return Ok(inner) };
        let alarm = faults.may_delay().then(|| Alarm::start(image.threads())).transpose()?;
        Ok(Box::new(Self {
            inner,
            image: Arc::clone(image),
            faults: Arc::clone(faults),
            alarm,
            refused: None,
            held: BinaryHeap::new(),
            held_acts: HashMap::new(),
            due: VecDeque::new(),
            to_fail: HashMap::new(),
            below: 0,
            without_io: Vec::new(),
        }))
    }

    /// Turns an operation and its fate into what to do.
    fn act(&self, op: HostOp, fate: Option<Fate>) -> Act {
        match (fate, op) {
            (None, op) => Act::Run(op),
            (Some(Fate::Fail(errno)), _) => Act::Ended(Err(io::Error::from_raw_os_error(errno))),
            (Some(Fate::FailSync(errno)), op) => Act::RunAndFail(without_sync(op), errno),
            (Some(Fate::LoseSync), op) => Act::Run(without_sync(op)),
            (Some(Fate::Lose), op) => Act::Ended(Ok(bytes_of(&op))),
            (Some(Fate::Short(dice)), op) => Act::Run(self.shortened(op, dice)),
            (Some(Fate::Tear(dice)), op) => match self.torn(op, dice) {
                Some(op) => Act::RunAndFail(op, libc::EIO),
                None => Act::Ended(Err(io::Error::from_raw_os_error(libc::EIO))),
            },
        }
    }

    /// Returns the beginning of a transfer in whole blocks. A transfer of one block is returned whole.
    fn shortened(&self, op: HostOp, dice: u64) -> HostOp {
        let unit = self.unit();
        match op {
            HostOp::Readv { iov, offset } => {
                let bytes = some_of(iov.bytes(), unit, dice).unwrap_or(iov.bytes());
                HostOp::Readv { iov: iov.part(0, bytes, usize::MAX), offset }
            }
            HostOp::Writev { iov, offset, dsync } => {
                let bytes = some_of(iov.bytes(), unit, dice).unwrap_or(iov.bytes());
                HostOp::Writev { iov: iov.part(0, bytes, usize::MAX), offset, dsync }
            }
            other => other,
        }
    }

    /// Returns the first or the last blocks of a write; `None` if it is a single block.
    fn torn(&self, op: HostOp, dice: u64) -> Option<HostOp> {
        let HostOp::Writev { iov, offset, dsync } = op else { return None };
        let cut = some_of(iov.bytes(), self.unit(), dice >> 1)?;
        let (skip, bytes) = if dice & 1 == 0 { (0, cut) } else { (cut, iov.bytes() - cut) };
        Some(HostOp::Writev { iov: iov.part(skip, bytes, usize::MAX), offset: offset + skip, dsync })
    }

    /// Returns the unit in bytes that the host transfers as a whole, in memory and on the disk.
    fn unit(&self) -> u64 {
        let alignment = self.image.geometry().alignment;
        u64::from(alignment.memory.max(alignment.offset).max(512))
    }

    /// Submits an operation to the engine below. Returns it as an error if that engine has no room.
    fn carry_out(&mut self, token: OpToken, act: Act) -> Result<(), Act> {
        let (op, errno) = match act {
            Act::Ended(result) => {
                self.without_io.push(Ended { token, result });
                return Ok(());
            }
            Act::Run(op) => (op, None),
            Act::RunAndFail(op, errno) => (op, Some(errno)),
        };
        match self.inner.submit(token, op) {
            Ok(()) => {
                self.below += 1;
                if let Some(errno) = errno {
                    self.to_fail.insert(token, errno);
                }
                Ok(())
            }
            Err(op) => Err(match errno {
                None => Act::Run(op),
                Some(errno) => Act::RunAndFail(op, errno),
            }),
        }
    }

    fn hold(&mut self, token: OpToken, until: Instant, act: Act) {
        self.held.push(Reverse((until, token)));
        self.held_acts.insert(token, act);
    }

    /// Submits the operations whose delay is over, as far as the engine below has room.
    fn release(&mut self) {
        let now = Instant::now();
        while let Some(&Reverse((until, token))) = self.held.peek()
            && until <= now
        {
            self.held.pop();
            self.due.push_back(token);
        }
        while let Some(token) = self.due.pop_front() {
            let Some(act) = self.held_acts.remove(&token) else { continue };
            if let Err(act) = self.carry_out(token, act) {
                self.held_acts.insert(token, act);
                self.due.push_front(token);
                return;
            }
        }
    }

    /// Waits in the engine below.
    fn wait_below(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        let waited = self.inner.wait(wake, ended);
        self.note(ended.get_mut(before..).unwrap_or_default());
        waited
    }

    /// Turns results of the engine below into errors where the rules say so.
    fn note(&mut self, ended: &mut [Ended]) {
        for end in ended {
            self.below = self.below.saturating_sub(1);
            if let Some(errno) = self.to_fail.remove(&end.token)
                && end.result.is_ok()
            {
                end.result = Err(io::Error::from_raw_os_error(errno));
            }
        }
    }

    /// Sets the alarm to ring the doorbell when the first held operation may begin.
    fn set_alarm(&self, doorbell: &Arc<EventFd>) {
        if let (Some(alarm), Some(&Reverse((until, _)))) = (&self.alarm, self.held.peek()) {
            alarm.set(until, doorbell);
        }
    }

    /// Sleeps until the first held operation may begin. Call it only if nothing else can complete.
    fn sleep(&self) {
        if let Some(Reverse((until, _))) = self.held.peek() {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
    }
}

/// Returns the operation without RWF_DSYNC.
fn without_sync(op: HostOp) -> HostOp {
    match op {
        HostOp::Writev { iov, offset, .. } => HostOp::Writev { iov, offset, dsync: false },
        other => other,
    }
}

/// Returns the result that the kernel would give on success.
fn bytes_of(op: &HostOp) -> usize {
    match op {
        HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => {
            usize::try_from(iov.bytes()).unwrap_or(usize::MAX)
        }
        _ => 0,
    }
}

/// Returns the bytes of at least one unit but not all; `None` if there are fewer than two units.
fn some_of(bytes: u64, unit: u64, dice: u64) -> Option<u64> {
    let units = bytes.div_ceil(unit);
    (units > 1).then(|| (1 + dice % (units - 1)) * unit)
}

impl Engine for FaultEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        // An operation is counted once, however often it is submitted.
        let plan = match self.refused.take() {
            Some((refused, plan)) if refused == token => plan,
            _ => self.faults.plan(&op, &self.image.stats.beside_queues),
        };
        if !plan.delay.is_zero() {
            let act = self.act(op, plan.fate);
            self.hold(token, Instant::now() + plan.delay, act);
            return Ok(());
        }
        let original = op.clone();
        let act = self.act(op, plan.fate);
        self.carry_out(token, act).map_err(|_| {
            self.refused = Some((token, plan));
            original
        })
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        let mut may_block = true;
        loop {
            self.release();
            if !self.without_io.is_empty() {
                ended.append(&mut self.without_io);
                may_block = false;
            }
            match wake {
                Wake::Doorbell(_) | Wake::EndOnly if !may_block => {
                    return self.wait_below(Wake::Now, ended);
                }
                Wake::EndOnly if self.below == 0 && !self.held.is_empty() => self.sleep(),
                Wake::Doorbell(doorbell) => {
                    self.set_alarm(doorbell);
                    self.wait_below(wake, ended)?;
                    // The alarm may have rung for a held operation, so submit it now.
                    self.release();
                    ended.append(&mut self.without_io);
                    return Ok(());
                }
                Wake::EndOnly | Wake::Now => {
                    self.wait_below(wake, ended)?;
                    if wake_is_now(wake) || ended.len() > before || self.held.is_empty() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn is_ready(&mut self) -> bool {
        let is_due = self.held.peek().is_some_and(|Reverse((until, _))| *until <= Instant::now());
        is_due || !self.without_io.is_empty() || !self.due.is_empty() || self.inner.is_ready()
    }

    fn meanwhile(&self) -> Meanwhile {
        match self.inner.meanwhile() {
            // A held operation may have to begin before that one would end.
            Meanwhile::ExecuteKept if !self.held.is_empty() => Meanwhile::Sleep,
            other => other,
        }
    }

    fn execute_kept(&mut self, came: &dyn Fn() -> bool, ended: &mut Vec<Ended>) {
        let before = ended.len();
        self.inner.execute_kept(came, ended);
        self.note(ended.get_mut(before..).unwrap_or_default());
    }

    fn listen_to(&mut self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        self.inner.listen_to(kick)
    }

    fn rest(&mut self) -> io::Result<()> {
        if let Some(alarm) = &self.alarm {
            alarm.forget();
        }
        self.inner.rest()
    }
}

fn wake_is_now(wake: Wake<'_>) -> bool {
    matches!(wake, Wake::Now)
}
