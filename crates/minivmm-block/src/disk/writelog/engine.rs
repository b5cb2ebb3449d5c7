//! An engine around another one that records in the write log what was really done.
//!
//! Owns the observation: which operation it was, when it was submitted and when its completion was seen. It
//! stands directly around the engine that makes the host's calls, below injected faults. A lost write is
//! therefore not in the log, and a torn one only as far as it was written. The logged bytes are the written
//! bytes, because the state machine copies every write of a disk that has a log (`disk/transfer.rs`).

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Change, WriteLog};
use crate::disk::engine::{Ended, Engine, HostOp, Meanwhile, OpToken, Wake};
use crate::disk::image::Image;
use crate::disk::sync_ledger::SyncTicket;

/// An engine whose completions are recorded.
pub struct LoggingEngine {
    inner: Box<dyn Engine>,
    image: Arc<Image>,
    in_flight: HashMap<OpToken, Watched>,
}

/// An operation that the engine below has.
struct Watched {
    op: HostOp,
    sync: Option<SyncTicket>,
}

impl LoggingEngine {
    /// Wraps `inner` in the log of `image`, if it has one.
    pub fn wrap(inner: Box<dyn Engine>, image: &Arc<Image>) -> Box<dyn Engine> {
        if image.write_log().is_none() {
            return inner;
        }
        Box::new(Self { inner, image: Arc::clone(image), in_flight: HashMap::new() })
    }
}

impl Watched {
    fn ends(self, log: &WriteLog, result: &io::Result<usize>) {
        let count = match result {
            Ok(count) => *count as u64,
            Err(error) => {
                if let Some(sync) = self.sync {
                    log.sync_ends(sync, (!says_nothing(&self.op, error)).then_some(false));
                }
                return;
            }
        };
        match self.op {
            HostOp::Fdatasync => {
                if let Some(sync) = self.sync {
                    log.sync_ends(sync, Some(true));
                }
            }
            HostOp::Writev { iov, offset, .. } => {
                log.change_ends(offset, Change::Bytes(iov.part(0, count, usize::MAX)), self.sync);
            }
            HostOp::PunchHole { offset, len, must_zero: false } => {
                log.change_ends(offset, Change::Discarded(len), None);
            }
            HostOp::PunchHole { offset, len, .. } | HostOp::ZeroRange { offset, len } => {
                log.change_ends(offset, Change::Zeroes(len), None);
            }
            HostOp::Readv { .. } => {}
        }
    }
}

/// Returns `true` if a sync's error says nothing about stability. The sync will be repeated, or the host has no
/// RWF_DSYNC.
fn says_nothing(op: &HostOp, error: &io::Error) -> bool {
    let refused = matches!(op, HostOp::Writev { .. }) && error.raw_os_error() == Some(libc::EOPNOTSUPP);
    refused || error.kind() == io::ErrorKind::Interrupted
}

impl LoggingEngine {
    /// Enters in the log what has ended.
    fn note(&mut self, ended: &[Ended]) {
        let Some(log) = self.image.write_log() else { return };
        for end in ended {
            if let Some(watched) = self.in_flight.remove(&end.token) {
                watched.ends(log, &end.result);
            }
        }
    }
}

impl Engine for LoggingEngine {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let Some(log) = self.image.write_log() else { return self.inner.submit(token, op) };
        if matches!(op, HostOp::Readv { .. }) {
            return self.inner.submit(token, op);
        }
        // Entered in the log before the engine may begin the operation.
        let sync = match op {
            HostOp::Fdatasync => Some(log.sync_starts()),
            HostOp::Writev { dsync: true, .. } => Some(log.stable_write_starts()),
            _ => None,
        };
        let watched = Watched { op: op.clone(), sync };
        self.inner.submit(token, op).inspect_err(|_| {
            if let Some(sync) = sync {
                log.sync_ends(sync, None);
            }
        })?;
        self.in_flight.insert(token, watched);
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let before = ended.len();
        let waited = self.inner.wait(wake, ended);
        self.note(ended.get(before..).unwrap_or_default());
        waited
    }

    fn is_ready(&mut self) -> bool {
        self.inner.is_ready()
    }

    fn meanwhile(&self) -> Meanwhile {
        self.inner.meanwhile()
    }

    fn execute_kept(&mut self, came: &dyn Fn() -> bool, ended: &mut Vec<Ended>) {
        let before = ended.len();
        self.inner.execute_kept(came, ended);
        self.note(ended.get(before..).unwrap_or_default());
    }

    fn listen_to(&mut self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        self.inner.listen_to(kick)
    }

    fn rest(&mut self) -> io::Result<()> {
        self.inner.rest()
    }
}

impl Drop for LoggingEngine {
    /// Counts syncs that nobody will judge as failed. Usually nothing is in flight.
    fn drop(&mut self) {
        let Some(log) = self.image.write_log() else { return };
        for sync in self.in_flight.drain().filter_map(|(_, watched)| watched.sync) {
            log.sync_ends(sync, Some(false));
        }
    }
}
