//! Which engine a disk gets.
//!
//! Owns the meaning of `engine=auto`: io_uring if the host has it and permits it, otherwise the blocking
//! engine. On tmpfs it is always the blocking engine: the data is in memory already, and every ring is a detour
//! (`docs/performance.md`).

use std::io;
use std::sync::Arc;

use super::blocking::{self, BlockingEngine};
use super::cache::CachePolicy;
use super::config::EngineChoice;
use super::engine::{Engine, HostOp};
use super::fault::FaultEngine;
use super::image::Image;
use super::uring::{self, UringEngine, UringError};
use super::writelog::engine::LoggingEngine;
use crate::mem::Ram;

/// The kinds of engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// [`UringEngine`].
    Uring,
    /// [`BlockingEngine`].
    Blocking,
}

impl EngineKind {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Uring => "io_uring",
            EngineKind::Blocking => "sync",
        }
    }

    /// Returns what the host's kernel sees of an operation on an image in the mode `cache`: a system call, or an
    /// entry of the ring.
    pub fn call(self, op: &HostOp, cache: &CachePolicy) -> &'static str {
        match self {
            EngineKind::Uring => uring::ring_entry(op, cache),
            EngineKind::Blocking => blocking::system_call(op, cache),
        }
    }
}

/// A disk's engines, and the reason if `auto` fell back.
pub struct Chosen {
    /// One engine per queue, all of the same kind.
    pub engines: Vec<Box<dyn Engine>>,
    /// The kind of the engines.
    pub kind: EngineKind,
    /// Why `auto` did not take io_uring; `None` if it did, or was not asked to choose.
    pub why: Option<String>,
}

/// Why a disk has no engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// io_uring was demanded, and the host has none for this image.
    #[error("disk {path}: io_uring is not available here: use engine=auto or engine=sync")]
    Uring {
        /// The path of the image.
        path: String,
        /// The error of io_uring.
        source: UringError,
    },
    /// The thread that times the delays of `fault=` cannot be started.
    #[error(
        "disk {path}: cannot start the thread 'fault-delays' for the delays of fault=: raise the limit of threads \
         (ulimit -u, pids.max of the cgroup), or leave the delays out"
    )]
    Delays {
        /// The path of the image.
        path: String,
        /// The error of the thread's start.
        source: io::Error,
    },
}

/// Returns one engine for each of `queues` queues of `image`. `ram` is guest memory, for buffers=fixed. Each
/// engine is wrapped in the image's write log and faults.
pub fn choose(image: &Arc<Image>, ram: Option<&Ram>, queues: u16) -> Result<Chosen, EngineError> {
    let chosen = find(image, ram, queues)?;
    image.stats.engine_is(chosen.kind.name());
    let engines = chosen.engines.into_iter().map(|engine| equip(engine, image)).collect::<io::Result<_>>();
    let delays = |source| EngineError::Delays { path: image.config().path.display().to_string(), source };
    Ok(Chosen { engines: engines.map_err(delays)?, ..chosen })
}

/// Wraps `engine` in the image's write log, and that in its faults. In this order the log records what was
/// really done. The error is that of a thread's start: delays need one.
pub fn equip(engine: Box<dyn Engine>, image: &Arc<Image>) -> io::Result<Box<dyn Engine>> {
    FaultEngine::wrap(LoggingEngine::wrap(engine, image), image)
}

fn find(image: &Arc<Image>, ram: Option<&Ram>, queues: u16) -> Result<Chosen, EngineError> {
    let blocking = |why| {
        let (file, rw_flags) = (image.file().descriptor(), image.config().cache.rw_flags());
        let engine = |_| Box::new(BlockingEngine::with_flags(Arc::clone(file), rw_flags)) as Box<dyn Engine>;
        Chosen { engines: (0..queues).map(engine).collect(), kind: EngineKind::Blocking, why }
    };
    let ring = |_| {
        let fixed = ram.filter(|_| image.config().fixed_buffers);
        let ring = UringEngine::new(Arc::clone(image), image.config().queue_size, fixed)?;
        Ok(Box::new(ring) as Box<dyn Engine>)
    };
    match image.config().engine {
        EngineChoice::Blocking => return Ok(blocking(None)),
        EngineChoice::Auto if image.file().is_on_tmpfs() => {
            return Ok(blocking(Some("the image is on tmpfs, where data is in memory already".to_owned())));
        }
        EngineChoice::Auto | EngineChoice::Uring => {}
    }
    match (0..queues).map(ring).collect::<Result<Vec<_>, UringError>>() {
        Ok(engines) => Ok(Chosen { engines, kind: EngineKind::Uring, why: None }),
        // `auto` does not fall back if memory could not be pinned, because buffers=fixed asks for that
        // explicitly.
        Err(error)
            if image.config().engine == EngineChoice::Auto && !matches!(error, UringError::Memory { .. }) =>
        {
            Ok(blocking(Some(in_words(&error))))
        }
        Err(source) => Err(EngineError::Uring { path: image.config().path.display().to_string(), source }),
    }
}

fn in_words(error: &UringError) -> String {
    let forbidden = "this host forbids io_uring (kernel.io_uring_disabled, or a seccomp filter)";
    match error {
        UringError::Refused { source, .. } => match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => forbidden.to_owned(),
            Some(libc::ENOSYS) => "this host's kernel has no io_uring".to_owned(),
            _ => format!("{error}: {source}"),
        },
        _ => error.to_string(),
    }
}
