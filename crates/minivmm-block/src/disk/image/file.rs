//! The open file of an image: descriptor, kind, flags, geometry, and what becomes of it.
//!
//! Owns the descriptor, which stays open for the life of the process (E3), and with it the lock. Knows the
//! configuration only while it opens the file.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::fate::Fate;
use super::host;
use super::opening::{FileKind, flags_in_words, wanted_flags};
use crate::disk::config::DiskConfig;
use crate::disk::geometry::{self, BUFFERED, Geometry, SECTOR};
use crate::disk::problem::ImageProblem;
use crate::files::locks;
use crate::text::shell_word;

/// The open file or block device of an image, with all that was found out about it.
#[derive(Debug)]
pub struct ImageFile {
    file: Arc<File>,
    kind: FileKind,
    wanted_flags: libc::c_int,
    geometry: Geometry,
    dsync_is_one_flush: bool,
    fate: Fate,
}

impl ImageFile {
    /// Probes the open file; changes nothing.
    pub(super) fn probe(file: Arc<File>, kind: FileKind, config: &DiskConfig) -> Result<Self, ImageProblem> {
        let geometry = find_geometry(&file, config, kind)?;
        Ok(Self::with_geometry(file, kind, config, geometry))
    }

    /// Takes the geometry as given.
    pub(super) fn with_geometry(
        file: Arc<File>,
        kind: FileKind,
        config: &DiskConfig,
        geometry: Geometry,
    ) -> Self {
        Self {
            fate: Fate::of(&file, kind),
            // On a raw device without FUA, pwritev2 with RWF_DSYNC flushes the disk twice (H3).
            dsync_is_one_flush: kind == FileKind::File || geometry::has_fua(&file).unwrap_or(true),
            wanted_flags: wanted_flags(config, kind),
            geometry,
            kind,
            file,
        }
    }

    /// Returns the descriptor, for engines.
    pub fn descriptor(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the size and the block sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Returns `true` if a write with RWF_DSYNC costs the host's disk no more flushes than an fdatasync.
    pub fn dsync_is_one_flush(&self) -> bool {
        self.dsync_is_one_flush
    }

    /// Returns `true` if the image is a file on tmpfs, which is memory that nothing makes stable. A device is
    /// excluded: its node lies on a tmpfs too, which says nothing about the device.
    pub fn is_on_tmpfs(&self) -> bool {
        self.kind == FileKind::File && is_tmpfs(&self.file)
    }

    /// Returns, in words, the flags that the image is open with, as the kernel reports them.
    pub fn open_flags(&self) -> String {
        // SAFETY: F_GETFL takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL) };
        flags_in_words(flags)
    }

    /// Returns, in words, the flags that [`Image::open`](super::Image::open) asks for.
    pub fn wanted_flags(&self) -> String {
        flags_in_words(self.wanted_flags)
    }

    /// Returns `true` for a block device, `false` for a regular file.
    pub fn is_device(&self) -> bool {
        self.kind == FileKind::Device
    }

    /// Returns `true` if the file has lost its last name since it was opened: it was deleted, or another file
    /// took its name. What is written to it is then lost when the last descriptor is closed.
    pub fn is_deleted(&self) -> bool {
        self.fate.is_deleted(&self.file)
    }

    /// Returns (size in bytes when the file was opened, smallest size seen since) if the second is less.
    /// Somebody has then truncated the file, and the data beyond is lost.
    pub fn cut(&self) -> Option<(u64, u64)> {
        self.fate.cut(&self.file)
    }

    /// Returns `true` if somebody else holds a lock that would make [`Image::open`](super::Image::open) fail.
    pub fn is_locked_by_another(&self) -> bool {
        let readonly = self.wanted_flags & libc::O_ACCMODE == libc::O_RDONLY;
        locks::is_locked(&self.file, readonly)
    }
}

fn find_geometry(file: &Arc<File>, config: &DiskConfig, kind: FileKind) -> Result<Geometry, ImageProblem> {
    let bytes = (&**file).seek(SeekFrom::End(0)).map_err(host("its size cannot be found"))?;
    let path = shell_word(&config.path);
    if bytes == 0 {
        return Err(ImageProblem::Empty(path));
    }
    let alignment = if config.cache.direct {
        geometry::probe_direct_alignment(file)
            .map_err(host("its alignment for O_DIRECT cannot be found"))?
            .ok_or(ImageProblem::NoDirect { mode: config.cache.name })?
    } else {
        BUFFERED
    };
    check_rw_flags(file, bytes, config)?;
    let needed = alignment.offset;
    let logical_block = match config.block_size {
        Some(asked) if asked < needed => return Err(ImageProblem::BlockTooSmall { asked, needed }),
        Some(asked) => asked,
        None => needed.max(geometry::logical_block_of_device(file).unwrap_or(512)),
    };
    if logical_block > 4096 {
        return Err(ImageProblem::BlockTooLarge(logical_block));
    }
    if !bytes.is_multiple_of(u64::from(logical_block)) {
        return Err(ImageProblem::PartialBlock { bytes, block: logical_block, path });
    }
    let physical_block = physical_block(file, kind).clamp(logical_block, 65536);
    Ok(Geometry { capacity_sectors: bytes / SECTOR, logical_block, physical_block, alignment })
}

/// Returns an error if the host refuses the flags that the mode's reads and writes have.
fn check_rw_flags(file: &Arc<File>, bytes: u64, config: &DiskConfig) -> Result<(), ImageProblem> {
    let rw_flags = config.cache.rw_flags();
    let unknown = host("RWF_DONTCACHE cannot be tried on it");
    if rw_flags == 0 || geometry::takes_rw_flags(file, bytes, rw_flags).map_err(unknown)? {
        return Ok(());
    }
    Err(ImageProblem::NoDontcache { mode: config.cache.name })
}

/// Returns the unit in bytes that the host rewrites as a whole: the device's physical block, or the file
/// system's block.
fn physical_block(file: &File, kind: FileKind) -> u32 {
    let found = match kind {
        FileKind::Device => geometry::physical_block_of_device(file),
        FileKind::File => file.metadata().ok().and_then(|found| u32::try_from(found.blksize()).ok()),
    };
    found.filter(|bytes| bytes.is_power_of_two()).unwrap_or(512)
}

fn is_tmpfs(file: &File) -> bool {
    // SAFETY: statfs is plain numbers, for which all zeroes are valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is valid for writes.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) };
    result == 0 && found.f_type == libc::TMPFS_MAGIC
}
