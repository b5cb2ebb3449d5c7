//! Which syncs of a disk overlap, and when a success may be trusted (E7).
//!
//! Linux reports a writeback error to only one of several concurrent fsyncs. A successful sync is therefore
//! trusted only after every sync that overlapped it has been judged. To judge a sync is to check its result
//! and to act on its error, if it has one.
//!
//! This file owns that rule. The error latch ([`super::latch`]) and the write log ([`super::writelog`]) each keep
//! a ledger of their own, because they judge results at different moments.

/// The number of a sync in its ledger. Later syncs have larger numbers.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
pub struct SyncTicket(u64);

/// The open syncs: those that an engine has, and those whose result nobody has judged yet.
#[derive(Debug, Default)]
pub struct SyncLedger {
    /// How many syncs were ever entered.
    opened: u64,
    /// Sorted by number, oldest first.
    open: Vec<SyncTicket>,
}

impl SyncLedger {
    /// Enters a sync and returns its number. Call this before the engine may begin it, so that no overlap is missed.
    pub fn open(&mut self) -> SyncTicket {
        self.opened += 1;
        let ticket = SyncTicket(self.opened);
        self.open.push(ticket);
        ticket
    }

    /// Removes a sync from the open ones. Call this after its error has been acted on.
    pub fn judge(&mut self, ticket: SyncTicket) {
        self.open.retain(|&other| other != ticket);
    }

    /// Returns the newest open sync, or `None` if there is nothing to wait for. A success that is reported now
    /// counts once that sync and all before it are judged.
    pub fn horizon(&self) -> Option<SyncTicket> {
        self.open.last().copied()
    }

    /// Returns `true` if the sync `horizon` and all syncs opened before it are judged.
    pub fn is_settled(&self, horizon: SyncTicket) -> bool {
        self.open.first().is_none_or(|&oldest| oldest > horizon)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows E7.
    #[test]
    fn a_success_is_settled_when_all_syncs_that_were_open_are_judged() {
        let mut ledger = SyncLedger::default();
        assert_eq!(ledger.horizon(), None);
        let (first, second) = (ledger.open(), ledger.open());
        ledger.judge(second);
        let horizon = ledger.horizon().unwrap();
        let _later = ledger.open();
        assert!(!ledger.is_settled(horizon));
        ledger.judge(first);
        assert!(ledger.is_settled(horizon), "what was opened later does not matter");
    }

    #[test]
    fn a_success_waits_for_the_newest_sync_that_was_open_and_for_each_before_it() {
        for judged_first in 0..3 {
            let mut ledger = SyncLedger::default();
            let syncs = [ledger.open(), ledger.open(), ledger.open()];
            let horizon = ledger.horizon().unwrap();
            assert_eq!(horizon, syncs[2]);
            for step in 0..3 {
                assert!(!ledger.is_settled(horizon), "{step} of 3 are judged, from number {judged_first} on");
                ledger.judge(syncs[(judged_first + step) % 3]);
            }
            assert!(ledger.is_settled(horizon));
        }
    }
}
