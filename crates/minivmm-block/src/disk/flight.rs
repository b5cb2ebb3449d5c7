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
    /// The operation that the engine has, kept to repeat it after EINTR.
    pub(super) current: Option<HostOp>,
    /// The open sync while the engine has `current`; `None` if `current` is no sync.
    pub(super) sync: Option<OpenSync>,
}

impl Flight {
    pub(super) fn new(id: Member, stage: Stage) -> Self {
        Self { id, wb_at_submit: false, stage, writes: 0, grouped: false, current: None, sync: None }
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
    flights: Slab<OpToken, Flight>,
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

    pub(super) fn insert(&mut self, flight: Flight) -> OpToken {
        self.writing += usize::from(flight.grouped);
        self.dsyncs += usize::from(flight.stage.is_dsync());
        self.flights.insert(flight)
    }

    pub(super) fn remove(&mut self, token: OpToken) -> Option<Flight> {
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

    /// Stores the operation that the engine gets, to repeat it after EINTR.
    pub(super) fn set_current(&mut self, token: OpToken, op: &HostOp) {
        if let Some(flight) = self.flights.get_mut(token) {
            flight.current = Some(op.clone());
        }
    }

    /// Stores the sync that is open while the engine has the flight's operation.
    pub(super) fn set_sync(&mut self, token: OpToken, sync: Option<OpenSync>) {
        if let Some(flight) = self.flights.get_mut(token) {
            flight.sync = sync;
        }
    }

    pub(super) fn get(&mut self, token: OpToken) -> Option<&Flight> {
        self.flights.get_mut(token).map(|flight| &*flight)
    }

    pub(super) fn into_values(self) -> impl Iterator<Item = Flight> {
        self.flights.into_values()
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
