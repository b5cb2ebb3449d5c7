//! Directories for a run's temporary files, which nobody has to remove by hand. That holds after an error, a
//! panic or a signal. It also holds after a SIGKILL, because the next run removes directories that nobody uses
//! any more.
//!
//! Owns their names, their locks and their removal. A directory is in use while a process holds its lock
//! (flock(2) on the directory itself), which the kernel releases with the process. Only directories of this
//! user with our prefix are ever removed. No symbolic link is followed, neither to such a directory nor inside
//! one.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, flock, openat, unlinkat};
use rustix::io::Errno;

use minivmm::sync::unpoisoned;

/// The prefix of the name of every such directory.
pub const PREFIX: &str = "minivmm-scratch-";
/// How many directories are tried. One is given up if another run's clean-up holds its lock at that moment.
const TRIES: usize = 16;
/// The depth to which nested directories are removed; no tool makes deeper ones.
const DEPTH_MAX: usize = 64;

/// The directories of this process, for [`remove_all`].
static IN_USE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A directory that is removed with all its content when dropped.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
    /// Holds the lock; `None` if the file system has no locks.
    _locked: Option<File>,
}

impl ScratchDir {
    /// Makes a directory where temporary files are kept ($TMPDIR, else /tmp).
    pub fn new(purpose: &str) -> io::Result<Self> {
        Self::new_in(&std::env::temp_dir(), purpose)
    }

    /// Makes a directory in `place`, after removing what earlier runs have left there.
    pub fn new_in(place: &Path, purpose: &str) -> io::Result<Self> {
        remove_abandoned(place);
        let prefix = format!("{PREFIX}{purpose}-");
        for _ in 0..TRIES {
            let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(place)?;
            match lock(made.path()) {
                Lock::Held(file) => return Ok(Self::kept(made, Some(file))),
                Lock::Impossible => return Ok(Self::kept(made, None)),
                // A clean-up took the lock first, and removes the directory.
                Lock::Busy => {}
            }
        }
        Err(io::Error::other("each new directory there is removed at once"))
    }

    fn kept(made: tempfile::TempDir, locked: Option<File>) -> Self {
        let path = made.keep();
        in_use().push(path.clone());
        Self { path, _locked: locked }
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        in_use().retain(|path| path != &self.path);
        remove(&self.path);
    }
}

fn in_use() -> MutexGuard<'static, Vec<PathBuf>> {
    unpoisoned(IN_USE.lock())
}

/// Removes all directories of this process. For a process that is about to exit without dropping them.
pub fn remove_all() {
    for path in in_use().drain(..) {
        remove(&path);
    }
}

/// Removes the directories in `place` that nobody uses.
pub fn remove_abandoned(place: &Path) {
    let Ok(entries) = std::fs::read_dir(place) else { return };
    let ours =
        entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    for entry in ours {
        // Holds the lock until everything is removed.
        if let Lock::Held(_file) = lock(&entry.path()) {
            log::info!("removing {}, which an earlier run has left behind", entry.path().display());
            remove(&entry.path());
        }
    }
}

enum Lock {
    Held(File),
    /// Somebody else holds the lock, or it is no directory of ours.
    Busy,
    /// This file system has no locks.
    Impossible,
}

fn lock(path: &Path) -> Lock {
    let Ok(opened) = open(CWD, path.as_os_str()) else { return Lock::Busy };
    let file = File::from(opened);
    let is_own = |it: &std::fs::Metadata| it.uid() == rustix::process::geteuid().as_raw();
    let Some(status) = file.metadata().ok().filter(is_own) else { return Lock::Busy };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Lock::Busy,
        Err(_) => return Lock::Impossible,
    }
    // Whoever held the lock before may have removed the directory.
    let is_same = std::fs::symlink_metadata(path)
        .is_ok_and(|now| (now.dev(), now.ino()) == (status.dev(), status.ino()));
    if is_same { Lock::Held(file) } else { Lock::Busy }
}

/// Opens a directory, but not through a symbolic link.
fn open(at: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Removes a directory with all its content, as far as possible. The next run tries again.
fn remove(path: &Path) {
    if let Ok(directory) = open(CWD, path.as_os_str()) {
        empty(&directory, 0);
    }
    let _ = std::fs::remove_dir(path);
}

fn empty(directory: &OwnedFd, depth: usize) {
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let name: &CStr = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") || unlinkat(directory, name, AtFlags::empty()).is_ok() {
            continue;
        }
        if depth < DEPTH_MAX
            && let Ok(inner) = openat(
                directory,
                name,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
        {
            empty(&inner, depth + 1);
            let _ = unlinkat(directory.as_fd(), name, AtFlags::REMOVEDIR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(place: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(place)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn it_goes_with_all_that_is_in_it_and_another_ones_stays_while_it_is_used() {
        let place = tempfile::tempdir().unwrap();
        let first = ScratchDir::new_in(place.path(), "a").unwrap();
        std::fs::create_dir_all(first.path().join("1/2")).unwrap();
        std::fs::write(first.path().join("1/2/file"), "x").unwrap();
        let second = ScratchDir::new_in(place.path(), "b").unwrap();
        remove_abandoned(place.path());
        assert!(first.path().join("1/2/file").exists() && second.path().exists());
        drop(first);
        assert_eq!(names(place.path()), [second.path().file_name().unwrap().to_str().unwrap()]);
        drop(second);
        assert!(names(place.path()).is_empty());
    }

    #[test]
    fn what_a_killed_run_has_left_goes_with_the_next_and_nothing_else_does() {
        let (place, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(elsewhere.path().join("precious"), "x").unwrap();
        let left = place.path().join(format!("{PREFIX}crash-dead"));
        std::fs::create_dir_all(left.join("0/sub")).unwrap();
        std::fs::write(left.join("0/disk.img"), "x").unwrap();
        // Links to directories that are not ours to remove: one in place of the directory, one inside it.
        std::os::unix::fs::symlink(elsewhere.path(), left.join("0/link")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), place.path().join(format!("{PREFIX}link"))).unwrap();
        std::fs::write(place.path().join(format!("{PREFIX}file")), "x").unwrap();
        std::fs::create_dir(place.path().join("minivmm-other")).unwrap();
        let _new = ScratchDir::new_in(place.path(), "x").unwrap();
        assert!(!left.exists());
        assert!(elsewhere.path().join("precious").exists());
        let left: Vec<String> =
            names(place.path()).into_iter().filter(|name| !name.contains("-x-")).collect();
        assert_eq!(left, ["minivmm-other", &format!("{PREFIX}file"), &format!("{PREFIX}link")]);
    }

    #[test]
    fn another_users_directory_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let theirs = place.path().join(format!("{PREFIX}theirs"));
        std::fs::create_dir(&theirs).unwrap();
        if let Err(error) = std::os::unix::fs::chown(&theirs, Some(12345), None) {
            eprintln!("skipped: only root can give a directory away: {error}");
            return;
        }
        remove_abandoned(place.path());
        assert!(theirs.exists());
    }

    #[test]
    fn many_at_once_all_get_one_of_their_own() {
        let place = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let dir = ScratchDir::new_in(place.path(), "many").unwrap();
                        std::fs::write(dir.path().join("f"), "x").unwrap();
                        remove_abandoned(place.path());
                        assert!(dir.path().join("f").exists());
                    }
                });
            }
        });
        assert!(names(place.path()).is_empty());
    }
}
