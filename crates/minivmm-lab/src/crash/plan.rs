//! Chooses which states are tried, and in which order.
//!
//! Owns the walk over the points and their states. No disk is tried twice: until the next flush, different
//! points and names can mean the same disk. Points ascend, so that a worker's copy of the disk never has to go
//! back.

use std::collections::HashSet;

use super::legal::{Extent, Pending, StateName, fingerprint};
use super::log::WriteLog;

/// Which of the writes that no flush has covered are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lose {
    /// Any of them, or none.
    Any,
    /// All of them, which is the worst case.
    All,
    /// None of them: the host crashed, but the disk kept its volatile cache.
    Nothing,
}

/// How many states are tried, and which.
#[derive(Debug, Clone, Copy)]
pub struct Breadth {
    /// Most states per point.
    pub states: usize,
    /// Seed of the random choices.
    pub seed: u64,
    /// True if writes may be there in part.
    pub torn: bool,
    /// Which writes may be lost.
    pub lose: Lose,
}

impl Default for Breadth {
    fn default() -> Self {
        Self { states: 64, seed: 1, torn: false, lose: Lose::Any }
    }
}

/// A state that is to be tried.
#[derive(Debug, Clone)]
pub struct Task {
    /// Number of entries that had completed.
    pub point: usize,
    /// Number of entries that are certainly on the disk.
    pub settled: usize,
    /// Name of the state.
    pub name: StateName,
    /// What is on the disk besides the settled entries.
    pub extents: Vec<Extent>,
}

/// All tasks of a campaign, in order.
pub struct Plan<'a> {
    log: &'a WriteLog,
    breadth: Breadth,
    points: std::vec::IntoIter<usize>,
    /// Upper bound of the number of states of the remaining points.
    ahead: u64,
    current: Option<CurrentPoint<'a>>,
    /// The only task, if a single state is repeated; `None` otherwise or once it was returned.
    alone: Option<Task>,
    seen: HashSet<u128>,
}

/// The current point.
struct CurrentPoint<'a> {
    point: usize,
    pending: Pending<'a>,
    names: Box<dyn Iterator<Item = StateName> + Send>,
    /// Number of states that this point may still yield.
    states_left: usize,
    /// Number of names that may still be tried. Random choices find the last few states of a point late or
    /// never.
    names_left: usize,
}

impl<'a> Plan<'a> {
    /// Creates a plan for these points, which must ascend.
    pub fn new(log: &'a WriteLog, points: Vec<usize>, breadth: Breadth) -> Self {
        let points = points.into_iter();
        let mut plan =
            Self { log, breadth, points, ahead: 0, current: None, alone: None, seen: HashSet::new() };
        plan.ahead = plan.points.as_slice().iter().map(|&point| plan.most_at(point)).sum();
        plan
    }

    /// Creates a plan of this one task.
    pub fn of_one(log: &'a WriteLog, task: Task) -> Self {
        Self { alone: Some(task), ..Self::new(log, Vec::new(), Breadth::default()) }
    }

    /// Returns the number of points that were not yet reached.
    pub fn points(&self) -> usize {
        self.points.len() + usize::from(self.alone.is_some())
    }

    /// Returns the number of states that were returned so far.
    pub fn given(&self) -> u64 {
        self.seen.len() as u64
    }

    /// Returns an upper bound of the number of states still to come.
    pub fn at_most(&self) -> u64 {
        let current = self.current.as_ref().map_or(0, |current| current.states_left as u64);
        u64::from(self.alone.is_some()) + current + self.ahead
    }

    /// Returns an upper bound of the number of states of this point.
    fn most_at(&self, point: usize) -> u64 {
        let choices = Pending::at(self.log, point, self.breadth.torn).choices();
        let all = u32::try_from(choices).ok().and_then(|choices| 1u64.checked_shl(choices));
        all.unwrap_or(u64::MAX).min(self.states() as u64)
    }

    fn states(&self) -> usize {
        if self.breadth.lose == Lose::Any { self.breadth.states } else { 1 }
    }

    fn arrive(&self, point: usize) -> CurrentPoint<'a> {
        let Breadth { states, seed, torn, lose } = self.breadth;
        let pending = Pending::at(self.log, point, torn);
        let names: Box<dyn Iterator<Item = StateName> + Send> = match lose {
            Lose::Any => pending.names(states, seed),
            Lose::All => Box::new([StateName::None].into_iter()),
            Lose::Nothing => Box::new([StateName::All].into_iter()),
        };
        CurrentPoint {
            point,
            pending,
            names,
            states_left: self.states(),
            names_left: states.saturating_mul(4),
        }
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
            if self.current.as_ref().is_none_or(|current| current.states_left == 0 || current.names_left == 0)
            {
                let point = self.points.next()?;
                self.ahead = self.ahead.saturating_sub(self.most_at(point));
                self.current = Some(self.arrive(point));
            }
            let current = self.current.as_mut()?;
            let Some(name) = current.names.next() else {
                current.states_left = 0;
                continue;
            };
            current.names_left -= 1;
            let Some(extents) = current.pending.extents(name) else { continue };
            let settled = current.pending.settled;
            if self.seen.insert(fingerprint(settled, &extents)) {
                current.states_left -= 1;
                return Some(Task { point: current.point, settled, name, extents });
            }
        }
    }
}

/// Returns the task for the state of this name; `None` if there is no such point or state.
pub fn one(log: &WriteLog, point: usize, name: StateName) -> Option<Task> {
    if point > log.entries.len() {
        return None;
    }
    let pending = Pending::at(log, point, name.is_torn());
    let extents = pending.extents(name)?;
    Some(Task { point, settled: pending.settled, name, extents })
}
