//! The host's system calls behind one write, FLUSH and read, counted with strace.

use std::fs;
use std::process::Command;

use minivmm_testkit::machine::*;

use crate::disk::{Mode, modes};

/// What the host's kernel was asked about the image, in order.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Open { direct: bool, writable: bool },
    Write { dsync: bool },
    Read,
    Sync,
}

/// The line of `strace -f -y` as a call on `image`, if it is one.
fn parse_call(line: &str, image: &str) -> Option<Call> {
    let line = line.split_once(' ').filter(|(pid, _)| pid.parse::<u32>().is_ok())?.1.trim_start();
    let (name, arguments) = line.split_once('(')?;
    if !arguments.contains(image) {
        return None;
    }
    match name {
        "openat" => {
            assert!(!arguments.contains("O_DSYNC") && !arguments.contains("O_SYNC"), "{line}");
            let writable = arguments.contains("O_RDWR");
            Some(Call::Open { direct: arguments.contains("O_DIRECT"), writable })
        }
        "pwrite64" | "pwritev" | "pwritev2" => Some(Call::Write { dsync: arguments.contains("RWF_DSYNC") }),
        "pread64" | "preadv" | "preadv2" => Some(Call::Read),
        "fdatasync" => Some(Call::Sync),
        other => panic!("{other} is no call that the blocking engine makes on an image: {line}"),
    }
}

fn trace_io(mode: Mode, words: &str, image: &Image) -> Vec<Call> {
    let log = image.path.with_extension("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-s", "4", "-e"]);
    strace.arg(
        "trace=openat,fdatasync,fsync,sync_file_range,pwrite64,pwritev,pwritev2,pread64,preadv,preadv2,io_uring_enter",
    );
    strace.arg("-o").arg(&log).arg(binary()).args(visible());
    start(&mut strace, Entry::Elf, &format!("scenario=io {words}"));
    strace.args(["--console", "stdio", "--timeout", "60", "--disk"]);
    strace.arg(image.disk(&format!("cache={},engine=sync", mode.name)));
    run(&mut strace, b"").expect(exit(0x20), &format!("cache={} {words} under strace", mode.name));
    let path = image.path.to_str().unwrap();
    fs::read_to_string(log).unwrap().lines().filter_map(|line| parse_call(line, path)).collect()
}

/// Syncs of one run, cut where the guest's write begins and where its read begins.
#[derive(Debug)]
struct Syncs {
    before_the_write: usize,
    /// RWF_DSYNC counts as one.
    write_and_flush: usize,
    after: usize,
}

fn count_syncs(calls: &[Call]) -> Syncs {
    let syncs = |calls: &[Call]| calls.iter().filter(|call| **call == Call::Sync).count();
    let write = calls.iter().position(|call| matches!(call, Call::Write { .. })).expect("a write");
    let writes = calls.iter().filter(|call| matches!(call, Call::Write { .. })).count();
    assert_eq!(writes, 1, "the guest wrote once: {calls:?}");
    let read = write + calls[write..].iter().position(|call| *call == Call::Read).expect("a read");
    let dsync = usize::from(calls[write] == Call::Write { dsync: true });
    Syncs {
        before_the_write: syncs(&calls[..write]),
        write_and_flush: dsync + syncs(&calls[write..read]),
        after: syncs(&calls[read..]),
    }
}

/// What a driver may choose, and whether its write must then be stable before it completes, by the
/// mode's write cache: (words, stable with the cache on, stable with the cache off, sends FLUSH).
const CHOICES: [(&str, bool, bool, bool); 6] = [
    ("", false, true, true),
    ("nowce", false, true, true),
    ("noflush nowce", true, true, false),
    ("noflush", true, true, false),
    ("wb=0", true, true, true),
    ("wb=1", false, false, true),
];

/// Shows B8 and H1.
#[test]
fn the_host_syncs_as_often_as_mode_and_negotiation_demand() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed, host syncs are not counted");
        return;
    }
    for mode in modes() {
        let mut syncs_at_start = None;
        for (words, stable_when_on, stable_when_off, flushes) in CHOICES {
            let what = format!("cache={} {words}", mode.name);
            let image = Image::new();
            let calls = trace_io(mode, words, &image);
            let opened = Call::Open { direct: mode.direct, writable: true };
            assert!(calls.contains(&opened), "{what}: {calls:?}");
            if !mode.direct {
                assert!(!calls.contains(&Call::Open { direct: true, writable: true }), "{what}: {calls:?}");
            }

            let syncs = count_syncs(&calls);
            let stable = if mode.write_cache { stable_when_on } else { stable_when_off };
            let demanded = usize::from(mode.honours_flush) * (usize::from(stable) + usize::from(flushes));
            assert_eq!(syncs.write_and_flush, demanded, "{what}: {calls:?}");
            assert_eq!(syncs.after > 0, mode.honours_flush, "{what}, the final sync: {calls:?}");

            // The first run turned nothing off; turning the write cache off is one sync more.
            let at_start = *syncs_at_start.get_or_insert(syncs.before_the_write);
            let turned_off = words == "wb=0" && mode.write_cache && mode.honours_flush;
            assert_eq!(syncs.before_the_write, at_start + usize::from(turned_off), "{what}: {calls:?}");
            image.must_hold(&Image::after(), &what);
        }
    }
}
