//! minivmm audited through the kernel's tracepoints, which see into io_uring, by the rules that strace's
//! calls are judged by.
//!
//! Owns the way from what the eye has seen to what was done to the image; docs/auditor.md tells what
//! is read where.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use minivmm_testkit::eye::{Eye, Operation};
use minivmm_testkit::loops::{LoopDevice, Mounted};
use minivmm_testkit::machine::*;

use super::NEGOTIATIONS;
use super::host::{Host, Output, Sync, Write};
use super::minivmm::{modes, must_find_everything};
use super::rules::{Audit, Finding};

/// The files that the eye is shown, in this order.
const IMAGE: usize = 0;
const CONSOLE: usize = 1;

const RWF_SYNCS: u64 = (libc::RWF_DSYNC | libc::RWF_SYNC) as u64;
/// It says nothing of stability.
const RWF_DONTCACHE: u64 = 0x80;
const O_SYNCS: u64 = (libc::O_DSYNC | libc::O_SYNC) as u64;
const ERASES: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) as u64;
const SHARED_FOR_WRITING: u64 = libc::PROT_WRITE as u64 | (libc::MAP_SHARED as u64) << 32;

/// What was done to the image and said on the console.
pub fn host(operations: &[Operation]) -> Result<Host, String> {
    let mut host = Host::default();
    for operation in operations {
        let (entry, exit) = (operation.entry, operation.exit.unwrap_or(usize::MAX));
        let time = format!("event {entry}");
        let moved = u64::try_from(operation.result).unwrap_or(0);
        match operation.file {
            Some(CONSOLE) if ["write", "writev"].contains(&operation.name) => {
                let moved = usize::try_from(moved).unwrap_or(usize::MAX);
                let in_pieces = operation.name == "writev" && operation.length != 1;
                let kept = operation.bytes.get(..moved).filter(|_| !in_pieces);
                let bytes =
                    kept.ok_or_else(|| format!("{time}: more on the console at once than is kept"))?;
                host.console.push(Output { bytes: bytes.to_vec(), entry, exit, time });
            }
            _ if hides(operation) => *host.hidden.entry(operation.name.into()).or_default() += 1,
            Some(IMAGE) if operation.exit.is_some() => act(&mut host, operation, time),
            _ => {}
        }
    }
    Ok(host)
}

/// Something that was done to the image, and has ended.
fn act(host: &mut Host, operation: &Operation, time: String) {
    let (entry, exit) = (operation.entry, operation.exit.unwrap_or(usize::MAX));
    let (start, is_ok) = (operation.offset, operation.result >= 0);
    let mut was_sync = false;
    match operation.name {
        name if name.contains("WRITE") || name.contains("pwrite") => {
            let bytes = start..start.saturating_add(u64::try_from(operation.result).unwrap_or(0));
            let dsync = operation.flags & RWF_SYNCS != 0 || operation.file_flags & O_SYNCS != 0;
            host.writes.push(Write { bytes, entry, exit, dsync: dsync && is_ok });
            was_sync = dsync && !is_ok;
        }
        "fallocate" | "IORING_OP_FALLOCATE" if operation.flags & ERASES != 0 && is_ok => {
            let bytes = start..start.saturating_add(operation.length);
            host.writes.push(Write { bytes, entry, exit, dsync: false });
        }
        "fsync" | "fdatasync" | "IORING_OP_FSYNC" if is_ok => {
            host.syncs.push(Sync { entry, exit, error: None, time });
            return;
        }
        "fsync" | "fdatasync" | "IORING_OP_FSYNC" => was_sync = true,
        _ => {}
    }
    // Those whose data may be gone; of a stable write nobody can tell which has failed.
    let lost = [libc::EIO, libc::ENOSPC, libc::EDQUOT].into_iter().find(|&e| operation.has_failed_with(e));
    if let (true, Some(errno)) = (was_sync, lost) {
        let error = Some(std::io::Error::from_raw_os_error(errno).to_string());
        host.syncs.push(Sync { entry, exit, error, time });
    }
}

/// Reaches the image, perhaps, in a way that the rules cannot place.
fn hides(operation: &Operation) -> bool {
    let on_image = operation.file == Some(IMAGE);
    match operation.name {
        "io_submit" | "sync" | "syncfs" | "msync" => true,
        "mmap" => on_image && operation.flags & SHARED_FOR_WRITING == SHARED_FOR_WRITING,
        "write" | "writev" | "sendfile" | "copy_file_range" | "splice" | "ioctl(BLKZEROOUT)" => on_image,
        "another entry" | "IORING_OP_SPLICE" => on_image,
        // Of a part of the file only.
        "IORING_OP_FSYNC" => on_image && (operation.waits || operation.length != 0),
        name if name.contains("WRITE") || name == "pwritev2" => {
            on_image && (operation.waits || operation.offset == u64::MAX)
        }
        _ => false,
    }
}

/// An eye, or why there is none.
pub fn eye() -> Option<Eye> {
    Eye::open().map_err(|reason| skip("bpf", &format!("{reason}; io_uring is not audited"))).ok()
}

/// Runs a VMM whose console goes to this file, and audits its image.
pub fn audit(
    mut eye: Eye,
    image: &Path,
    console: &Path,
    command: &mut Command,
    status: i32,
) -> (Audit, Seen) {
    let what = format!("{command:?}");
    std::fs::write(console, "").unwrap();
    eye.shows(image);
    eye.shows(console);
    eye.watches(command);
    run(command, b"").expect(status, &what);
    let seen = eye.operations().unwrap_or_else(|error| panic!("{what}: {error}"));
    let audit = host(&seen).and_then(Audit::of_host);
    (audit.unwrap_or_else(|error| panic!("{what}: {error}")), counts(&seen))
}

/// How often the image was written to or synced, in which way.
pub type Seen = BTreeMap<&'static str, usize>;

fn counts(operations: &[Operation]) -> Seen {
    let mut counts = Seen::new();
    for operation in operations.iter().filter(|operation| operation.file == Some(IMAGE)) {
        let name = match (operation.name, operation.flags & !RWF_DONTCACHE) {
            ("IORING_OP_WRITE" | "IORING_OP_WRITE_FIXED", 0) => "ring write",
            ("IORING_OP_WRITE" | "IORING_OP_WRITE_FIXED", 2) => "ring write, DSYNC",
            ("IORING_OP_FSYNC", 1) => "ring fdatasync",
            ("pwritev2", 8) if operation.result > 0 => "pwritev2(NOWAIT)",
            ("pwritev2", 8) => "pwritev2(NOWAIT), refused",
            ("fdatasync", _) => "fdatasync",
            ("pwritev" | "pwritev2", 0) => "pwritev",
            ("pwritev2", 2) => "pwritev2(DSYNC)",
            (name, _) if name.to_lowercase().contains("read") => continue,
            _ => "others",
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// minivmm with this disk, which lies at `image`.
fn audit_minivmm(eye: Eye, image: &Path, keys: &str, words: &str, status: i32) -> (Audit, Seen) {
    let scratch = scratch();
    let console = scratch.path().join("console");
    let mut command = minivmm();
    start(&mut command, Entry::Pvh, &format!("scenario=audit {words}"));
    command.arg("--console").arg(format!("file={}", console.display())).args(["--timeout", "60", "--disk"]);
    command.arg(format!("{},{keys}", image.display()));
    audit(eye, image, &console, &mut command, status)
}

const WAYS: [&str; 4] = ["dsync", "fdatasync", "group", "auto"];

/// What was judged was done in the way that was asked for, by the ring or, where it was alone, by the worker: otherwise
/// nothing is proven. `flushes`: how many fdatasyncs are nobody's write's.
fn must_be_done_as_asked(seen: &Seen, by: &str, stable: bool, flushes: usize, what: &str) {
    let times = |names: &[&str]| names.iter().filter_map(|&name| seen.get(name)).sum::<usize>();
    let plain = times(&["ring write", "pwritev", "pwritev2(NOWAIT)"]);
    let dsync = times(&["ring write, DSYNC", "pwritev2(DSYNC)"]);
    assert_eq!(plain + dsync, 8, "{what}");
    assert_eq!(times(&["others"]), 0, "{what}");
    let syncs = times(&["ring fdatasync", "fdatasync"]);
    if syncs == 0 {
        assert_eq!(dsync, 0, "unsafe: {what}");
        return;
    }
    let start_and_end = 2;
    assert!(times(&["fdatasync"]) >= start_and_end, "{what}");
    let syncs = syncs - start_and_end;
    match by {
        _ if !stable => assert_eq!((dsync, syncs), (0, flushes), "{what}"),
        "dsync" => assert_eq!((dsync, syncs), (8, flushes), "{what}"),
        "fdatasync" => assert_eq!((dsync, syncs), (0, 8 + flushes), "{what}"),
        // Two in flight may share one.
        "group" => assert!(dsync == 0 && syncs <= 8 + flushes && syncs >= 6, "{what}"),
        _ => assert!(dsync > 0 && syncs <= 8 - dsync + flushes, "{what}"),
    }
}

#[test]
fn through_the_ring_every_mode_keeps_what_it_acknowledges_and_unsafe_does_not() {
    every_way_keeps_what_it_acknowledges("io_uring");
}

/// strace has looked at one way to stable writes; the eye looks at all.
#[test]
fn without_the_ring_every_way_to_stable_writes_keeps_what_it_acknowledges() {
    every_way_keeps_what_it_acknowledges("sync");
}

fn every_way_keeps_what_it_acknowledges(engine: &str) {
    if !kvm() {
        return;
    }
    let mut syncs = (0, 0);
    for (mode, write_cache, honours_flush) in modes() {
        // Registered memory has entries of its own.
        let fixed = (engine == "io_uring").then_some("auto,buffers=fixed");
        for by in WAYS.into_iter().chain(fixed) {
            for (words, stable_with_cache) in NEGOTIATIONS {
                let Some(eye) = eye() else { return };
                let keys = format!("cache={mode},engine={engine},stable={by}");
                let image = Image::new();
                let (audit, seen) = audit_minivmm(eye, &image.path, &keys, words, exit(0x2a));
                println!("{keys} {words:14} {seen:?}");
                let times = |name: &str| seen.get(name).copied().unwrap_or(0);
                syncs.0 += times("ring fdatasync") + times("ring write, DSYNC");
                syncs.1 += times("fdatasync").saturating_sub(2) + times("pwritev2(DSYNC)");
                let what = format!("{keys} {words}: {audit}{seen:?}");
                let flushes = !words.contains("noflush");
                let stable = stable_with_cache || !write_cache;
                assert_eq!(audit.writes, 8, "{what}");
                assert_eq!(audit.flushes, if flushes { 6 } else { 0 }, "{what}");
                assert_eq!(audit.stable_writes, if stable { 8 } else { 0 }, "{what}");
                assert_eq!(audit.hidden, Vec::<String>::new(), "{what}");
                if engine == "io_uring" {
                    let flushes = audit.flushes + usize::from(words == "wb=0" && write_cache);
                    must_be_done_as_asked(&seen, by, stable && honours_flush, flushes, &what);
                }
                if honours_flush {
                    assert_eq!(audit.findings, [], "{what}");
                } else {
                    must_find_everything(&audit, flushes, stable, &what);
                }
            }
        }
    }
    let (by_ring, by_worker) = syncs;
    assert!(
        by_worker > 0 && (by_ring > 0) == (engine == "io_uring"),
        "{by_ring} by the ring, {by_worker} not"
    );
}

#[test]
fn a_sync_that_fails_in_the_ring_is_told_and_no_later_one_is_trusted() {
    if !kvm() {
        return;
    }
    let buffered = WAYS.map(|by| [("writeback", by, "", (8, 1)), ("writeback", by, "wb=0", (2, 1))]);
    // Here the write fails by itself: where it is no sync, nothing is lost that was acknowledged.
    let direct = [("directsync", "dsync", "", (2, 1)), ("directsync", "fdatasync", "", (3, 6))];
    for (mode, by, words, acknowledged) in buffered.into_iter().flatten().chain(direct) {
        let Some(eye) = eye() else { return };
        // Room for the first two blocks; the third, before the second FLUSH, finds none.
        let Some(small) = Mounted::tmpfs(2 * 4096) else { return };
        let file = small.dir.path().join("disk.img");
        std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let Some(device) = LoopDevice::new(&file, 512) else { return };
        let keys = format!("cache={mode},engine=io_uring,stable={by}");
        let status = if acknowledged.1 == 6 { exit(0x2a) } else { FAILURE };
        let (audit, seen) = audit_minivmm(eye, &device.0, &keys, words, status);
        println!("no room; {keys} {words:14} {seen:?}");
        let what = format!("{keys} {words}: {audit}{seen:?}");
        assert_eq!((audit.writes, audit.flushes), acknowledged, "{what}");
        assert_eq!(audit.findings, [], "{what}");
    }
}

/// What a VMM did in the ring, for two requests that the guest has said: a write and then a FLUSH. A name,
/// its beginning and end, flags, and the result.
fn judged(negotiated: &str, entries: &[(&'static str, usize, usize, u64, i64)]) -> Vec<Finding> {
    let operation = |name, file, entry, exit, result| {
        let length = 4096;
        Operation { file: Some(file), exit: Some(exit), result, length, ..Operation::new(name, entry) }
    };
    let says = |at, text: &str| {
        let bytes = format!("{text}\n").into_bytes();
        let length = bytes.len() as u64;
        Operation { bytes, length, ..operation("write", CONSOLE, at, at + 1, i64::try_from(length).unwrap()) }
    };
    let mut all = vec![
        says(0, negotiated),
        says(2, "@S 1 W 8 8"),
        says(20, "@A 1 0"),
        says(22, "@S 2 F"),
        says(40, "@A 2 0"),
    ];
    for &(name, entry, exit, flags, result) in entries {
        let is_sync = name == "IORING_OP_FSYNC";
        let (offset, length) = if is_sync { (0, 0) } else { (4096, 4096) };
        all.push(Operation { offset, length, flags, ..operation(name, IMAGE, entry, exit, result) });
    }
    all.sort_by_key(|operation| operation.entry);
    Audit::of_host(host(&all).unwrap()).unwrap().findings
}

#[test]
fn entries_of_a_ring_are_judged_by_their_beginnings_and_ends() {
    let (write, sync) = ("IORING_OP_WRITE", "IORING_OP_FSYNC");
    let (back, through) = ("@N 1 1 1", "@N 1 1 0");
    let broken = |negotiated, entries: &[_]| {
        judged(negotiated, entries).into_iter().filter(Finding::is_broken_promise).count()
    };
    for (what, negotiated, entries, count) in [
        ("kept", back, vec![(write, 5, 6, 0, 4096), (sync, 25, 26, 1, 0)], 0),
        ("DSYNC", through, vec![(write, 5, 6, 2, 4096), (sync, 25, 26, 1, 0)], 0),
        ("a group", through, vec![(write, 5, 6, 0, 4096), (sync, 7, 8, 1, 0), (sync, 25, 26, 1, 0)], 0),
        ("no sync", back, vec![(write, 5, 6, 0, 4096)], 1),
        (
            "a sync that begins before the write has ended",
            back,
            vec![(write, 5, 8, 0, 4096), (sync, 7, 9, 1, 0)],
            1,
        ),
        (
            "the same, stable",
            through,
            vec![(write, 5, 8, 0, 4096), (sync, 7, 9, 1, 0), (sync, 25, 26, 1, 0)],
            1,
        ),
        ("a sync that ends late", back, vec![(write, 5, 6, 0, 4096), (sync, 25, 45, 1, 0)], 1),
        (
            "a plain write where it must be stable",
            through,
            vec![(write, 5, 6, 0, 4096), (sync, 25, 26, 1, 0)],
            1,
        ),
        ("short", back, vec![(write, 5, 6, 0, 512), (sync, 25, 26, 1, 0)], 1),
        (
            "failed, then said OK",
            back,
            vec![(write, 5, 6, 0, 4096), (sync, 7, 8, 1, -5), (sync, 25, 26, 1, 0)],
            1,
        ),
    ] {
        assert_eq!(broken(negotiated, &entries), count, "{what}: {:?}", judged(negotiated, &entries));
    }
}
