//! A cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst), in memory.
//!
//! Owns the format. Everything belongs to root; directories above a file are made where it needs
//! them. A path that comes twice is the first one's: nothing is in the archive twice.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::JobError;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const KIND: u32 = 0o170_000;
/// The kernel finds the next archive at a multiple of 4; tools like 512.
const ALIGN: usize = 512;

/// What has been put so far.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    paths: HashSet<PathBuf>,
}

impl Archive {
    /// Whether this path is in it.
    pub fn has(&self, path: &Path) -> bool {
        self.paths.contains(path)
    }

    /// A directory.
    pub fn directory(&mut self, path: &Path, mode: u32, mtime: u32) -> Result<(), JobError> {
        self.put(path, DIRECTORY | mode & 0o7777, mtime, b"")
    }

    /// A file.
    pub fn file(&mut self, path: &Path, mode: u32, mtime: u32, bytes: &[u8]) -> Result<(), JobError> {
        self.put(path, REGULAR | mode & 0o7777, mtime, bytes)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &Path, mtime: u32, target: &Path) -> Result<(), JobError> {
        self.put(path, LINK | 0o777, mtime, target.as_os_str().as_bytes())
    }

    fn put(&mut self, path: &Path, mode: u32, mtime: u32, bytes: &[u8]) -> Result<(), JobError> {
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
        self.entry(name.as_os_str().as_bytes(), mode, mtime, bytes)
            .ok_or_else(|| JobError::TooLarge(path.into()))?;
        self.paths.insert(path.into());
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        // The trailer is too short not to fit.
        let _ = self.entry(b"TRAILER!!!", 0, 0, b"");
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        self.bytes
    }

    fn entry(&mut self, name: &[u8], mode: u32, mtime: u32, bytes: &[u8]) -> Option<()> {
        let size = u32::try_from(bytes.len()).ok()?;
        let name_size = u32::try_from(name.len() + 1).ok()?;
        // An inode number of its own for each, and one link: no hard links.
        let inode = u32::try_from(self.paths.len() + 1).ok()?;
        let links = if mode & KIND == DIRECTORY { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check.
        let fields = [inode, mode, 0, 0, links, mtime, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        self.bytes.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(bytes);
        self.pad();
        Some(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them_and_nothing_comes_twice() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/c"), 0o755, 7, b"hello").unwrap();
        archive.file(Path::new("/a/b/c"), 0o644, 7, b"other").unwrap();
        archive.link(Path::new("/a/d"), 7, Path::new("b/c")).unwrap();
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(ALIGN));
        let text = String::from_utf8(bytes).unwrap();
        let names: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(names.len(), 5, "a, a/b, a/b/c, a/d, the trailer");
        assert!(text.contains("hello") && !text.contains("other"));
        assert!(text.find("a/b\0").unwrap() < text.find("a/b/c\0").unwrap());
    }
}
