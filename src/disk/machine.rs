//! The state machine between requests and host operations.
//!
//! Owns, for one queue: continuation of short transfers, bounce buffers, stable writes, the use of
//! the error latch, draining; [`super::transfer`] and [`super::erase`] take a request through its parts. Its completions are
//! whole: `Ok` means every byte and, for a stable write or a FLUSH, stable. It sits above the
//! engines, so whatever an engine does wrong or the kernel answers is judged here, and a simulated
//! engine can try all of it.
//!
//! A request has exactly one host operation in flight at any time:
//!
//! ```text
//!            ┌─ short, EINTR ─┐
//!            ▼                │
//! submit → transfer ──────────┴─ all bytes ─┬─ may be volatile, or was DSYNC ─→ Ok
//!          erase (each range)               └─ must be stable → fdatasync ─┬──→ Ok
//! FLUSH ──────────────────────────────────────────────────────→ fdatasync ─┴──→ Err, latched
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use super::cache::WriteCache;
use super::counters::Counters;
use super::engine::{Ended, Engine, HostOp, Wake};
use super::erase::{Erase, ZeroedRange};
use super::geometry::SectorRange;
use super::image::Image;
use super::latch::Ticket;
use super::monitor::{SyncEnd, SyncStart};
use super::transfer::Transfer;
use crate::mem::Iov;
use crate::mutants::{self, Mutant, is_on};

/// What a request wants of the disk.
#[derive(Debug)]
pub enum Op {
    /// Fills the memory from the image.
    Read(SectorRange, Iov),
    /// Writes the memory to the image.
    Write(SectorRange, Iov),
    /// Makes stable whatever was complete before this was submitted.
    Flush,
    /// The content of these ranges is not wanted any more.
    Discard(Vec<SectorRange>),
    /// These ranges read as zeroes afterwards.
    WriteZeroes(Vec<ZeroedRange>),
}

/// Why a request failed. Nothing of it is retried.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refused the operation.
    #[error("{what} failed")]
    Host {
        /// Which one.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The image ends before the request does: somebody has truncated it.
    #[error("{what} ended after {done} of {bytes} bytes: has the image been truncated?")]
    Short {
        /// Which operation.
        what: &'static str,
        /// Bytes moved, all parts together.
        done: u64,
        /// Bytes asked for.
        bytes: u64,
    },
    /// An earlier sync has failed, so nothing can be called stable any more.
    #[error("nothing can be made stable since an earlier sync failed")]
    Latched(#[source] io::Error),
    /// The disk is read-only.
    #[error("the disk is readonly")]
    Readonly,
    /// Not on the block boundaries that O_DIRECT needs here.
    #[error("not aligned to the {0} bytes that O_DIRECT needs on this host")]
    Misaligned(u32),
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The identity it was submitted with.
    pub id: u64,
    /// Every byte moved and, where that was asked, stable; or why not.
    pub result: Result<(), DiskError>,
}

/// How a write is made stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StableBy {
    /// RWF_DSYNC on each write.
    Dsync,
    /// A write, then fdatasync.
    Fdatasync,
}

impl StableBy {
    /// What a disk begins with: where the host has no RWF_DSYNC it goes over to the other.
    pub const FIRST: StableBy = StableBy::Dsync;
}

/// The state machine of one queue of one disk.
pub struct Disk {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    engine: Box<dyn Engine>,
    stable_by: StableBy,
    in_flight: HashMap<u64, Flight>,
    next_token: u64,
    waiting: VecDeque<(u64, HostOp)>,
    ended: Vec<Ended>,
    /// Successes that count only when other syncs have been judged.
    held: Vec<(Ticket, Success)>,
    done: Vec<Completion>,
}

/// A request in flight.
struct Flight {
    /// `None` for a sync of our own.
    id: Option<u64>,
    wb_at_submit: bool,
    stage: Stage,
    /// Bytes that the guest sees changed, for the monitor.
    writes: u64,
    /// The operation that the engine has, to repeat it after EINTR.
    current: Option<HostOp>,
    /// Open while the engine has that operation and it is a sync.
    sync: Option<OpenSync>,
}

/// A sync that the engine has.
struct OpenSync {
    ticket: Ticket,
    /// What an fdatasync will have made stable, for the monitor.
    covers: Option<SyncStart>,
}

/// A request, or a sync of our own, that is done and stable if no other sync says otherwise.
struct Success {
    id: Option<u64>,
    covers: Option<SyncStart>,
}

enum Stage {
    Transfer(Transfer),
    Erase(Erase),
    /// An fdatasync that started after everything of this request had ended.
    Sync,
}

/// What comes after an operation has ended.
enum Next {
    Op(HostOp),
    Done(Result<(), DiskError>),
    /// Done and stable, if no other sync says otherwise.
    Stable,
}

impl Disk {
    /// The machine of one queue; `engine` works on the image's descriptor.
    pub fn new(
        image: Arc<Image>,
        cache: Arc<WriteCache>,
        engine: Box<dyn Engine>,
        stable_by: StableBy,
    ) -> Self {
        Self {
            image,
            cache,
            engine,
            stable_by,
            in_flight: HashMap::new(),
            next_token: 0,
            waiting: VecDeque::new(),
            ended: Vec::new(),
            held: Vec::new(),
            done: Vec::new(),
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether nothing is in flight and no completion waits to be taken.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.held.is_empty() && self.done.is_empty()
    }

    /// Takes a request. Its completion comes out of [`Disk::take_completions`], perhaps at once.
    pub fn submit(&mut self, id: u64, op: Op) {
        self.count(&op);
        let wb_at_submit = self.cache.writeback();
        let is_write = matches!(op, Op::Write(..));
        let writes = op.written_bytes();
        match self.begin(op, wb_at_submit) {
            Ok((stage, Next::Op(first))) => {
                if is_on(Mutant::SyncBeforeWrite) && is_write && self.cache.write_must_be_stable(wb_at_submit)
                {
                    self.take_off(None, false, Stage::Sync, HostOp::Fdatasync, 0);
                }
                let early = is_on(Mutant::StatusBeforeData) && matches!(stage, Stage::Transfer(_));
                self.take_off((!early).then_some(id), wb_at_submit, stage, first, writes);
                if early {
                    self.complete(Some(id), Ok(()));
                }
            }
            Ok((_, Next::Done(result))) => self.complete(Some(id), result),
            Ok((_, Next::Stable)) => self.complete(Some(id), Ok(())),
            Err(error) => self.complete(Some(id), Err(error)),
        }
    }

    /// The guest has turned its write cache off: makes stable what is complete by now.
    pub fn sync_if_switched_off(&mut self) {
        if self.cache.take_switched_off() && self.cache.policy().honour_flush && !self.image.readonly() {
            self.take_off(None, false, Stage::Sync, HostOp::Fdatasync, 0);
        }
    }

    /// Waits until something has ended or `wake` says so.
    pub fn wait(&mut self, wake: Wake<'_>) -> io::Result<()> {
        self.feed_engine();
        self.release_settled();
        // What is held only by another queue's sync has no end of our own to wake us.
        let held_by_others = !self.held.is_empty() && self.in_flight.is_empty();
        let wake = if self.done.is_empty() && !held_by_others { wake } else { Wake::Now };
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.engine.wait(wake, &mut ended);
        for end in ended.drain(..) {
            self.advance(end);
        }
        self.ended = ended;
        self.release_settled();
        waited
    }

    /// Completes what was held, once all the syncs that it waited for are judged.
    fn release_settled(&mut self) {
        for (horizon, success) in std::mem::take(&mut self.held) {
            if self.image.latch.is_settled(horizon) {
                self.succeed(success);
            } else {
                self.held.push((horizon, success));
            }
        }
    }

    /// The requests that are done, in the order of their ends.
    pub fn take_completions(&mut self) -> std::vec::Drain<'_, Completion> {
        self.done.drain(..)
    }

    fn count(&self, op: &Op) {
        let counters = &self.image.counters;
        Counters::count(match op {
            Op::Read(..) => &counters.reads,
            Op::Write(..) => &counters.writes,
            Op::Flush => &counters.flushes,
            Op::Discard(_) => &counters.discards,
            Op::WriteZeroes(_) => &counters.write_zeroes,
        });
    }

    /// The first stage of a request and its first host operation.
    fn begin(&self, op: Op, wb_at_submit: bool) -> Result<(Stage, Next), DiskError> {
        match op {
            Op::Read(range, iov) => self.begin_transfer(range, iov, false, false),
            Op::Write(range, iov) => {
                self.check_writable()?;
                let stable = self.cache.write_must_be_stable(wb_at_submit);
                if stable {
                    self.check_latch()?;
                }
                let dsync = stable && self.stable_by == StableBy::Dsync && !is_on(Mutant::SyncBeforeWrite);
                self.begin_transfer(range, iov, true, dsync)
            }
            Op::Flush if is_on(Mutant::FlushDoesNothing) || mutants::skips_sync() => {
                Ok((Stage::Sync, Next::Done(Ok(()))))
            }
            Op::Flush if !self.cache.policy().honour_flush => {
                Counters::count(&self.image.counters.flushes_ignored);
                Ok((Stage::Sync, Next::Done(Ok(()))))
            }
            Op::Flush => {
                self.check_latch()?;
                Ok((Stage::Sync, Next::Op(HostOp::Fdatasync)))
            }
            Op::Discard(ranges) => {
                let unmapped = |range| ZeroedRange { range, unmap: true };
                let ranges: Vec<_> = ranges.into_iter().map(unmapped).collect();
                self.begin_erase(&ranges, false, wb_at_submit)
            }
            Op::WriteZeroes(ranges) => self.begin_erase(&ranges, true, wb_at_submit),
        }
    }

    fn begin_transfer(
        &self,
        range: SectorRange,
        iov: Iov,
        write: bool,
        dsync: bool,
    ) -> Result<(Stage, Next), DiskError> {
        self.check_aligned(range)?;
        let mut transfer = Transfer::new(range.offset(), iov, write, dsync);
        let next = if transfer.is_empty() {
            Next::Done(Ok(()))
        } else {
            Next::Op(transfer.next_window(&self.image)?)
        };
        Ok((Stage::Transfer(transfer), next))
    }

    fn begin_erase(
        &self,
        ranges: &[ZeroedRange],
        must_zero: bool,
        wb_at_submit: bool,
    ) -> Result<(Stage, Next), DiskError> {
        self.check_writable()?;
        for erased in ranges {
            self.check_aligned(erased.range)?;
        }
        if self.cache.write_must_be_stable(wb_at_submit) {
            self.check_latch()?;
        }
        let mut erase = Erase::new(ranges, must_zero, self.image.geometry().alignment);
        let next = match erase.begin_range() {
            Some(op) => Next::Op(op),
            None => Next::Done(Ok(())),
        };
        Ok((Stage::Erase(erase), next))
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if self.image.readonly() { Err(DiskError::Readonly) } else { Ok(()) }
    }

    fn check_latch(&self) -> Result<(), DiskError> {
        self.image.latch.check().map_err(DiskError::Latched)
    }

    fn check_aligned(&self, range: SectorRange) -> Result<(), DiskError> {
        let geometry = self.image.geometry();
        if geometry.is_aligned(range) || is_on(Mutant::UnlockedRmw) {
            Ok(())
        } else {
            Err(DiskError::Misaligned(geometry.alignment.offset))
        }
    }

    fn take_off(&mut self, id: Option<u64>, wb_at_submit: bool, stage: Stage, first: HostOp, writes: u64) {
        let token = self.next_token;
        self.next_token += 1;
        let flight = Flight { id, wb_at_submit, stage, writes, current: None, sync: None };
        self.in_flight.insert(token, flight);
        self.issue(token, first);
    }

    /// Hands an operation to the engine, behind those that already wait for room in it.
    fn issue(&mut self, token: u64, op: HostOp) {
        if let Some(flight) = self.in_flight.get_mut(&token) {
            flight.current = Some(op.clone());
        }
        self.waiting.push_back((token, op));
        self.feed_engine();
    }

    fn feed_engine(&mut self) {
        while let Some((token, op)) = self.waiting.pop_front() {
            let counter = counter_of(&self.image.counters, &op);
            // Open before the engine may begin it.
            let sync = self.open_sync(&op);
            match self.engine.submit(token, op) {
                Ok(()) => {
                    Counters::count(counter);
                    if let Some(flight) = self.in_flight.get_mut(&token) {
                        flight.sync = sync;
                    }
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
        let Some(mut flight) = self.in_flight.remove(&end.token) else {
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
        let covers = sync.and_then(|sync| sync.covers);
        match next {
            Next::Op(op) => {
                self.end_sync(covers, SyncEnd::Void);
                self.in_flight.insert(end.token, flight);
                self.issue(end.token, op);
            }
            Next::Done(result) => {
                let failed = matches!(result, Err(DiskError::Host { .. }));
                self.end_sync(covers, if failed { SyncEnd::Failed } else { SyncEnd::Void });
                // Before the guest is told: what it now takes for written.
                if result.is_ok() && !flight.stage.is_stable() {
                    self.image.monitor.acknowledges(flight.writes);
                }
                self.complete(flight.id, result);
            }
            Next::Stable => {
                let success = Success { id: flight.id, covers };
                match self.image.latch.open_now() {
                    Some(horizon) if !is_on(Mutant::SuccessCountsAtOnce) => {
                        self.held.push((horizon, success))
                    }
                    _ => self.succeed(success),
                }
            }
        }
    }

    /// A success that counts, unless an earlier sync has failed.
    fn succeed(&mut self, success: Success) {
        let result = self.check_latch();
        self.end_sync(success.covers, if result.is_ok() { SyncEnd::Stable } else { SyncEnd::Void });
        self.complete(success.id, result);
    }

    fn end_sync(&self, covers: Option<SyncStart>, end: SyncEnd) {
        if let Some(start) = covers {
            self.image.monitor.sync_ends(start, end);
        }
    }

    fn judge(&mut self, flight: &mut Flight, result: io::Result<usize>) -> Next {
        match &mut flight.stage {
            Stage::Sync => self.judge_sync(result),
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
            Ok(count) => transfer.advance(count as u64, &self.image),
            Err(source) if transfer.dsync && source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                // Refused before a byte was written: this host has no RWF_DSYNC here.
                log::info!("disk: no RWF_DSYNC on this file; stable writes use fdatasync");
                self.stable_by = StableBy::Fdatasync;
                transfer.dsync = false;
                transfer.next_window(&self.image).map(Some)
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

    fn complete(&mut self, id: Option<u64>, result: Result<(), DiskError>) {
        if result.is_err() {
            Counters::count(&self.image.counters.errors);
        }
        mutants::count_write();
        if let Some(id) = id {
            self.done.push(Completion { id, result });
        }
    }
}

impl Op {
    /// Bytes that the guest will see changed.
    fn written_bytes(&self) -> u64 {
        match self {
            Op::Read(..) | Op::Flush => 0,
            Op::Write(range, _) => range.bytes(),
            Op::Discard(ranges) => ranges.iter().fold(0, |sum, range| sum.saturating_add(range.bytes())),
            Op::WriteZeroes(ranges) => {
                ranges.iter().fold(0, |sum, zeroed| sum.saturating_add(zeroed.range.bytes()))
            }
        }
    }
}

impl Stage {
    /// Whether all that was written is stable when this ends well.
    fn is_stable(&self) -> bool {
        matches!(self, Stage::Sync) || matches!(self, Stage::Transfer(transfer) if transfer.dsync)
    }
}

fn counter_of<'a>(counters: &'a Counters, op: &HostOp) -> &'a std::sync::atomic::AtomicU64 {
    match op {
        HostOp::Readv { .. } => &counters.preadvs,
        HostOp::Writev { dsync: false, .. } => &counters.pwritevs,
        HostOp::Writev { dsync: true, .. } => &counters.pwritevs_dsync,
        HostOp::Fdatasync => &counters.fdatasyncs,
        HostOp::PunchHole { .. } | HostOp::ZeroRange { .. } => &counters.fallocates,
    }
}
