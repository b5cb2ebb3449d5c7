//! `host-cache=drop|warm`: brings the host's page cache of an image into a known state before the guest starts.
//!
//! Owns the operations and their verification. No data is lost, because dirty pages are written first. If pages
//! cannot be loaded or dropped, an error says so.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::cache::{self, CacheError, Residency};
use crate::disk::Image;

/// Number of attempts. Pages may be busy for a moment, for example with readahead, or in a list of one CPU.
const TRIES: usize = 20;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
/// Number of bytes that warming reads at once.
const CHUNK: usize = 1 << 20;

/// What happens to the host's page cache of an image before the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCache {
    /// Nothing happens to it.
    Keep,
    /// It is written back and dropped.
    Drop,
    /// It is filled with the whole image.
    Warm,
}

impl HostCache {
    /// Every value.
    pub const ALL: [Self; 3] = [Self::Keep, Self::Drop, Self::Warm];

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
            Self::Warm => "warm",
        }
    }
}

/// Why a cache is not in the state that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("cannot apply host-cache={} to {path}", wish.name())]
pub struct ControlError {
    wish: HostCache,
    path: PathBuf,
    source: ControlProblem,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ControlProblem {
    /// A system call failed.
    #[error("{what} failed")]
    Host {
        /// The call.
        what: &'static str,
        /// The error that the kernel reported.
        source: io::Error,
    },
    /// The cache cannot be measured, so the result cannot be verified.
    #[error("the result cannot be verified")]
    Unseen(#[from] CacheError),
    /// The file lies in memory, so it cannot be dropped.
    #[error("it lies on tmpfs, where the cache is the file itself (use a file on ext4 or xfs)")]
    Memory,
    /// Something keeps this many bytes in the cache.
    #[error(
        "{0} bytes of it stay in the cache: another process maps the file or is using it (fuser -v names it), or \
         has locked it in memory"
    )]
    Stays(u64),
    /// The file has this many bytes in holes, for which tmpfs has no pages.
    #[error(
        "it lies on tmpfs, where holes are in no cache, and {0} of its bytes are holes (fallocate -l SIZE FILE fills \
         them; what it holds is in memory already)"
    )]
    Holes(u64),
    /// The file is larger than the memory. Reading it would only evict everything else.
    #[error("its {wanted} bytes are more than the {memory} bytes of this host's memory")]
    LargerThanMemory {
        /// Size of the file.
        wanted: u64,
        /// Size of the host's memory.
        memory: u64,
    },
    /// The file does not fit into free memory.
    #[error("of {wanted} bytes only {found} stay in the cache: the host has too little free memory for it")]
    TooLarge {
        /// Size of the file, rounded up to pages.
        wanted: u64,
        /// Number of bytes that stayed in the cache.
        found: u64,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> ControlProblem {
    move |source| ControlProblem::Host { what, source }
}

/// Brings the host's page cache of `image` into this state and verifies it.
pub fn apply(wish: HostCache, image: &Image) -> Result<(), ControlError> {
    let done = match wish {
        HostCache::Keep => Ok(()),
        HostCache::Drop if image.file().is_on_tmpfs() => Err(ControlProblem::Memory),
        HostCache::Drop => drop_cache(image.file().descriptor()),
        HostCache::Warm => match (image.file().is_on_tmpfs(), warm_cache(image.file().descriptor())) {
            (true, Err(ControlProblem::TooLarge { wanted, found })) => {
                Err(ControlProblem::Holes(wanted - found))
            }
            (_, done) => done,
        },
    };
    done.map_err(|source| ControlError { wish, path: image.config().path.to_owned(), source })
}

/// Writes the dirty pages of `file` and drops all its pages. When this succeeds, none is in the cache.
pub fn drop_cache(file: &File) -> Result<(), ControlProblem> {
    let mut stays = 0;
    for _ in 0..TRIES {
        // POSIX_FADV_DONTNEED leaves dirty pages in the cache, so they are written first.
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

/// Returns the size of the host's memory in bytes, or the largest number if it is unknown.
fn host_memory() -> u64 {
    // SAFETY: sysconf takes a number and touches no memory.
    let ask = |name| u64::try_from(unsafe { libc::sysconf(name) });
    match (ask(libc::_SC_PHYS_PAGES), ask(libc::_SC_PAGESIZE)) {
        (Ok(pages), Ok(page_bytes)) => pages.saturating_mul(page_bytes),
        _ => u64::MAX,
    }
}

/// Reads all of `file` through the page cache. When this succeeds, every page is in the cache.
pub fn warm_cache(file: &File) -> Result<(), ControlProblem> {
    // A second descriptor has no O_DIRECT. The image's lock is not affected, because it belongs to the first
    // one (an OFD lock).
    let buffered = OpenOptions::new()
        .read(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(host("opening it anew, for reading, through /proc (is it mounted?)"))?;
    let bytes = cache::size(&buffered).map_err(host("finding its size"))?;
    let memory = host_memory();
    if bytes > memory {
        return Err(ControlProblem::LargerThanMemory { wanted: bytes, memory });
    }
    let (mut wanted, mut found) = (0, 0);
    // Linux drops a page that a request with RWF_DONTCACHE has left, by whatever read finds it next (mm/filemap.c).
    // What the second pass reads anew stays.
    for _ in 0..2 {
        read_all(&buffered, bytes)?;
        let seen = Residency::of(file)?;
        (wanted, found) = (bytes.next_multiple_of(seen.page_bytes), seen.cached_bytes());
        if found >= wanted {
            return Ok(());
        }
    }
    Err(ControlProblem::TooLarge { wanted, found })
}

fn read_all(file: &File, bytes: u64) -> Result<(), ControlProblem> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        match file.read_at(&mut chunk, at) {
            Ok(0) => break,
            Ok(count) => at += count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(host("reading it")(error)),
        }
    }
    Ok(())
}
