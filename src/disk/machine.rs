//! The state machine between requests and host operations.
//!
//! Owns, for one queue: continuation of short transfers, bounce buffers, stable writes, the use of
//! the error latch, draining; [`super::erase`] takes an erase through its ranges. Its completions are
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
use super::monitor::{SyncEnd, SyncStart};
use crate::mem::{AlignedBuffer, Iov};

/// Most bytes that one transfer moves through a private buffer; longer requests take turns.
pub const BOUNCE_MAX: u64 = 256 << 10;
/// Most bytes of one host transfer: what Linux moves at once (MAX_RW_COUNT), on whole blocks.
const TRANSFER_MAX: u64 = 0x7fff_f000;
/// Most pieces of one host transfer (IOV_MAX).
const PIECES_MAX: usize = 1024;

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

/// The state machine of one queue of one disk.
pub struct Disk {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    engine: Box<dyn Engine>,
    stable_by: StableBy,
    in_flight: HashMap<u64, Flight>,
    next_token: u64,
    /// The fdatasyncs that the engine has, for the monitor.
    syncs: HashMap<u64, SyncStart>,
    waiting: VecDeque<(u64, HostOp)>,
    ended: Vec<Ended>,
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
}

enum Stage {
    Transfer(Transfer),
    Erase(Erase),
    /// An fdatasync that started after everything of this request had ended.
    Sync,
}

struct Transfer {
    write: bool,
    iov: Iov,
    offset: u64,
    done: u64,
    dsync: bool,
    bounce: Option<Iov>,
    asked: u64,
}

/// What comes after an operation has ended.
enum Next {
    Op(HostOp),
    Done(Result<(), DiskError>),
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
            syncs: HashMap::new(),
            waiting: VecDeque::new(),
            ended: Vec::new(),
            done: Vec::new(),
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether nothing is in flight and no completion waits to be taken.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.done.is_empty()
    }

    /// Takes a request. Its completion comes out of [`Disk::take_completions`], perhaps at once.
    pub fn submit(&mut self, id: u64, op: Op) {
        self.count(&op);
        let wb_at_submit = self.cache.writeback();
        let writes = op.written_bytes();
        match self.begin(op, wb_at_submit) {
            Ok((stage, Next::Op(first))) => self.take_off(Some(id), wb_at_submit, stage, first, writes),
            Ok((_, Next::Done(result))) => self.complete(Some(id), result),
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
        let wake = if self.done.is_empty() { wake } else { Wake::Now };
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.engine.wait(wake, &mut ended);
        for end in ended.drain(..) {
            self.advance(end);
        }
        self.ended = ended;
        waited
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
                self.begin_transfer(range, iov, true, stable && self.stable_by == StableBy::Dsync)
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
        let mut transfer =
            Transfer { write, iov, offset: range.offset(), done: 0, dsync, bounce: None, asked: 0 };
        let next = match transfer.iov.bytes() {
            0 => Next::Done(Ok(())),
            _ => self.next_window(&mut transfer)?,
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
        if geometry.is_aligned(range) {
            Ok(())
        } else {
            Err(DiskError::Misaligned(geometry.alignment.offset))
        }
    }

    fn take_off(&mut self, id: Option<u64>, wb_at_submit: bool, stage: Stage, first: HostOp, writes: u64) {
        let token = self.next_token;
        self.next_token += 1;
        let flight = Flight { id, wb_at_submit, stage, writes, current: None };
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
            let sync = matches!(op, HostOp::Fdatasync).then(|| self.image.monitor.sync_starts());
            match self.engine.submit(token, op) {
                Ok(()) => {
                    Counters::count(counter);
                    if let Some(start) = sync {
                        self.syncs.insert(token, start);
                    }
                }
                Err(op) => {
                    self.waiting.push_front((token, op));
                    return;
                }
            }
        }
    }

    /// An operation has ended: the next one of its request, or the request's completion.
    fn advance(&mut self, end: Ended) {
        let Some(mut flight) = self.in_flight.remove(&end.token) else {
            // An engine that ends what it was never given could just as well have lost something.
            log::error!("disk: the engine ended operation {}, which is not in flight", end.token);
            self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            return;
        };
        let next = match end.result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => match flight.current.take() {
                Some(op) => Next::Op(op),
                None => Next::Done(Err(DiskError::Host { what: "an interrupted operation", source: error })),
            },
            result => self.judge(&mut flight, result),
        };
        self.tell_monitor(end.token, &flight, &next);
        match next {
            Next::Op(op) => {
                self.in_flight.insert(end.token, flight);
                self.issue(end.token, op);
            }
            Next::Done(result) => self.complete(flight.id, result),
        }
    }

    /// Before the guest is told anything: what it now takes for written, or for stable.
    fn tell_monitor(&mut self, token: u64, flight: &Flight, next: &Next) {
        let sync = if self.syncs.is_empty() { None } else { self.syncs.remove(&token) };
        if let Some(start) = sync {
            let end = match next {
                Next::Done(Ok(())) => SyncEnd::Stable,
                Next::Done(Err(DiskError::Host { .. })) => SyncEnd::Failed,
                _ => SyncEnd::Void,
            };
            self.image.monitor.sync_ends(start, end);
        } else if matches!(next, Next::Done(Ok(()))) && !flight.stage.is_stable() {
            self.image.monitor.acknowledges(flight.writes);
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
            Ok(()) if is_stable => Next::Done(Ok(())),
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
        // Another queue's sync may have failed meanwhile and taken the error that was ours too.
        Next::Done(self.check_latch())
    }

    fn judge_transfer(
        &mut self,
        transfer: &mut Transfer,
        result: io::Result<usize>,
    ) -> Result<Option<HostOp>, DiskError> {
        let what = transfer.what();
        let count = match result {
            Ok(count) => count as u64,
            Err(source) if transfer.dsync && source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                // Refused before a byte was written: this host has no RWF_DSYNC here.
                log::info!("disk: no RWF_DSYNC on this file; stable writes use fdatasync");
                self.stable_by = StableBy::Fdatasync;
                transfer.dsync = false;
                return self.next_window(transfer).map(Next::into_op);
            }
            Err(source) => {
                if transfer.dsync {
                    // Whether the write or its sync has failed cannot be told apart.
                    self.image.latch.set(&source);
                }
                return Err(DiskError::Host { what, source });
            }
        };
        let bytes = transfer.iov.bytes();
        let short = DiskError::Short { what, done: transfer.done, bytes };
        if count == 0 || count > transfer.asked {
            return Err(short);
        }
        // What O_DIRECT cannot continue in the middle of a block is moved again, whole.
        let step = u64::from(self.image.geometry().alignment.offset);
        let moved = if count == transfer.asked { count } else { count - count % step };
        if moved == 0 {
            return Err(short);
        }
        if let (Some(bounce), false) = (&transfer.bounce, transfer.write) {
            bounce.part(0, moved, 1).copy_to(&transfer.iov.part(transfer.done, moved, usize::MAX));
        }
        if moved < transfer.asked {
            Counters::count(&self.image.counters.continued);
        }
        transfer.done += moved;
        if transfer.done == bytes {
            return Ok(None);
        }
        self.next_window(transfer).map(Next::into_op)
    }

    /// The host operation for the next part of a transfer, through a bounce buffer if it must be.
    fn next_window(&self, transfer: &mut Transfer) -> Result<Next, DiskError> {
        let alignment = self.image.geometry().alignment;
        let direct = self.cache.policy().direct;
        let mut window = transfer.iov.part(transfer.done, TRANSFER_MAX, PIECES_MAX);
        transfer.bounce = None;
        let fits = window.is_aligned(alignment.memory, alignment.offset);
        if direct && (self.image.bounce_always() || !fits) {
            let bounce = self.bounce(transfer)?;
            transfer.bounce = Some(bounce.clone());
            window = bounce;
        }
        transfer.asked = window.bytes();
        let offset = transfer.offset + transfer.done;
        Ok(Next::Op(if transfer.write {
            HostOp::Writev { iov: window, offset, dsync: transfer.dsync }
        } else {
            HostOp::Readv { iov: window, offset }
        }))
    }

    fn bounce(&self, transfer: &Transfer) -> Result<Iov, DiskError> {
        let part = transfer.iov.part(transfer.done, BOUNCE_MAX, usize::MAX);
        let alignment = self.image.geometry().alignment;
        let no_memory = |source| DiskError::Host { what: "allocating a bounce buffer", source };
        let bytes = usize::try_from(part.bytes()).map_err(|error| no_memory(io::Error::other(error)))?;
        let buffer = AlignedBuffer::new(bytes, alignment.memory.max(512) as usize).map_err(no_memory)?;
        let bounce = Iov::from_buffer(&Arc::new(buffer), bytes);
        if transfer.write {
            part.copy_to(&bounce);
        }
        Counters::count(&self.image.counters.bounces);
        Ok(bounce)
    }

    fn complete(&mut self, id: Option<u64>, result: Result<(), DiskError>) {
        if result.is_err() {
            Counters::count(&self.image.counters.errors);
        }
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
        matches!(self, Stage::Sync | Stage::Transfer(Transfer { dsync: true, .. }))
    }
}

impl Next {
    fn into_op(self) -> Option<HostOp> {
        match self {
            Next::Op(op) => Some(op),
            Next::Done(_) => None,
        }
    }
}

impl Transfer {
    fn what(&self) -> &'static str {
        match (self.write, self.dsync) {
            (false, _) => "preadv",
            (true, false) => "pwritev",
            (true, true) => "pwritev2 with RWF_DSYNC",
        }
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
