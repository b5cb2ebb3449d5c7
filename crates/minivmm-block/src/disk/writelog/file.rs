//! The log's file: created, locked, appended to.
//!
//! Owns where the next entry goes. Zeroes are left as holes, so that erasing a huge range costs the log
//! nothing. The superblock is updated after every entry, so a log whose writer was killed ends with the last
//! whole entry.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::format::{HEADER_BYTES, Header, SUPERBLOCK_BYTES, Superblock};
use crate::disk::blocking::BlockingEngine;
use crate::disk::engine::{Engine, HostOp, OpToken, Wake};
use crate::disk::geometry::SECTOR;
use crate::disk::lock;
use crate::disk::problem::ImageProblem;
use crate::files::{Content, FileId, Output, output};
use crate::mem::Iov;

/// Bytes in a sector of our logs: the disk's own unit.
const SECTOR_BYTES: u32 = 512;

/// What follows the header of an entry.
#[derive(Debug)]
pub(super) enum Data {
    /// Nothing.
    None,
    /// These bytes.
    Bytes(Iov),
    /// This many zeroes.
    Zeroes(u64),
    /// A mark's text, in the same sector as the header.
    Text(&'static str),
}

/// A log that is being written.
#[derive(Debug)]
pub(super) struct LogFile {
    file: Arc<File>,
    /// The offset of the next entry, in bytes.
    at: u64,
    entries: u64,
}

impl LogFile {
    /// Creates an empty log at `path`. It may replace an older log; anything else there is refused.
    pub(super) fn begin(path: &Path, image: &File) -> Result<Self, ImageProblem> {
        let failed = |what: &'static str| {
            let path = path.display().to_string();
            move |source| ImageProblem::WriteLog { path, what, source }
        };
        let image = FileId::of(&image.metadata().map_err(failed("be looked at"))?);
        let file = output::open_log(&as_output(path), image).map_err(ImageProblem::Output)?;
        lock::take(&file, false)
            .map_err(|_| failed("be used")(io::Error::other("another disk, or another VM, has locked it")))?;
        file.set_len(0).map_err(failed("be emptied"))?;
        let mut log = Self { file: Arc::new(file), at: SECTOR, entries: 0 };
        log.write_superblock().map_err(failed("be written"))?;
        Ok(log)
    }

    /// Returns how many entries the log has.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Appends an entry, wholly or not at all.
    pub(super) fn append(&mut self, header: Header, data: &Data) -> io::Result<()> {
        self.file.write_all_at(&header.encode(), self.at)?;
        let data_at = self.at + SECTOR;
        let bytes = match data {
            Data::None => 0,
            Data::Text(text) => {
                self.file.write_all_at(text.as_bytes(), self.at + HEADER_BYTES as u64)?;
                0
            }
            Data::Bytes(iov) => {
                self.write_pieces(iov, data_at)?;
                iov.bytes()
            }
            Data::Zeroes(bytes) => *bytes,
        };
        let end = data_at + bytes;
        // Parts of this range that were not written read as zeroes.
        self.file.set_len(end)?;
        self.at = end;
        self.entries += 1;
        self.write_superblock()
    }

    /// Makes the log itself stable on the host's disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write_superblock(&mut self) -> io::Result<()> {
        let superblock = Superblock { entries: self.entries, sector_bytes: SECTOR_BYTES };
        let mut sector = [0; 512];
        sector[..SUPERBLOCK_BYTES].copy_from_slice(&superblock.encode());
        self.file.write_all_at(&sector, 0)
    }

    /// Writes all bytes of an [`Iov`] to the file.
    fn write_pieces(&self, iov: &Iov, offset: u64) -> io::Result<()> {
        let mut engine = BlockingEngine::new(Arc::clone(&self.file));
        let mut done = 0;
        while done < iov.bytes() {
            let part = iov.part(done, u64::MAX, 1024);
            let op = HostOp::Writev { iov: part, offset: offset + done, dsync: false };
            let mut ended = Vec::new();
            let given = engine.submit(OpToken(0), op);
            engine.wait(Wake::Now, &mut ended)?;
            match ended.pop().map(|end| end.result) {
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(error)) => return Err(error),
                Some(Ok(moved)) if moved > 0 && given.is_ok() => done += moved as u64,
                _ => return Err(io::ErrorKind::WriteZero.into()),
            }
        }
        Ok(())
    }
}

/// Describes a log at `path` as an output of the command: it may replace an older log and nothing else.
pub fn as_output(path: &Path) -> Output {
    let content = Content { name: "an older write log", is_older: is_log };
    Output { option: "log-writes=", path: path.to_owned(), content }
}

/// Returns `true` if these are the first bytes of a log.
fn is_log(first: &[u8]) -> bool {
    first.first_chunk::<SUPERBLOCK_BYTES>().is_some_and(|bytes| Superblock::decode(bytes).is_some())
}
