//! The deliberate mistakes in the write path, all in one build, each of which the durability suite must find.
//!
//! `crates/minivmm-block/tests/durability/mistakes.patch` is applied to a copy of the tree, and the suite built
//! there, once. Then it runs once a mistake, which MINIVMM_MISTAKE names; without one it must find nothing.
//! Mistakes that need a build each are `tests/mutants.rs`'.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_testkit::patched::{cargo_test, copy, copy_of_the_tree, patch, words};
use minivmm_testkit::places::root;

const PATCH: &str = "crates/minivmm-block/tests/durability/mistakes.patch";

/// Each with what it is.
const MISTAKES: [(&str, &str); 25] = [
    ("flush-does-nothing", "FLUSH is acknowledged but not carried out"),
    ("sync-before-write", "a stable write is synced before its data is written"),
    (
        "generation-skip",
        "a sync is skipped when no write was counted since the last, and writes are counted too late",
    ),
    ("sync-error-acked", "a failed fdatasync is acknowledged as if it had worked"),
    ("sync-error-forgotten", "a failed fdatasync fails one request and is then forgotten"),
    ("toggle-ignored", "the guest's writeback byte has no effect"),
    ("no-flush-is-writeback", "a driver without FLUSH gets volatile writes"),
    ("reset-keeps-writeback", "a reset leaves the writeback byte as the last driver set it"),
    ("zeroes-unsynced", "WRITE_ZEROES is not synced where writes are"),
    ("directsync-without-sync", "a direct mode without a write cache syncs nothing"),
    ("short-write-ok", "a short write counts as complete"),
    ("flush-shares-earlier-sync", "a FLUSH is satisfied by a sync that was already running"),
    ("sector-wraps", "the sector number is shifted without a check for overflow"),
    ("status-before-data", "a request completes when its operation is submitted"),
    ("unlocked-rmw", "requests smaller than a block are done by read-modify-write without a lock"),
    ("file-flush", "FLUSH is File::flush, which does nothing in Rust"),
    ("sync-file-range", "FLUSH is sync_file_range, which flushes no disk's cache"),
    ("blk-fls-buf", "FLUSH is BLKFLSBUF, which flushes no disk's cache"),
    ("wrong-descriptor", "FLUSH syncs another file"),
    (
        "success-counts-at-once",
        "a sync's success counts though an overlapping sync, not judged yet, may have been told of the error",
    ),
    ("group-takes-latecomers", "a request joins a shared fdatasync that is running already"),
    ("kept-completes-first", "an operation that the worker makes itself is acknowledged before it returned"),
    ("kept-error-dropped", "the error of an operation that the worker makes itself is dropped"),
    (
        "kept-sync-shares-another-queues",
        "a sync that the worker is to make itself is satisfied by another queue's that began before",
    ),
    ("group-done-at-start", "requests that share an fdatasync complete when it starts"),
];

#[test]
fn every_mistake_is_made_somewhere() {
    let simulation = "crates/minivmm-block/tests/durability";
    let made = [PATCH, &format!("{simulation}/storage.rs"), &format!("{simulation}/engine.rs")]
        .map(|path| std::fs::read_to_string(root().join(path)).unwrap())
        .concat();
    for (name, _) in MISTAKES {
        assert!(made.contains(&format!("\"{name}\"")), "nothing makes {name}");
    }
}

#[test]
fn every_mistake_is_found_and_without_one_nothing_is() {
    let tree = copy_of_the_tree("mistakes");
    copy(root(), &tree);
    let applied = patch(&tree, &[], &std::fs::read_to_string(root().join(PATCH)).unwrap());
    assert!(
        applied.status.success(),
        "{PATCH} does not apply any more: make the same mistakes in the code as it is now.\n{}",
        words(&applied)
    );
    let suite = build(&tree);
    let run = |mistake: Option<&str>| {
        let mut command = Command::new(&suite);
        command.args(["--exact", "--nocapture", "the_mistake_of_this_run_is_found"]);
        match mistake {
            Some(name) => command.env("MINIVMM_MISTAKE", name),
            None => command.env_remove("MINIVMM_MISTAKE"),
        };
        command.output().unwrap()
    };
    let control = run(None);
    assert!(control.status.success(), "without a mistake something is found:\n{}", words(&control));
    let mut survivors = Vec::new();
    for (name, what) in MISTAKES {
        let ran = run(Some(name));
        for line in words(&ran).lines().filter(|line| line.contains(" dies at seed ")) {
            println!("{line}");
        }
        if !ran.status.success() {
            survivors.push(format!("{name} ({what}):\n{}", words(&ran)));
        }
    }
    assert!(survivors.is_empty(), "not found:\n{}", survivors.join("\n"));
}

/// Builds the suite in the copy; where it is.
fn build(tree: &Path) -> PathBuf {
    let mut cargo = cargo_test(tree, &["--package", "minivmm-block", "--test", "durability"]);
    cargo.args(["--no-run", "--message-format", "json"]);
    let built = cargo.output().unwrap();
    assert!(built.status.success(), "the copy does not compile:\n{}", words(&built));
    let said = String::from_utf8_lossy(&built.stdout).into_owned();
    let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let executables = messages.filter(|it| it["target"]["name"] == "durability");
    let mut paths = executables.filter_map(|it| it["executable"].as_str().map(PathBuf::from));
    paths.next_back().unwrap_or_else(|| panic!("no durability suite was built:\n{said}"))
}
