//! The image that everybody works on, one after the other.
//!
//! Owns its making (every block written, no hole, no unwritten extent, checked by FIEMAP) and the
//! state of the host's page cache before a run.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::random::Random;

/// _IOWR('f', 11, struct fiemap).
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENT_LAST: u32 = 0x1;
const EXTENTS: usize = 256;
const SYS_CACHESTAT: libc::c_long = 451;
const BLOCK: usize = 1 << 20;

/// What is in the host's page cache when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resident {
    /// Nothing: written back and dropped.
    None,
    /// All of it, clean.
    All,
}

/// A file that is written from end to end.
pub struct BenchImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Pieces on the disk.
    pub extents: u64,
}

impl BenchImage {
    /// The image at `path`, the one that is there already if it is as it should be.
    pub fn ready(path: PathBuf, bytes: u64) -> Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        if std::fs::metadata(&path).map(|there| there.len()).ok() != Some(bytes) || written(&path)?.is_none()
        {
            eprintln!("writing {} ({} MiB)", path.display(), bytes >> 20);
            write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let extents = written(&path)?.with_context(|| {
            format!("{}: the file system leaves holes in what is written", path.display())
        })?;
        Ok(Self { path, bytes, extents })
    }

    /// Brings the page cache into this state; the pages that are then resident, if the host tells.
    pub fn settle(&self, resident: Resident) -> Result<Option<u64>> {
        let file = File::open(&self.path)?;
        file.sync_data()?;
        match resident {
            Resident::None => {
                // SAFETY: no memory is involved.
                let failed =
                    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
                ensure!(failed == 0, "the page cache cannot be dropped");
            }
            Resident::All => {
                let mut buffer = vec![0; BLOCK];
                for offset in (0..self.bytes).step_by(BLOCK) {
                    file.read_exact_at(&mut buffer, offset)?;
                }
            }
        }
        Ok(resident_pages(&file))
    }
}

/// Random bytes in 1 MiB blocks, past the page cache where that is possible.
fn write(path: &Path, bytes: u64) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let file = match options.clone().custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => options.open(path)?,
        Err(error) => return Err(error),
    };
    let mut random = Random::new(bytes);
    let mut memory = vec![0u8; BLOCK + 4096];
    let start = memory.as_ptr().align_offset(4096);
    for offset in (0..bytes).step_by(BLOCK) {
        let block = &mut memory[start..start + BLOCK];
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_ne_bytes());
        }
        file.write_all_at(block, offset)?;
    }
    file.sync_all()
}

/// struct fiemap with room for its extents (linux/fiemap.h).
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved32: [u32; 3],
}

/// Number of extents if every byte has one and all of them are written; `None` if not.
fn written(path: &Path) -> Result<Option<u64>> {
    let Ok(file) = File::open(path) else { return Ok(None) };
    let bytes = file.metadata()?.len();
    let (mut covered, mut count) = (0, 0);
    while covered < bytes {
        let mut map = Fiemap {
            start: covered,
            length: bytes - covered,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: `map` is a struct fiemap with room for the `extent_count` extents that it names.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } != 0 {
            let error = io::Error::last_os_error();
            return Err(error).with_context(|| format!("{}: its extents cannot be seen", path.display()));
        }
        let found = &map.extents[..(map.mapped_extents as usize).min(EXTENTS)];
        for extent in found {
            if extent.logical > covered || extent.flags & EXTENT_UNWRITTEN != 0 {
                return Ok(None);
            }
            covered = extent.logical + extent.length;
            count += 1;
        }
        if found.last().is_none_or(|last| last.flags & EXTENT_LAST != 0) {
            break;
        }
    }
    Ok((covered >= bytes && bytes > 0).then_some(count))
}

/// Pages in the page cache, by cachestat(2), where the kernel has it.
fn resident_pages(file: &File) -> Option<u64> {
    let range = [0u64; 2];
    let mut stat = [0u64; 5];
    // SAFETY: a struct cachestat_range (two u64, all of the file) and a struct cachestat (five u64).
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
    (result == 0).then_some(stat[0])
}
