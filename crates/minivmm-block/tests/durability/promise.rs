//! What the device has promised: the *spec floor*, computed from device events alone (virtio
//! 5.2.6.2, B5). Knows nothing of host operations.

use super::storage::{INITIAL, Tag};

/// A request that changes sectors.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    pub tag: Tag,
    pub from: usize,
    pub to: usize,
    pub submitted: u64,
    pub completed: Option<u64>,
    pub ok: bool,
    /// A discard: the sectors may read as zeroes or as before.
    pub is_advice: bool,
    pub stable: bool,
}

/// Every change so far.
pub struct Promises {
    changes: Vec<Change>,
}

impl Promises {
    pub fn new() -> Self {
        let initial = Change {
            tag: INITIAL,
            from: 0,
            to: usize::MAX,
            submitted: 0,
            completed: Some(0),
            ok: true,
            is_advice: false,
            stable: true,
        };
        Self { changes: vec![initial] }
    }

    pub fn submitted(&mut self, change: Change) -> usize {
        self.changes.push(change);
        self.changes.len() - 1
    }

    /// Reported to the driver; `stable` if the rule says so of a write that completes now.
    pub fn completed(&mut self, index: usize, now: u64, ok: bool, stable: bool) {
        let change = &mut self.changes[index];
        change.completed = Some(now);
        change.ok = ok;
        change.stable = ok && stable;
    }

    /// A FLUSH that was submitted then has been reported OK.
    pub fn flushed(&mut self, submitted: u64) {
        for change in &mut self.changes {
            change.stable |= change.ok && change.completed.is_some_and(|at| at < submitted);
        }
    }

    /// All of them, in the order of their submissions.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    fn of(&self, sector: usize) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |change| (change.from..change.to).contains(&sector))
    }

    /// What may be found in a sector after a power failure now.
    pub fn legal_after_crash(&self, sector: usize) -> Vec<Tag> {
        self.not_older_than(sector, |w| w.stable)
    }

    /// The same, were everything stable that the driver was told is written.
    pub fn legal_were_all_stable(&self, sector: usize) -> Vec<Tag> {
        self.not_older_than(sector, |w| w.ok)
    }

    fn not_older_than(&self, sector: usize, counts: impl Fn(&Change) -> bool) -> Vec<Tag> {
        let is_dead = |v: &Change| {
            self.of(sector)
                .any(|w| counts(w) && !w.is_advice && v.completed.is_some_and(|at| at < w.submitted))
        };
        self.of(sector).filter(|v| !is_dead(v)).map(|v| v.tag).collect()
    }

    /// What a read that was submitted then may find in a sector now, without any crash (I4).
    pub fn legal_to_read(&self, sector: usize, submitted: u64) -> Vec<Tag> {
        let is_covered = |v: &Change| {
            self.of(sector).any(|w| {
                let was_there = w.ok && w.completed.is_some_and(|at| at < submitted);
                was_there && !w.is_advice && v.completed.is_some_and(|at| at < w.submitted)
            })
        };
        self.of(sector).filter(|v| !is_covered(v)).map(|v| v.tag).collect()
    }
}
