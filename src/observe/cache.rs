//! Measures what the host's page cache holds of a file: with cachestat(2), or with mincore(2) if that is
//! missing.
//!
//! Owns the two system calls, and the search for the file below an overlay, because the pages belong to the
//! upper or lower file. Measuring neither brings pages into the cache nor evicts any.

use std::borrow::Borrow;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::explain::Place;

/// Number of cachestat(2), which is the same on every architecture (Linux 6.5).
const SYS_CACHESTAT: libc::c_long = 451;
/// Bytes that one mincore(2) call covers. It returns one byte per page.
const WINDOW_BYTES: u64 = 1 << 30;

/// struct cachestat_range of the kernel. Length 0 means to the end of the file.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// struct cachestat of the kernel, in pages.
#[repr(C)]
#[derive(Debug, Default)]
struct CachestatCounts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// The system call that supplied the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResidencySource {
    /// cachestat(2), which supplies all figures.
    Cachestat,
    /// mincore(2), which supplies only the number of cached pages.
    Mincore,
}

/// The pages of a file in the host's page cache. A figure that the host cannot supply is `None`, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Size of a page in bytes.
    pub page_bytes: u64,
    /// Number of pages in the cache.
    pub cached: u64,
    /// Number of those that are dirty: newer than the disk.
    pub dirty: Option<u64>,
    /// Number of those that are under writeback.
    pub writeback: Option<u64>,
    /// Number of pages that were evicted, as far as the kernel still remembers them.
    pub evicted: Option<u64>,
    /// Number of those that were evicted so recently that bringing them back would mean that the cache is too
    /// small.
    pub recently_evicted: Option<u64>,
    /// The system call that supplied the figures.
    pub source: ResidencySource,
}

/// Why a cache cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// cachestat(2) exists but refuses.
    #[error(
        "cachestat(2) of {path} is refused: the kernel reports a file's cache only to its owner, or to those who may write it"
    )]
    Refused {
        /// The file.
        path: PathBuf,
        /// The error that the kernel reported.
        source: io::Error,
    },
    /// mincore(2) cannot be used. It reports every page as resident to a process that may not write the file.
    #[error("this kernel has no cachestat(2) (Linux 6.5 has it), and mincore(2) reports nothing of {path}")]
    Mincore {
        /// The file.
        path: PathBuf,
        /// The error that the kernel reported.
        source: io::Error,
    },
}

impl Residency {
    /// Measures the whole of `file`, a regular file or a block device. On an overlay the file below is
    /// measured.
    pub fn of(file: &File) -> Result<Self, CacheError> {
        Watched::new(file).measure()
    }

    /// Returns the number of bytes in the cache.
    pub fn cached_bytes(&self) -> u64 {
        self.bytes(self.cached)
    }

    /// Converts a number of pages to bytes.
    pub fn bytes(&self, pages: u64) -> u64 {
        pages.saturating_mul(self.page_bytes)
    }
}

/// A file that is measured repeatedly. The file below an overlay is looked up only once.
#[derive(Debug)]
pub struct Watched<F> {
    file: F,
    path: PathBuf,
    below: Below,
    /// True if mincore(2) tells this process the truth.
    mincore_is_truthful: bool,
}

#[derive(Debug)]
enum Below {
    /// The file has pages of its own.
    Own,
    /// The file is on an overlay, and this file has its pages.
    File(File),
    /// The file is on an overlay, and the file that has its pages cannot be opened. mincore(2) still works,
    /// because a mapping of the overlay's file maps that file.
    OutOfReach,
}

impl<F: Borrow<File>> Watched<F> {
    /// Prepares `file`, and finds the file that has its pages.
    pub fn new(file: F) -> Self {
        let own = file.borrow();
        let link = format!("/proc/self/fd/{}", own.as_raw_fd());
        let path = fs::read_link(&link).unwrap_or_else(|_| link.into());
        let place = Place::of_file(own);
        let below = if place.file_system != "overlay" || !is_regular(own) {
            Below::Own
        } else {
            below_overlay(own, &path, &place).map_or(Below::OutOfReach, Below::File)
        };
        let mincore_is_truthful = is_mincore_truthful(own).unwrap_or(false);
        Self { file, path, below, mincore_is_truthful }
    }

    /// Measures the whole file.
    pub fn measure(&self) -> Result<Residency, CacheError> {
        self.measure_range(0, 0)
    }

    /// Measures `length` bytes from `offset` on. Length 0 means to the end of the file.
    pub fn measure_range(&self, offset: u64, length: u64) -> Result<Residency, CacheError> {
        let asked = match &self.below {
            Below::Own => Some(self.file.borrow()),
            Below::File(file) => Some(file),
            Below::OutOfReach => None,
        };
        let refused = match asked.map(|file| cachestat(file, offset, length)) {
            Some(Ok(found)) => return Ok(found),
            Some(Err(error)) if is_missing(&error) => None,
            Some(Err(error)) => Some(error),
            None => None,
        };
        let seen = if self.mincore_is_truthful {
            mincore(self.file.borrow(), offset, length)
        } else {
            Err(io::ErrorKind::PermissionDenied.into())
        };
        match (seen, refused) {
            (Ok(found), _) => Ok(found),
            (Err(_), Some(source)) => Err(CacheError::Refused { path: self.path.clone(), source }),
            (Err(source), None) => Err(CacheError::Mincore { path: self.path.clone(), source }),
        }
    }
}

/// Returns `true` if the kernel is too old for the system call, or a seccomp filter does not know it.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP))
}

fn page_bytes() -> u64 {
    // SAFETY: sysconf takes a number and touches no memory.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

fn cachestat(file: &File, offset: u64, length: u64) -> io::Result<Residency> {
    let range = CachestatRange { offset, length };
    let mut found = CachestatCounts::default();
    // SAFETY: the kernel reads one range and writes one answer. Both have the layout of its header and live
    // until the call returns.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut found, 0u32) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Residency {
        page_bytes: page_bytes(),
        cached: found.cached,
        dirty: Some(found.dirty),
        writeback: Some(found.writeback),
        evicted: Some(found.evicted),
        recently_evicted: Some(found.recently_evicted),
        source: ResidencySource::Cachestat,
    })
}

/// A mapping that is never read or written.
struct Mapping {
    at: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    fn new(file: &File, offset: u64, bytes: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: this makes a new mapping of an open descriptor, at an address that the kernel chooses.
        let at = unsafe {
            let flags = libc::MAP_SHARED;
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, file.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at, bytes }) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and has this length, and nobody has a pointer into it.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}

fn mincore(file: &File, offset: u64, length: u64) -> io::Result<Residency> {
    let page = page_bytes();
    let end = match length {
        0 => size(file)?,
        length => size(file)?.min(offset.saturating_add(length)),
    };
    let (mut at, mut cached) = (offset / page * page, 0u64);
    while at < end {
        let bytes = usize::try_from((end - at).min(WINDOW_BYTES)).map_err(io::Error::other)?;
        let mapping = Mapping::new(file, at, bytes)?;
        let pages = bytes.div_ceil(usize::try_from(page).map_err(io::Error::other)?);
        let mut answer = vec![0u8; pages];
        // SAFETY: the mapping is `bytes` long, and the answer has a byte for each of its pages.
        if unsafe { libc::mincore(mapping.at, bytes, answer.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        cached += answer.iter().map(|byte| u64::from(byte & 1)).sum::<u64>();
        at += WINDOW_BYTES;
    }
    Ok(Residency {
        page_bytes: page,
        cached,
        dirty: None,
        writeback: None,
        evicted: None,
        recently_evicted: None,
        source: ResidencySource::Mincore,
    })
}

/// Returns `true` if mincore(2) tells this process the truth. Since Linux 5.2 it reports every page as resident
/// to a process that neither owns the file nor may write it.
fn is_mincore_truthful(file: &File) -> io::Result<bool> {
    // SAFETY: geteuid cannot fail and touches no memory.
    let me = unsafe { libc::geteuid() };
    if me == 0 || file.metadata()?.uid() == me {
        return Ok(true);
    }
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // SAFETY: `path` is a string with its terminator, and the kernel only reads it.
    Ok(unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK, libc::AT_EACCESS) } == 0)
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|found| found.is_file())
}

/// Returns the size of a file or block device in bytes.
pub(super) fn size(file: &File) -> io::Result<u64> {
    let found = file.metadata()?;
    if found.is_file() {
        return Ok(found.len());
    }
    // SAFETY: lseek touches no memory. Nobody uses the file offset of a device, because every call that reads
    // or writes an image gives its own.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

/// Opens the file that an overlay file stands for: the upper file, or that of the first lower layer that has
/// it. Returns `None` if it cannot be opened or is not the same file.
fn below_overlay(file: &File, path: &Path, place: &Place) -> Option<File> {
    let inside = path.strip_prefix(&place.mount_point).ok()?;
    let option = |name: &str| place.options.iter().filter_map(|option| option.strip_prefix(name)).collect();
    let upper: Vec<&str> = option("upperdir=");
    let lower: Vec<&str> = option("lowerdir=");
    let lower_plus: Vec<&str> = option("lowerdir+=");
    let layers =
        upper.into_iter().chain(lower.into_iter().flat_map(|dirs| dirs.split(':'))).chain(lower_plus);
    let own = file.metadata().ok()?;
    for layer in layers {
        let candidate = Path::new(&unescape(layer)).join(inside);
        // A device or FIFO must not be opened by mistake.
        let Some(found) = fs::symlink_metadata(&candidate).ok().filter(fs::Metadata::is_file) else {
            continue;
        };
        let times = |of: &fs::Metadata| (of.len(), of.mtime(), of.mtime_nsec());
        if times(&found) == times(&own) {
            return File::open(candidate).ok();
        }
        return None;
    }
    None
}

/// Removes the backslashes that the options of an overlay have before colons and commas.
fn unescape(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut from = text.bytes().peekable();
    while let Some(byte) = from.next() {
        let escaped = byte == b'\\' && from.peek().is_some_and(|next| matches!(next, b':' | b',' | b'\\'));
        bytes.extend(if escaped { from.next() } else { Some(byte) });
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn mincore_tells_as_many_pages_as_cachestat() {
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![7; 100_000]).unwrap();
        let asked = cachestat(&file, 0, 0);
        let counted = mincore(&file, 0, 0).unwrap();
        assert_eq!(counted.cached_bytes(), 100_000u64.next_multiple_of(page_bytes()));
        assert_eq!((counted.dirty, counted.evicted, counted.source), (None, None, ResidencySource::Mincore));
        match asked {
            Ok(found) => assert_eq!(found.cached, counted.cached),
            Err(error) => assert!(is_missing(&error), "{error}"),
        }
        let part = mincore(&file, 5 * page_bytes(), page_bytes()).unwrap();
        assert_eq!(part.cached, 1);
    }

    #[test]
    fn paths_of_layers_lose_their_backslashes() {
        for (text, path) in
            [("/a/b", "/a/b"), ("/a\\:b\\,c", "/a:b,c"), ("/a\\b", "/a\\b"), ("/a\\\\b", "/a\\b")]
        {
            assert_eq!(unescape(text), OsString::from(path));
        }
    }
}
