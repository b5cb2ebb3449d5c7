//! Whether two paths lead to one file.
//!
//! Owns the answer. For existing files it is device and inode, whatever links lead to them. For files that
//! would be created it is the directory and the name in it.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How many symbolic links the kernel follows in one path.
const LINKS_MAX: usize = 40;

/// The identity of a file, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl FileId {
    /// Returns the identity of the file that `found` describes.
    pub fn of(found: &Metadata) -> Self {
        Self { device: found.dev(), inode: found.ino() }
    }
}

/// The number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

impl Device {
    /// Converts `st_dev` or `st_rdev`.
    pub fn from_number(number: u64) -> Self {
        Self { major: libc::major(number), minor: libc::minor(number) }
    }

    /// Parses MAJOR:MINOR; `None` if `text` is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Where a path leads.
#[derive(Debug)]
pub(super) enum Spot {
    /// To an existing file.
    Exists(Metadata),
    /// To no file yet: opening the path would create `name` in `directory`.
    New {
        /// The directory, for messages.
        directory: PathBuf,
        /// The identity of `directory`.
        id: FileId,
        /// The name in `directory`.
        name: OsString,
    },
}

impl Spot {
    /// Finds out where `path` leads. A dangling symbolic link leads to the file that opening it would create.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found.map(Self::Exists),
        }
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            let directory = directory_of(&path);
            let found = fs::metadata(&directory)?;
            let name = path.file_name().ok_or(io::ErrorKind::NotFound)?.to_owned();
            match fs::read_link(&path) {
                Ok(target) => path = directory.join(target),
                Err(_) => return Ok(Self::New { directory, id: FileId::of(&found), name }),
            }
        }
        Err(io::Error::from_raw_os_error(libc::ELOOP))
    }

    /// Returns `true` if both lead to the same file.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exists(a), Self::Exists(b)) => FileId::of(a) == FileId::of(b),
            (Self::New { id: a, name: x, .. }, Self::New { id: b, name: y, .. }) => a == b && x == y,
            _ => false,
        }
    }
}

/// Returns the directory of a file, even if its path has no slash.
fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Returns the descriptor of this process that `path` names; `None` if it names none. Such paths are
/// /dev/stdout, /dev/fd/N, /proc/self/fd/N and links to one of them.
pub(super) fn own_descriptor(path: &Path) -> Option<RawFd> {
    let ours = fs::canonicalize("/proc/self/fd").ok()?;
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let directory = fs::canonicalize(directory_of(&path)).ok()?;
        if directory == ours {
            return path.file_name()?.to_str()?.parse().ok();
        }
        path = directory.join(fs::read_link(&path).ok()?);
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_both_kinds_lead_to_one_file_whether_it_exists_or_not() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("file"), "x").unwrap();
        fs::hard_link(at("file"), at("hard")).unwrap();
        symlink("file", at("soft")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        symlink("dir", at("dir-link")).unwrap();
        symlink("dir/new", at("dangling")).unwrap();
        symlink("dangling", at("dangling-twice")).unwrap();
        symlink("loop", at("loop")).unwrap();
        let same = |a: &str, b: &str| Spot::of(&at(a)).unwrap().is_same(&Spot::of(&at(b)).unwrap());
        for (a, b, expected) in [
            ("file", "hard", true),
            ("file", "soft", true),
            ("file", "dir/../file", true),
            ("dir/new", "dir-link/new", true),
            ("dir/new", "dangling", true),
            ("dir-link/new", "dangling-twice", true),
            ("dir/new", "dir/other", false),
            ("new", "dir/new", false),
            ("file", "dir/new", false),
        ] {
            assert_eq!(same(a, b), expected, "{a} {b}");
        }
        assert!(Spot::of(&at("missing/new")).is_err());
        assert!(Spot::of(&at("loop")).is_err());
    }

    #[test]
    fn our_own_descriptors_are_known_by_every_name() {
        for (path, descriptor) in [
            ("/dev/stdout", Some(1)),
            ("/dev/stderr", Some(2)),
            ("/dev/fd/7", Some(7)),
            ("/proc/self/fd/1", Some(1)),
            ("/dev/null", None),
            ("/nonexistent/1", None),
            ("1", None),
        ] {
            assert_eq!(own_descriptor(Path::new(path)), descriptor, "{path}");
        }
        let by_number = format!("/proc/{}/fd/2", std::process::id());
        assert_eq!(own_descriptor(Path::new(&by_number)), Some(2));
    }
}
