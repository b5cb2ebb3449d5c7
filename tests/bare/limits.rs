//! The host's limits as a guest meets them (`docs/limits.md`): a disk that is full, a file that may not grow,
//! an image cut off underneath, a file system that hangs. Each is told to the guest, each with the VM going on.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use minivmm_testkit::loops::{LoopDevice, Mounted};
use minivmm_testkit::machine::*;

use crate::hostile::{Running, hostile};
use crate::terminal::Session;

/// The guest's exit code if it was told to end.
const TOLD: i32 = 0x10;
const BYTES: u64 = 8 << 20;
const BLOCKS: u64 = BYTES / (64 << 10);

/// A file system of its own; `None`, said aloud, where this user cannot have one. Taken apart into variables, the
/// last one goes first: it is unmounted before its device goes.
fn file_system(directory: &Path) -> Option<(LoopDevice, Mounted)> {
    let backing = directory.join("fs");
    File::create(&backing).unwrap().set_len(64 << 20).unwrap();
    assert!(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&backing).status().unwrap().success());
    let device = LoopDevice::new(&backing, 512)?;
    let mounted = Mounted::device(&device.0)?;
    Some((device, mounted))
}

/// The guest that does what it is told, on a sparse image in `directory`.
fn serving(directory: &Path, keys: &str) -> Command {
    let image = directory.join("disk.img");
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    let mut command = hostile("pci", "serve=1");
    command.arg("--disk").arg(format!("{},{keys}", image.display()));
    command
}

/// What a pass over the disk came to: blocks that went well, blocks with IOERR.
#[track_caller]
fn pass(running: &mut Running, letter: &str, name: &str) -> (u64, u64) {
    running.type_in(letter);
    let line = running.line(name).0;
    let figure = |name: &str| {
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap();
        word.parse::<u64>().unwrap()
    };
    (figure("ok="), figure("ioerr="))
}

/// The guest is told to end; what the VMM has said. Where a stable write has failed, that is the end's status.
#[track_caller]
fn end(mut running: Running, is_lost: bool, what: &str) -> String {
    running.type_in("q");
    let (status, log) = running.end();
    assert_eq!(status, Some(if is_lost { FAILURE } else { exit(TOLD) }), "{what}: {log}");
    log
}

/// The disk's keys, and whether every write is stable. Of a stable write that fails nobody can tell whether it was
/// the write or its sync: it is latched, and no later one succeeds (`docs/cache-modes.md`).
const KEYS: [(&str, bool); 6] = [
    ("cache=none", false),
    ("cache=writethrough", true),
    ("cache=writeback", false),
    ("cache=directsync,engine=sync", true),
    ("cache=unsafe", false),
    ("cache=writeback,engine=sync", false),
];

/// Shows E5.
#[test]
fn a_full_host_disk_is_told_to_the_guest_and_when_there_is_room_again_all_is_well() {
    if !kvm() {
        return;
    }
    for (keys, stable) in KEYS {
        let directory = scratch();
        let Some((_device, full)) = file_system(directory.path()) else { return };
        let mut command = serving(full.dir.path(), keys);
        // 2 MiB for an image of 8.
        let filler = full.dir.path().join("filler");
        let free = rustix::fs::statvfs(full.dir.path()).unwrap();
        let file = File::create(&filler).unwrap();
        let bytes = free.f_bavail * free.f_frsize - (2 << 20);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let mut running = Running::start(&mut command);
        running.line("ready");
        let (good, bad) = pass(&mut running, "w", "written");
        assert!(bad > 0 && good > 0 && good + bad == BLOCKS, "{keys}: {good} good, {bad} bad");
        // What is there can be read, what is not is a hole.
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS, 0), "{keys}");
        fs::remove_file(&filler).unwrap();
        rustix::fs::syncfs(File::open(full.dir.path()).unwrap()).unwrap();
        let again = if stable { (0, BLOCKS) } else { (BLOCKS, 0) };
        assert_eq!(pass(&mut running, "w", "written"), again, "{keys}");
        running.type_in("f");
        let flushed = if stable { "flushed IOERR" } else { "flushed OK" };
        assert_eq!(running.line("flushed").0, flushed, "{keys}");
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS, 0), "{keys}");
        let log = end(running, stable, keys);
        assert!(log.contains("disk.img") && log.contains("No space left on device"), "{keys}: {log}");
        assert!(log.lines().count() < 20, "{keys}: {log}");
    }
}

#[test]
fn a_file_that_may_not_grow_is_told_to_the_guest_and_kills_nobody() {
    if !kvm() {
        return;
    }
    for (keys, stable) in KEYS {
        let directory = scratch();
        let mut command = serving(directory.path(), keys);
        let limit = libc::rlimit { rlim_cur: BYTES / 4, rlim_max: BYTES / 4 };
        // SAFETY: setrlimit may be called between fork and exec; it reads one rlimit, which the closure owns.
        unsafe {
            command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        let mut running = Running::start(&mut command);
        running.line("ready");
        assert_eq!(pass(&mut running, "w", "written"), (BLOCKS / 4, BLOCKS * 3 / 4), "{keys}");
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS, 0), "{keys}");
        let log = end(running, stable, keys);
        assert!(log.contains("disk.img") && log.contains("File too large"), "{keys}: {log}");
    }
}

#[test]
fn a_quota_that_is_used_up_is_told_to_the_guest() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed, no quota is used up");
        return;
    }
    // Every write from the tenth on: a quota of nine blocks.
    for (keys, call, stable) in
        [("cache=none,engine=sync", "pwritev", false), ("cache=writethrough,engine=sync", "pwritev2", true)]
    {
        let directory = scratch();
        let plain = serving(directory.path(), keys);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e"]);
        strace
            .arg(format!("inject={call}:error=EDQUOT:when=10+"))
            .arg(plain.get_program())
            .args(plain.get_args());
        let mut running = Running::start(&mut strace);
        running.line("ready");
        let (good, bad) = pass(&mut running, "w", "written");
        assert_eq!((good, bad), (9, BLOCKS - 9), "{keys}");
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS, 0), "{keys}");
        let log = end(running, stable, keys);
        assert!(log.contains("quota exceeded") || log.contains("Quota exceeded"), "{keys}: {log}");
    }
}

#[test]
fn an_image_cut_off_underneath_is_told_to_the_guest_and_survived() {
    if !kvm() {
        return;
    }
    for (keys, _) in KEYS {
        let directory = scratch();
        let mut running = Running::start(&mut serving(directory.path(), keys));
        running.line("ready");
        assert_eq!(pass(&mut running, "w", "written"), (BLOCKS, 0), "{keys}");
        let image = File::options().write(true).open(directory.path().join("disk.img")).unwrap();
        image.set_len(BYTES / 2).unwrap();
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS / 2, BLOCKS / 2), "{keys}");
        // A write makes the file longer again, as far as the disk was.
        assert_eq!(pass(&mut running, "w", "written"), (BLOCKS, 0), "{keys}");
        assert_eq!(pass(&mut running, "r", "read"), (BLOCKS, 0), "{keys}");
        assert_eq!(image.metadata().unwrap().len(), BYTES, "{keys}");
        // Others than this guest would find zeroes now where data was.
        let log = end(running, true, keys);
        assert!(log.contains("has the image been truncated?"), "{keys}: {log}");
        assert!(log.contains(&format!("from {BYTES} to {} bytes", BYTES / 2)), "{keys}: {log}");
    }
}

fn freeze(how: &str, directory: &Path) -> bool {
    Command::new("fsfreeze").arg(how).arg(directory).status().is_ok_and(|status| status.success())
}

/// A file system that takes no write until it is thawed: the host's own way of hanging.
struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        freeze("-u", self.0);
    }
}

#[test]
fn a_host_disk_that_hangs_stops_neither_the_console_nor_the_other_disk_nor_the_end() {
    if !kvm() {
        return;
    }
    for (keys, resets) in [
        ("cache=none,engine=io_uring", false),
        ("cache=none,engine=sync", true),
        ("cache=writeback", true),
        ("cache=directsync", false),
    ] {
        let directory = scratch();
        let Some((_device, mounted)) = file_system(directory.path()) else { return };
        let other = directory.path().join("other.img");
        fs::write(&other, vec![7; 1 << 20]).unwrap();
        let image = mounted.dir.path().join("disk.img");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        let mut command = hostile("pci", "serve=2");
        command.arg("--disk").arg(format!("{},{keys}", image.display()));
        command.arg("--disk").arg(format!("{},cache=none", other.display()));
        let mut session = Session::start(command.args(["--stop-timeout", "5"]));
        session.read_until("ready");
        File::open(&image).unwrap().sync_all().unwrap();
        if !freeze("-f", mounted.dir.path()) {
            skip("root", "no file system can be frozen here (root only)");
            return;
        }
        let frozen = Frozen(mounted.dir.path());
        session.type_in(b"h");
        session.read_until("begun");
        for _ in 0..3 {
            session.type_in(b"xyz");
            session.read_until("xyz");
            session.type_in(b"b");
            session.read_until("other OK");
        }
        // A CPU that resets the disk waits for what is in flight, and the end waits for the CPU.
        if resets {
            session.type_in(b"R");
            session.read_until("resets");
        }
        session.type_in(b"\x01x");
        // It says what it waits for, and then that it gives up; the kernel keeps the process until the
        // disk is back.
        let said = session.read_until("gave up waiting for");
        let waits_for = if resets { "waiting for" } else { "waiting for requests in flight: 1 of" };
        assert!(said.contains(waits_for), "{keys}: {said}");
        drop(frozen);
        assert_eq!(session.end(), (FAILURE, true), "{keys}: (status, terminal restored)");
    }
}
