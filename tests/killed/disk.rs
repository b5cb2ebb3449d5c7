//! The images on the disk of a host that is no more: its file system's journal is replayed, as its next
//! start would, and the files are read from outside.

use std::path::Path;
use std::process::Command;

/// The content of each mode's image on the ext4 file system in `disk`.
pub fn images_of(disk: &Path, modes: &[&str]) -> Vec<Vec<u8>> {
    let replayed = Command::new("e2fsck").args(["-fy"]).arg(disk).output().unwrap();
    // 1: errors were corrected, and the replay of the journal is one.
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{replayed:?}");
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dump = |mode: &&str| {
        let copy = directory.path().join(mode);
        let request = format!("dump /{mode}.img {}", copy.display());
        let dumped = Command::new("debugfs").args(["-R", &request]).arg(disk).output().unwrap();
        std::fs::read(&copy).unwrap_or_else(|error| panic!("{mode}: {error}: {dumped:?}"))
    };
    modes.iter().map(dump).collect()
}
