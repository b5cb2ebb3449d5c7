//! `--stats` of a real run against what strace has seen.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::disk::MODES;
use crate::machine::*;

/// Calls on the image in strace's log: (fdatasync, write, read).
fn count(log: &Path, image: &Path) -> (usize, usize, usize) {
    let text = fs::read_to_string(log).unwrap();
    let image = image.to_str().unwrap();
    let on_image = |name: &str| {
        let name = format!(" {name}(");
        text.lines().filter(|line| line.contains(&name) && line.contains(image)).count()
    };
    (on_image("fdatasync"), on_image("pwritev") + on_image("pwritev2"), on_image("preadv"))
}

#[test]
fn the_json_counts_what_strace_counts_in_every_mode() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace is not installed, host calls are not counted");
        return;
    }
    for mode in MODES {
        for words in ["", "noflush nowce", "wb=0", "wb=1"] {
            let what = format!("cache={} {words}", mode.name);
            let image = Image::new();
            let (log, json) = (image.path.with_extension("strace"), image.path.with_extension("json"));
            let mut strace = Command::new("strace");
            strace
                .args(["-f", "-y", "-s", "4", "-e", "trace=fdatasync,pwritev,pwritev2,preadv"])
                .arg("-o")
                .arg(&log);
            strace.arg(binary());
            start(&mut strace, Entry::Elf, &format!("scenario=io {words}"));
            strace.args(["--console", "stdio", "--timeout", "60"]);
            strace.arg(format!("--stats={}", json.display()));
            strace.arg("--disk").arg(image.disk(&format!("cache={},engine=sync", mode.name)));
            run(&mut strace, b"").expect(exit(0x20), &what);

            let found: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
            let disk = &found["disks"][0];
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let calls = &disk["host_calls"];
            let writes = number(&calls["pwritev"]) + number(&calls["pwritev_dsync"]);
            let counted = (number(&calls["fdatasync"]), writes, number(&calls["preadv"]));
            // In a direct mode the alignment may have been probed by reading.
            let (syncs, writes, reads) = count(&log, &image.path);
            assert_eq!((counted.0, counted.1), (syncs, writes), "{what}: {found:#}");
            assert!(counted.2 <= reads, "{what}: {found:#}");
            assert_eq!((&disk["name"], &disk["cache"]), (&"vda".into(), &mode.name.into()));

            // The one write is 4096 bytes; a guest with the cache on has flushed it.
            let stable = match words {
                "noflush nowce" | "wb=0" => true,
                "wb=1" => false,
                _ => !mode.write_cache,
            };
            let durability = &disk["durability"];
            let volatile = if stable && mode.honours_flush { 0 } else { BLOCK_BYTES };
            assert_eq!(number(&durability["volatile_bytes_acknowledged"]), volatile, "{what}: {found:#}");
            assert_eq!(number(&durability["bytes_at_risk_max"]), volatile, "{what}");
            let left = if mode.honours_flush { 0 } else { volatile };
            assert_eq!(number(&durability["bytes_at_risk"]), left, "{what}");
            assert_eq!(durability["oldest_at_risk_ns"].is_u64(), left > 0, "{what}");
            let timed = durability["fdatasync_ns"]["count"].as_u64().map_or(0, |count| count + 1);
            assert_eq!(timed, u64::try_from(syncs).unwrap(), "{what}: all but the first are timed");
        }
    }
}

#[test]
fn the_text_says_what_is_at_risk_however_the_machine_ends() {
    if !kvm() {
        return;
    }
    for (mode, word) in [("none", "0 bytes now, 4 KiB at most"), ("unsafe", "this only grows")] {
        let image = Image::new();
        let disk = image.disk(&format!("cache={mode}"));
        let ran = run_plain(Entry::Pvh, "scenario=io", &["--stats", "--disk", &disk]);
        let ran = ran.expect(exit(0x20), mode);
        assert!(ran.log.contains("vda: ") && ran.log.contains(word), "{}", ran.log);
        let ran = run_plain(Entry::Pvh, "scenario=triple", &["--stats", "--disk", &disk]);
        let ran = ran.expect(FAILURE, mode);
        assert!(ran.log.contains("0 bytes now, 0 bytes at most"), "{}", ran.log);
    }
    let ran = run_plain(Entry::Pvh, "scenario=exit=7", &["--stats"]).expect(exit(7), "without a disk");
    assert!(ran.log.contains("no disks"), "{}", ran.log);
}

#[test]
fn statistics_that_cannot_be_written_are_refused_before_the_guest_runs() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let disk = image.disk("cache=none");
    for (path, reason) in
        [(image.path.to_str().unwrap(), "a disk image of this VM"), ("/no/such/file", "No such file")]
    {
        let stats = format!("--stats={path}");
        let ran = run_plain(Entry::Elf, "scenario=io", &[&stats, "--disk", &disk]).expect(FAILURE, path);
        assert!(ran.log.contains(reason) && ran.console.is_empty(), "{path}: {}", ran.log);
        image.must_hold(&Image::before(), path);
    }
}
