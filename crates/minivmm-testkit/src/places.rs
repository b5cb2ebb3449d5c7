//! Where a test finds the source tree, the program that cargo has built for it, and room for files.
//!
//! Cargo tells these paths only to the test programs themselves (`CARGO_BIN_EXE_minivmm`, `CARGO_TARGET_TMPDIR`). This
//! crate is none: it takes them from where the test program lies, `TARGET/[TRIPLE/]PROFILE/deps/NAME-HASH`.

use std::path::{Path, PathBuf};

/// Returns the root of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// Returns the directory of the profile that this process was built with, such as `target/release`.
fn profile() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    me.ancestors().nth(2).unwrap_or_else(|| panic!("{} lies in no target directory", me.display())).to_owned()
}

/// Returns the path of the minivmm that was built for this process.
pub fn minivmm() -> PathBuf {
    profile().join("minivmm")
}

/// Returns what `CARGO_TARGET_TMPDIR` is to a test program, where this process lies in a target directory.
pub fn target_tmp() -> Option<PathBuf> {
    profile().ancestors().skip(1).take(2).map(|target| target.join("tmp")).find(|tmp| tmp.is_dir())
}

/// Returns a directory for a test's files: cargo's own for tests, on a file system that usually has O_DIRECT.
///
/// # Panics
///
/// Where this process lies in no target directory.
pub fn tmp() -> PathBuf {
    target_tmp().unwrap_or_else(|| panic!("{} has no tmp beside it", profile().display()))
}
