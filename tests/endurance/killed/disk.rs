//! The disk of a host that is no more, as it is, or as a loss of power could have left it at the worst. Its
//! file system's journal is replayed, as its next start would, and the images are read from outside.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What a loss of power leaves at the worst of the disk whose log this is: all that its last flush, or a
/// write that was stable by itself, speaks for, and nothing else.
pub fn after_power_loss(log: &Path, disk: &Path) {
    let minivmm = || Command::new(minivmm_testkit::tools::minivmm());
    let listed = minivmm().args(["log", "--json"]).arg(log).output().unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let entries = listed["entries"].as_array().unwrap().len();
    let _ = std::fs::remove_file(disk);
    let made = minivmm()
        .arg("crash")
        .arg(log)
        .arg("--base")
        .arg(log.with_extension("log.base"))
        .args(["--at", &entries.to_string(), "--lose", "all", "--write"])
        .arg(disk)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

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
