//! How writes become stable, and the group commit.
//!
//! Owns the choice between RWF_DSYNC, one fdatasync per write and one for many, and which requests wait
//! for which fdatasync. [`super::cache`] decides whether a write must be stable at all;
//! [`super::disk_queue`] judges what the kernel answers.
//!
//! One rule makes this correct: an fdatasync counts only for the requests that joined before it started
//! (virtio 5.2.6.2). A write joins when its last byte has been written. A FLUSH joins when it is taken from
//! the queue.
//!
//! ```text
//! stable write ─ transfer ─ ended ──┐
//! FLUSH ────────────────────────────┴─ joins ─→ waiting ─ fdatasync starts ─→ running ─→ complete
//! ```

use super::op::RequestId;

/// How a write that must be stable is made stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StableBy {
    /// RWF_DSYNC on each write.
    Dsync,
    /// Each write, then an fdatasync for it alone.
    Fdatasync,
    /// All writes in flight, then one fdatasync for all of them.
    Group,
    /// `Dsync` for a write that is alone in flight, `Group` for several. Always `Group` on a block device whose
    /// disk has no FUA: there an O_DIRECT `pwritev2` with RWF_DSYNC costs two flushes, one for the write and one
    /// of the sync behind it. (Through io_uring no sync follows, so it is one flush; `Group` costs one too.) H3.
    Auto,
}

impl StableBy {
    /// All variants, in the order of `--help`.
    pub const ALL: [StableBy; 4] = [StableBy::Dsync, StableBy::Fdatasync, StableBy::Group, StableBy::Auto];

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            StableBy::Dsync => "dsync",
            StableBy::Fdatasync => "fdatasync",
            StableBy::Group => "group",
            StableBy::Auto => "auto",
        }
    }

    /// Returns the variant with that name, or `None` if there is none.
    pub fn by_name(name: &str) -> Option<StableBy> {
        Self::ALL.into_iter().find(|by| by.name() == name)
    }
}

/// A request that waits for an fdatasync; `None` for a sync that no request asked for.
pub(super) type Member = Option<RequestId>;

/// The shared fdatasyncs of one queue. At most one is running at a time.
#[derive(Default)]
pub(super) struct Group {
    /// The members that joined since the running sync started.
    waiting: Vec<Member>,
    /// `true` if a waiting member is a FLUSH or a sync of our own: the next sync then waits for no write.
    urgent: bool,
    /// `true` if a sync of our own is in `waiting`.
    own_waits: bool,
    /// The members that the running sync is for; `None` if no sync is running.
    running: Option<Vec<Member>>,
    /// Empty lists to reuse, so that a sync allocates nothing.
    spare: Vec<Vec<Member>>,
}

impl Group {
    /// Returns `true` if no member waits and no sync is running.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }

    /// Adds a member to the next sync. An urgent member makes that sync start without waiting for writes.
    pub(super) fn joins(&mut self, member: Member, urgent: bool) {
        self.urgent |= urgent;
        // One waiting sync of our own is enough, however often the guest gives cause for one (R23).
        if member.is_some() || !std::mem::replace(&mut self.own_waits, true) {
            self.waiting.push(member);
        }
    }

    /// Returns `true` if a sync must start now. `writing` is the number of stable writes that still move bytes.
    ///
    /// Only one sync runs at a time; members that join meanwhile share the next one. The next sync waits for the
    /// `writing` writes unless an urgent member waits. That wait is bounded: none of these writes completes
    /// before the sync, so no more can come than the queue has entries.
    pub(super) fn is_due(&self, writing: usize) -> bool {
        !self.waiting.is_empty() && self.running.is_none() && (self.urgent || writing == 0)
    }

    /// Records that a sync starts. It is for all members that wait now.
    pub(super) fn starts(&mut self) {
        let next = self.spare.pop().unwrap_or_default();
        self.running = Some(std::mem::replace(&mut self.waiting, next));
        (self.urgent, self.own_waits) = (false, false);
    }

    /// Returns the requests that the running sync is for.
    pub(super) fn running(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.running.iter().flatten().copied().flatten()
    }

    /// Records that the sync has completed, and returns its members. Give the list back with [`Group::recycle`].
    pub(super) fn ends(&mut self) -> Vec<Member> {
        self.running.take().unwrap_or_default()
    }

    /// Takes a list back, to use it again.
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
            // The running sync started before this switch, so it does not count for it.
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
