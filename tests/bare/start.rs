//! What minivmm itself needs beyond guest RAM, read from smaps while a guest runs. Not a timing.

use std::fs;
use std::io::Read;
use std::process::{Child, Stdio};

use minivmm_testkit::machine::*;

/// Most that the program may have in memory beyond guest RAM in the default configuration, in KiB.
const OWN_KIB_MAX: u64 = 5 << 10;
/// And for each further CPU, which brings a queue, in KiB.
const CPU_KIB_MAX: u64 = 128;
/// The size of guest RAM that the tests ask for; no other mapping is as large.
const RAM_KIB: u64 = 512 << 10;

/// A mapping: its address, its KiB, those in memory, those on huge pages, its VmFlags.
#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    size: u64,
    rss: u64,
    huge: u64,
    flags: String,
}

fn mappings(child: &Child) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{}/smaps", child.id())).unwrap();
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(' ').unwrap();
        let kib = || value.trim().trim_end_matches(" kB").parse().unwrap();
        match (key, found.last_mut()) {
            ("Size:", Some(mapping)) => mapping.size = kib(),
            ("Rss:", Some(mapping)) => mapping.rss = kib(),
            ("AnonHugePages:", Some(mapping)) => mapping.huge = kib(),
            ("VmFlags:", Some(mapping)) => mapping.flags = format!("{value} "),
            (key, _) if !key.ends_with(':') => {
                let (start, _) = key.split_once('-').unwrap();
                found.push(Mapping { start: u64::from_str_radix(start, 16).unwrap(), ..Mapping::default() });
            }
            _ => {}
        }
    }
    found
}

/// The most that was ever in memory, in KiB.
fn most(child: &Child) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A guest that hangs, once it has greeted: all is built then, and its CPU runs.
fn hanging(image: &Image, more: &[&str]) -> (Child, Watchdog) {
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=hang").args(["--console", "stdio", "--memory", "512M"]);
    command.args(visible()).args(more).arg("--disk").arg(&image.path);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let watchdog = Watchdog::over(&child);
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    (child, watchdog)
}

#[test]
fn what_is_added_is_read_straight_into_guest_memory() {
    if !kvm() {
        return;
    }
    const ADDED_KIB: u64 = 64 << 10;
    let directory = scratch();
    let (initrd, added) = (directory.path().join("initrd"), directory.path().join("added"));
    fs::write(&initrd, "070701").unwrap();
    fs::write(&added, vec![0x6d; usize::try_from(ADDED_KIB).unwrap() << 10]).unwrap();
    let mut command = minivmm();
    command.arg("--kernel").arg(Entry::Elf.kernel()).arg("--initrd").arg(&initrd);
    command.args(["--cmdline", "scenario=hang", "--console", "stderr", "--boot-timeout", "0", "--add"]);
    command.arg(&added).args(["--", "true"]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    child.stderr.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let most = most(&child);
    kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    // In guest memory once, and in no buffer of ours beside it.
    assert!((ADDED_KIB..ADDED_KIB * 3 / 2).contains(&most), "{most} KiB at most");
}

#[test]
fn the_program_takes_at_most_five_mib_beyond_guest_ram() {
    if !kvm() {
        return;
    }
    if cfg!(debug_assertions) {
        return skip("release", "a debug build has more code than a user runs");
    }
    // One queue, the default; and four.
    for cpus in ["1", "4"] {
        let image = Image::new();
        let (mut child, _watchdog) = hanging(&image, &["--cpus", cpus]);
        let (ram, own): (Vec<_>, Vec<_>) =
            mappings(&child).into_iter().partition(|mapping| mapping.size == RAM_KIB);
        let most = most(&child);
        kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM);
        child.wait().unwrap();
        let [ram] = ram.as_slice() else { panic!("guest RAM is one mapping: {ram:?}") };
        let own: u64 = own.iter().map(|mapping| mapping.rss).sum();
        let peak = most.saturating_sub(ram.rss);
        println!("{cpus} CPUs: {own} KiB beyond guest RAM, {peak} KiB at most; RAM: {ram:?}");
        let most = OWN_KIB_MAX + CPU_KIB_MAX * (cpus.parse::<u64>().unwrap() - 1);
        assert!(own <= most && peak <= most, "{cpus} CPUs: {own} KiB now, {peak} KiB at most");
        // May lie on huge pages, and is not copied at a fork.
        for flag in [" hg ", " dc "] {
            assert!(ram.flags.contains(flag), "{ram:?}");
        }
        assert!(ram.huge <= ram.rss && ram.rss > 0, "{ram:?}");
        // KVM maps huge pages only where guest and host address agree modulo 2 MiB; the guest's is 0.
        assert_eq!(ram.start % (2 << 20), 0, "{ram:?}");
    }
}
