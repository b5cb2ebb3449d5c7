//! Reads a write log: its entries, and where the data of each entry lies.
//!
//! Owns the checks that the bytes must pass. The entries are kept in memory, about 64 bytes each; their data
//! stays in the file. [`minivmm::disk::writelog::format`] defines the format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use minivmm::disk::writelog::format::{
    DISCARD, FLUSH, FUA, HEADER_BYTES, Header, MARK, METADATA, SUPERBLOCK_BYTES, Superblock,
};

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The host reports an error.
    #[error("cannot read the write log {path}")]
    Read {
        /// The log.
        path: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The file is not a write log.
    #[error("{0} is not a write log: it does not begin like one of dm-log-writes")]
    NotALog(String),
    /// The superblock contains a sector size that is not allowed.
    #[error("the write log {path} has sectors of {bytes} bytes: it is damaged")]
    SectorSize {
        /// The log.
        path: String,
        /// The size in the superblock.
        bytes: u32,
    },
    /// An entry is not valid.
    #[error("entry {number} of the write log {path} is damaged: {what}")]
    Damaged {
        /// The log.
        path: String,
        /// Index of the entry, from 0.
        number: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Offset on the disk in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The flags of the format.
    pub flags: u64,
    /// Offset of the data in the log in bytes; `None` if the entry has no data.
    pub data_at: Option<u64>,
    /// The text of a mark; `None` for other entries.
    pub mark: Option<String>,
}

impl Entry {
    /// Returns `true` if everything before the entry was stable when it completed.
    pub fn is_flush(&self) -> bool {
        self.flags & FLUSH != 0
    }

    /// Returns `true` if the entry was stable itself when it completed.
    pub fn is_fua(&self) -> bool {
        self.flags & FUA != 0
    }

    /// Returns `true` if the entry discards content.
    pub fn is_discard(&self) -> bool {
        self.flags & DISCARD != 0
    }

    /// Returns `true` if the entry changes the disk.
    pub fn changes(&self) -> bool {
        self.bytes > 0 && self.mark.is_none()
    }

    /// Describes the entry, for example `write+fua`, `discard` or `flush`.
    pub fn kind(&self) -> String {
        let mut words = Vec::new();
        if self.is_flush() {
            words.push("flush");
        }
        if self.mark.is_some() {
            words.push("mark");
        } else if self.is_discard() {
            words.push("discard");
        } else if self.bytes > 0 {
            words.push("write");
        }
        if self.is_fua() {
            words.push("fua");
        }
        if self.flags & METADATA != 0 {
            words.push("metadata");
        }
        if words.is_empty() { "nothing".to_owned() } else { words.join("+") }
    }
}

/// A log whose entries have been read.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    path: PathBuf,
    /// Size of a sector in bytes.
    pub sector_bytes: u32,
    /// The entries, in the order of the log.
    pub entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads the log at `path`, a file or a block device.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let name = || path.display().to_string();
        let failed = |source| LogError::Read { path: name(), source };
        let file = File::open(path).map_err(failed)?;
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let superblock = match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(failed(error)),
            Ok(()) => Superblock::decode(&bytes),
        };
        let Superblock { entries, sector_bytes } = superblock.ok_or_else(|| LogError::NotALog(name()))?;
        if !sector_bytes.is_power_of_two() || !(512..=1 << 20).contains(&sector_bytes) {
            return Err(LogError::SectorSize { path: name(), bytes: sector_bytes });
        }
        let mut log = Self { file, path: path.to_owned(), sector_bytes, entries: Vec::new() };
        let mut at = u64::from(sector_bytes);
        for number in 0..entries {
            let (entry, next) = log.read_entry(number, at)?;
            log.entries.push(entry);
            at = next;
        }
        Ok(log)
    }

    /// Returns the path of the log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buffer` from the data of `entry`, starting `skip` bytes into it. The data of an entry without
    /// data is zeroes.
    pub fn read_data(&self, entry: &Entry, skip: u64, buffer: &mut [u8]) -> Result<(), LogError> {
        let at = entry.data_at.and_then(|at| at.checked_add(skip));
        let read = match at {
            Some(at) => self.file.read_exact_at(buffer, at),
            None => {
                buffer.fill(0);
                Ok(())
            }
        };
        read.map_err(|source| LogError::Read { path: self.path.display().to_string(), source })
    }

    /// Reads the entry at offset `at`. Returns it and the offset of the next entry.
    fn read_entry(&self, number: u64, at: u64) -> Result<(Entry, u64), LogError> {
        let sector_bytes = u64::from(self.sector_bytes);
        let damaged = |what| LogError::Damaged { path: self.path.display().to_string(), number, what };
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => damaged("the file ends in it"),
            _ => LogError::Read { path: self.path.display().to_string(), source },
        };
        let mut head = [0; HEADER_BYTES];
        self.file.read_exact_at(&mut head, at).map_err(failed)?;
        let header = Header::decode(&head);
        let in_bytes = |sectors: u64| sectors.checked_mul(sector_bytes).filter(|&bytes| bytes < 1 << 62);
        let (Some(offset), Some(bytes)) = (in_bytes(header.sector), in_bytes(header.sectors)) else {
            return Err(damaged("it is beyond all disks"));
        };
        let is_mark = header.flags & MARK != 0;
        let mark = is_mark.then(|| self.read_text(at, header, damaged, failed)).transpose()?;
        let data_at = at + sector_bytes;
        let next = if header.has_data() { data_at + bytes } else { data_at };
        if header.has_data() {
            // Reading the last byte of the data shows that the log is not cut off.
            self.file.read_exact_at(&mut [0], next - 1).map_err(failed)?;
        }
        let data_at = header.has_data().then_some(data_at);
        Ok((Entry { offset, bytes, flags: header.flags, data_at, mark }, next))
    }

    fn read_text(
        &self,
        at: u64,
        header: Header,
        damaged: impl Fn(&'static str) -> LogError,
        failed: impl Fn(io::Error) -> LogError,
    ) -> Result<String, LogError> {
        let room = u64::from(self.sector_bytes) - HEADER_BYTES as u64;
        if header.text_bytes > room {
            return Err(damaged("its text is longer than its sector"));
        }
        let mut text = vec![0; usize::try_from(header.text_bytes).unwrap_or_default()];
        self.file.read_exact_at(&mut text, at + HEADER_BYTES as u64).map_err(failed)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}
