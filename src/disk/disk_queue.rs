//! The state machine between requests and host operations.
//!
//! Owns, for one queue: continuation of short transfers, bounce buffers, stable writes, the use of
//! the error latch, draining; [`super::transfer`] and [`super::erase`] take a request through its
//! parts, [`super::stable`] tells who shares an fdatasync. Its completions are whole: `Ok` means
//! every byte and, for a stable write or a FLUSH, stable. It sits above the engines, so whatever an
//! engine does wrong or the kernel answers is judged here, and a simulated engine can try all of it.
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
use super::transfer::{Transfer, bounce_buffers};
use crate::mem::BufferPool;
use crate::mutants::{self, Mutant, is_on};
use figures::Moments;

/// The state machine of one queue of one disk.
pub struct DiskQueue {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    engine: Box<dyn Engine>,
    stable_by: StableBy,
    /// Until the host refuses RWF_DSYNC.
    has_dsync: bool,
    dsync_worked: bool,
    in_flight: Flights,
    group: Group,
    pool: BufferPool,
    /// Stable writes of this batch, of which the way is not decided yet.
    undecided: Vec<OpToken>,
    /// Operations that the engine has no room for.
    waiting: VecDeque<(OpToken, HostOp)>,
    ended: Vec<Ended>,
    /// Successes that count only when other syncs have been judged.
    held: Vec<(SyncTicket, Success)>,
    done: Vec<Completion>,
    stats: Arc<QueueStats>,
    moments: Option<Moments>,
}

impl DiskQueue {
    /// The machine of one queue; `engine` works on the image's descriptor.
    pub fn new(
        image: Arc<Image>,
        cache: Arc<WriteCache>,
        engine: Box<dyn Engine>,
        stable_by: StableBy,
    ) -> Self {
        let stats = image.add_queue();
        let moments = stats.is_timed().then(Moments::begin);
        Self {
            pool: bounce_buffers(&image),
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
            done: Vec::new(),
            stats,
            moments,
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether nothing is in flight and no completion waits to be taken.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.group.is_idle() && self.held.is_empty() && self.done.is_empty()
    }

    /// Takes a request. Its completion comes out of [`DiskQueue::take_completions`], perhaps at once.
    pub fn submit(&mut self, id: RequestId, op: Op) {
        self.count(&op);
        let wb_at_submit = self.cache.writeback();
        let is_write = matches!(op, Op::Write(..));
        let writes = op.written_bytes();
        let (stage, next) = match self.begin(op, wb_at_submit) {
            Ok(begun) => begun,
            Err(error) => return self.complete(Some(id), Err(error)),
        };
        let stable = !stage.is_sync() && self.cache.write_must_be_stable(wb_at_submit);
        let grouped = stable && self.shares_syncs() && !stage.is_dsync() && !is_on(Mutant::SyncBeforeWrite);
        let flight = Flight { wb_at_submit, writes, grouped, ..Flight::new(Some(id), stage) };
        match next {
            Next::Op(first) => {
                if is_on(Mutant::SyncBeforeWrite) && is_write && stable {
                    self.take_off(Flight::new(None, Stage::Sync), HostOp::Fdatasync);
                }
                let early = is_on(Mutant::StatusBeforeData) && matches!(flight.stage, Stage::Transfer(_));
                self.take_off(Flight { id: (!early).then_some(id), ..flight }, first);
                if early {
                    self.complete(Some(id), Ok(()));
                }
            }
            Next::Later => {
                let token = self.in_flight.insert(flight);
                self.undecided.push(token);
            }
            Next::Join => self.group.joins(Some(id), true),
            Next::Done(result) => self.complete(Some(id), result),
            Next::Stable => self.complete(Some(id), Ok(())),
        }
    }

    /// The guest has turned its write cache off: makes stable what is complete by now.
    pub fn sync_if_switched_off(&mut self) {
        if self.cache.take_switched_off() && self.cache.policy().honour_flush && !self.image.readonly() {
            self.group.joins(None, true);
            // Before whatever the guest asks for next.
            self.start_shared_sync();
        }
    }

    /// Waits until something has ended or `wake` says so.
    pub fn wait(&mut self, wake: Wake<'_>) -> io::Result<()> {
        self.decide();
        self.feed_engine();
        self.start_shared_sync();
        // A release is an end. That of a sync of our own completes no request, and nothing may be left to ring.
        let has_ended = self.release_settled();
        let wake = if !has_ended && self.may_sleep(wake) { wake } else { Wake::Now };
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.engine.wait(wake, &mut ended);
        self.woke_now();
        for end in ended.drain(..) {
            self.advance(end);
        }
        self.ended = ended;
        self.feed_engine();
        self.release_settled();
        waited
    }

    /// Whether a wait may last. What is held only by another queue's sync has no end of our own to
    /// wake us: whoever judges that sync rings our doorbell.
    fn may_sleep(&self, wake: Wake<'_>) -> bool {
        match (wake, self.first_horizon()) {
            _ if !self.done.is_empty() => false,
            (Wake::Doorbell(doorbell), Some(horizon)) => {
                self.image.latch.ring_when_settled(horizon, doorbell)
            }
            _ => true,
        }
    }

    /// What has to be settled first for something held to count.
    fn first_horizon(&self) -> Option<SyncTicket> {
        self.held.iter().map(|&(horizon, _)| horizon).min()
    }

    /// Whether a success waits for another queue's sync, whose judgement rings the doorbell of the
    /// last wait.
    pub fn holds_success(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether a wait would end something at once, found without a system call.
    pub fn is_ready(&mut self) -> bool {
        let is_settled = |horizon| self.image.latch.is_settled(horizon);
        !self.done.is_empty()
            || self.group.is_due(self.in_flight.writing())
            || self.first_horizon().is_some_and(is_settled)
            || self.engine.is_ready()
    }

    /// The queue is at rest and its doorbell goes away: the engine lets go of it.
    pub fn rest(&mut self) -> io::Result<()> {
        self.engine.rest()
    }

    /// The requests that are done, in the order of their ends.
    pub fn take_completions(&mut self) -> std::vec::Drain<'_, Completion> {
        self.done.drain(..)
    }

    /// Whether a stable write without RWF_DSYNC joins the others, instead of an fdatasync of its own.
    fn shares_syncs(&self) -> bool {
        matches!(self.stable_by, StableBy::Group | StableBy::Auto)
    }

    /// The batch is known: a stable write that is alone in flight is written with RWF_DSYNC, one
    /// call and one flush; others share an fdatasync, one flush for all of them.
    fn decide(&mut self) {
        if self.undecided.is_empty() {
            return;
        }
        let mut undecided = std::mem::take(&mut self.undecided);
        let alone = undecided.len() == 1
            && (self.in_flight.writing(), self.in_flight.dsyncs()) == (1, 0)
            && self.group.is_idle();
        for token in undecided.drain(..) {
            let (image, stats, pool) = (&self.image, &self.stats, &mut self.pool);
            let first = self.in_flight.change(token, |flight| {
                let Stage::Transfer(transfer) = &mut flight.stage else { return None };
                transfer.dsync = alone;
                flight.grouped = !alone;
                Some(transfer.next_window(image, stats, pool))
            });
            match first.flatten() {
                Some(Ok(op)) => self.issue(token, op),
                Some(Err(error)) => self.abandon(token, error),
                None => {}
            }
        }
        self.undecided = undecided;
    }

    /// A flight that never took off.
    fn abandon(&mut self, token: OpToken, error: DiskError) {
        if let Some(flight) = self.in_flight.remove(token) {
            self.complete(flight.id, Err(error));
        }
    }

    fn start_shared_sync(&mut self) {
        if self.group.is_due(self.in_flight.writing()) {
            self.group.starts();
            self.stats.count(|counters| &counters.shared_syncs);
            self.take_off(Flight::new(None, Stage::GroupSync), HostOp::Fdatasync);
            if is_on(Mutant::GroupDoneAtStart) {
                let members = self.group.ends();
                self.complete_all(members, |_| Ok(()));
            }
        }
    }

    /// Completes what was held, once all the syncs that it waited for are judged; whether there was any.
    fn release_settled(&mut self) -> bool {
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

    fn take_off(&mut self, flight: Flight, first: HostOp) {
        let token = self.in_flight.insert(flight);
        self.issue(token, first);
    }

    /// Hands an operation to the engine, behind those that already wait for room in it.
    fn issue(&mut self, token: OpToken, op: HostOp) {
        self.in_flight.set_current(token, &op);
        self.waiting.push_back((token, op));
        self.feed_engine();
    }

    fn feed_engine(&mut self) {
        while let Some((token, op)) = self.waiting.pop_front() {
            let kind = HostKind::of(&op);
            let now = self.moments.is_some().then(Instant::now);
            // Open before the engine may begin it.
            let sync = self.open_sync(&op);
            match self.engine.submit(token, op) {
                Ok(()) => {
                    self.stats.count(|counters| counters.of(kind));
                    self.note_submitted(token, now);
                    self.in_flight.set_sync(token, sync);
                }
                Err(op) => {
                    if let Some(sync) = sync {
                        self.image.latch.judged(sync.ticket);
                    }
                    self.waiting.push_front((token, op));
                    return;
                }
            }
        }
    }

    fn open_sync(&self, op: &HostOp) -> Option<OpenSync> {
        op.is_sync().then(|| OpenSync {
            ticket: self.image.latch.open(),
            covers: matches!(op, HostOp::Fdatasync).then(|| self.image.monitor.sync_starts()),
        })
    }

    /// An operation has ended: the next one of its request, or the request's completion.
    fn advance(&mut self, end: Ended) {
        // A number a operation: what ends twice, or late, finds nothing.
        let Some(mut flight) = self.in_flight.remove(end.token) else {
            // An engine that ends what it was never given could just as well have lost something.
            log::error!("disk: the engine ended operation {}, which is not in flight", end.token);
            self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            return;
        };
        let sync = flight.sync.take();
        let next = match end.result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => match flight.current.take() {
                Some(op) => Next::Op(op),
                None => Next::Done(Err(DiskError::Host { what: "an interrupted operation", source: error })),
            },
            result => self.judge(&mut flight, result),
        };
        // Judged only now that an error of it is latched.
        if let Some(sync) = &sync {
            self.image.latch.judged(sync.ticket);
        }
        flight.grouped &= flight.goes_on_writing(&next);
        self.go_on(flight, next, sync.and_then(|sync| sync.covers));
    }

    fn go_on(&mut self, flight: Flight, next: Next, covers: Option<SyncStart>) {
        match next {
            Next::Op(op) => {
                self.end_sync(covers, SyncEnd::Void);
                let token = self.in_flight.insert(flight);
                self.issue(token, op);
            }
            Next::Done(result) => {
                let failed = matches!(result, Err(DiskError::Host { .. }));
                // Now, because the next write may make the file as long as it was.
                if let Err(DiskError::Short { .. }) = result {
                    let _ = self.image.cut();
                }
                self.end_sync(covers, if failed { SyncEnd::Failed } else { SyncEnd::Void });
                // Before the guest is told: what it now takes for written.
                if result.is_ok() && !flight.stage.is_stable() {
                    self.image.monitor.acknowledges(flight.writes);
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
                    Some(horizon) if !is_on(Mutant::SuccessCountsAtOnce) => {
                        self.held.push((horizon, success));
                    }
                    _ => self.succeed(success),
                }
            }
            Next::Join | Next::Later => {
                self.end_sync(covers, SyncEnd::Void);
                self.group.joins(flight.id, false);
            }
        }
    }

    /// Reports the end of a flight, to all for whom it speaks.
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

    /// A success that counts, unless an earlier sync has failed.
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
                Ok(None) if is_on(Mutant::ZeroesUnsynced) => Next::Done(Ok(())),
                Ok(None) => self.finish_write(flight, false),
            },
        }
    }

    /// Everything is written: complete, or make stable first what must be.
    fn finish_write(&self, flight: &mut Flight, is_stable: bool) -> Next {
        if !self.cache.write_must_be_stable(flight.wb_at_submit) {
            return Next::Done(Ok(()));
        }
        match self.check_latch() {
            Err(error) => Next::Done(Err(error)),
            Ok(()) if is_stable || is_on(Mutant::SyncBeforeWrite) => Next::Stable,
            Ok(()) if mutants::skips_sync() => Next::Done(Ok(())),
            Ok(()) if self.shares_syncs() => Next::Join,
            Ok(()) => {
                flight.stage = Stage::Sync;
                Next::Op(HostOp::Fdatasync)
            }
        }
    }

    fn judge_sync(&self, result: io::Result<usize>) -> Next {
        if let Err(source) = result {
            if is_on(Mutant::SyncErrorAcked) {
                return Next::Done(Ok(()));
            }
            if !is_on(Mutant::SyncErrorForgotten) {
                self.image.latch.set(&source);
            }
            return Next::Done(Err(DiskError::Host { what: "fdatasync", source }));
        }
        mutants::count_sync();
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
                transfer.advance(count as u64, &self.image, &self.stats, &mut self.pool)
            }
            Err(source)
                if transfer.dsync
                    && !self.dsync_worked
                    && source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                // Refused before a byte was written: this host has no RWF_DSYNC here. Where one has
                // worked before, it is an error like any other.
                log::info!("disk: no RWF_DSYNC on this file; stable writes use fdatasync");
                self.has_dsync = false;
                transfer.dsync = false;
                transfer.next_window(&self.image, &self.stats, &mut self.pool).map(Some)
            }
            Err(source) => {
                if transfer.dsync && !is_on(Mutant::SyncErrorForgotten) {
                    // Whether the write or its sync has failed cannot be told apart.
                    self.image.latch.set(&source);
                }
                Err(DiskError::Host { what: transfer.what(), source })
            }
        }
    }

    fn complete(&mut self, id: Member, result: Result<(), DiskError>) {
        if result.is_err() {
            self.stats.count(|counters| &counters.errors);
        }
        mutants::count_write();
        if let Some(id) = id {
            self.stats.ends();
            self.done.push(Completion { id, result });
        }
    }
}

impl Drop for DiskQueue {
    /// Usually nothing is in flight. Where an engine has failed, nobody will judge the syncs that it
    /// had: they count as failed.
    fn drop(&mut self) {
        for sync in std::mem::take(&mut self.in_flight).into_values().filter_map(|flight| flight.sync) {
            self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            self.image.latch.judged(sync.ticket);
        }
    }
}
