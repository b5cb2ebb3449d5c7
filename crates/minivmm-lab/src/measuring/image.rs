//! Images whose figures are those of a disk: every byte is allocated on the host's disk and was written there.
//!
//! Owns the creation of such images, and the filling of images with holes. It never changes a byte that can be
//! read from an existing image: filling a hole writes the zeroes that it reads as.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::extents::Layout;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::{DiskConfig, Image};
use minivmm::files::output;
use minivmm::observe::Residency;
use minivmm::observe::control::HostCache;
use minivmm::observe::control::{ControlProblem, drop_cache, warm_cache};

/// Number of bytes that are written at once.
const CHUNK: usize = 1 << 20;
/// Alignment of memory, offsets and sizes for O_DIRECT.
const ALIGNMENT: usize = 4096;

/// Why an image cannot be provided.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A system call failed.
    #[error("cannot {what} {path}")]
    Host {
        /// The operation that failed.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The image exists with another size. It is not overwritten.
    #[error(
        "{path} has {found} bytes and not {wanted}; it may be somebody's data, so it is not replaced: give another path, or \
         remove it"
    )]
    OtherSize {
        /// The image.
        path: PathBuf,
        /// Size of the image.
        found: u64,
        /// The size that was asked for.
        wanted: u64,
    },
    /// The file system leaves holes in what was written.
    #[error(
        "{path} was written from end to end, and its file system has no place on the disk for {gaps} bytes of it \
         (compression, or zeroes that become holes): put it on another file system, or turn that off for it"
    )]
    StillGaps {
        /// The image.
        path: PathBuf,
        /// Number of bytes that are not allocated.
        gaps: u64,
    },
    /// The image cannot be opened, or a VM has it locked.
    #[error("it cannot be filled")]
    Disk(#[from] minivmm::disk::ImageError),
    /// A stop was requested while this image was written.
    #[error("stopped while {0} was written; what there is of it is not whole")]
    Interrupted(PathBuf),
}

fn host<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| ImageError::Host { what, path: path.to_owned(), source }
}

/// Called with the number of bytes that were written since the last call.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// Returns the layout of the image at `path`.
pub fn look(path: &Path) -> Result<Layout, ImageError> {
    let file = File::open(path).map_err(host("open", path))?;
    Layout::of(&file).map_err(host("find the extents of", path))
}

/// Provides an image of this size at `path`. A missing image is made ([`make`]) and a complete one is reused.
/// The gaps of any other are filled ([`fill`]): an image of this size in this place was made by this tool.
pub fn ready(
    path: &Path,
    bytes: u64,
    progress: Progress<'_>,
    stop: &AtomicBool,
) -> Result<Layout, ImageError> {
    if path.exists() {
        let layout = look(path)?;
        if layout.bytes != bytes {
            return Err(ImageError::OtherSize { path: path.to_owned(), found: layout.bytes, wanted: bytes });
        }
        return if layout.is_written() { Ok(layout) } else { fill(path, progress, stop) };
    }
    make(path, bytes, progress, stop)
}

/// Makes a new image at `path` of incompressible bytes, all of them written and synced. Fails if the path
/// exists.
pub fn make(
    path: &Path,
    bytes: u64,
    progress: Progress<'_>,
    stop: &AtomicBool,
) -> Result<Layout, ImageError> {
    let file = output::make_new(path).map_err(host("create", path))?;
    let made = write(path, &file, &[(0, bytes)], Content::Random, progress, stop);
    if made.is_err() {
        // An incomplete image is of no use to anybody.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Writes zeroes to every gap of the image at `path`, so that it is allocated. What can be read from the image
/// does not change. The image is locked meanwhile, because what a VM wrote to a gap would be lost.
pub fn fill(path: &Path, progress: Progress<'_>, stop: &AtomicBool) -> Result<Layout, ImageError> {
    let mut disk = DiskConfig::new(path);
    // The format does not matter, because no content changes.
    disk.force_raw = true;
    disk.cache = CachePolicy::by_name("writeback").unwrap_or(disk.cache);
    let _locked = Image::open(&disk)?;
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open(path).map_err(host("open for writing", path))?;
    let layout = Layout::of(&file).map_err(host("find the extents of", path))?;
    write(path, &file, &layout.gaps, Content::Zeroes, progress, stop)
}

/// Brings the host's page cache of the image at `path` into this state and verifies it. Returns what the cache
/// then holds, or `None` if that cannot be seen.
pub fn settle(path: &Path, wish: HostCache) -> Result<Option<Residency>, SettleError> {
    let failed = |problem| SettleError { wish, path: path.to_owned(), source: problem };
    let opening = |source| failed(ControlProblem::Host { what: "opening it", source });
    let file = File::open(path).map_err(opening)?;
    match wish {
        HostCache::Keep => Ok(()),
        HostCache::Drop => drop_cache(&file),
        HostCache::Warm => warm_cache(&file),
    }
    .map_err(failed)?;
    Ok(Residency::of(&file).ok())
}

/// Why the host's page cache of an image is not in the state that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("cannot bring the host's cache of {path} to '{}'", wish.name())]
pub struct SettleError {
    wish: HostCache,
    path: PathBuf,
    source: ControlProblem,
}

#[derive(Clone, Copy)]
enum Content {
    Random,
    Zeroes,
}

fn write(
    path: &Path,
    file: &File,
    places: &[(u64, u64)],
    content: Content,
    progress: Progress<'_>,
    stop: &AtomicBool,
) -> Result<Layout, ImageError> {
    let failed = || host("write", path);
    // O_DIRECT, if the file system supports it, keeps these writes from filling the page cache.
    let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).ok();
    let mut random = Random(places.iter().map(|place| place.1).sum());
    let mut memory = vec![0u8; CHUNK + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let chunk = memory.get_mut(start..start + CHUNK).unwrap_or_default();
    for &(from, to) in places {
        let mut at = from;
        while at < to {
            if stop.load(Ordering::Relaxed) {
                return Err(ImageError::Interrupted(path.to_owned()));
            }
            let bytes = usize::try_from(to - at).unwrap_or(CHUNK).min(CHUNK);
            let piece = chunk.get_mut(..bytes).unwrap_or_default();
            if matches!(content, Content::Random) {
                random.fill(piece);
            }
            match &direct {
                Some(direct) if is_aligned(at, bytes) && direct.write_all_at(piece, at).is_ok() => {}
                _ => file.write_all_at(piece, at).map_err(failed())?,
            }
            at += bytes as u64;
            progress(bytes as u64);
        }
    }
    file.sync_all().map_err(host("sync", path))?;
    let layout = Layout::of(file).map_err(host("find the extents of", path))?;
    match layout.is_written() {
        true => Ok(layout),
        false => Err(ImageError::StillGaps { path: path.to_owned(), gaps: layout.gap_bytes() }),
    }
}

fn is_aligned(at: u64, bytes: usize) -> bool {
    at.is_multiple_of(ALIGNMENT as u64) && bytes.is_multiple_of(ALIGNMENT)
}

/// Generates bytes that cannot be compressed (splitmix64). A seed always gives the same bytes.
struct Random(u64);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let word = (mixed ^ (mixed >> 31)).to_ne_bytes();
            piece.copy_from_slice(word.get(..piece.len()).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static NEVER: AtomicBool = AtomicBool::new(false);
    const MIB: u64 = 1 << 20;

    fn place() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    #[test]
    fn one_is_made_whole_and_then_reused() {
        let dir = place();
        let path = dir.path().join("a,b:c.img");
        let mut written = 0;
        // The size is a multiple neither of CHUNK nor of ALIGNMENT.
        let bytes = 3 * MIB + 512;
        let made = ready(&path, bytes, &mut |more| written += more, &NEVER).unwrap();
        assert!(made.is_written() && made.bytes == bytes && written == bytes, "{made:?}, {written}");
        let content = std::fs::read(&path).unwrap();
        assert!(content.chunks(64).all(|piece| piece.iter().any(|&byte| byte != 0)));
        let again = ready(&path, bytes, &mut |_| panic!("written again"), &NEVER).unwrap();
        assert_eq!(again, made);
        assert_eq!(std::fs::read(&path).unwrap(), content);
        let other = ready(&path, MIB, &mut |_| {}, &NEVER).unwrap_err().to_string();
        assert!(other.contains("not replaced"), "{other}");
        assert!(make(&path, bytes, &mut |_| {}, &NEVER).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }

    #[test]
    fn filling_gaps_changes_nothing_that_can_be_read() {
        let dir = place();
        let path = dir.path().join("sparse.img");
        let file = File::create(&path).unwrap();
        file.set_len(3 * MIB).unwrap();
        file.write_all_at(b"precious", MIB + 12345).unwrap();
        file.sync_all().unwrap();
        assert!(!look(&path).unwrap().is_written());
        let before = std::fs::read(&path).unwrap();
        let mut written = 0;
        let filled = fill(&path, &mut |more| written += more, &NEVER).unwrap();
        assert!(filled.is_written() && written > 2 * MIB && written < 3 * MIB, "{filled:?}, {written}");
        assert!(std::fs::read(&path).unwrap() == before);
        let in_use = Image::open(&DiskConfig::new(&path)).unwrap();
        assert!(matches!(fill(&path, &mut |_| {}, &NEVER), Err(ImageError::Disk(_))));
        drop(in_use);
    }

    #[test]
    fn who_stops_leaves_no_half_image() {
        let dir = place();
        let path = dir.path().join("a.img");
        let stopped = make(&path, 4 * MIB, &mut |_| {}, &AtomicBool::new(true));
        assert!(matches!(stopped, Err(ImageError::Interrupted(_))), "{stopped:?}");
        assert!(!path.exists());
    }

    #[test]
    fn the_hosts_cache_is_as_it_was_wished() {
        let dir = place();
        let path = dir.path().join("a.img");
        make(&path, 2 * MIB, &mut |_| {}, &NEVER).unwrap();
        for (wish, bytes) in [(HostCache::Warm, 2 * MIB), (HostCache::Keep, 2 * MIB), (HostCache::Drop, 0)] {
            let found = settle(&path, wish).unwrap().unwrap();
            assert_eq!(found.cached_bytes(), bytes, "{wish:?}");
        }
        let missing = settle(&dir.path().join("b.img"), HostCache::Drop).unwrap_err().to_string();
        assert!(missing.contains("b.img") && missing.contains("drop"), "{missing}");
    }
}
