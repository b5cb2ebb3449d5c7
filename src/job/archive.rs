//! A cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst), as a plan.
//!
//! Owns the format and the sizes. The length of the archive, and the memory that it takes unpacked, are known
//! before a byte of any large file is read. Everything belongs to root. Directories above a file are created
//! as needed. If a path is added twice, the first addition counts: nothing is in the archive twice.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::JobError;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const KIND: u32 = 0o170_000;
/// Alignment of the next archive: the kernel requires a multiple of 4, tools prefer 512.
const ALIGN: u64 = 512;
/// The least memory that a file, a directory or a link takes in the guest, besides whole pages of content: an
/// inode and a directory entry (mm/shmem.c).
const ENTRY_BYTES: u64 = 2048;
const PAGE: u64 = 4096;

/// A piece of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The content of a file on this host, which has this length.
    File {
        /// The path of the file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
}

/// The content of a file in the archive.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The content of a file on this host with this many bytes, which is read when the archive is written.
    File(&'a Path, u64),
}

impl Content<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, len) => *len,
        }
    }
}

/// The archive as planned so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Archive {
    parts: Vec<Part>,
    len: u64,
    unpacked_bytes: u64,
    paths: HashSet<PathBuf>,
    /// A record for each entry: what the guest must find once everything is unpacked.
    promised: Vec<u8>,
}

impl Archive {
    /// Returns `true` if this path is in the archive.
    pub fn has(&self, path: &Path) -> bool {
        self.paths.contains(path)
    }

    /// Returns the length of the archive in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.len
    }

    /// Returns the bytes of guest memory that the archive takes once it is unpacked.
    pub fn unpacked_bytes(&self) -> u64 {
        self.unpacked_bytes
    }

    /// Returns the pieces of the archive, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Returns the records of what the guest must find, each ended by a NUL: `f SIZE PATH` for a file, `e 0
    /// PATH` for what only has to exist.
    pub fn promised(&self) -> &[u8] {
        &self.promised
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &Path, mode: u32, mtime: u32) -> Result<(), JobError> {
        self.put(path, DIRECTORY | mode & 0o7777, mtime, Content::Bytes(b""))
    }

    /// Adds a file.
    pub fn file(&mut self, path: &Path, mode: u32, mtime: u32, content: Content<'_>) -> Result<(), JobError> {
        self.put(path, REGULAR | mode & 0o7777, mtime, content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &Path, mtime: u32, target: &Path) -> Result<(), JobError> {
        self.put(path, LINK | 0o777, mtime, Content::Bytes(target.as_os_str().as_bytes()))
    }

    /// Appends another archive, which must have none of this one's paths.
    pub fn append(&mut self, mut other: Self) {
        self.len += other.len;
        self.unpacked_bytes += other.unpacked_bytes;
        self.paths.extend(other.paths);
        self.promised.append(&mut other.promised);
        self.parts.append(&mut other.parts);
    }

    fn put(&mut self, path: &Path, mode: u32, mtime: u32, content: Content<'_>) -> Result<(), JobError> {
        if self.has(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent()
            && parent != Path::new("/")
            && !parent.as_os_str().is_empty()
        {
            self.directory(parent, 0o755, mtime)?;
        }
        let name = path.strip_prefix("/").unwrap_or(path);
        self.entry(name.as_os_str().as_bytes(), mode, mtime, content)
            .ok_or_else(|| JobError::TooLarge(path.into()))?;
        let (kind, size) = if mode & KIND == REGULAR { ('f', content.len()) } else { ('e', 0) };
        self.promised.extend(format!("{kind} {size} /").into_bytes());
        self.promised.extend(name.as_os_str().as_bytes());
        self.promised.push(0);
        self.unpacked_bytes += content.len().next_multiple_of(PAGE) + ENTRY_BYTES;
        self.paths.insert(path.into());
        Ok(())
    }

    /// Ends the archive. The kernel takes what follows as another archive.
    pub fn finish(&mut self) {
        // The trailer is so short that it always fits.
        let _ = self.entry(b"TRAILER!!!", 0, 0, Content::Bytes(b""));
        self.pad(ALIGN);
    }

    fn entry(&mut self, name: &[u8], mode: u32, mtime: u32, content: Content<'_>) -> Option<()> {
        let size = u32::try_from(content.len()).ok()?;
        let name_size = u32::try_from(name.len() + 1).ok()?;
        // Each entry gets its own inode number and one link: there are no hard links.
        let inode = u32::try_from(self.paths.len() + 1).ok()?;
        let links = if mode & KIND == DIRECTORY { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check.
        let fields = [inode, mode, 0, 0, links, mtime, size, 0, 0, 0, 0, name_size, 0];
        self.bytes(b"070701");
        for field in fields {
            self.bytes(format!("{field:08X}").as_bytes());
        }
        self.bytes(name);
        self.bytes(&[0]);
        self.pad(4);
        match content {
            Content::Bytes(bytes) => self.bytes(bytes),
            Content::File(_, 0) => {}
            Content::File(path, len) => {
                self.parts.push(Part::File { path: path.into(), len });
                self.len += len;
            }
        }
        self.pad(4);
        Some(())
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        match self.parts.last_mut() {
            Some(Part::Bytes(last)) => last.extend(bytes),
            _ if bytes.is_empty() => {}
            _ => self.parts.push(Part::Bytes(bytes.to_vec())),
        }
    }

    fn pad(&mut self, align: u64) {
        let missing = self.len.next_multiple_of(align) - self.len;
        self.bytes(&vec![0; usize::try_from(missing).unwrap_or_default()]);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Returns the whole archive, with the contents of the files.
    pub fn bytes_of(archive: &Archive) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in archive.parts() {
            match part {
                Part::Bytes(part) => bytes.extend(part),
                Part::File { path, .. } => bytes.extend(std::fs::read(path).unwrap()),
            }
        }
        assert_eq!(bytes.len() as u64, archive.total_bytes());
        bytes
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_nothing_comes_twice() {
        let host = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(host.path(), "hello").unwrap();
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/c"), 0o755, 7, Content::File(host.path(), 5)).unwrap();
        archive.file(Path::new("/a/b/c"), 0o644, 7, Content::Bytes(b"other")).unwrap();
        archive.link(Path::new("/a/d"), 7, Path::new("b/c")).unwrap();
        archive.finish();
        let bytes = bytes_of(&archive);
        assert!(bytes.len().is_multiple_of(512));
        let text = String::from_utf8(bytes).unwrap();
        let names: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(names.len(), 5, "a, a/b, a/b/c, a/d, the trailer");
        assert!(text.contains("hello") && !text.contains("other"));
        assert!(text.find("a/b\0").unwrap() < text.find("a/b/c\0").unwrap());
        assert_eq!(archive.promised(), b"e 0 /a\0e 0 /a/b\0f 5 /a/b/c\0e 0 /a/d\0");
        assert_eq!(archive.unpacked_bytes(), 4 * ENTRY_BYTES + 2 * PAGE);
    }

    #[test]
    fn a_file_of_four_gibibytes_is_refused_by_its_size_alone() {
        let mut archive = Archive::default();
        let nowhere = Path::new("/no/such/file");
        let max = u64::from(u32::MAX);
        archive.file(Path::new("/fits"), 0o644, 0, Content::File(nowhere, max)).unwrap();
        let refused = archive.file(Path::new("/a"), 0o644, 0, Content::File(nowhere, max + 1)).unwrap_err();
        assert!(matches!(refused, JobError::TooLarge(_)), "{refused}");
        assert!(archive.total_bytes() > max && archive.parts().len() <= 3);
    }
}
