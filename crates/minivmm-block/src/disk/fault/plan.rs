//! The decision of what happens to each operation, from a disk's rules and their counts.
//!
//! Owns the counts, which all queues of a disk share, and the random choices. The same rules, seed and order of
//! operations give the same plans. [`super`] carries the plans out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::spec::{Action, FaultSpec, FaultedOp, Rule, When};
use crate::disk::counters::Counters;
use crate::disk::engine::HostOp;
use crate::disk::geometry::SECTOR;

/// The rules of one disk and their counts. All its queues share one.
#[derive(Debug)]
pub struct Faults {
    spec: FaultSpec,
    /// How many operations each rule has matched so far.
    seen: Vec<AtomicU64>,
}

/// What is to be done with one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// How long it is held before it begins.
    pub(super) delay: Duration,
    /// What happens to it then; `None` for nothing.
    pub(super) fate: Option<Fate>,
}

/// The fault that an operation suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is not done, and fails with this errno.
    Fail(i32),
    /// A write with RWF_DSYNC is written without it, and fails with this errno.
    FailSync(i32),
    /// Only the beginning is transferred; the number decides its length.
    Short(u64),
    /// Only the first or last blocks are written, and it fails; the number decides which blocks.
    Tear(u64),
    /// It is not done, and succeeds.
    Lose,
    /// A write with RWF_DSYNC is written without it, and succeeds.
    LoseSync,
}

impl Faults {
    /// Returns the rules with all counts at 0.
    pub fn new(spec: FaultSpec) -> Self {
        let seen = spec.rules.iter().map(|_| AtomicU64::new(0)).collect();
        Self { spec, seen }
    }

    /// Returns the rules.
    pub fn spec(&self) -> &FaultSpec {
        &self.spec
    }

    /// Returns `true` if any rule can delay an operation.
    pub(super) fn may_delay(&self) -> bool {
        self.spec.rules.iter().any(|rule| matches!(rule.action, Action::Delay(_)))
    }

    /// Applies the rules to the next operation. All delays add up; of the other actions only the first counts.
    pub(super) fn plan(&self, op: &HostOp, counters: &Counters) -> Plan {
        let mut plan = Plan { delay: Duration::ZERO, fate: None };
        for (number, (rule, seen)) in (0u64..).zip(self.spec.rules.iter().zip(&self.seen)) {
            if !rule.is_about(op) {
                continue;
            }
            let count = seen.fetch_add(1, Ordering::SeqCst) + 1;
            let dice = mix(mix(self.spec.seed, number), count);
            if !rule.when.is_now(count, dice) {
                continue;
            }
            match rule.action {
                Action::Delay(time) => plan.delay = plan.delay.saturating_add(time),
                _ if plan.fate.is_some() => {}
                action => plan.fate = Some(fate(action, rule.kind, op, mix(dice, 1))),
            }
        }
        plan.count(counters);
        plan
    }
}

impl Plan {
    fn count(&self, counters: &Counters) {
        if !self.delay.is_zero() {
            Counters::count(&counters.faults_delayed);
        }
        if let Some(fate) = self.fate {
            Counters::count(match fate {
                Fate::Fail(_) | Fate::FailSync(_) => &counters.faults_failed,
                Fate::Short(_) => &counters.faults_shortened,
                Fate::Tear(_) => &counters.faults_torn,
                Fate::Lose | Fate::LoseSync => &counters.faults_lost,
            });
        }
    }
}

fn fate(action: Action, kind: FaultedOp, op: &HostOp, dice: u64) -> Fate {
    // For a rule about flushes, a stable write is only its sync, not the write itself.
    let sync_of_write = kind == FaultedOp::Flush && matches!(op, HostOp::Writev { .. });
    match action {
        Action::Fail(errno) if sync_of_write => Fate::FailSync(errno),
        Action::Fail(errno) => Fate::Fail(errno),
        Action::Lose if sync_of_write => Fate::LoseSync,
        Action::Lose | Action::Delay(_) => Fate::Lose,
        Action::Short => Fate::Short(dice),
        Action::Tear => Fate::Tear(dice),
    }
}

impl Rule {
    fn is_about(&self, op: &HostOp) -> bool {
        let is_kind = match self.kind {
            FaultedOp::Read => matches!(op, HostOp::Readv { .. }),
            FaultedOp::Write => matches!(op, HostOp::Writev { .. }),
            FaultedOp::Flush => op.is_sync(),
            FaultedOp::Discard => matches!(op, HostOp::PunchHole { .. } | HostOp::ZeroRange { .. }),
        };
        is_kind && self.sectors.as_ref().is_none_or(|sectors| touches(op, *sectors.start(), *sectors.end()))
    }
}

impl When {
    fn is_now(self, count: u64, dice: u64) -> bool {
        match self {
            When::Always => true,
            When::Nth(nth) => count == nth,
            When::Every(step) => count.is_multiple_of(step),
            When::Chance(percent) => dice % 100 < u64::from(percent),
        }
    }
}

/// Returns `true` if the operation touches one of these sectors.
fn touches(op: &HostOp, first: u64, last: u64) -> bool {
    let (offset, bytes) = match op {
        HostOp::Readv { iov, offset } | HostOp::Writev { iov, offset, .. } => (*offset, iov.bytes()),
        HostOp::PunchHole { offset, len, .. } | HostOp::ZeroRange { offset, len } => (*offset, *len),
        HostOp::Fdatasync => return false,
    };
    bytes > 0 && offset / SECTOR <= last && offset.saturating_add(bytes - 1) / SECTOR >= first
}

/// Mixes two numbers into a third that looks random (splitmix64).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_add(b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(sector: u64) -> HostOp {
        HostOp::PunchHole { offset: sector * SECTOR, len: SECTOR, must_zero: false }
    }

    /// Returns which of the first `count` operations suffer a fault.
    fn hits(spec: &str, count: u64, op: impl Fn(u64) -> HostOp) -> Vec<u64> {
        let faults = Faults::new(spec.parse().unwrap());
        let counters = Counters::default();
        (1..=count).filter(|&number| faults.plan(&op(number), &counters).fate.is_some()).collect()
    }

    #[test]
    fn each_rule_counts_what_it_is_about() {
        let flush = |_| HostOp::Fdatasync;
        assert_eq!(hits("fail:flush:nth=3", 5, flush), [3]);
        assert_eq!(hits("fail:flush:every=2", 5, flush), [2, 4]);
        assert_eq!(hits("flush-fail=once", 5, flush), [1]);
        assert_eq!(hits("fail:flush", 3, flush), [1, 2, 3]);
        assert_eq!(hits("fail:read", 3, flush), [0; 0]);
        // The second of the operations in the range.
        assert_eq!(hits("fail:discard:sectors=4-6:nth=2", 9, hole), [5]);
        assert_eq!(hits("fail:discard:sectors=4-4", 9, hole), [4]);
    }

    #[test]
    fn chance_is_the_same_for_the_same_seed_and_about_as_often_as_it_says() {
        let flush = |_| HostOp::Fdatasync;
        let first = hits("fail:flush:chance=25%+seed=1", 1000, flush);
        assert_eq!(first, hits("fail:flush:chance=25%+seed=1", 1000, flush));
        assert_ne!(first, hits("fail:flush:chance=25%+seed=2", 1000, flush));
        assert!((200..=300).contains(&first.len()), "{}", first.len());
    }

    #[test]
    fn delays_add_up_and_the_first_of_the_rest_counts() {
        let faults = Faults::new("delay=1ms:flush+lose:flush+delay=2ms:flush+fail:flush".parse().unwrap());
        let counters = Counters::default();
        let plan = faults.plan(&HostOp::Fdatasync, &counters);
        assert_eq!(plan, Plan { delay: Duration::from_millis(3), fate: Some(Fate::Lose) });
        let counted = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        assert_eq!((counted(&counters.faults_delayed), counted(&counters.faults_lost)), (1, 1));
        assert_eq!(counted(&counters.faults_failed), 0);
    }
}
