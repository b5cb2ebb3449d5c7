//! A file of this host on its way into the archive.
//!
//! Owns how it is opened, and how its length is found. Its content stays in place until the guest's memory is
//! filled, unless its length is not known beforehand.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::JobError;
use super::archive::{Archive, Content};

/// The most bytes that are read into this process's memory from a file whose length is not known beforehand.
const UNKNOWN_BYTES_MAX: u64 = 16 << 20;
/// A file that claims at most this length, and has no block on a disk, may be a kernel's virtual file. (sysfs
/// claims 4096 bytes for every file.)
const CLAIMED_BYTES_MAX: u64 = 64 << 10;

/// Turns an error of the file at `path` into one of the job.
pub fn read(path: &Path) -> impl FnOnce(std::io::Error) -> JobError {
    move |source| JobError::Read { path: path.into(), source }
}

/// Returns when the file was modified, in seconds, as an archive has it.
pub fn mtime(metadata: &Metadata) -> u32 {
    u32::try_from(metadata.mtime()).unwrap_or(0)
}

/// Opens a regular file, without blocking even if it has become a FIFO meanwhile.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}

/// Plans one file; `mode` is added to the file's own mode.
pub fn put_content(
    archive: &mut Archive,
    file: &File,
    host: &Path,
    place: &Path,
    mode: u32,
) -> Result<(), JobError> {
    let metadata = file.metadata().map_err(read(host))?;
    let (mode, mtime) = (metadata.mode() | mode, mtime(&metadata));
    // Virtual files of a kernel (/proc, /sys) have another length than they claim.
    if metadata.blocks() == 0 && metadata.len() <= CLAIMED_BYTES_MAX {
        let mut bytes = Vec::new();
        file.take(UNKNOWN_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read(host))?;
        if bytes.len() as u64 > UNKNOWN_BYTES_MAX {
            return Err(JobError::Endless(host.into()));
        }
        return archive.file(place, mode, mtime, Content::Bytes(&bytes));
    }
    archive.file(place, mode, mtime, Content::File(host, metadata.len()))
}
