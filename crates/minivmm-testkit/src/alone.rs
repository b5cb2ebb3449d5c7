//! Tests in a process of their own: for what is a whole process's, such as its limits, its filters and its log.

use std::process::Command;

/// Returns this test program's command for one of its tests, and for no other: `test` in the module whose
/// `module_path!()` is `module`. What it prints is not captured.
pub fn command(module: &str, test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name(module, test), "--nocapture", "--test-threads", "1"]);
    command
}

/// Returns the test's name as the test program lists it, without the crate that the module's path begins with.
pub fn name(module: &str, test: &str) -> String {
    module.split_once("::").map_or(test.to_owned(), |(_, modules)| format!("{modules}::{test}"))
}
