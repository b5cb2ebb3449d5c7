//! The in-guest benchmark (`benches/guest`) as a user starts it, with minivmm alone and briefly: that its
//! tables and its JSON hold what docs/performance.md says. How fast anything was is not looked at.
//!
//! It boots a kernel; where the guest runs is the harness's choice, which it prints.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn a_short_run_tells_jobs_boots_and_memory() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join("guest-images/build/6.12/vmlinux").exists() {
        panic!("there is no test guest: `make guest emuhost` builds it");
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let json = directory.path().join("guest.json");
    let output = Command::new(env!("CARGO"))
        .current_dir(root)
        .args([
            "bench",
            "--quiet",
            "--locked",
            "--bench",
            "guest",
            "--",
            "--quick",
            "--boots=1",
            "--qemu=none",
        ])
        .args(["--who=minivmm-pci", "--modes=none", "--only=boot,randread-4k-d1,ext4-log", "--image-mib=128"])
        .args(["--minivmm", env!("CARGO_BIN_EXE_minivmm")])
        .arg(format!("--dir={}", directory.path().display()))
        .arg(format!("--json={}", json.display()))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    println!("{out}");

    for text in ["Guests run ", "| randread-4k-d1 ", "none, dropped", "to init", "beyond the guest"] {
        assert!(out.contains(text), "no {text:?} in\n{out}\n{err}");
    }
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["version"], 1);
    let contests = report["contests"].as_array().unwrap();
    let jobs: Vec<_> = contests.iter().map(|contest| contest["job"].as_str().unwrap()).collect();
    assert_eq!(jobs, ["randread-4k-d1", "ext4-log-4k-d1-odsync"], "{err}");
    for contest in contests {
        let run = &contest["entries"][0]["rounds"][0];
        assert!(run["iops"].as_f64().unwrap() > 0.0, "{contest:#}\n{err}");
        assert_eq!(run["resident_pages"], 0, "the page cache was not dropped: {contest:#}");
    }
    let boot = &report["boots"][0];
    assert_eq!(boot["who"], "minivmm");
    assert!(boot["seconds_to_init"][0].as_f64().unwrap() > 0.0, "{report:#}");
    let beyond = &boot["beyond_guest"][0];
    assert!(beyond["guest_rss_kib"].as_u64().unwrap() > 10 << 10, "a kernel takes more: {report:#}");
    assert!(beyond["peak_rss_kib"].as_u64().unwrap() < 16 << 10, "{report:#}");
}
