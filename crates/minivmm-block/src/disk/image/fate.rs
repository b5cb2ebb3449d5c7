//! What happens to an image's file while it is open: it loses its last name, or somebody truncates it.
//!
//! Owns the state of the file at the start, and the smallest size seen since. The current size is not enough: a
//! guest's write makes a truncated file long again, with zeroes where data was.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Statx, StatxFlags, statx};

use super::FileKind;

/// The file's state at the start, and what has happened to it since.
#[derive(Debug)]
pub(super) struct Fate {
    /// `true` if it had a name. A file that was deleted before it was opened is meant to have none.
    had_name: bool,
    /// Its size in bytes; 0 for anything but a regular file, which nobody can truncate.
    bytes: u64,
    /// The smallest size in bytes seen since the start.
    least: AtomicU64,
}

impl Fate {
    /// Records the file's present state.
    pub fn of(file: &File, kind: FileKind) -> Self {
        let found = look(file).filter(|_| kind == FileKind::File);
        let (links, bytes) = found.map_or((0, 0), |found| (found.stx_nlink, found.stx_size));
        Self { had_name: links > 0, bytes, least: AtomicU64::new(bytes) }
    }

    /// Returns `true` if the file has lost its last name.
    pub fn is_deleted(&self, file: &File) -> bool {
        self.had_name && look(file).is_some_and(|found| found.stx_nlink == 0)
    }

    /// Returns (size at the start, smallest size since) if the second is less.
    pub fn cut(&self, file: &File) -> Option<(u64, u64)> {
        let now = look(file).map_or(self.bytes, |found| found.stx_size);
        let least = self.least.fetch_min(now, Ordering::SeqCst).min(now);
        (least < self.bytes).then_some((self.bytes, least))
    }
}

/// Returns what this kernel knows of the file. It does not ask a file server, which may not answer, because the
/// main thread calls this too.
fn look(file: &File) -> Option<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(file, c"", flags, StatxFlags::SIZE | StatxFlags::NLINK).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_cut_stays_one_when_it_is_as_long_again() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let fate = Fate::of(&file, FileKind::File);
        file.set_len(16384).unwrap();
        assert_eq!(fate.cut(&file), None, "it may grow");
        file.set_len(4096).unwrap();
        assert_eq!(fate.cut(&file), Some((8192, 4096)));
        file.set_len(8192).unwrap();
        assert_eq!(fate.cut(&file), Some((8192, 4096)));
        assert!(!fate.is_deleted(&file), "it never had a name");
    }

    #[test]
    fn a_device_has_no_size_to_lose() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(Fate::of(&null, FileKind::Device).cut(&null), None);
        assert_eq!(Fate::of(&null, FileKind::File).cut(&null), None);
    }
}
