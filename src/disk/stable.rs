//! How writes become stable, and the group commit.
//!
//! Owns the choice between RWF_DSYNC, an fdatasync of a write's own and one for many, and who waits
//! for which fdatasync. Whether a write must be stable at all is the business of [`super::cache`];
//! what the kernel answers is judged by [`super::disk_queue`].
//!
//! One rule keeps it right: an fdatasync speaks only for those that had joined before it started
//! (virtio 5.2.6.2). A write joins when its last byte has ended; a FLUSH when it is taken from the
//! queue.
//!
//! ```text
//! stable write ─ transfer ─ ended ──┐
//! FLUSH ────────────────────────────┴─ joins ─→ waiting ─ fdatasync starts ─→ running ─→ complete
//! ```

use super::op::RequestId;
use crate::mutants::{Mutant, is_on};

/// How a write is made stable where it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StableBy {
    /// RWF_DSYNC on each write.
    Dsync,
    /// A write, then an fdatasync of its own.
    Fdatasync,
    /// The writes in flight, then one fdatasync for all of them.
    Group,
    /// A write that is alone as `Dsync`, several as `Group`; on a block device whose disk has no
    /// FUA, where a DSYNC write costs two flushes, always as `Group`.
    Auto,
}

impl StableBy {
    /// All ways, in the order of the help.
    pub const ALL: [StableBy; 4] = [StableBy::Dsync, StableBy::Fdatasync, StableBy::Group, StableBy::Auto];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            StableBy::Dsync => "dsync",
            StableBy::Fdatasync => "fdatasync",
            StableBy::Group => "group",
            StableBy::Auto => "auto",
        }
    }

    /// The way of that name.
    pub fn by_name(name: &str) -> Option<StableBy> {
        Self::ALL.into_iter().find(|by| by.name() == name)
    }
}

/// A request that waits for an fdatasync; `None` for a sync of our own.
pub(super) type Member = Option<RequestId>;

/// The shared fdatasyncs of one queue: at most one is running.
#[derive(Default)]
pub(super) struct Group {
    /// Joined since the running sync started.
    waiting: Vec<Member>,
    /// Somebody who waits is a FLUSH: it waits for no write.
    urgent: bool,
    /// Among them is a sync of our own.
    own_waits: bool,
    /// A sync is running for these.
    running: Option<Vec<Member>>,
    /// Emptied lists, so that a sync allocates nothing.
    spare: Vec<Vec<Member>>,
}

impl Group {
    /// Nobody waits or is being synced.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }

    /// Waits for the next sync to start; an urgent member makes it start at once.
    pub(super) fn joins(&mut self, member: Member, urgent: bool) {
        if is_on(Mutant::GroupTakesLatecomers)
            && let Some(running) = &mut self.running
        {
            running.push(member);
            return;
        }
        self.urgent |= urgent;
        // A sync of our own is the same sync, however often the guest gives cause for it (R23).
        if member.is_some() || !std::mem::replace(&mut self.own_waits, true) {
            self.waiting.push(member);
        }
    }

    /// Returns `true` if a sync must start now, with `writing` stable writes that still move bytes. One sync at a
    /// time: those who come meanwhile share the next. Unless a FLUSH waits, the sync waits for these writes. That
    /// wait ends: no more writes can come than the queue has entries, since none of them completes before.
    pub(super) fn is_due(&self, writing: usize) -> bool {
        self.running.is_none() && !self.waiting.is_empty() && (self.urgent || writing == 0)
    }

    /// A sync starts: it speaks for all who wait now.
    pub(super) fn starts(&mut self) {
        let next = self.spare.pop().unwrap_or_default();
        self.running = Some(std::mem::replace(&mut self.waiting, next));
        (self.urgent, self.own_waits) = (false, false);
    }

    /// Whom the running sync is for, without our own.
    pub(super) fn running(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.running.iter().flatten().copied().flatten()
    }

    /// The sync has ended; whom it was for. Give the list back with [`Group::recycle`].
    pub(super) fn ends(&mut self) -> Vec<Member> {
        self.running.take().unwrap_or_default()
    }

    /// Takes an emptied list back.
    pub(super) fn recycle(&mut self, mut members: Vec<Member>) {
        members.clear();
        if self.spare.len() < 4 {
            self.spare.push(members);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> Member {
        Some(RequestId(number))
    }

    #[test]
    fn names_are_told_apart_and_found_again() {
        for by in StableBy::ALL {
            assert_eq!(StableBy::by_name(by.name()), Some(by));
        }
        assert_eq!(StableBy::by_name("fsync"), None);
    }

    #[test]
    fn writes_wait_for_each_other_and_share_one_sync() {
        let mut group = Group::default();
        group.joins(id(1), false);
        assert!(!group.is_due(1), "the other is still being written");
        group.joins(id(2), false);
        assert!(group.is_due(0));
        group.starts();
        assert!(!group.is_due(0));
        assert_eq!(group.ends(), [id(1), id(2)]);
        assert!(group.is_idle());
    }

    /// Shows H2.
    #[test]
    fn a_flush_waits_for_no_write_but_for_the_running_sync() {
        let mut group = Group::default();
        group.joins(id(1), true);
        assert!(group.is_due(1));
        group.starts();
        group.joins(id(2), true);
        assert!(!group.is_due(1), "one at a time");
        assert_eq!(group.ends(), [id(1)], "who came later is not spoken for");
        assert!(group.is_due(0));
    }

    #[test]
    fn a_guest_that_turns_its_cache_off_again_and_again_waits_for_one_sync() {
        let mut group = Group::default();
        group.joins(id(1), true);
        group.starts();
        for _ in 0..1000 {
            group.joins(None, true);
        }
        assert_eq!(group.ends(), [id(1)]);
        group.starts();
        assert_eq!(group.ends(), [None]);
    }

    #[test]
    fn each_time_the_guest_turns_its_cache_off_there_is_a_sync_that_starts_after_it() {
        let mut group = Group::default();
        for round in 0..3 {
            group.joins(None, true);
            assert!(group.is_due(0), "round {round}");
            group.starts();
            // While that one runs: it started before.
            group.joins(None, true);
            assert_eq!(group.ends(), [None], "round {round}");
            assert!(group.is_due(0), "round {round}: the running sync does not count for the second switch");
            group.starts();
            assert_eq!(group.ends(), [None], "round {round}");
            assert!(group.is_idle());
        }
    }

    #[test]
    fn lists_are_used_again() {
        let mut group = Group::default();
        for round in 0..3 {
            group.joins(id(round), true);
            group.starts();
            let members = group.ends();
            assert_eq!(members, [id(round)]);
            group.recycle(members);
        }
        assert_eq!(group.spare.len(), 1);
    }
}
