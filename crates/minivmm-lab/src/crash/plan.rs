//! Which states are tried, in which order.
//!
//! Owns the walk over points and their states, and that no disk is tried twice: within the reach of one
//! flush different points and names can mean the same one. Points go forward, so that a worker's copy
//! only has to go forward too.

use std::collections::HashSet;

use super::legal::{Extent, Pending, StateName, fingerprint};
use super::log::WriteLog;

/// What of the writes that no flush has spoken for is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lose {
    /// Any of them, or none.
    Any,
    /// None of them: the worst that can happen to a promise.
    All,
    /// All of them: only the host has crashed, the disk's own cache has survived.
    Nothing,
}

/// How many states, and of which kind.
#[derive(Debug, Clone, Copy)]
pub struct Breadth {
    /// At most so many a point.
    pub states: usize,
    /// Where chance begins.
    pub seed: u64,
    /// Writes may be there in part.
    pub torn: bool,
    /// Which writes may be lost.
    pub lose: Lose,
}

impl Default for Breadth {
    fn default() -> Self {
        Self { states: 64, seed: 1, torn: false, lose: Lose::Any }
    }
}

/// A state to be tried.
#[derive(Debug, Clone)]
pub struct Task {
    /// Entries that had ended.
    pub point: usize,
    /// Entries that are there for certain.
    pub settled: usize,
    /// What it is called.
    pub name: StateName,
    /// What is there besides.
    pub extents: Vec<Extent>,
}

/// All tasks of a campaign, one after the other.
pub struct Plan<'a> {
    log: &'a WriteLog,
    breadth: Breadth,
    points: std::vec::IntoIter<usize>,
    /// No more states than this come of them.
    ahead: u64,
    here: Option<Here<'a>>,
    /// The only one.
    alone: Option<Task>,
    seen: HashSet<u128>,
}

/// The point at which we are.
struct Here<'a> {
    point: usize,
    pending: Pending<'a>,
    names: Box<dyn Iterator<Item = StateName> + Send>,
    /// States that it may still give.
    left: usize,
    /// Names that may still be looked at: chance finds the last few states of a point late or never.
    looks: usize,
}

impl<'a> Plan<'a> {
    /// Over these points, which ascend.
    pub fn new(log: &'a WriteLog, points: Vec<usize>, breadth: Breadth) -> Self {
        let points = points.into_iter();
        let mut plan = Self { log, breadth, points, ahead: 0, here: None, alone: None, seen: HashSet::new() };
        plan.ahead = plan.points.as_slice().iter().map(|&point| plan.most_at(point)).sum();
        plan
    }

    /// This one state, and no other.
    pub fn of_one(log: &'a WriteLog, task: Task) -> Self {
        Self { alone: Some(task), ..Self::new(log, Vec::new(), Breadth::default()) }
    }

    /// Points that have not been reached yet.
    pub fn points(&self) -> usize {
        self.points.len() + usize::from(self.alone.is_some())
    }

    /// States that have come.
    pub fn given(&self) -> u64 {
        self.seen.len() as u64
    }

    /// No more than so many states come.
    pub fn at_most(&self) -> u64 {
        let here = self.here.as_ref().map_or(0, |here| here.left as u64);
        u64::from(self.alone.is_some()) + here + self.ahead
    }

    /// No more than so many at this point.
    fn most_at(&self, point: usize) -> u64 {
        let choices = Pending::at(self.log, point, self.breadth.torn).choices();
        let all = u32::try_from(choices).ok().and_then(|choices| 1u64.checked_shl(choices));
        all.unwrap_or(u64::MAX).min(self.states() as u64)
    }

    fn states(&self) -> usize {
        if self.breadth.lose == Lose::Any { self.breadth.states } else { 1 }
    }

    fn arrive(&self, point: usize) -> Here<'a> {
        let Breadth { states, seed, torn, lose } = self.breadth;
        let pending = Pending::at(self.log, point, torn);
        let names: Box<dyn Iterator<Item = StateName> + Send> = match lose {
            Lose::Any => pending.names(states, seed),
            Lose::All => Box::new([StateName::None].into_iter()),
            Lose::Nothing => Box::new([StateName::All].into_iter()),
        };
        Here { point, pending, names, left: self.states(), looks: states.saturating_mul(4) }
    }
}

impl Iterator for Plan<'_> {
    type Item = Task;

    fn next(&mut self) -> Option<Task> {
        if let Some(task) = self.alone.take() {
            self.seen.insert(fingerprint(task.settled, &task.extents));
            return Some(task);
        }
        loop {
            if self.here.as_ref().is_none_or(|here| here.left == 0 || here.looks == 0) {
                let point = self.points.next()?;
                self.ahead = self.ahead.saturating_sub(self.most_at(point));
                self.here = Some(self.arrive(point));
            }
            let here = self.here.as_mut()?;
            let Some(name) = here.names.next() else {
                here.left = 0;
                continue;
            };
            here.looks -= 1;
            let Some(extents) = here.pending.extents(name) else { continue };
            let settled = here.pending.settled;
            if self.seen.insert(fingerprint(settled, &extents)) {
                here.left -= 1;
                return Some(Task { point: here.point, settled, name, extents });
            }
        }
    }
}

/// The one state of that name.
pub fn one(log: &WriteLog, point: usize, name: StateName) -> Option<Task> {
    if point > log.entries.len() {
        return None;
    }
    let pending = Pending::at(log, point, name.is_torn());
    let extents = pending.extents(name)?;
    Some(Task { point, settled: pending.settled, name, extents })
}
