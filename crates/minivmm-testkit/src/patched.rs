//! A copy of the tree with a mistake in it, and cargo in that copy.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::places;

/// Where the copy is, for the suite of this name.
pub fn copy_of_the_tree(suite: &str) -> PathBuf {
    places::tmp().join(suite).join("tree")
}

/// What `patch` says to a patch, in a tree.
pub fn patch(tree: &Path, arguments: &[&str], patch: &str) -> Output {
    let mut child = Command::new("patch")
        .args(["--strip=1", "--force", "--no-backup-if-mismatch", "--reject-file=-"])
        .args(arguments)
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run patch: {error}; apt-get install patch"));
    child.stdin.take().unwrap().write_all(patch.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Returns what a command has said on both streams.
pub fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Directories that nothing is built from. The copy has none of them.
const NOT_BUILT_FROM: [&str; 5] = ["target", ".git", "build", "corpus", "mutants"];

/// Makes `to` like `from`, without touching what is the same already, which need not be built again. What only `to`
/// has is removed: a patch has made it, and would not apply a second time.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(to).unwrap() {
        let copied = entry.unwrap();
        if from.join(copied.file_name()).symlink_metadata().is_ok() {
            continue;
        }
        if copied.file_type().unwrap().is_dir() {
            std::fs::remove_dir_all(copied.path()).unwrap();
        } else {
            std::fs::remove_file(copied.path()).unwrap();
        }
    }
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, copied) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            if !NOT_BUILT_FROM.iter().any(|name| entry.file_name() == *name) {
                copy(&path, &copied);
            }
        } else if path.is_file() && std::fs::read(&path).ok() != std::fs::read(&copied).ok() {
            std::fs::copy(&path, &copied).unwrap();
        }
    }
}

/// `cargo test` in the copy: with the feature that most suites need, so that one build serves all of them, and built
/// for speed of building.
pub fn cargo_test(tree: &Path, arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["test", "--release", "--locked", "--features", "minivmm-block/observed"])
        .args(arguments)
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", tree.with_file_name("build"))
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_INCREMENTAL", "true")
        .env("RUST_BACKTRACE", "0");
    cargo
}
