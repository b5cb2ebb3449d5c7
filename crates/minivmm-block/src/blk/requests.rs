//! The requests of one queue: from a popped chain to the disk, and from the disk to the used ring.
//!
//! Owns what each request in flight still needs for its completion. A popped chain is completed exactly once, or the
//! ring is declared broken. Requests are kept under a private number and never under the guest's head, because a
//! hostile guest may submit the same head twice (R8).

use std::sync::Arc;
use std::time::Instant;

use super::job::{Job, TurnError};
use super::request::{self, Data, Frame, HEADER_BYTES, Header, ID_BYTES, Limits, Request, Status};
use super::stopwatch::Stopwatch;
use crate::disk::Image;
use crate::disk::disk_queue::{Completion, DiskQueue, Op, RequestId};
use crate::mem::{self, Iov};
use crate::ratelimit::RateLimit;
use crate::slab::Slab;
use crate::virtio::queue::{Chain, RingError};
use crate::warn_limited;

/// What is needed to complete a request that is in flight.
#[derive(Clone, Copy)]
struct Owed {
    head: u16,
    status_addr: u64,
    /// Writable bytes before the status byte.
    room: u64,
    /// Bytes of data that the driver gets if the request succeeds.
    data_bytes: u32,
}

/// The requests of one queue, from DRIVER_OK to reset.
pub(super) struct Requests<'a> {
    pub(super) job: Job,
    pub(super) disk: &'a mut DiskQueue,
    image: Arc<Image>,
    pending: Slab<RequestId, Owed>,
    /// The data of an erase. Its memory is reused for the next one.
    payload: Vec<u8>,
    errors: &'a mut RateLimit,
    /// Requests completed since [`Requests::take_completed`].
    completed: u32,
    /// `None` if latencies are not recorded.
    stopwatch: Option<Stopwatch>,
}

impl<'a> Requests<'a> {
    pub(super) fn new(job: Job, disk: &'a mut DiskQueue, errors: &'a mut RateLimit) -> Self {
        let image = Arc::clone(disk.image());
        let stopwatch = Stopwatch::begin(disk);
        Self {
            job,
            disk,
            image,
            pending: Slab::default(),
            payload: Vec::new(),
            errors,
            completed: 0,
            stopwatch,
        }
    }

    /// Returns the number of requests in flight.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Returns how many more requests can be in flight: at most as many are as the ring has entries. Only a driver that
    /// submits descriptors that it does not own can want more; those wait until others have completed (R23).
    pub(super) fn room(&self) -> usize {
        usize::from(self.job.ring.size()).saturating_sub(self.pending.len())
    }

    /// Asks for the doorbell, unless the queue is full. Returns `true` if a chain is there already.
    pub(super) fn enable_doorbell(&mut self) -> bool {
        self.room() > 0 && self.job.ring.enable_doorbell()
    }

    /// Returns the number of requests completed since the last call.
    pub(super) fn take_completed(&mut self) -> u32 {
        std::mem::take(&mut self.completed)
    }

    /// Turns a chain into a request to the disk, or completes it at once. Cuts header and status off the chain.
    pub(super) fn take(&mut self, chain: &mut Chain) -> Result<(), RingError> {
        let (head, fault) = (chain.head, chain.fault);
        let mut header = [0; HEADER_BYTES];
        let gathered = mem::gather_header(&self.job.ram, &chain.readable, &mut header);
        let Some(frame) = Frame::take_apart(chain) else { return Err(RingError::NoStatus(head)) };
        let (status_addr, room) = (frame.status_addr, frame.data_in.bytes);
        let owed = Owed { head, status_addr, room, data_bytes: 0 };
        let begun = match (fault, gathered) {
            (Some(fault), _) => Err(self.refuse(head, &fault)),
            (None, _) if !frame.has_header => Err(self.refuse(head, &"its header is shorter than 16 bytes")),
            (None, Err(why)) => Err(self.refuse(head, &why)),
            (None, Ok(_)) => self.begin(owed, Header::parse(&header), &frame),
        };
        match begun {
            Ok(()) => Ok(()),
            Err(status) => finish(&mut self.job, &owed, status),
        }
    }

    /// Logs why a request makes no sense, and returns its status.
    #[cold]
    fn refuse(&mut self, head: u16, why: &dyn std::fmt::Display) -> Status {
        warn_limited!(self.errors, "blk: request at descriptor {head}: {why}");
        Status::IoErr
    }

    /// Submits what a request asks for. The error is the status of a request that needs no disk, or is refused.
    #[inline(always)]
    fn begin(&mut self, owed: Owed, header: Header, frame: &Frame<'_>) -> Result<(), Status> {
        // Where an erase is not offered it must complete with UNSUPP, even if its amount of data is wrong. So
        // an empty payload goes on to the parser, which refuses it.
        let payload_bytes = header.payload_bytes(frame.data_out.bytes).unwrap_or(0);
        self.payload.clear();
        if payload_bytes > 0 {
            self.payload.resize(payload_bytes, 0);
            let gathered = mem::gather(&self.job.ram, frame.data_out.segments, &mut self.payload);
            gathered.map_err(|why| self.refuse(owed.head, &why))?;
        }
        let image = &self.image;
        let limits = Limits {
            geometry: image.geometry(),
            features: self.job.features,
            readonly: image.config().readonly,
        };
        match request::parse(header, frame, &self.payload, &limits)? {
            Request::In(range) => {
                let iov = self.memory(&owed, frame.data_in)?;
                // The walk has refused more than 4 GiB; the largest used length is 2^32 - 1.
                let data_bytes = u32::try_from(range.bytes()).unwrap_or(u32::MAX - 1);
                self.submit(Owed { data_bytes, ..owed }, Op::Read(range, iov));
            }
            Request::Out(range) => {
                let iov = self.memory(&owed, frame.data_out)?;
                self.submit(owed, Op::Write(range, iov));
            }
            Request::Flush => self.submit_rare(owed, Op::Flush),
            Request::Discard(ranges) => self.submit_rare(owed, Op::Discard(ranges)),
            Request::WriteZeroes(ranges) => self.submit_rare(owed, Op::WriteZeroes(ranges)),
            Request::GetId => return self.write_id(owed, frame),
        }
        Ok(())
    }

    #[inline(always)]
    fn memory(&mut self, owed: &Owed, data: Data<'_>) -> Result<Iov, Status> {
        Iov::new(&self.job.ram, data.segments).map_err(|why| self.refuse(owed.head, &why))
    }

    /// Completes a GET_ID, which needs no disk.
    fn write_id(&mut self, owed: Owed, frame: &Frame<'_>) -> Result<(), Status> {
        let written = mem::scatter(&self.job.ram, frame.data_in.segments, self.image.serial());
        written.map_err(|why| self.refuse(owed.head, &why))?;
        let owed = Owed { data_bytes: ID_BYTES, ..owed };
        // A status that cannot be written is found again by the caller, and breaks the ring there.
        finish(&mut self.job, &owed, Status::Ok).map_err(|_| Status::IoErr)
    }

    #[inline(always)]
    fn submit(&mut self, owed: Owed, op: Op) {
        let id = self.pending.insert(owed);
        if let (Some(watch), Some(woke)) = (&mut self.stopwatch, self.disk.woke_at()) {
            watch.pops(id, &op, woke);
        }
        self.disk.submit(id, op);
    }

    /// [`Requests::submit`], without its code at each place.
    #[inline(never)]
    fn submit_rare(&mut self, owed: Owed, op: Op) {
        self.submit(owed, op);
    }

    /// Completes what the disk has finished. Then publishes all of it by one store, and notifies the driver at
    /// most once.
    #[inline]
    pub(super) fn complete_finished(&mut self) -> Result<(), TurnError> {
        let has_work = self.disk.has_completed() || self.job.ring.owes_publish() || self.stopwatch.is_some();
        if has_work { self.complete_all() } else { Ok(()) }
    }

    fn complete_all(&mut self) -> Result<(), TurnError> {
        let heard = self.note_submitted();
        while let Some(completion) = self.disk.next_completion() {
            let Completion { id, result } = completion;
            let mut owed = self.pending.remove(id).ok_or(TurnError::Lost(id))?;
            let status = match result {
                Ok(()) => Status::Ok,
                Err(error) => {
                    let path = self.image.config().path.display();
                    warn_limited!(self.errors, "disk {path}: request fails: {}", Chained(&*error));
                    // The driver cannot rely on what was transferred before the error; a length of 0 is always
                    // true.
                    owed.data_bytes = 0;
                    Status::IoErr
                }
            };
            finish(&mut self.job, &owed, status)?;
            self.completed += 1;
            if let (Some(watch), Some(heard)) = (&mut self.stopwatch, heard) {
                watch.completes(id, heard);
            }
        }
        if self.job.ring.publish() {
            self.job.interrupt.queue(self.job.index);
        }
        if let Some(watch) = &mut self.stopwatch {
            watch.publishes();
        }
        Ok(())
    }

    /// Notes what was handed to the host since the last call. Returns when the last wait for the engine
    /// returned; `None` if latencies are not recorded.
    fn note_submitted(&mut self) -> Option<Instant> {
        let watch = self.stopwatch.as_mut()?;
        self.disk.take_submitted().for_each(|(id, at)| watch.submits(id, at));
        self.disk.woke_at()
    }
}

/// Writes the status, then the used entry; the data was written before. The used index follows when the batch
/// is published (virtio 2.7.8.2).
fn finish(job: &mut Job, owed: &Owed, status: Status) -> Result<(), RingError> {
    mem::write_byte(&job.ram, owed.status_addr, status as u8).map_err(|_| RingError::NoStatus(owed.head))?;
    job.ring.push_used(owed.head, request::written(owed.data_bytes, owed.room))
}

/// Displays an error with its causes, in one line.
pub(super) struct Chained<'a>(pub(super) &'a dyn std::error::Error);

impl std::fmt::Display for Chained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
