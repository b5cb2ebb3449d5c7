//! `minivmm crash`: that the states it makes are the legal ones, all of them where they are few, and no
//! other; that it finds a program that forgets a flush; and that no check can spoil the next one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use minivmm::disk::writelog::format::{DISCARD, FLUSH, FUA, Header, MARK, Superblock};
use minivmm_lab::crash::log::WriteLog;
use minivmm_lab::crash::plan::{Breadth, Lose, Plan};
use minivmm_lab::crash::scratch::{Base, Stage};
use minivmm_testkit::tools;
use serde_json::Value;
use tempfile::TempDir;

const GOOD: i32 = 0;
const NOT_GOOD: i32 = 1;
const USAGE: i32 = 2;
const FAILURE: i32 = 125;

/// An entry of a hand-made log.
#[derive(Debug, Clone)]
enum Made {
    /// To that sector, so many sectors full of that byte.
    Write(u64, u64, u8),
    /// The same, stable when it ended.
    Stable(u64, u64, u8),
    /// The same with a flush before it, as the kernel logs a commit.
    FlushAndWrite(u64, u64, u8),
    Discard(u64, u64),
    Flush,
    Mark(&'static str),
}
use Made::*;

/// A log and its base in a directory of their own.
struct Case {
    dir: TempDir,
    sectors: u64,
}

impl Case {
    /// Over a disk of so many sectors full of the byte 255.
    fn new(entries: &[Made], sectors: u64) -> Self {
        let dir = minivmm_testkit::images::test_dir();
        fs::write(dir.path().join("base.img"), vec![255; sectors as usize * 512]).unwrap();
        fs::write(dir.path().join("x.log"), log(entries)).unwrap();
        Self { dir, sectors }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `minivmm crash` over it.
    fn crash(&self, args: &[&str]) -> Output {
        self.minivmm(&[&["crash", "x.log", "--base", "base.img"], args].concat())
    }

    fn minivmm(&self, args: &[&str]) -> Output {
        let mut command = Command::new(tools::minivmm());
        command.current_dir(self.dir.path()).args(args).output().unwrap()
    }

    /// The report as JSON, and the exit status.
    fn report(&self, args: &[&str]) -> (Value, i32) {
        let output = self.crash(&[args, &["--json"]].concat());
        let status = output.status.code().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let parsed = serde_json::from_str(&text);
        (parsed.unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))), status)
    }

    /// The disks that are made at that point, a byte a sector; none of them twice.
    fn made_at(&self, point: usize, states: usize, torn: bool) -> Vec<Vec<u8>> {
        let log = WriteLog::open(&self.path("x.log")).unwrap();
        let base = Base::open(&self.path("base.img"), &log).unwrap();
        let breadth = Breadth { states, seed: 7, torn, lose: Lose::Any };
        let mut stage = Stage::new(&log, &base, &self.path("stage")).unwrap();
        let image = self.path("state");
        let make = |task: minivmm_lab::crash::plan::Task| {
            stage.advance(task.settled).unwrap();
            stage.make(&task.extents, &image).unwrap();
            let content = fs::read(&image).unwrap();
            assert_eq!(content.len() as u64, self.sectors * 512);
            let sectors: Vec<&[u8]> = content.chunks(512).collect();
            assert!(sectors.iter().all(|sector| sector.iter().all(|byte| byte == &sector[0])), "torn sector");
            sectors.iter().map(|sector| sector[0]).collect()
        };
        Plan::new(&log, vec![point], breadth).map(make).collect()
    }
}

/// The bytes of a log.
fn log(entries: &[Made]) -> Vec<u8> {
    let mut bytes = Superblock { entries: entries.len() as u64, sector_bytes: 512 }.encode().to_vec();
    bytes.resize(512, 0);
    for entry in entries {
        let (flags, sector, sectors, data, text) = match *entry {
            Write(sector, sectors, byte) => (0, sector, sectors, Some(byte), ""),
            Stable(sector, sectors, byte) => (FUA, sector, sectors, Some(byte), ""),
            FlushAndWrite(sector, sectors, byte) => (FLUSH | FUA, sector, sectors, Some(byte), ""),
            Discard(sector, sectors) => (DISCARD, sector, sectors, None, ""),
            Flush => (FLUSH, 0, 0, None, ""),
            Mark(text) => (MARK, 0, 0, None, text),
        };
        let mut head = Header { sector, sectors, flags, text_bytes: text.len() as u64 }.encode().to_vec();
        head.extend(text.as_bytes());
        head.resize(512, 0);
        bytes.extend(head);
        bytes.extend(data.map(|byte| vec![byte; sectors as usize * 512]).unwrap_or_default());
    }
    bytes
}

/// What a legal disk is, said in another way than the program says it: sector by sector, by lists.
/// A byte a sector, the first `point` entries had ended.
fn legal(entries: &[Made], point: usize, sectors: u64, torn: bool) -> BTreeSet<Vec<u8>> {
    let change = |entry: &Made| match *entry {
        Write(sector, sectors, byte)
        | Stable(sector, sectors, byte)
        | FlushAndWrite(sector, sectors, byte) => Some((sector, sectors, byte)),
        Discard(sector, sectors) => Some((sector, sectors, 0)),
        Flush | Mark(_) => None,
    };
    let is_flush = |entry: &Made| matches!(entry, Flush | FlushAndWrite(..));
    let is_stable = |entry: &Made| matches!(entry, Stable(..) | FlushAndWrite(..));
    let mut disks = BTreeSet::from([vec![255; sectors as usize]]);
    for number in 0..point {
        let Some((sector, sectors, byte)) = change(&entries[number]) else { continue };
        let certain = is_stable(&entries[number]) || entries[number + 1..point].iter().any(is_flush);
        let mut next = BTreeSet::new();
        // A subset of its sectors: all, or also none, or any.
        for subset in 0..1u32 << sectors {
            let whole = subset + 1 == 1 << sectors;
            if !(whole || !certain && (subset == 0 || torn)) {
                continue;
            }
            for disk in &disks {
                let mut disk: Vec<u8> = disk.clone();
                let there = (0..sectors).filter(|at| subset >> at & 1 == 1);
                there.for_each(|at| disk[(sector + at) as usize] = byte);
                next.insert(disk);
            }
        }
        disks = next;
    }
    disks
}

/// Entries that look like chance.
fn generated(seed: u32, count: usize, sectors: u64) -> Vec<Made> {
    let mut state = seed;
    let mut dice = |limit: u64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        u64::from(state >> 12) % limit
    };
    let entry = |number: usize| {
        let (length, byte) = (1 + dice(3), number as u8 + 1);
        let sector = dice(sectors - length + 1);
        match dice(12) {
            0 | 1 => Flush,
            2 => Stable(sector, length, byte),
            3 => FlushAndWrite(sector, length, byte),
            4 => Discard(sector, length),
            5 => Mark("m"),
            _ => Write(sector, length, byte),
        }
    };
    (0..count).map(entry).collect()
}

#[test]
fn where_few_all_legal_disks_are_made_and_no_other() {
    for torn in [false, true] {
        for seed in 0..12 {
            let entries = generated(seed, 10, 8);
            let case = Case::new(&entries, 8);
            for point in 0..=entries.len() {
                let expected = legal(&entries, point, 8, torn);
                let made = case.made_at(point, 1 << 13, torn);
                let distinct: BTreeSet<Vec<u8>> = made.iter().cloned().collect();
                // More than 2^13 names are not looked at one by one.
                if !torn || distinct.len() == expected.len() {
                    assert_eq!(distinct, expected, "torn {torn}, seed {seed}, point {point}: {entries:?}");
                } else {
                    assert!(expected.len() > 1 << 8 && distinct.is_subset(&expected), "{point}: {entries:?}");
                }
            }
        }
    }
}

#[test]
fn where_many_those_made_are_legal_and_the_extremes_are_among_them() {
    for torn in [false, true] {
        let entries: Vec<Made> = (0..12).map(|at| Write(at % 7, 2, at as u8 + 1)).collect();
        let case = Case::new(&entries, 8);
        let expected = legal(&entries, 12, 8, torn);
        let made = case.made_at(12, 100, torn);
        assert_eq!(made.len(), 100);
        assert!(made.iter().all(|disk| expected.contains(disk)), "{torn}");
        assert_eq!(made[0], [255; 8], "none");
        assert_eq!(made[1], [8, 9, 10, 11, 12, 12, 7, 7], "all");
        assert!(torn == made.iter().any(|disk| !legal(&entries, 12, 8, false).contains(disk)));
        assert_eq!(made, case.made_at(12, 100, torn), "the same seed");
    }
}

#[test]
fn the_flush_points_leave_all_that_any_point_can_leave() {
    for seed in 100..110 {
        let entries = generated(seed, 14, 8);
        // Before anything changes there is only the base.
        let first = 1 + entries.iter().position(|entry| !matches!(entry, Flush | Mark(_))).unwrap();
        let points = first..=entries.len();
        let everywhere: BTreeSet<_> = points.flat_map(|at| legal(&entries, at, 8, false)).collect();
        let case = Case::new(&entries, 8);
        let report = case.report(&["--check", "cat {} >> all; : ", "--jobs", "1", "--states", "16384"]);
        assert_eq!(report.1, GOOD);
        let all = fs::read(case.path("all")).unwrap();
        let checked: Vec<Vec<u8>> =
            all.chunks(8 * 512).map(|disk| disk.chunks(512).map(|sector| sector[0]).collect()).collect();
        assert_eq!(report.0["states"], checked.len());
        let checked: BTreeSet<Vec<u8>> = checked.into_iter().collect();
        let missed: Vec<_> = everywhere.difference(&checked).collect();
        assert!(missed.is_empty(), "seed {seed}: {missed:?} of {entries:?}");
    }
}

/// A program that keeps a value in one of two places, and in sector 0 the number of the place.
const POINTER: &str = "p=$(od -An -tu1 -N1 {}); v=$(od -An -tu1 -j$((p * 512)) -N1 {}); test $v = 7";

/// First the value, then the pointer; with a flush between them, or not.
fn commit(flush_between: bool) -> Case {
    let mut entries = vec![Write(1, 1, 7), Write(0, 1, 1), Flush, Mark("one"), Write(2, 1, 7)];
    entries.extend(flush_between.then_some(Flush));
    entries.extend([Write(0, 1, 2), Flush, Mark("two")]);
    Case::new(&entries, 4)
}

#[test]
fn a_program_that_forgets_a_flush_is_found_and_its_disk_comes_back() {
    let case = commit(false);
    let (report, status) = case.report(&["--check", POINTER, "--at", "6", "--keep", "kept"]);
    assert_eq!(status, NOT_GOOD);
    assert_eq!((&report["states"], &report["points"]), (&4.into(), &1.into()));
    let failures = report["failures"].as_array().unwrap();
    assert_eq!(failures.len(), 1, "{report:#}");
    let failure = &failures[0];
    assert_eq!((&failure["entry"], &failure["lost"]), (&6.into(), &serde_json::json!([4])));
    assert_eq!(failure["why"], "exit status 1");
    let kept = fs::read(case.path(failure["image"].as_str().unwrap())).unwrap();
    let expected: Vec<u8> = [2, 7, 255, 255].into_iter().flat_map(|byte| [byte; 512]).collect();
    assert!(kept == expected);
    // Its line tries it again, its name makes it again.
    let line = failure["repeat"].as_str().unwrap();
    let bin = tools::minivmm();
    let line = line.replacen("minivmm", &bin.display().to_string(), 1);
    let mut shell = std::process::Command::new("sh");
    let again = shell.current_dir(case.dir.path()).args(["-c", &format!("{line} --json")]).output().unwrap();
    assert_eq!(again.status.code(), Some(NOT_GOOD), "{line}");
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((&again["states"], &again["failures"][0]["state"]), (&1.into(), &failure["state"]));
    let name = format!("6:{}", failure["state"].as_str().unwrap());
    let written = case.crash(&["--repeat", &name, "--write", "again.img"]);
    assert_eq!(written.status.code(), Some(GOOD), "{}", String::from_utf8_lossy(&written.stderr));
    assert!(fs::read(case.path("again.img")).unwrap() == expected);
}

#[test]
fn a_program_with_its_flushes_is_good_from_its_first_commit_on() {
    let case = commit(true);
    for args in
        [&["--at", "5", "--at", "7", "--at", "8"][..], &["--at", "mark=one", "--at", "mark=two", "--torn"]]
    {
        let (report, status) = case.report(&[args, &["--check", POINTER]].concat());
        assert_eq!((status, report["failures"].as_array().unwrap().len()), (GOOD, 0), "{report:#}");
    }
    // Before the first commit there is no pointer.
    assert_eq!(case.report(&["--check", POINTER]).1, NOT_GOOD);
}

#[test]
fn the_worst_and_the_best_of_an_entry_are_written() {
    let case = commit(true);
    let written = |args: &[&str]| {
        let output = case.crash(&[args, &["--write", "out.img"]].concat());
        assert_eq!(output.status.code(), Some(GOOD), "{}", String::from_utf8_lossy(&output.stderr));
        let content = fs::read(case.path("out.img")).unwrap();
        content.chunks(512).map(|sector| sector[0]).collect::<Vec<u8>>()
    };
    assert_eq!(written(&["--at", "2", "--lose", "all"]), [255, 255, 255, 255]);
    assert_eq!(written(&["--at", "2", "--lose", "nothing"]), [1, 7, 255, 255]);
    assert_eq!(written(&["--at", "7", "--lose", "all"]), [1, 7, 7, 255]);
    assert_eq!(written(&["--at", "mark=two"]), [2, 7, 7, 255], "there is only one");
    let output = case.crash(&["--at", "2", "--write", "no.img"]);
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(String::from_utf8_lossy(&output.stderr).contains("up to 4 images"));
    assert!(!case.path("no.img").exists());
    for path in ["base.img", "x.log", "/dev/null", "."] {
        let output = case.crash(&["--at", "2", "--lose", "all", "--write", path]);
        assert_eq!(output.status.code(), Some(FAILURE), "{path}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write --write to"), "{path}");
    }
    fs::write(case.path("notes"), "mine").unwrap();
    let output = case.crash(&["--at", "2", "--lose", "all", "--write", "notes"]);
    assert_eq!(output.status.code(), Some(FAILURE));
    assert!(String::from_utf8_lossy(&output.stderr).contains("an older image of the same size"));
    assert_eq!(fs::read(case.path("notes")).unwrap(), b"mine");
    assert!(fs::read(case.path("base.img")).unwrap() == [255; 4 * 512]);
}

#[test]
fn a_host_crash_leaves_what_had_ended() {
    let case = commit(true);
    let (report, _) = case.report(&["--host-crash", "--check", "cat {} >> all", "--jobs", "1"]);
    assert_eq!(report["states"], 4);
    let all = fs::read(case.path("all")).unwrap();
    let sectors: Vec<u8> = all.chunks(512).map(|sector| sector[0]).collect();
    let expected = [[255, 7, 255, 255], [1, 7, 255, 255], [1, 7, 7, 255], [2, 7, 7, 255]].concat();
    assert_eq!(sectors, expected);
}

#[test]
fn what_a_check_does_to_its_image_no_other_sees() {
    let entries: Vec<Made> = (0..5).map(|at| Write(at, 1, 1)).collect();
    let case = Case::new(&entries, 64);
    let check = "test $(od -An -tu1 -j9000 -N1 {}) = 255 && test $(wc -c < {}) = 32768 \
                 && test $(od -An -tu1 -N1 {}) != 9 || exit 1; exec 3<>{}; printf '\\t' | dd of={} conv=notrunc 2>/dev/null; \
                 case $MINIVMM_CRASH_STATE in *[02468]) rm {};; *[1357]) truncate -s 9000 {};; \
                 *) head -c 32768 /dev/zero > {};; esac; \
                 (sleep 100; head -c 32768 /dev/zero >&3) > /dev/null 2>&1 &";
    let started = Instant::now();
    let (report, status) = case.report(&["--check", check, "--jobs", "2"]);
    assert_eq!((status, &report["states"]), (GOOD, &32.into()), "{report:#}");
    assert!(fs::read(case.path("base.img")).unwrap() == [255; 32768]);
    assert!(started.elapsed() < Duration::from_secs(50), "whoever is left running is not waited for");
}

#[test]
fn a_check_that_takes_too_long_is_ended_with_all_it_has_started() {
    let case = Case::new(&[Write(0, 1, 1), Flush], 4);
    let check = "echo $$ >> pids; sleep 1000 & echo $! >> pids; echo still here; wait; : {}";
    let (report, status) = case.report(&["--check", check, "--check-timeout", "0.3", "--lose", "all"]);
    assert_eq!(status, NOT_GOOD);
    let failure = &report["failures"][0];
    assert_eq!(failure["why"], "it was not done after 0.3 s");
    assert_eq!(failure["output"], "still here\n");
    assert!(failure["repeat"].as_str().unwrap().contains("--check-timeout 0.3 --repeat 1:none"));
    assert!(case.path("x.log.failed/1-none.img").exists());
    assert_eq!(fs::read_to_string(case.path("x.log.failed/1-none.txt")).unwrap(), "still here\n");
    for pid in fs::read_to_string(case.path("pids")).unwrap().lines() {
        // A zombie that nobody has waited for yet has ended too.
        let state = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z"), "{pid} still runs: {state}");
    }
}

#[test]
fn a_signal_ends_it_in_order_with_what_was_found_until_then() {
    let case = Case::new(&(0..6).map(|at| Write(at, 1, 1)).collect::<Vec<_>>(), 8);
    fs::create_dir(case.path("scratch")).unwrap();
    let mut command = std::process::Command::new(tools::minivmm());
    command.current_dir(case.dir.path()).args([
        "crash",
        "x.log",
        "--base",
        "base.img",
        "--scratch",
        "scratch",
    ]);
    // The third check tells that it has begun, and never ends.
    let check = "echo . >> begun; test $(wc -l < begun) -lt 3 && exit 1; exec sleep 1000 #{}";
    command.args(["--jobs", "1", "--json", "--check", check]).stdout(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let begun = || fs::read_to_string(case.path("begun")).is_ok_and(|lines| lines.lines().count() == 3);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !begun() {
        assert!(Instant::now() < deadline, "the third check never began");
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["states"], &report["interrupted"]), (&2.into(), &true.into()));
    assert_eq!(report["failures"].as_array().unwrap().len(), 2);
    assert_eq!(fs::read_dir(case.path("scratch")).unwrap().count(), 0, "nothing is left");
}

#[test]
fn the_check_is_told_where_it_is() {
    let case = commit(true);
    let check = "echo $MINIVMM_CRASH_ENTRY $MINIVMM_CRASH_STATE $MINIVMM_CRASH_MARK >> told; : {}";
    case.report(&["--check", check, "--at", "mark=two", "--at", "5", "--jobs", "1"]);
    assert_eq!(fs::read_to_string(case.path("told")).unwrap(), "5 none one\n5 all one\n8 all one\n");
}

#[test]
fn what_cannot_be_done_is_said_with_what_to_do() {
    let case = commit(true);
    fs::write(case.path("small.img"), [0; 512]).unwrap();
    let run = |args: &[&str]| {
        let output = case.minivmm(&[&["crash", "x.log"], args].concat());
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (args, status, word) in [
        (&["--base", "base.img"][..], USAGE, "--check 'COMMAND {}'"),
        (&["--base", "none.img", "--check", "true {}"], FAILURE, "none.img"),
        (&["--base", "small.img", "--check", "true {}"], FAILURE, "512 bytes"),
        (&["--base", "base.img", "--check", "no-such-program {}"], FAILURE, "not found"),
        (&["--base", "base.img", "--check", "true {}", "--at", "99"], USAGE, "the log has 9"),
        (&["--base", "base.img", "--check", "true {}", "--at", "mark=x"], USAGE, "the log has one, two"),
        (&["--base", "base.img", "--check", "true {}", "--repeat", "2:xff"], USAGE, "no state xff"),
        (&["--base", "base.img", "--check", "true {}", "--scratch", "/nowhere"], FAILURE, "--scratch"),
        (&["--base", "base.img", "--check", "true"], USAGE, "{}"),
        (&["--base", "base.img", "--at", "somewhere"], USAGE, "mark=NAME"),
        (&["--base", "base.img", "--repeat", "2"], USAGE, "ENTRY:STATE"),
        (&["--base", "base.img", "--repeat", "2:y1"], USAGE, "a state is"),
        (&["--base", "base.img", "--states", "0"], USAGE, "from 1"),
        (&["--base", "base.img", "--host-crash", "--torn"], USAGE, "cannot be used with"),
        (&[], USAGE, "--base"),
    ] {
        let (found, told) = run(args);
        assert_eq!(found, status, "{args:?}: {told}");
        assert!(told.contains(word), "{args:?}: {told}");
    }
    let empty = Case::new(&[Flush, Mark("x")], 4);
    assert!(
        String::from_utf8_lossy(&empty.crash(&["--check", "true {}"]).stderr).contains("changes nothing")
    );
}

#[test]
fn the_logs_of_the_kernel_and_of_qemu_give_their_disks() {
    // tests/logs/README.md tells how they were made.
    for (log, at, lose, expected) in [
        (
            "dm-log-writes.log",
            "12",
            "nothing",
            &[(0, b'C'), (6, b'B'), (7, b'B'), (9, b'D'), (20, b'E'), (30, b'F')][..],
        ),
        ("dm-log-writes.log", "12", "all", &[(0, b'C'), (6, b'B'), (7, b'B'), (9, b'D'), (20, b'E')]),
        ("dm-log-writes.log", "mark=half", "all", &[(0, b'A'), (6, b'B'), (7, b'B')]),
        ("dm-log-writes.log", "2", "all", &[]),
        ("blklogwrites.log", "13", "all", &[(0, b'C'), (7, b'B'), (9, b'D'), (30, b'E')]),
        ("blklogwrites.log", "6", "nothing", &[(0, b'C'), (6, b'B'), (7, b'B'), (9, b'D')]),
        ("blklogwrites.log", "6", "all", &[(0, b'A'), (6, b'B'), (7, b'B')]),
    ] {
        let case = Case::new(&[], 128);
        fs::write(case.path("base.img"), [0; 128 * 512]).unwrap();
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/logs").join(log), case.path("x.log"))
            .unwrap();
        let output = case.crash(&["--at", at, "--lose", lose, "--write", "out.img"]);
        assert_eq!(output.status.code(), Some(GOOD), "{}", String::from_utf8_lossy(&output.stderr));
        let mut disk = vec![0; 128 * 512];
        expected.iter().for_each(|&(sector, byte)| disk[sector * 512..][..512].fill(byte));
        assert!(fs::read(case.path("out.img")).unwrap() == disk, "{log} at {at}, {lose} lost");
        // And with checks: every flush point of both has states.
        assert_eq!(case.report(&["--check", "test $(wc -c < {}) = 65536", "--torn"]).1, GOOD);
    }
}

#[test]
fn holes_stay_holes() {
    let case = Case::new(&[Write(0, 8, 1), Discard(8, 2048), Write(4096, 2048, 0), Flush], 16);
    let base = fs::File::options().write(true).open(case.path("base.img")).unwrap();
    base.set_len(1 << 30).unwrap();
    let (report, status) = case.report(&["--check", "test $(stat -c %b {}) -lt 200"]);
    assert_eq!((status, &report["states"]), (GOOD, &8.into()), "{report:#}");
}
