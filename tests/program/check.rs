//! `minivmm check`, on this machine as it is, without /dev/kvm, without permission for it, with
//! something else in its place, and where Linux guests do run (this machine's KVM or the emulated host).
//!
//! Owns the machines that are pretended: a mount namespace with another /dev (root only), and another
//! user. What cannot be pretended without root is skipped, and says so.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use minivmm_testkit::host;
use minivmm_testkit::skips::skip;
use serde_json::Value;
use tempfile::TempDir;

const RUNS: i32 = 0;
const RUNS_NOT: i32 = 1;
const PROBES: [&str; 5] = ["cmpxchg16b", "int3", "xsave", "iretq", "speed"];

fn binary() -> PathBuf {
    env!("CARGO_BIN_EXE_minivmm").into()
}

fn check(arguments: &[&str]) -> Output {
    Command::new(binary()).arg("check").args(arguments).output().unwrap()
}

/// The answer as JSON, which agrees with the exit status.
#[track_caller]
fn parse(output: &Output) -> Value {
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|why| panic!("{why}: {output:?}"));
    let expected = if report["linux_runs"] == true { RUNS } else { RUNS_NOT };
    assert_eq!(output.status.code(), Some(expected), "{report}");
    assert_eq!(report["remedy"].is_null(), report["linux_runs"] == true, "{report}");
    report
}

fn row<'a>(report: &'a Value, key: &str) -> &'a Value {
    let rows = report["rows"].as_array().unwrap();
    rows.iter().find(|row| row["key"] == key).unwrap_or(&Value::Null)
}

/// A binary that every user may run, wherever the build directory is.
struct Public {
    _directory: TempDir,
    binary: PathBuf,
}

impl Public {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let copy = directory.path().join("minivmm");
        std::fs::copy(binary(), &copy).unwrap();
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { _directory: directory, binary: copy }
    }
}

/// Runs `check --json` behind `script`, in a mount namespace of its own with an empty /dev; `None`
/// where that needs rights that we have not. The script ends in a command that gets the binary and its
/// arguments.
fn with_dev(script: &str) -> Option<Output> {
    let can = Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|done| done.status.success());
    if !can {
        skip("root", "no right to make a mount namespace, so no other /dev");
        return None;
    }
    let public = Public::new();
    let script = format!("mount -t tmpfs none /dev && {script} \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(&public.binary).args(["check", "--json"]);
    Some(command.output().unwrap())
}

#[test]
fn this_machine_is_judged_in_less_than_a_second_and_the_two_forms_agree() {
    let begin = Instant::now();
    let output = check(&["--json"]);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?} on a busy machine", begin.elapsed());
    let report = parse(&output);
    let text = String::from_utf8(check(&[]).stdout).unwrap();
    let verdict = report["verdict"].as_str().unwrap();
    assert!(text.split_whitespace().collect::<Vec<_>>().join(" ").contains(&format!("verdict: {verdict}")));
    let brief = String::from_utf8(check(&["--quiet"]).stdout).unwrap();
    assert_eq!(brief, format!("{verdict}\n"));
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    for row in report["rows"].as_array().unwrap() {
        assert!(text.contains(row["key"].as_str().unwrap()), "{row} is missing in\n{text}");
        assert!(["pass", "fail", "note"].contains(&row["status"].as_str().unwrap()), "{row}");
        assert!(row["group"] != "features" || row["status"] == "note", "{row} decides something");
    }
}

#[test]
fn a_kvm_that_lacks_instructions_is_told_from_one_that_runs_linux() {
    let report = parse(&check(&["--json"]));
    if row(&report, "interface version")["status"] != "pass" {
        skip("kvm", "this machine has no KVM to probe");
        return;
    }
    let statuses: Vec<_> = PROBES.iter().map(|key| row(&report, key)["status"].as_str().unwrap()).collect();
    assert_eq!(statuses.iter().all(|status| *status == "pass"), report["linux_runs"] == true, "{report}");
    assert!(row(&report, "speed")["number"].as_u64().unwrap() > 100_000, "{report}");
    let verdict = report["verdict"].as_str().unwrap();
    for (key, status) in PROBES.iter().zip(&statuses).filter(|(key, _)| **key != "speed") {
        assert_eq!(verdict.contains(key), *status == "fail", "{report}");
    }
    if report["linux_runs"] == false {
        assert!(report["remedy"].as_str().unwrap().contains("guest-images/emuhost"), "{report}");
    }
}

#[test]
fn without_dev_kvm_it_says_how_to_get_one() {
    let Some(output) = with_dev("") else { return };
    let report = parse(&output);
    assert_eq!(report["linux_runs"], false);
    assert_eq!(row(&report, "/dev/kvm")["found"], "not there");
    assert_eq!(report["verdict"], "this machine has no /dev/kvm");
    assert!(report["remedy"].as_str().unwrap().contains("emuhost"), "{report}");
    assert!(row(&report, "cmpxchg16b").is_null(), "nothing was probed");
    assert!(!row(&report, "io_uring").is_null(), "the features are told all the same");
}

#[test]
fn without_permission_it_names_the_group_to_join() {
    let another = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    for (device, word) in [
        // 1 is the group daemon, on every Debian.
        ("mknod -m 660 /dev/kvm c 10 232 && chgrp 1 /dev/kvm", "usermod -aG daemon"),
        ("mknod -m 600 /dev/kvm c 10 232", "chgrp kvm /dev/kvm"),
    ] {
        let Some(output) = with_dev(&format!("{device} && exec {another}")) else { return };
        let report = parse(&output);
        let found = row(&report, "/dev/kvm")["found"].as_str().unwrap();
        assert!(found.contains("no permission") && found.contains("uid 65534"), "{report}");
        assert!(report["remedy"].as_str().unwrap().contains(word), "{report}");
    }
}

#[test]
fn something_else_in_the_place_of_kvm_is_found_out() {
    for device in ["mknod -m 666 /dev/kvm c 1 3", "touch /dev/kvm"] {
        let Some(output) = with_dev(&format!("{device} && exec")) else { return };
        let report = parse(&output);
        assert_eq!(report["verdict"], "/dev/kvm is not KVM", "{device}: {report}");
    }
    let Some(output) = with_dev("mkdir /dev/kvm && exec") else { return };
    assert_eq!(parse(&output)["linux_runs"], false);
}

#[test]
fn where_linux_guests_run_check_says_so() {
    let place = host::Host::get().place();
    let outcome = place.sh("minivmm check --json");
    assert_eq!(outcome.status, RUNS, "{outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(report["linux_runs"], true, "{report}");
    for key in PROBES {
        assert_eq!(row(&report, key)["status"], "pass", "{report}");
    }
    let text = place.sh("minivmm check").stdout;
    assert!(text.contains("verdict: Linux kernels run here"), "{text}");
}
