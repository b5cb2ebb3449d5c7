//! A request in flight, and what may follow each of its operations.
//!
//! Owns the set of flights of one queue and the counts derived from it.

use super::engine::{HostOp, OpToken};
use super::erase::Erase;
use super::monitor::SyncStart;
use super::op::DiskError;
use super::stable::Member;
use super::sync_ledger::SyncTicket;
use super::transfer::Transfer;
use crate::slab::Slab;

/// A request in flight. Exactly one host operation of it is in the engine or waits to be handed over.
pub(super) struct Flight {
    /// `None` for a sync that this queue makes for itself, such as the shared fdatasync.
    pub(super) id: Member,
    /// The guest's `writeback` byte when the request was submitted.
    pub(super) wb_at_submit: bool,
    pub(super) stage: Stage,
    /// Bytes that the guest sees changed, for the monitor.
    pub(super) writes: u64,
    /// `true` if the next shared sync waits for this write.
    pub(super) grouped: bool,
}

impl Flight {
    fn new(id: Member) -> Self {
        Self { id, wb_at_submit: false, stage: Stage::Sync, writes: 0, grouped: false }
    }

    /// Puts the flight into the stage of a transfer, and returns the transfer.
    #[inline(always)]
    pub(super) fn transfers(&mut self, transfer: Transfer) -> &mut Transfer {
        self.stage = Stage::Transfer(transfer);
        match &mut self.stage {
            Stage::Transfer(transfer) => transfer,
            _ => unreachable!("stored just now"),
        }
    }

    /// Returns `true` if `next` is another operation of the write itself, and not a sync.
    pub(super) fn goes_on_writing(&self, next: &Next) -> bool {
        matches!(next, Next::Op(_)) && !self.stage.is_sync()
    }
}

/// The requests in flight of one queue, with a count of each of two kinds.
///
/// Flights are added, changed and removed only through these methods, which keep the counts right. No caller
/// has to.
#[derive(Default)]
pub(super) struct Flights {
    /// Boxed, because a flight is large and goes in and out with each of its operations.
    flights: Slab<OpToken, Box<Flight>>,
    /// Boxes of requests that have completed, to use again.
    #[allow(clippy::vec_box, reason = "a box goes back in as it is, which moves no flight")]
    spare: Vec<Box<Flight>>,
    /// The syncs that the engine has. Few flights are one, so they are kept apart.
    syncs: Vec<(OpToken, OpenSync)>,
    writing: usize,
    dsyncs: usize,
}

impl Flights {
    pub(super) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Returns the number of writes for which the next shared sync waits.
    pub(super) fn writing(&self) -> usize {
        self.writing
    }

    /// Returns the number of writes with RWF_DSYNC.
    pub(super) fn dsyncs(&self) -> usize {
        self.dsyncs
    }

    /// Returns a flight for a new request, in the stage [`Stage::Sync`]. It is not in flight yet.
    #[inline(always)]
    pub(super) fn begin(&mut self, id: Member) -> Box<Flight> {
        match self.spare.pop() {
            Some(mut flight) => {
                (flight.id, flight.wb_at_submit, flight.writes, flight.grouped) = (id, false, 0, false);
                flight
            }
            None => Box::new(Flight::new(id)),
        }
    }

    /// Adds a request that begins or goes on. It gets a new token for its next operation.
    #[inline(always)]
    pub(super) fn insert(&mut self, flight: Box<Flight>) -> OpToken {
        self.writing += usize::from(flight.grouped);
        self.dsyncs += usize::from(flight.stage.is_dsync());
        self.flights.insert(flight)
    }

    /// Keeps the box of a request that is over, and drops what it held.
    #[inline(always)]
    pub(super) fn recycle(&mut self, mut flight: Box<Flight>) {
        flight.stage = Stage::Sync;
        self.spare.push(flight);
    }

    #[inline(always)]
    pub(super) fn remove(&mut self, token: OpToken) -> Option<Box<Flight>> {
        let flight = self.flights.remove(token)?;
        self.uncount(&flight);
        Some(flight)
    }

    /// Changes a flight and returns what `change` returns, or `None` if there is no flight under `token`.
    pub(super) fn change<R>(&mut self, token: OpToken, change: impl FnOnce(&mut Flight) -> R) -> Option<R> {
        let flight = self.flights.get_mut(token)?;
        let before = (flight.grouped, flight.stage.is_dsync());
        let result = change(flight);
        let after = (flight.grouped, flight.stage.is_dsync());
        self.writing = self.writing + usize::from(after.0) - usize::from(before.0);
        self.dsyncs = self.dsyncs + usize::from(after.1) - usize::from(before.1);
        Some(result)
    }

    /// Stores the sync that is open while the engine has the flight's operation.
    pub(super) fn set_sync(&mut self, token: OpToken, sync: OpenSync) {
        self.syncs.push((token, sync));
    }

    /// Takes the sync that was open while the engine had this operation; `None` if the operation is no sync.
    pub(super) fn take_sync(&mut self, token: OpToken) -> Option<OpenSync> {
        if self.syncs.is_empty() {
            return None;
        }
        let at = self.syncs.iter().position(|&(of, _)| of == token)?;
        Some(self.syncs.swap_remove(at).1)
    }

    /// Takes all syncs that are open.
    pub(super) fn take_syncs(&mut self) -> Vec<(OpToken, OpenSync)> {
        std::mem::take(&mut self.syncs)
    }

    pub(super) fn get(&mut self, token: OpToken) -> Option<&Flight> {
        self.flights.get_mut(token).map(|flight| &**flight)
    }

    fn uncount(&mut self, flight: &Flight) {
        self.writing -= usize::from(flight.grouped);
        self.dsyncs -= usize::from(flight.stage.is_dsync());
    }
}

/// A sync that the engine has.
pub(super) struct OpenSync {
    pub(super) ticket: SyncTicket,
    /// What this sync will have made stable, for the monitor. `None` unless it is an fdatasync.
    pub(super) covers: Option<SyncStart>,
}

/// A sync that succeeded. Its requests are stable unless a sync that overlapped it has failed.
pub(super) struct Success {
    pub(super) who: Who,
    pub(super) covers: Option<SyncStart>,
}

/// The requests that a sync completes.
pub(super) enum Who {
    One(Member),
    Group(Vec<Member>),
}

/// What a request is doing.
pub(super) enum Stage {
    Transfer(Transfer),
    Erase(Erase),
    /// An fdatasync for this request alone. It starts after every other operation of the request has completed.
    Sync,
    /// The shared fdatasync, for all requests that joined before it started.
    GroupSync,
}

impl Stage {
    pub(super) fn is_sync(&self) -> bool {
        matches!(self, Stage::Sync | Stage::GroupSync)
    }

    /// Returns `true` if everything written is stable once this stage succeeds.
    pub(super) fn is_stable(&self) -> bool {
        self.is_sync() || self.is_dsync()
    }

    /// Returns `true` if this is a write with RWF_DSYNC: each part is stable when it completes.
    pub(super) fn is_dsync(&self) -> bool {
        matches!(self, Stage::Transfer(transfer) if transfer.dsync)
    }
}

/// What follows a completed operation, or the submission of a request.
pub(super) enum Next {
    /// Issue this operation.
    Op(HostOp),
    /// Complete the request.
    Done(Result<(), DiskError>),
    /// Complete the request as stable, unless a sync that overlapped has failed.
    Stable,
    /// Everything is written. Wait for the next shared fdatasync to make it stable.
    Join,
    /// Wait: `decide` chooses RWF_DSYNC or a shared fdatasync once the whole batch is known.
    DeferToBatch,
}
