//! `--stats` of a real run against what strace has seen, and told at a signal.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use minivmm_testkit::machine::*;
use serde_json::Value;

use crate::disk::modes;

/// Calls on the image in strace's log: (fdatasync, write, read).
fn count(log: &Path, image: &Path) -> (usize, usize, usize) {
    let text = fs::read_to_string(log).unwrap();
    let image = image.to_str().unwrap();
    let on_image = |name: &str| {
        let name = format!(" {name}(");
        text.lines().filter(|line| line.contains(&name) && line.contains(image)).count()
    };
    (
        on_image("fdatasync"),
        on_image("pwritev") + on_image("pwritev2"),
        on_image("preadv") + on_image("preadv2"),
    )
}

#[test]
fn the_json_counts_what_strace_counts_in_every_mode() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed, host calls are not counted");
        return;
    }
    for mode in modes() {
        for words in ["", "noflush nowce", "wb=0", "wb=1"] {
            let what = format!("cache={} {words}", mode.name);
            let image = Image::new();
            let (log, json) = (image.path.with_extension("strace"), image.path.with_extension("json"));
            let mut strace = Command::new("strace");
            strace
                .args(["-f", "-y", "-s", "4", "-e", "trace=fdatasync,pwritev,pwritev2,preadv,preadv2"])
                .arg("-o")
                .arg(&log);
            strace.arg(binary()).args(visible());
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
            // In a direct mode the alignment may have been probed by reading, in dontcache the flag has been.
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
        [(image.path.to_str().unwrap(), "same file as --disk"), ("/no/such/file", "No such file")]
    {
        let stats = format!("--stats={path}");
        let ran = run_plain(Entry::Elf, "scenario=io", &[&stats, "--disk", &disk]).expect(FAILURE, path);
        assert!(ran.log.contains(reason) && ran.console.is_empty(), "{path}: {}", ran.log);
        image.must_hold(&Image::before(), path);
    }
}

#[test]
fn the_json_counts_the_calls_of_io_uring_that_strace_counts() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed, host calls are not counted");
        return;
    }
    for mode in modes() {
        let what = mode.name;
        let image = Image::new();
        let (log, json) = (image.path.with_extension("strace"), image.path.with_extension("json"));
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", "trace=io_uring_enter", "-o"]).arg(&log).arg(binary());
        start(&mut strace, Entry::Elf, "scenario=io");
        strace.args(["--console", "stdio", "--timeout", "60"]);
        strace.arg(format!("--stats={}", json.display()));
        strace.arg("--disk").arg(image.disk(&format!("cache={what}")));
        run(&mut strace, b"").expect(exit(0x20), what);
        let found: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
        if found["disks"][0]["engine"] == "sync" {
            skip("io_uring", "no io_uring here");
            return;
        }
        // A call that lasts is in two lines, of which the second does not have the parenthesis.
        let calls = fs::read_to_string(&log).unwrap().matches(" io_uring_enter(").count();
        assert_eq!(found["disks"][0]["host_calls"]["io_uring_enter"], calls, "{what}");
    }
}

/// A guest that prints what is typed, and what has been heard of it.
pub struct Echo {
    child: Child,
    console: BufReader<ChildStdout>,
    told: BufReader<ChildStderr>,
    _watchdog: Watchdog,
}

impl Echo {
    pub fn start(more: &[&str]) -> Self {
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=echo").args(["--console", "stdio", "--timeout", "60"]);
        let io = Stdio::piped;
        let mut child = command.args(more).stdin(io()).stdout(io()).stderr(io()).spawn().unwrap();
        let watchdog = Watchdog::over(&child);
        let mut console = BufReader::new(child.stdout.take().unwrap());
        let told = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("until q") {
            line.clear();
            assert_ne!(console.read_line(&mut line).unwrap(), 0, "the guest has not come so far");
        }
        Self { child, console, told, _watchdog: watchdog }
    }

    pub fn signal(&self) {
        kill(i32::try_from(self.child.id()).unwrap(), libc::SIGUSR1);
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The guest is there as before.
    pub fn answers(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let mut echoed = [0];
        self.console.read_exact(&mut echoed).unwrap();
        assert_eq!(echoed, *b"x");
    }

    /// The next line on standard error with `word` in it.
    pub fn hears(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.told.read_line(&mut line).unwrap(), 0, "{word} was not said");
            if line.contains(word) {
                return line;
            }
        }
    }

    pub fn end(self) -> String {
        self.end_with(exit(0x21))
    }

    /// What else it says on standard error until it has ended so.
    pub fn end_with(mut self, status: i32) -> String {
        self.child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
        let mut rest = String::new();
        self.told.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(status), "{rest}");
        rest
    }
}

#[test]
fn sigusr1_renews_the_json_under_a_lock_and_the_guest_goes_on() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let path = image.path.with_extension("json");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let disk = image.disk("cache=writeback,queues=2");
    let mut guest = Echo::start(&[&format!("--stats={}", path.display()), "--disk", &disk]);
    let inode = fs::metadata(&path).unwrap().ino();
    let mut before = Vec::new();
    assert_eq!(fs::read(&path).unwrap(), b"", "the file begins empty");
    let mut exits = 0;
    for _ in 0..3 {
        guest.signal();
        let found: Value = loop {
            let mut file = fs::File::open(&path).unwrap();
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
            let mut now = Vec::new();
            file.read_to_end(&mut now).unwrap();
            // Under a reader's lock it is the old one or the new one, whole.
            if now != before {
                before = now;
                break serde_json::from_slice(&before).unwrap();
            }
            drop(file);
            std::thread::yield_now();
        };
        assert_eq!(found["disks"][0]["per_queue"].as_array().unwrap().len(), 2, "{found:#}");
        assert!(found["disks"][0]["latency_ns"].is_object(), "{found:#}");
        let now = found["exits"]["port_write"].as_u64().unwrap();
        assert!(now > exits, "{now} after {exits}");
        exits = now;
        guest.answers();
    }
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o777, found.ino()), (0o640, inode), "the same file");
    assert_eq!(guest.end(), "", "nothing else is said");
    let last: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(last["exits"]["port_write"].as_u64().unwrap() > exits, "the end is told too");
    let others = fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(others, 2, "the image and the statistics, and no file of passage");
}

#[test]
fn a_reader_that_keeps_its_lock_on_the_statistics_keeps_nobody_from_them() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let path = image.path.with_extension("json");
    let mut guest =
        Echo::start(&[&format!("--stats={}", path.display()), "--disk", &image.disk("cache=none")]);
    let reader = fs::File::open(&path).unwrap();
    rustix::fs::flock(&reader, rustix::fs::FlockOperation::LockShared).unwrap();
    guest.signal();
    while fs::metadata(&path).unwrap().len() == 0 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    guest.answers();
    assert_eq!(guest.end(), "", "nothing is said of it");
    let _: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
}

#[test]
fn sigusr1_tells_the_statistics_on_standard_error_with_and_without_the_option() {
    if !kvm() {
        return;
    }
    for options in [&["--stats"][..], &[]] {
        let image = Image::new();
        let disk = image.disk("cache=none");
        let mut guest = Echo::start(&[&["--disk", &disk], options].concat());
        guest.signal();
        guest.answers();
        // The signal was there before the first byte was, so it has been seen to.
        let log = guest.end();
        let told = log.matches("bytes at risk").count();
        assert_eq!(told, 1 + options.len(), "{options:?}: {log}");
    }
}

#[test]
fn statistics_at_a_symbolic_link_or_a_pipe_go_where_it_leads() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let directory = scratch();
    let (target, link) = (directory.path().join("target"), directory.path().join("link"));
    fs::write(&target, "longer than nothing").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let disk = image.disk("cache=none");
    let stats = format!("--stats={}", link.display());
    run_plain(Entry::Elf, "scenario=io", &[&stats, "--disk", &disk]).expect(exit(0x20), "a link");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let found: Value = serde_json::from_slice(&fs::read(&target).unwrap()).unwrap();
    assert_eq!(found["disks"][0]["requests"]["write"], 1);
    let ran = run_plain(Entry::Elf, "scenario=io", &["--stats=/dev/stderr", "--disk", &disk]);
    let log = ran.expect(exit(0x20), "a pipe").log;
    let found: Value = serde_json::from_str(&log).unwrap();
    assert_eq!(found["disks"][0]["requests"]["write"], 1);
}
