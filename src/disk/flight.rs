//! A request in flight, and what may come after an operation of it.

use super::engine::{HostOp, OpToken};
use super::erase::Erase;
use super::monitor::SyncStart;
use super::op::DiskError;
use super::stable::Member;
use super::sync_ledger::SyncTicket;
use super::transfer::Transfer;
use crate::slab::Slab;

/// A request in flight: exactly one host operation of it is under way, or waits for room.
pub(super) struct Flight {
    /// `None` for a sync of our own.
    pub(super) id: Member,
    pub(super) wb_at_submit: bool,
    pub(super) stage: Stage,
    /// Bytes that the guest sees changed, for the monitor.
    pub(super) writes: u64,
    /// The next shared sync waits for it.
    pub(super) grouped: bool,
    /// The operation that the engine has, to repeat it after EINTR.
    pub(super) current: Option<HostOp>,
    /// Open while the engine has that operation and it is a sync.
    pub(super) sync: Option<OpenSync>,
}

impl Flight {
    pub(super) fn new(id: Member, stage: Stage) -> Self {
        Self { id, wb_at_submit: false, stage, writes: 0, grouped: false, current: None, sync: None }
    }

    /// Whether it is still moving bytes after `next`.
    pub(super) fn goes_on_writing(&self, next: &Next) -> bool {
        matches!(next, Next::Op(_)) && !self.stage.is_sync()
    }
}

/// The requests in flight of one queue, with counts of two kinds among them.
///
/// The counts are derived: every flight enters, leaves and changes through these methods, so that no caller
/// has to keep a count in step.
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

    /// Changes a flight; `None` if there is none under `token`.
    pub(super) fn change<R>(&mut self, token: OpToken, change: impl FnOnce(&mut Flight) -> R) -> Option<R> {
        let flight = self.flights.get_mut(token)?;
        let before = (flight.grouped, flight.stage.is_dsync());
        let result = change(flight);
        let after = (flight.grouped, flight.stage.is_dsync());
        self.writing = self.writing + usize::from(after.0) - usize::from(before.0);
        self.dsyncs = self.dsyncs + usize::from(after.1) - usize::from(before.1);
        Some(result)
    }

    /// Keeps the operation that the engine gets, to repeat it after EINTR.
    pub(super) fn set_current(&mut self, token: OpToken, op: &HostOp) {
        if let Some(flight) = self.flights.get_mut(token) {
            flight.current = Some(op.clone());
        }
    }

    /// Keeps the sync that is open while the engine has the flight's operation.
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
    /// What an fdatasync will have made stable, for the monitor.
    pub(super) covers: Option<SyncStart>,
}

/// A sync that went well: requests that are done and stable if no other sync says otherwise.
pub(super) struct Success {
    pub(super) who: Who,
    pub(super) covers: Option<SyncStart>,
}

/// For whom a sync speaks.
pub(super) enum Who {
    One(Member),
    Group(Vec<Member>),
}

pub(super) enum Stage {
    Transfer(Transfer),
    Erase(Erase),
    /// An fdatasync of its own, that started after everything of this request had ended.
    Sync,
    /// The shared fdatasync, for all who had joined before it started.
    GroupSync,
}

impl Stage {
    pub(super) fn is_sync(&self) -> bool {
        matches!(self, Stage::Sync | Stage::GroupSync)
    }

    /// Whether all that was written is stable when this ends well.
    pub(super) fn is_stable(&self) -> bool {
        self.is_sync() || self.is_dsync()
    }

    /// Whether this is a write whose parts are stable when they end.
    pub(super) fn is_dsync(&self) -> bool {
        matches!(self, Stage::Transfer(transfer) if transfer.dsync)
    }
}

/// What comes after an operation has ended, or at the beginning.
pub(super) enum Next {
    Op(HostOp),
    Done(Result<(), DiskError>),
    /// Done and stable, if no other sync says otherwise.
    Stable,
    /// All is written; the next shared fdatasync makes it stable.
    Join,
    /// How it becomes stable is decided when the batch is known.
    Later,
}
