//! Engines that do what a test says before, or instead of, what the host does.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use minivmm::disk::Image;
use minivmm::disk::blocking::BlockingEngine;
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};

/// What happens to an operation.
#[derive(Debug, Clone, Copy)]
pub enum Fate {
    /// The host executes it.
    Real,
    /// It fails with this errno and nothing is done.
    Fails(i32),
    /// It moves at most so many bytes.
    Short(u64),
    /// It ends with this count and nothing is done.
    Claims(usize),
}

/// Decides about each operation, from its kind and how many of that kind came before.
pub type Script = Box<dyn FnMut(Kind, usize) -> Fate + Send>;

/// What strace would call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// preadv.
    Read,
    /// pwritev.
    Write,
    /// pwritev2 with RWF_DSYNC.
    WriteDsync,
    /// fdatasync.
    Fdatasync,
    /// fallocate with FALLOC_FL_PUNCH_HOLE.
    Punch,
    /// fallocate with FALLOC_FL_ZERO_RANGE.
    Zero,
}

impl Kind {
    /// Returns the kind of an operation.
    pub fn of(op: &HostOp) -> Self {
        match op {
            HostOp::Readv { .. } => Kind::Read,
            HostOp::Writev { dsync: false, .. } => Kind::Write,
            HostOp::Writev { dsync: true, .. } => Kind::WriteDsync,
            HostOp::Fdatasync => Kind::Fdatasync,
            HostOp::PunchHole { .. } => Kind::Punch,
            HostOp::ZeroRange { .. } => Kind::Zero,
        }
    }
}

/// The operations that an engine was given, in the order of their execution.
pub type Log = Arc<Mutex<Vec<Kind>>>;

/// An engine that follows a script and keeps a log.
pub struct Scripted {
    inner: BlockingEngine,
    script: Script,
    log: Log,
    queued: VecDeque<(OpToken, HostOp)>,
}

impl Scripted {
    /// Makes an engine over the image's file, and the log that it keeps.
    pub fn with_log(image: &Image, script: Script) -> (Box<dyn Engine>, Log) {
        let log = Log::default();
        let inner = BlockingEngine::new(Arc::clone(image.file().descriptor()));
        let engine = Self { inner, script, log: Arc::clone(&log), queued: VecDeque::new() };
        (Box::new(engine), log)
    }

    /// Everything real, only logged.
    pub fn honest(image: &Image) -> (Box<dyn Engine>, Log) {
        Self::with_log(image, Box::new(|_, _| Fate::Real))
    }
}

impl Engine for Scripted {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.queued.push_back((token, op));
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let Some((token, op)) = self.queued.pop_front() else { return self.inner.wait(wake, ended) };
        let kind = Kind::of(&op);
        let before = {
            let mut log = self.log.lock().unwrap();
            let before = log.iter().filter(|&&other| other == kind).count();
            log.push(kind);
            before
        };
        let op = match (self.script)(kind, before) {
            Fate::Real => op,
            Fate::Fails(errno) => {
                ended.push(Ended { token, result: Err(io::Error::from_raw_os_error(errno)) });
                return Ok(());
            }
            Fate::Claims(count) => {
                ended.push(Ended { token, result: Ok(count) });
                return Ok(());
            }
            Fate::Short(bytes) => match op {
                HostOp::Readv { iov, offset } => HostOp::Readv { iov: iov.part(0, bytes, 1024), offset },
                HostOp::Writev { iov, offset, dsync } => {
                    HostOp::Writev { iov: iov.part(0, bytes, 1024), offset, dsync }
                }
                other => other,
            },
        };
        self.inner.submit(token, op).unwrap();
        self.inner.wait(wake, ended)
    }
}
