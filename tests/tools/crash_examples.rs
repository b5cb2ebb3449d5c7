//! The walk-throughs of `examples/crash/README.md`: that `minivmm crash` finds what the wrong programs of
//! `examples/crash` lose, and nothing in the right ones, with a stock kernel's ext4 and Debian's SQLite.
//!
//! The guests run on this machine's KVM where it can run Linux, in the emulated host elsewhere; the
//! disks are made and checked here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_testkit::host::Host;
use minivmm_testkit::tools;
use serde_json::Value;
use tempfile::TempDir;

const GOOD: i32 = 0;
const NOT_GOOD: i32 = 1;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/crash").join(name)
}

/// A disk as it was at first, and what some guest programs have done to it, each in a log of its own.
struct Recorded {
    dir: TempDir,
    example: &'static str,
}

/// What `minivmm crash` has found in one log.
struct Found {
    status: Option<i32>,
    states: u64,
    /// What the check has said, one for each failure.
    failures: Vec<String>,
}

/// Runs the example's guest.sh with each of these arguments, in one guest with a disk each.
fn record(example_name: &'static str, file: Option<&[u8]>, programs: &[&str], ways: &[&str]) -> Recorded {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    let mut make = Command::new(example("disk.sh"));
    make.arg(&base);
    if let Some(bytes) = file {
        let settings = dir.path().join("settings");
        fs::write(&settings, bytes).unwrap();
        make.arg(settings);
    }
    assert!(make.status().unwrap().success());

    let place = Host::get().place();
    place.push(&base, "base.img");
    place.put("guest.sh", &fs::read(example(example_name).join("guest.sh")).unwrap());
    let mut command = "minivmm --timeout 200 --add guest.sh".to_owned();
    for program in programs {
        place.bring(program);
        command += &format!(" --add {program}");
    }
    let mut job = "set -e".to_owned();
    let mut copies = String::new();
    for (number, way) in ways.iter().enumerate() {
        let device = char::from(b"abcdefgh"[number]);
        copies += &format!("cp base.img {number}.img && ");
        command += &format!(" --disk {number}.img,log-writes={number}.log");
        job += &format!("; sh /guest.sh {}", way.replace("DEVICE", &format!("/dev/vd{device}")));
    }
    let outcome = place.sh(&format!("{copies}MINIVMM_GUEST=$GUESTS/6.12 {command} -- sh -c '{job}'"));
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    for number in 0..ways.len() {
        let log = format!("{number}.log");
        place.pull(&log, &dir.path().join(&log));
    }
    Recorded { dir, example: example_name }
}

impl Recorded {
    fn crash(&self, number: usize) -> Found {
        let check = example(self.example).join("check.sh");
        let output = Command::new(tools::minivmm())
            .current_dir(self.dir.path())
            .args(["crash", &format!("{number}.log"), "--base", "base.img", "--states", "4", "--json"])
            .args(["--check", &format!("'{}' {{}}", check.display())])
            .output()
            .unwrap();
        let json: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        let failures = json["failures"].as_array().unwrap().iter();
        let failures = failures.map(|one| one["output"].as_str().unwrap().trim().to_owned()).collect();
        Found { status: output.status.code(), states: json["states"].as_u64().unwrap(), failures }
    }

    fn is_good(&self, number: usize, states_min: u64) {
        let found = self.crash(number);
        assert_eq!((found.status, &found.failures), (Some(GOOD), &Vec::new()));
        assert!(found.states >= states_min, "{} states", found.states);
    }

    /// Each of these failures is among those found; returns all of them.
    fn fails_with(&self, number: usize, said: &[&str]) -> Vec<String> {
        let Found { status, failures, .. } = self.crash(number);
        assert_eq!(status, Some(NOT_GOOD));
        for words in said {
            assert!(failures.iter().any(|one| one.contains(words)), "{words}: {failures:#?}");
        }
        failures
    }
}

#[test]
fn a_program_that_forgets_a_sync_is_found_and_the_right_one_is_not() {
    let version_0 = "version 0\n".repeat(2000);
    let ways = ["right DEVICE", "careless DEVICE", "careless DEVICE noauto_da_alloc", "file-only DEVICE"];
    let recorded = record("rename", Some(version_0.as_bytes()), &[], &ways);
    recorded.is_good(0, 150);
    recorded.fails_with(1, &["promised: version 2; settings is version 0"]);
    recorded.fails_with(2, &["settings is empty or missing"]);
    // Each version is there once the next one's file has been synced: the last promise is what is lost.
    recorded.fails_with(3, &["promised: version 5; settings is version 4"]);
}

#[test]
fn sqlite_keeps_every_row_it_has_promised_where_its_manual_says_so() {
    let ways = ["WAL FULL DEVICE", "DELETE EXTRA DEVICE", "DELETE FULL DEVICE", "DELETE OFF DEVICE"];
    let recorded = record("sqlite", None, &["/usr/bin/sqlite3"], &ways);
    recorded.is_good(0, 100);
    recorded.is_good(1, 200);
    // FULL does not sync the directory after the rollback journal was deleted: the transaction whose COMMIT
    // has returned is rolled back. No other one, and the database is sound.
    let failures = recorded.fails_with(2, &["promised: row 7; the last one is row 6"]);
    for failure in failures {
        let numbers: Vec<u32> =
            failure.split(' ').filter_map(|word| word.trim_end_matches(';').parse().ok()).collect();
        let one_less = matches!(numbers[..], [promised, last] if promised == last + 1);
        assert!(one_less || failure.starts_with("promised: row 0; "), "{failure}");
        assert!(failure.contains("rows.db-journal"), "{failure}");
    }
    // The control: rows lost, and a broken database.
    recorded.fails_with(3, &["the last one is row", "integrity_check: "]);
}

/// `emuhost run -- minivmm --add PROGRAM`: both are programs, and share libraries.
#[test]
fn two_programs_with_the_same_library_are_brought_into_an_emulated_host() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"set -euo pipefail
. guest-images/lib/common.sh
. guest-images/lib/emuhost-vm.sh
HOST_BUILD=$1
: >"$1/sonames"
stage_libraries "$1/stage" /usr/bin/sqlite3
stage_libraries "$1/stage" /usr/bin/sqlite3"#;
    let output = Command::new("bash")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["-c", script, "emuhost"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(dir.path().join("stage/lib/libsqlite3.so.0").exists());
}
