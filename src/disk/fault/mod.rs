//! Faults on purpose: an engine around another one that fails, delays, shortens, tears or loses what
//! the rules of `fault=` say (`docs/crash-testing.md`).
//!
//! Owns the carrying out. The state machine above cannot tell it from a host that does these things,
//! and the write log below ([`super::writelog`]) sees what was really done. Which operation is meant is
//! [`plan`]'s business, what can be said [`spec`]'s, the keeping of time [`alarm`]'s.

mod alarm;
pub mod plan;
pub mod spec;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::engine::{Ended, Engine, HostOp, OpToken, Wake};
use super::image::Image;
use alarm::Alarm;
use plan::{Fate, Faults, Plan};

/// What an operation looks like to the engine below.
enum Act {
    /// It is handed on, as this.
    Run(HostOp),
    /// It is handed on, and whatever comes of it, it fails so if it succeeds.
    RunAndFail(HostOp, i32),
    /// It has ended already.
    Ended(io::Result<usize>),
}

/// An engine that does what the rules say to the operations of one queue.
pub struct FaultEngine {
    inner: Box<dyn Engine>,
    image: Arc<Image>,
    faults: Arc<Faults>,
    alarm: Option<Alarm>,
    /// What was decided of an operation that the engine below had no room for.
    refused: Option<(OpToken, Plan)>,
    held: BinaryHeap<Reverse<(Instant, OpToken)>>,
    /// The operations of those that are held.
    ops: HashMap<OpToken, Act>,
    /// Their time has come.
    due: VecDeque<OpToken>,
    /// Those that fail when the engine below ends them.
    to_fail: HashMap<OpToken, i32>,
    /// Operations that the engine below has.
    below: usize,
    at_once: Vec<Ended>,
}

impl FaultEngine {
    /// The rules of `image`, if it has any, around `inner`.
    pub fn wrap(inner: Box<dyn Engine>, image: &Arc<Image>) -> Box<dyn Engine> {
        let Some(faults) = image.faults() else { return inner };
        Box::new(Self {
            inner,
            image: Arc::clone(image),
            faults: Arc::clone(faults),
            // Before the guest runs: afterwards no thread can be started.
            alarm: faults.may_delay().then(Alarm::start).and_then(Result::ok),
            refused: None,
            held: BinaryHeap::new(),
            ops: HashMap::new(),
            due: VecDeque::new(),
            to_fail: HashMap::new(),
            below: 0,
            at_once: Vec::new(),
        })
    }

    /// What becomes of an operation.
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

    /// A beginning of a transfer, of whole blocks; all of it if it is one block.
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

    /// The first or the last blocks of a write; `None` if it is one block.
    fn torn(&self, op: HostOp, dice: u64) -> Option<HostOp> {
        let HostOp::Writev { iov, offset, dsync } = op else { return None };
        let cut = some_of(iov.bytes(), self.unit(), dice >> 1)?;
        let (skip, bytes) = if dice & 1 == 0 { (0, cut) } else { (cut, iov.bytes() - cut) };
        Some(HostOp::Writev { iov: iov.part(skip, bytes, usize::MAX), offset: offset + skip, dsync })
    }

    /// What the host takes as one, in memory and on the disk.
    fn unit(&self) -> u64 {
        let alignment = self.image.geometry().alignment;
        u64::from(alignment.memory.max(alignment.offset).max(512))
    }

    /// Hands an operation on; gives it back where there is no room.
    fn carry_out(&mut self, token: OpToken, act: Act) -> Result<(), Act> {
        let (op, errno) = match act {
            Act::Ended(result) => {
                self.at_once.push(Ended { token, result });
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
        self.ops.insert(token, act);
    }

    /// Hands on what was held long enough, as far as there is room.
    fn release(&mut self) {
        let now = Instant::now();
        while let Some(&Reverse((until, token))) = self.held.peek()
            && until <= now
        {
            self.held.pop();
            self.due.push_back(token);
        }
        while let Some(token) = self.due.pop_front() {
            let Some(act) = self.ops.remove(&token) else { continue };
            if let Err(act) = self.carry_out(token, act) {
                self.ops.insert(token, act);
                self.due.push_front(token);
                return;
            }
        }
    }

    /// Waits below; what has ended is what the rules make of it.
    fn wait_below(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        let waited = self.inner.wait(wake, ended);
        for end in ended.iter_mut().skip(before) {
            self.below = self.below.saturating_sub(1);
            if let Some(errno) = self.to_fail.remove(&end.token)
                && end.result.is_ok()
            {
                end.result = Err(io::Error::from_raw_os_error(errno));
            }
        }
        waited
    }

    /// Has the doorbell rung when the first of what is held may begin.
    fn set_alarm(&mut self, doorbell: &Arc<EventFd>) -> io::Result<()> {
        let Some(&Reverse((until, _))) = self.held.peek() else { return Ok(()) };
        let alarm = match self.alarm.take() {
            Some(alarm) => alarm,
            None => Alarm::start()?,
        };
        self.alarm.insert(alarm).set(until, doorbell);
        Ok(())
    }

    /// Nothing but what is held can end: sleeps until the first of it may begin.
    fn sleep(&self) {
        if let Some(Reverse((until, _))) = self.held.peek() {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
    }
}

/// The same without RWF_DSYNC.
fn without_sync(op: HostOp) -> HostOp {
    match op {
        HostOp::Writev { iov, offset, .. } => HostOp::Writev { iov, offset, dsync: false },
        other => other,
    }
}

/// What the kernel would answer.
fn bytes_of(op: &HostOp) -> usize {
    match op {
        HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => {
            usize::try_from(iov.bytes()).unwrap_or(usize::MAX)
        }
        _ => 0,
    }
}

/// At least one unit, and not all; `None` where there are no two.
fn some_of(bytes: u64, unit: u64, dice: u64) -> Option<u64> {
    let units = bytes.div_ceil(unit);
    (units > 1).then(|| (1 + dice % (units - 1)) * unit)
}

impl Engine for FaultEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        // An operation is counted once, however often it is handed over.
        let plan = match self.refused.take() {
            Some((refused, plan)) if refused == token => plan,
            _ => self.faults.plan(&op, &self.image.beside_queues),
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
            if !self.at_once.is_empty() {
                ended.append(&mut self.at_once);
                may_block = false;
            }
            match wake {
                Wake::Doorbell(_) | Wake::EndOnly if !may_block => {
                    return self.wait_below(Wake::Now, ended);
                }
                Wake::EndOnly if self.below == 0 && !self.held.is_empty() => self.sleep(),
                Wake::Doorbell(doorbell) => {
                    self.set_alarm(doorbell)?;
                    self.wait_below(wake, ended)?;
                    // Woken for what is held, perhaps: it begins now.
                    self.release();
                    ended.append(&mut self.at_once);
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
        is_due || !self.at_once.is_empty() || !self.due.is_empty() || self.inner.is_ready()
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
