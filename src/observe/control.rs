//! `host-cache=drop|warm`: what the host's cache has of an image when the guest starts.
//!
//! Owns the doing and its proof. Nothing is lost: what is dirty is written first, and pages that cannot
//! be had, or cannot be let go, are an error that says so.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::cache::{self, CacheError, Residency};
use crate::disk::Image;
use crate::disk::options::HostCache;

/// Pages that are busy for a moment (a readahead in flight, a CPU's own list) are tried so often.
const TRIES: usize = 20;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
/// Warming reads so much at once.
const CHUNK: usize = 1 << 20;

/// Why a cache is not as it was wished.
#[derive(Debug, thiserror::Error)]
#[error("cannot apply host-cache={} to {path}", wish.name())]
pub struct ControlError {
    wish: HostCache,
    path: PathBuf,
    source: ControlProblem,
}

/// What was in the way.
#[derive(Debug, thiserror::Error)]
pub enum ControlProblem {
    /// A call has failed.
    #[error("{what} failed")]
    Host {
        /// Which.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It cannot be seen, so it cannot be verified.
    #[error("the result cannot be verified")]
    Unseen(#[from] CacheError),
    /// Memory is all there is.
    #[error("it lies on tmpfs, where the cache is the file itself (use a file on ext4 or xfs)")]
    Memory,
    /// Something holds pages.
    #[error(
        "{0} bytes of it stay in the cache: another process maps the file or is using it (fuser -v names it), or \
         has locked it in memory"
    )]
    Stays(u64),
    /// tmpfs holds no pages for holes.
    #[error(
        "it lies on tmpfs, where holes are in no cache, and {0} of its bytes are holes (fallocate -l SIZE FILE fills \
         them; what it holds is in memory already)"
    )]
    Holes(u64),
    /// It cannot fit, and reading it would only drive everything else out.
    #[error("its {wanted} bytes are more than the {memory} bytes of this host's memory")]
    LargerThanMemory {
        /// All of it.
        wanted: u64,
        /// What the host has.
        memory: u64,
    },
    /// Not all fits.
    #[error("of {wanted} bytes only {found} stay in the cache: the host has too little free memory for it")]
    TooLarge {
        /// All of it.
        wanted: u64,
        /// What is there.
        found: u64,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> ControlProblem {
    move |source| ControlProblem::Host { what, source }
}

/// Makes the host's cache of `image` what is wished, and verifies it.
pub fn apply(wish: HostCache, image: &Image) -> Result<(), ControlError> {
    let done = match wish {
        HostCache::Keep => Ok(()),
        HostCache::Drop if image.is_on_tmpfs() => Err(ControlProblem::Memory),
        HostCache::Drop => drop_cache(image.file()),
        HostCache::Warm => match (image.is_on_tmpfs(), warm_cache(image.file())) {
            (true, Err(ControlProblem::TooLarge { wanted, found })) => {
                Err(ControlProblem::Holes(wanted - found))
            }
            (_, done) => done,
        },
    };
    done.map_err(|source| ControlError { wish, path: image.path().to_owned(), source })
}

/// Writes what is dirty, then lets go of every page of `file`; afterwards none is in the cache.
pub fn drop_cache(file: &File) -> Result<(), ControlProblem> {
    let mut stays = 0;
    for _ in 0..TRIES {
        // Dirty pages are not let go: first they are written (POSIX_FADV_DONTNEED alone leaves them).
        file.sync_data().map_err(host("fdatasync"))?;
        // SAFETY: posix_fadvise takes numbers and touches no memory.
        let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if error != 0 {
            return Err(host("posix_fadvise(POSIX_FADV_DONTNEED)")(io::Error::from_raw_os_error(error)));
        }
        stays = Residency::of(file)?.cached_bytes();
        if stays == 0 {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    Err(ControlProblem::Stays(stays))
}

/// All the memory of this host, in bytes; as much as there can be where it does not tell.
fn host_memory() -> u64 {
    // SAFETY: sysconf takes a number and touches no memory.
    let ask = |name| u64::try_from(unsafe { libc::sysconf(name) });
    match (ask(libc::_SC_PHYS_PAGES), ask(libc::_SC_PAGESIZE)) {
        (Ok(pages), Ok(page_bytes)) => pages.saturating_mul(page_bytes),
        _ => u64::MAX,
    }
}

/// Reads all of `file` through the cache; afterwards every page is there.
pub fn warm_cache(file: &File) -> Result<(), ControlProblem> {
    // A descriptor of its own without O_DIRECT. The image's lock goes with its own descriptor (OFD).
    let buffered = OpenOptions::new()
        .read(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(host("opening it anew, for reading, through /proc (is it mounted?)"))?;
    let bytes = cache::size(&buffered).map_err(host("finding its size"))?;
    let memory = host_memory();
    if bytes > memory {
        return Err(ControlProblem::LargerThanMemory { wanted: bytes, memory });
    }
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        match buffered.read_at(&mut chunk, at) {
            Ok(0) => break,
            Ok(count) => at += count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(host("reading it")(error)),
        }
    }
    let found = Residency::of(file)?;
    let wanted = bytes.next_multiple_of(found.page_bytes);
    if found.cached_bytes() < wanted {
        return Err(ControlProblem::TooLarge { wanted, found: found.cached_bytes() });
    }
    Ok(())
}
