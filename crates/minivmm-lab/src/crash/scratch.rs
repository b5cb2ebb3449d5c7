//! Makes the images of states quickly.
//!
//! Owns where the images are and how they are made. Each worker has a *stage*, a copy of the base with all
//! settled entries, which never goes back. Each state is a new file: a copy of the stage with the extents of
//! the state. So nothing that a check writes to its image, even later, can change another state. Copies are
//! reflinks if the file system supports them; otherwise only data is copied and holes stay holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, ioctl_ficlone, seek, statfs};
use rustix::io::Errno;

use super::legal::Extent;
use super::log::{LogError, WriteLog};
use minivmm::files::output;

/// Number of bytes that are copied at once.
const CHUNK: u64 = 1 << 20;
/// Size of the aligned pieces that become holes if they are all zeroes.
const PIECE: usize = 64 << 10;
static ZEROES: [u8; PIECE] = [0; PIECE];
/// The kernel's magic number of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The base cannot be read.
    #[error("cannot read the base {path}")]
    Base {
        /// The base.
        path: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// An image or a directory cannot be made.
    #[error("cannot make {path}")]
    Make {
        /// The image or directory.
        path: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The base is smaller than the disk of the log.
    #[error(
        "entry {entry} of the log reaches byte {end}, but {path} has {bytes} bytes: the base is the disk as it was \
         when the log began"
    )]
    TooSmall {
        /// Index of the entry, from 0.
        entry: usize,
        /// End of the entry on the disk, in bytes.
        end: u64,
        /// The base.
        path: String,
        /// Size of the base in bytes.
        bytes: u64,
    },
}

/// The disk as it was when the log began.
#[derive(Debug)]
pub struct Base {
    file: File,
    path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Approximate number of bytes that are not in holes.
    pub data_bytes: u64,
}

impl Base {
    /// Opens a file or a block device for reading only. Fails if the log changes bytes beyond its end.
    pub fn open(path: &Path, log: &WriteLog) -> Result<Self, ScratchError> {
        let name = || path.display().to_string();
        let failed = |source: io::Error| ScratchError::Base { path: name(), source };
        let file = File::open(path).map_err(failed)?;
        let status = file.metadata().map_err(failed)?;
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|errno| failed(errno.into()))?;
        let data_bytes = if status.is_file() { status.blocks() * 512 } else { bytes };
        let mut ends =
            log.entries.iter().map(|it| if it.changes() { it.offset + it.bytes } else { 0 }).enumerate();
        if let Some((entry, end)) = ends.find(|&(_, end)| end > bytes) {
            return Err(ScratchError::TooSmall { entry, end, path: name(), bytes });
        }
        Ok(Self { file, path: path.to_owned(), bytes, data_bytes })
    }

    /// Returns `true` if the base begins with an ext2, ext3 or ext4.
    pub fn is_ext4(&self) -> bool {
        let mut magic = [0; 2];
        self.file.read_exact_at(&mut magic, 1024 + 56).is_ok() && u16::from_le_bytes(magic) == 0xef53
    }

    fn reopened(&self) -> Result<File, ScratchError> {
        let failed = |source| ScratchError::Base { path: self.path.display().to_string(), source };
        File::open(&self.path).map_err(failed)
    }
}

/// Returns the default directory for images: memory if twice the needed space is free there, because a check
/// syncs what it repairs, and the directory of temporary files otherwise.
pub fn default_place(needed_bytes: u64) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let has_room = statfs(memory).is_ok_and(|found| {
        let free = found.f_bavail.saturating_mul(u64::try_from(found.f_bsize).unwrap_or(0));
        found.f_type == TMPFS_MAGIC && free / 2 > needed_bytes
    });
    if has_room { memory.to_owned() } else { std::env::temp_dir() }
}

/// A copy of the base with the first entries of the log.
#[derive(Debug)]
pub struct Stage<'a> {
    log: &'a WriteLog,
    file: File,
    bytes: u64,
    applied: usize,
}

impl<'a> Stage<'a> {
    /// Copies the base to a new file at `path`.
    pub fn new(log: &'a WriteLog, base: &Base, path: &Path) -> Result<Self, ScratchError> {
        // Workers copy at the same time, and each needs a file position of its own.
        let from = base.reopened()?;
        let file = copied(&from, base.bytes, path, copy_sparsely).map_err(making(path))?;
        Ok(Self { log, file, bytes: base.bytes, applied: 0 })
    }

    /// Applies entries until the first `settled` ones are in it. The stage never goes back.
    pub fn advance(&mut self, settled: usize) -> Result<(), ScratchError> {
        while self.applied < settled {
            if let Some(entry) = self.log.entries.get(self.applied).filter(|entry| entry.changes()) {
                let all = Extent { offset: entry.offset, bytes: entry.bytes, entry: self.applied, skip: 0 };
                apply(self.log, &self.file, all)?;
            }
            self.applied += 1;
        }
        Ok(())
    }

    /// Makes a file at `path` with the content of the stage and these extents. An older file is replaced.
    pub fn make(&self, extents: &[Extent], path: &Path) -> Result<(), ScratchError> {
        let file = copied(&self.file, self.bytes, path, copy_range).map_err(making(path))?;
        extents.iter().try_for_each(|&extent| apply(self.log, &file, extent))
    }
}

fn making(path: &Path) -> impl Fn(io::Error) -> ScratchError {
    let path = path.display().to_string();
    move |source| ScratchError::Make { path: path.clone(), source }
}

/// Writes the content of an extent. Zeroes become holes.
fn apply(log: &WriteLog, file: &File, extent: Extent) -> Result<(), ScratchError> {
    let failed = |source| ScratchError::Make { path: "an image of a state".to_owned(), source };
    let Some(entry) = log.entries.get(extent.entry) else { return Ok(()) };
    if entry.data_at.is_none() {
        return erase(file, extent.offset, extent.bytes).map_err(failed);
    }
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < extent.bytes {
        let bytes = CHUNK.min(extent.bytes - done);
        buffer.resize(usize::try_from(bytes).unwrap_or_default(), 0);
        log.read_data(entry, extent.skip + done, &mut buffer)?;
        let written = match is_zero(&buffer) {
            true => erase(file, extent.offset + done, bytes),
            false => file.write_all_at(&buffer, extent.offset + done),
        };
        written.map_err(failed)?;
        done += bytes;
    }
    Ok(())
}

fn erase(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeroes = vec![0; usize::try_from(CHUNK.min(bytes)).unwrap_or_default()];
            let mut done = 0;
            while done < bytes {
                let part =
                    zeroes.get(..usize::try_from(bytes - done).unwrap_or(usize::MAX)).unwrap_or(&zeroes);
                file.write_all_at(part, offset + done)?;
                done += part.len() as u64;
            }
            Ok(())
        }
        result => Ok(result?),
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PIECE).all(|piece| ZEROES.starts_with(piece))
}

/// Copies the bytes from offset `start` to `end` into a new file.
type Mover = fn(from: &File, to: &File, start: u64, end: u64) -> io::Result<()>;

/// Makes a new file at `path` with the same content, by a reflink, or by copying with `mover` everything that
/// is not a hole.
fn copied(from: &File, bytes: u64, path: &Path, mover: Mover) -> io::Result<File> {
    // The old file is unlinked and not overwritten, because a process may still have it open.
    let to = output::make_anew(path)?;
    if ioctl_ficlone(&to, from).is_ok() && to.metadata()?.len() == bytes {
        return Ok(to);
    }
    to.set_len(bytes)?;
    let mut at = 0;
    while at < bytes {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            // A block device has no holes.
            Err(Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = match seek(from, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL) => bytes,
            Err(errno) => return Err(errno.into()),
        };
        mover(from, &to, start, end.min(bytes))?;
        at = end;
    }
    Ok(to)
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mut source, mut target) = (at, at);
        let bytes = usize::try_from(end - at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut source), to, Some(&mut target), bytes) {
            Ok(moved) if moved > 0 => at += moved as u64,
            Err(Errno::INTR) => {}
            // Old kernels cannot copy between some files.
            _ => return copy_sparsely(from, to, at, end),
        }
    }
    Ok(())
}

/// Copies by reading and writing, which also works across file systems and from devices. Zeroes become holes:
/// finding them costs time once, and each later copy is cheaper, because an image with a freshly zeroed journal
/// is mostly zeroes.
fn copy_sparsely(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    let mut buffer = Vec::new();
    while at < end {
        buffer.resize(usize::try_from(CHUNK.min(end - at)).unwrap_or_default(), 0);
        from.read_exact_at(&mut buffer, at)?;
        for piece in buffer.chunks(PIECE) {
            if !is_zero(piece) {
                to.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
    }
    Ok(())
}
