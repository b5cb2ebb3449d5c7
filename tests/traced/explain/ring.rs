//! `--explain --json` keeps its word for every engine: what the kernel's tracepoints show of ring and
//! system calls is what was told, for every mode, driver and way to stable writes.

use minivmm_testkit::eye::Eye;
use minivmm_testkit::machine::*;
use serde_json::Value;

use super::log::{self, Log};
use super::{calls, expected, explain, modes, takes, words};

fn watch(image: &Image, disk: &str, words: &str, status: i32) -> Option<Log> {
    let mut eye =
        Eye::open().map_err(|reason| skip("bpf", &format!("{reason}; io_uring is not seen"))).ok()?;
    let console = log::console(&image.path);
    std::fs::write(&console, "").unwrap();
    for file in [&image.path, &console, image.path.parent().unwrap()] {
        eye.shows(file);
    }
    let mut command = minivmm();
    start(&mut command, Entry::Elf, &format!("scenario=io {words}"));
    command.arg("--console").arg(format!("file={}", console.display()));
    command.args(["--timeout", "100", "--disk", disk]);
    eye.watches(&mut command);
    run(&mut command, b"").expect(exit(status), &format!("{disk} {words}"));
    Some(Log::seen(&eye.operations().unwrap()))
}

/// What was told for a write behind the setting of the byte: in any order with the sync of what was complete
/// before, and like a write that meets another one where that sync still runs.
fn behind_the_setting(driver: &Value, seen: &[String]) -> bool {
    let on_setting = calls(&driver["on_setting"]);
    let mut among_others = driver["write"].get("two_at_once").map(calls).unwrap_or_default();
    among_others.dedup();
    let sorted = |calls: &[String]| {
        let mut calls = calls.to_vec();
        calls.sort();
        calls
    };
    !on_setting.is_empty()
        && [calls(&driver["write"]["calls"]), among_others]
            .into_iter()
            .any(|told| sorted(seen) == sorted(&[on_setting.as_slice(), &told].concat()))
}

#[test]
fn the_ring_is_asked_for_exactly_what_was_told_beforehand() {
    every_way_is_what_was_told("io_uring");
}

/// strace has looked at one way to stable writes; the eye looks at all.
#[test]
fn without_the_ring_every_way_to_stable_writes_is_what_was_told() {
    every_way_is_what_was_told("sync");
}

fn every_way_is_what_was_told(engine: &str) {
    if !kvm() {
        return;
    }
    for mode in modes() {
        for by in ["dsync", "fdatasync", "group", "auto"] {
            let image = Image::new();
            let disk = image.disk(&format!("cache={mode},engine={engine},stable={by}"));
            let told = explain(&disk);
            assert_eq!((&told["engine"], &told["stable"]), (&engine.into(), &by.into()));
            for driver in told["calls"]["drivers"].as_array().unwrap() {
                let words = words(driver);
                let what = format!("engine={engine} cache={mode} stable={by} {words}");
                let status = if takes(driver) { 0x20 } else { 0x25 };
                let Some(log) = watch(&image, &disk, &words, status) else { return };
                // Who is asked for nothing, in unsafe, is not seen with a file.
                if !log.calls().is_empty() {
                    assert_eq!(log.opened.as_deref(), told["open_flags"].as_str(), "{what}");
                }
                let mut expected = expected(&told, driver);
                let seen = log.cut(&expected, &what);
                if takes(driver) && behind_the_setting(driver, &seen[1].1) {
                    expected[1].1.clone_from(&seen[1].1);
                }
                assert_eq!(seen, expected, "{what}");
            }
        }
    }
}
