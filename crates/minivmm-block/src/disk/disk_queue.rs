//! The state machine between requests and host operations.
//!
//! Owns, for one queue: continuation of short transfers, bounce buffers, stable writes, the use of
//! the error latch, draining. `transfer` and [`super::erase`] split a request into host operations;
//! [`super::stable`] decides which requests share an fdatasync. A request completes with `Ok` only when every
//! byte has been moved and, for a stable write or a FLUSH, is stable.
//!
//! This layer sits above the engines. Whatever the kernel answers or an engine does wrong is judged here, so
//! a test with a simulated engine can try all of it.
//!
//! A request has at most one host operation in flight at any time:
//!
//! ```text
//!            ┌─ short, EINTR ─┐
//!            ▼                │
//! submit → transfer ──────────┴─ all bytes ─┬─ may be volatile, or was DSYNC ──────→ Ok
//!          erase (each range)               ├─ stable=fdatasync → its own fdatasync ─┬──→ Ok
//!                                           └─ joins ─┐                              └──→ Err, latched
//! FLUSH ───────────────────────────────────── joins ──┴→ the next shared fdatasync ──┬──→ Ok, all
//!                                                                                    └──→ Err, all
//! ```

mod begin;
mod figures;
mod waiting;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::cache::WriteCache;
use super::counters::HostKind;
use super::engine::{Ended, Engine, HostOp, OpToken, Wake};
use super::flight::{Flight, Flights, Next, OpenSync, Stage, Success, Who};
use super::image::Image;
use super::monitor::{SyncEnd, SyncStart};
pub use super::op::{Completion, DiskError, Op, RequestId};
use super::queue_stats::QueueStats;
pub use super::stable::StableBy;
use super::stable::{Group, Member};
use super::sync_ledger::SyncTicket;
use super::transfer::{Transfer, Windows};
use figures::QueueClock;

/// The state machine of one queue of one disk.
pub struct DiskQueue {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    engine: Box<dyn Engine>,
    stable_by: StableBy,
    /// `true` until the host answers EOPNOTSUPP to RWF_DSYNC.
    has_dsync: bool,
    /// `true` once a write with RWF_DSYNC has succeeded. EOPNOTSUPP is an error like any other from then on.
    dsync_worked: bool,
    in_flight: Flights,
    group: Group,
    windows: Windows,
    /// Stable writes of this batch for which [`DiskQueue::decide`] has not chosen RWF_DSYNC or fdatasync yet.
    undecided: Vec<OpToken>,
    /// Operations that wait for room in the engine, oldest first.
    waiting: VecDeque<(OpToken, HostOp)>,
    /// An empty list that each wait reuses.
    ended: Vec<Ended>,
    /// Successful syncs that count only once every sync up to the ticket has been judged.
    held: Vec<(SyncTicket, Success)>,
    /// Completed requests that nobody has taken yet.
    done: VecDeque<Completion>,
    /// Bytes that requests have written and that are not stable, of which the monitor knows nothing yet.
    acknowledged: u64,
    stats: Arc<QueueStats>,
    /// `None` unless latencies are recorded.
    clock: Option<QueueClock>,
}

impl DiskQueue {
    /// Returns the state machine of one queue. `engine` works on the image's descriptor.
    pub fn new(
        image: Arc<Image>,
        cache: Arc<WriteCache>,
        engine: Box<dyn Engine>,
        stable_by: StableBy,
    ) -> Self {
        let stats = image.stats.add_queue();
        let clock = stats.is_timed().then(QueueClock::begin);
        Self {
            windows: Windows::new(&image, &stats),
            image,
            cache,
            engine,
            stable_by,
            has_dsync: true,
            dsync_worked: false,
            in_flight: Flights::default(),
            group: Group::default(),
            undecided: Vec::new(),
            waiting: VecDeque::new(),
            ended: Vec::new(),
            held: Vec::new(),
            done: VecDeque::new(),
            acknowledged: 0,
            stats,
            clock,
        }
    }

    /// Returns the image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Returns `true` if nothing is in flight and no completion waits to be taken.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.group.is_idle() && self.held.is_empty() && self.done.is_empty()
    }

    /// Submits a request. [`DiskQueue::take_completions`] returns its completion, possibly at once.
    #[inline(always)]
    pub fn submit(&mut self, id: RequestId, op: Op) {
        self.count(&op);
        let mut flight = self.in_flight.begin(Some(id));
        flight.wb_at_submit = self.cache.writeback();
        flight.writes = op.written_bytes();
        match self.begin(&mut flight, op) {
            Ok(Next::Op(first)) => return self.take_off(flight, first),
            Ok(Next::DeferToBatch) => {
                let token = self.in_flight.insert(flight);
                return self.undecided.push(token);
            }
            Ok(Next::Join) => self.group.joins(Some(id), true),
            Ok(Next::Done(result)) => self.complete(Some(id), result),
            Ok(Next::Stable) => self.complete(Some(id), Ok(())),
            Err(error) => self.complete(Some(id), Err(error)),
        }
        self.in_flight.recycle(flight);
    }

    /// Makes stable what has completed by now, if the guest has turned its write cache off.
    pub fn sync_if_switched_off(&mut self) {
        if self.cache.is_switch_pending()
            && self.cache.take_switched_off()
            && self.cache.policy().honour_flush
            && !self.image.config().readonly
        {
            self.group.joins(None, true);
            // Unless another sync is running, this one starts before the guest's next request.
            if self.group.is_due(self.in_flight.writing()) {
                self.start_shared_sync();
            }
        }
    }

    /// Hands to the engine what it can take now.
    #[inline(always)]
    fn hand_over(&mut self) {
        if !self.undecided.is_empty() {
            self.decide();
        }
        self.feed_engine();
        if self.group.is_due(self.in_flight.writing()) {
            self.start_shared_sync();
        }
    }

    /// Hands all queued operations to the engine and waits until one completes or `wake` ends the wait.
    pub fn wait(&mut self, wake: Wake<'_>) -> io::Result<()> {
        self.hand_over();
        // A release ends the wait: a sync of our own completes no request, and nothing may be left to ring the bell.
        let has_ended = self.release_settled();
        let wake = if !has_ended && self.may_sleep(wake) { wake } else { Wake::Now };
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.engine.wait(wake, &mut ended);
        self.take_ended(ended);
        waited
    }

    /// Handles the completed operations of a wait, and gives the list back.
    fn take_ended(&mut self, mut ended: Vec<Ended>) {
        self.woke_now();
        for end in ended.drain(..) {
            self.advance(end);
        }
        // The list that is exchanged has no memory: this drops nothing.
        std::mem::forget(std::mem::replace(&mut self.ended, ended));
        self.count_acknowledged();
        self.feed_engine();
        self.release_settled();
    }

    /// Tells the monitor of the bytes that were written and are not stable: before the guest is told, and before a sync
    /// starts that covers them. All of a batch together, because the monitor has a lock.
    fn count_acknowledged(&mut self) {
        if self.acknowledged > 0 {
            self.image.monitor.acknowledges(std::mem::take(&mut self.acknowledged));
        }
    }

    /// Returns `true` if the engine may block. A success held only by another queue's sync is not released by an
    /// operation of this queue. Whoever judges that sync rings this queue's doorbell.
    fn may_sleep(&self, wake: Wake<'_>) -> bool {
        match (wake, self.first_horizon()) {
            _ if !self.done.is_empty() => false,
            (Wake::Doorbell(doorbell), Some(horizon)) => {
                self.image.latch.ring_when_settled(horizon, doorbell)
            }
            _ => true,
        }
    }

    /// Returns the oldest horizon of the held successes: the first of them counts once it is settled.
    fn first_horizon(&self) -> Option<SyncTicket> {
        self.held.iter().map(|&(horizon, _)| horizon).min()
    }

    /// Returns `true` if a success waits for another sync to be judged. If another queue judges that sync, it
    /// rings the doorbell of this queue's last wait.
    pub fn holds_success(&self) -> bool {
        !self.held.is_empty()
    }

    /// Returns `true` if a completion waits to be taken.
    pub fn has_completed(&self) -> bool {
        !self.done.is_empty()
    }

    /// Returns the request that completed first, and removes it.
    #[inline]
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    /// Returns the completed requests in the order in which they completed, and removes them.
    pub fn take_completions(&mut self) -> std::collections::vec_deque::Drain<'_, Completion> {
        self.done.drain(..)
    }

    /// Returns `true` if stable writes without RWF_DSYNC share an fdatasync, `false` if each has its own.
    fn shares_syncs(&self) -> bool {
        matches!(self.stable_by, StableBy::Group | StableBy::Auto)
    }

    /// Chooses how the undecided writes become stable, now that the whole batch is known. A stable write that is
    /// alone in flight gets RWF_DSYNC: one call and one flush. Several share an fdatasync: one flush for all.
    #[inline(never)]
    fn decide(&mut self) {
        let mut undecided = std::mem::take(&mut self.undecided);
        let alone = undecided.len() == 1
            && (self.in_flight.writing(), self.in_flight.dsyncs()) == (1, 0)
            && self.group.is_idle();
        for token in undecided.drain(..) {
            let windows = &mut self.windows;
            let first = self.in_flight.change(token, |flight| {
                let Stage::Transfer(transfer) = &mut flight.stage else { return None };
                transfer.dsync = alone;
                flight.grouped = !alone;
                Some(transfer.next_window(windows))
            });
            match first.flatten() {
                Some(Ok(op)) => self.issue(token, op),
                Some(Err(error)) => self.abandon(token, error),
                None => {}
            }
        }
        self.undecided = undecided;
    }

    /// Completes a request whose first operation could not be made.
    fn abandon(&mut self, token: OpToken, error: DiskError) {
        if let Some(flight) = self.in_flight.remove(token) {
            self.complete(flight.id, Err(error));
            self.in_flight.recycle(flight);
        }
    }

    #[inline(never)]
    fn start_shared_sync(&mut self) {
        self.group.starts();
        self.stats.count(|counters| &counters.shared_syncs);
        let mut flight = self.in_flight.begin(None);
        flight.stage = Stage::GroupSync;
        self.take_off(flight, HostOp::Fdatasync);
    }

    /// Completes the held successes whose syncs have all been judged. Returns `true` if there was any.
    #[inline]
    fn release_settled(&mut self) -> bool {
        !self.held.is_empty() && self.release_held()
    }

    fn release_held(&mut self) -> bool {
        let before = self.held.len();
        let mut at = 0;
        while let Some(&(horizon, _)) = self.held.get(at) {
            if self.image.latch.is_settled(horizon) {
                let (_, success) = self.held.remove(at);
                self.succeed(success);
            } else {
                at += 1;
            }
        }
        self.held.len() < before
    }

    #[inline(always)]
    fn take_off(&mut self, flight: Box<Flight>, first: HostOp) {
        let token = self.in_flight.insert(flight);
        self.issue(token, first);
    }

    /// Hands an operation to the engine, after those that already wait for room there.
    #[inline(always)]
    fn issue(&mut self, token: OpToken, op: HostOp) {
        let refused = if self.waiting.is_empty() { self.hand_to_engine(token, op) } else { Err(op) };
        if let Err(op) = refused {
            self.waiting.push_back((token, op));
        }
    }

    #[inline]
    fn feed_engine(&mut self) {
        if !self.waiting.is_empty() {
            self.feed_waiting();
        }
    }

    #[cold]
    fn feed_waiting(&mut self) {
        while let Some((token, op)) = self.waiting.pop_front() {
            if let Err(op) = self.hand_to_engine(token, op) {
                self.waiting.push_front((token, op));
                return;
            }
        }
    }

    /// Hands an operation to the engine. Returns it as an error if the engine has no room.
    #[inline(always)]
    fn hand_to_engine(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let kind = HostKind::of(&op);
        let now = self.clock.is_some().then(Instant::now);
        // Opened before the engine may begin it, so that no overlap is missed (E7).
        let sync = if op.is_sync() { Some(self.open_sync(&op)) } else { None };
        match self.engine.submit(token, op) {
            Ok(()) => {
                self.stats.count(|counters| counters.of(kind));
                self.note_submitted(token, now);
                if let Some(sync) = sync {
                    self.in_flight.set_sync(token, sync);
                }
                Ok(())
            }
            Err(op) => {
                if let Some(sync) = sync {
                    self.image.latch.judged(sync.ticket);
                }
                Err(op)
            }
        }
    }

    #[cold]
    fn open_sync(&mut self, op: &HostOp) -> OpenSync {
        self.count_acknowledged();
        OpenSync {
            ticket: self.image.latch.open(),
            covers: matches!(op, HostOp::Fdatasync).then(|| self.image.monitor.sync_starts()),
        }
    }

    /// Handles a completed operation: issues the next one of its request, or completes the request.
    fn advance(&mut self, end: Ended) {
        // Every operation has a token of its own, so a duplicate or late result finds no flight.
        let Some(mut flight) = self.in_flight.remove(end.token) else {
            // An engine that reports an operation it was never given may have lost another one as well.
            log::error!("disk: the engine ended operation {}, which is not in flight", end.token);
            self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            return;
        };
        let sync = self.in_flight.take_sync(end.token);
        let next = match end.result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.repeat(&mut flight, error),
            result => self.judge(&mut flight, result),
        };
        // The sync counts as judged only now, after `judge` has latched its error.
        if let Some(sync) = &sync {
            self.image.latch.judged(sync.ticket);
        }
        flight.grouped &= flight.goes_on_writing(&next);
        self.go_on(flight, next, sync.and_then(|sync| sync.covers));
    }

    /// Returns the operation that a signal has interrupted, once more. The host has done nothing of it.
    fn repeat(&mut self, flight: &mut Flight, error: io::Error) -> Next {
        let op = match &mut flight.stage {
            Stage::Sync | Stage::GroupSync => Ok(Some(HostOp::Fdatasync)),
            Stage::Transfer(transfer) => transfer.next_window(&mut self.windows).map(Some),
            Stage::Erase(erase) => erase.again(),
        };
        match op {
            Ok(Some(op)) => Next::Op(op),
            Ok(None) => Next::Done(Err(DiskError::Host { what: "an interrupted operation", source: error })),
            Err(error) => Next::Done(Err(error)),
        }
    }

    fn go_on(&mut self, flight: Box<Flight>, next: Next, covers: Option<SyncStart>) {
        match next {
            Next::Op(op) => {
                self.end_sync(covers, SyncEnd::Void);
                return self.take_off(flight, op);
            }
            Next::Done(result) => {
                let failed = matches!(result, Err(DiskError::Host { .. }));
                // Records the file's size now, because the next write may extend a truncated file again.
                if let Err(DiskError::Short { .. }) = result {
                    let _ = self.image.file().cut();
                }
                self.end_sync(covers, if failed { SyncEnd::Failed } else { SyncEnd::Void });
                if result.is_ok() && !flight.stage.is_stable() {
                    self.acknowledged = self.acknowledged.saturating_add(flight.writes);
                }
                self.finish(&flight, result);
            }
            Next::Stable => {
                let who = match flight.stage {
                    Stage::GroupSync => Who::Group(self.group.ends()),
                    _ => Who::One(flight.id),
                };
                let success = Success { who, covers };
                match self.image.latch.open_now() {
                    Some(horizon) => self.held.push((horizon, success)),
                    None => self.succeed(success),
                }
            }
            Next::Join | Next::DeferToBatch => {
                self.end_sync(covers, SyncEnd::Void);
                self.group.joins(flight.id, false);
            }
        }
        self.in_flight.recycle(flight);
    }

    /// Completes the request of a flight, or all requests that share its fdatasync.
    fn finish(&mut self, flight: &Flight, result: Result<(), DiskError>) {
        match (&flight.stage, result) {
            (Stage::GroupSync, result) => {
                let members = self.group.ends();
                self.complete_all(members, |_| match &result {
                    Ok(()) => Ok(()),
                    Err(error) => Err(error.again()),
                });
            }
            (_, result) => self.complete(flight.id, result),
        }
    }

    fn complete_all(&mut self, mut members: Vec<Member>, result: impl Fn(&Self) -> Result<(), DiskError>) {
        for member in members.drain(..) {
            let result = result(self);
            self.complete(member, result);
        }
        self.group.recycle(members);
    }

    /// Completes the requests of a successful sync. They fail with the latched error if any sync has failed.
    fn succeed(&mut self, success: Success) {
        let is_ok = self.check_latch().is_ok();
        self.end_sync(success.covers, if is_ok { SyncEnd::Stable } else { SyncEnd::Void });
        match success.who {
            Who::One(id) => {
                let result = self.check_latch();
                self.complete(id, result);
            }
            Who::Group(members) => self.complete_all(members, Self::check_latch),
        }
    }

    fn end_sync(&self, covers: Option<SyncStart>, end: SyncEnd) {
        if let Some(start) = covers {
            self.image.monitor.sync_ends(start, end);
        }
    }

    fn judge(&mut self, flight: &mut Flight, result: io::Result<usize>) -> Next {
        match &mut flight.stage {
            Stage::Sync | Stage::GroupSync => self.judge_sync(result),
            Stage::Transfer(transfer) => match self.judge_transfer(transfer, result) {
                Err(error) => Next::Done(Err(error)),
                Ok(Some(op)) => Next::Op(op),
                Ok(None) if !transfer.write => Next::Done(Ok(())),
                Ok(None) => {
                    let is_stable = transfer.dsync;
                    self.finish_write(flight, is_stable)
                }
            },
            Stage::Erase(erase) => match erase.judge(result) {
                Err(error) => Next::Done(Err(error)),
                Ok(Some(op)) => Next::Op(op),
                Ok(None) => self.finish_write(flight, false),
            },
        }
    }

    /// Returns what follows the last byte of a write: its completion, or the sync that must come first.
    fn finish_write(&self, flight: &mut Flight, is_stable: bool) -> Next {
        if !self.cache.write_must_be_stable(flight.wb_at_submit) {
            return Next::Done(Ok(()));
        }
        match self.check_latch() {
            Err(error) => Next::Done(Err(error)),
            Ok(()) if is_stable => Next::Stable,
            Ok(()) if self.shares_syncs() => Next::Join,
            Ok(()) => {
                flight.stage = Stage::Sync;
                Next::Op(HostOp::Fdatasync)
            }
        }
    }

    fn judge_sync(&self, result: io::Result<usize>) -> Next {
        if let Err(source) = result {
            self.image.latch.set(&source);
            return Next::Done(Err(DiskError::Host { what: "fdatasync", source }));
        }
        Next::Stable
    }

    fn judge_transfer(
        &mut self,
        transfer: &mut Transfer,
        result: io::Result<usize>,
    ) -> Result<Option<HostOp>, DiskError> {
        match result {
            Ok(count) => {
                self.dsync_worked |= transfer.dsync;
                transfer.advance(count as u64, &mut self.windows)
            }
            Err(source)
                if transfer.dsync
                    && !self.dsync_worked
                    && source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                // The kernel refused before it wrote a byte: it has no RWF_DSYNC for this file. After a
                // write with RWF_DSYNC has worked, EOPNOTSUPP is an error like any other.
                log::info!("disk: no RWF_DSYNC on this file; stable writes use fdatasync");
                self.has_dsync = false;
                transfer.dsync = false;
                transfer.next_window(&mut self.windows).map(Some)
            }
            Err(source) => {
                if transfer.dsync {
                    // A failed write and a failed sync of it cannot be told apart, so both are latched.
                    self.image.latch.set(&source);
                }
                Err(DiskError::Host { what: transfer.what(), source })
            }
        }
    }

    #[inline(always)]
    fn complete(&mut self, id: Member, result: Result<(), DiskError>) {
        let result = result.map_err(|error| {
            self.stats.count(|counters| &counters.errors);
            Box::new(error)
        });
        if let Some(id) = id {
            self.stats.ends();
            self.done.push_back(Completion { id, result });
        }
    }
}

impl Drop for DiskQueue {
    /// Fails the syncs that are still in flight. There are some only after an engine has failed; nobody else
    /// will judge them.
    fn drop(&mut self) {
        for (_, sync) in self.in_flight.take_syncs() {
            self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            self.image.latch.judged(sync.ticket);
        }
    }
}
