//! The hostile guest (`guest-images/hostile`) against the live VMM: every attack of `docs/attacks.md` on both
//! transports and both engines, in the sandbox. Inside, a good request follows each attack; from outside,
//! the images, the VMM's memory, its descriptors and what it says are looked at.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use minivmm_testkit::dontcache;
use minivmm_testkit::machine::*;

/// The guest's exit code if it is alive after all.
const ALL_IS_WELL: i32 = 0x10;
const BYTES: usize = 8 << 20;
const SECTOR: usize = 512;
/// So much of its memory the guest uses: its code, its buffers (32 MiB), its rings.
const GUEST_USES_KIB: u64 = 36 << 10;
/// What one queue may have in private buffers: 256 requests of 256 KiB (`docs/limits.md`).
const BOUNCES_KIB: u64 = 64 << 10;
/// The VMM itself, with the libraries that it is linked with.
const ITSELF_KIB: u64 = 24 << 10;

fn guest() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| freestanding("hostile"))
}

fn content() -> Vec<u8> {
    (0..BYTES).map(|at| u8::try_from((at * 31 + at / SECTOR) % 251).unwrap()).collect()
}

/// minivmm with the guest on a transport; `words` are the guest's.
pub fn hostile(transport: &str, words: &str) -> Command {
    let ring = if hardware_virtualization() { 0 } else { 3 };
    let mmio = if transport == "mmio" { "mmio=0xd0000000 mmio_count=8" } else { "" };
    let cmdline = format!("{words} ring={ring} tsc_khz=2000000 ram=0x8000000 transport={transport} {mmio}");
    let mut command = minivmm();
    command.args(["--memory", "128M", "--timeout", "110", "--initrd", "none"]);
    command.args(["--transport", transport, "--cmdline", &cmdline, "--kernel"]).arg(guest());
    command
}

/// A guest at work, line by line.
pub struct Running {
    child: Child,
    console: BufReader<ChildStdout>,
    _watchdog: Watchdog,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let io = Stdio::piped;
        command.args(["--console", "stdio"]);
        let mut child = command.stdin(io()).stdout(io()).stderr(io()).spawn().unwrap();
        let watchdog = Watchdog::over(&child);
        let console = BufReader::new(child.stdout.take().unwrap());
        Self { child, console, _watchdog: watchdog }
    }

    /// The next line that begins so, and what came before it.
    #[track_caller]
    pub fn line(&mut self, beginning: &str) -> (String, Vec<String>) {
        let mut before = Vec::new();
        loop {
            let mut line = String::new();
            if self.console.read_line(&mut line).unwrap() == 0 {
                let mut log = String::new();
                std::io::Read::read_to_string(&mut self.child.stderr.take().unwrap(), &mut log).unwrap();
                panic!(
                    "no line begins with {beginning:?}\n--- console\n{}\n--- log\n{log}",
                    before.join("\n")
                );
            }
            let line = line.trim().to_owned();
            if line.starts_with(beginning) {
                return (line, before);
            }
            before.push(line);
        }
    }

    pub fn type_in(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Of /proc/PID/status, in KiB where it is memory.
    pub fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Its own threads by their names; the kernel lends io_uring more, and takes them back. Those are told by
    /// their flag: at first they have the name of the thread that they are made for.
    fn threads(&self) -> Vec<String> {
        /// PF_IO_WORKER (include/linux/sched.h).
        const IO_WORKER: u64 = 0x10;
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        let stats = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
        let own = stats.filter_map(|stat| {
            // proc(5): the name is in brackets, and the flags are the seventh word behind it.
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let flags: u64 = rest.split_whitespace().nth(6)?.parse().unwrap();
            (flags & IO_WORKER == 0).then(|| name.to_owned())
        });
        let mut own: Vec<String> = own.collect();
        own.sort();
        own
    }

    /// `None` where this user may not look.
    fn descriptors(&self) -> Option<usize> {
        let found = fs::read_dir(format!("/proc/{}/fd", self.id()));
        if found.is_err() && !sees_all() {
            skip("root", "only root counts the descriptors of a process that is not dumpable");
            return None;
        }
        Some(found.unwrap().count())
    }

    /// Its exit status and its log.
    pub fn end(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Sectors that the guest may write: the header of a foreign format, its good sector, its scratch.
fn is_the_guests(sector: usize) -> bool {
    sector == 0 || sector == 3 || (64..1152).contains(&sector)
}

#[track_caller]
fn must_be_as_before(image: &Path, attacked: bool, what: &str) {
    let (now, before) = (fs::read(image).unwrap(), content());
    assert_eq!(now.len(), before.len(), "{what}: the image's size has changed");
    for (sector, (now, before)) in now.chunks(SECTOR).zip(before.chunks(SECTOR)).enumerate() {
        assert!(now == before || attacked && is_the_guests(sector), "{what}: sector {sector} has changed");
    }
}

/// All attacks on a disk with these keys, beside another disk and a console device.
fn attack(transport: &str, keys: &str) {
    let what = format!("{transport}, {keys}");
    let directory = scratch();
    let [image, other, csv] =
        ["disk.img", "other.img", "observed.csv"].map(|name| directory.path().join(name));
    fs::write(&image, content()).unwrap();
    fs::write(&other, content()).unwrap();
    let mut command = hostile(transport, "");
    command.arg("--disk").arg(format!("{},{keys}", image.display()));
    command.arg("--disk").arg(format!("{},cache=writeback", other.display()));
    command.arg("--observe").arg(&csv);
    let mut running = Running::start(&mut command);
    running.line("features=");
    let (descriptors, threads) = (running.descriptors(), running.threads());
    let (result, attacks) = running.line("result ");
    let rules: BTreeSet<&str> = attacks.iter().filter_map(|line| line.split(' ').next()).collect();
    // R13 among them, with requests that change while they are read.
    for rule in 1..=23 {
        assert!(rules.contains(format!("R{rule}").as_str()), "{what}: R{rule} is not among {rules:?}");
    }
    assert!(attacks.iter().all(|line| line.ends_with("alive")), "{what}: {attacks:#?}");
    assert!(result.contains(&format!("attacks={}", attacks.len())), "{what}: {result}");
    assert!(!result.ends_with("console=0"), "{what}: {result}");
    // What the guest has made us use, at its most (R23).
    let most = running.status("VmHWM");
    // Fixed buffers are all of the guest's memory, pinned.
    let guests = if keys.contains("buffers=fixed") { 128 << 10 } else { GUEST_USES_KIB };
    let allowed = guests + BOUNCES_KIB + ITSELF_KIB;
    assert!(most < allowed, "{what}: {most} KiB of memory, {allowed} are allowed");
    assert_eq!(running.descriptors(), descriptors, "{what}: descriptors");
    assert_eq!(running.threads(), threads, "{what}: threads");
    running.type_in("q");
    let (status, log) = running.end();
    assert_eq!(status, Some(exit(ALL_IS_WELL)), "{what}: {log}");
    // Some 40000 errors, of five kinds of source, in periods of ten seconds.
    let lines = log.lines().count();
    assert!(lines < 150, "{what}: {lines} lines are said\n{log}");
    assert!(log.contains("held back"), "{what}: how many were not said is\n{log}");
    assert!(!log.contains("panicked") && !log.contains("has called"), "{what}: {log}");
    must_be_as_before(&image, true, &what);
    must_be_as_before(&other, false, &what);
}

#[test]
fn every_attack_over_mmio_with_io_uring() {
    if kvm() {
        attack("mmio", "cache=none,engine=io_uring");
    }
}

#[test]
fn every_attack_over_mmio_without_io_uring() {
    if kvm() {
        attack("mmio", "cache=none,engine=sync");
    }
}

#[test]
fn every_attack_over_pci_with_io_uring() {
    if kvm() {
        attack("pci", "cache=none,engine=io_uring");
    }
}

#[test]
fn every_attack_over_pci_without_io_uring() {
    if kvm() {
        attack("pci", "cache=none,engine=sync");
    }
}

#[test]
fn every_attack_in_the_modes_that_use_the_page_cache_and_with_discard() {
    if kvm() {
        attack("pci", "cache=writeback,discard=on,queues=4");
        attack("mmio", "cache=directsync,stable=group");
        attack("pci", "cache=writethrough,engine=sync,discard=on");
        if may_lock(128) {
            attack("mmio", "cache=unsafe,buffers=fixed");
        }
        if dontcache::is_here() {
            attack("pci", "cache=dontcache,discard=on,queues=4");
        }
    }
}

/// Shows R21.
#[test]
fn what_a_guest_writes_to_its_first_sector_is_never_taken_for_a_format() {
    if !kvm() {
        return;
    }
    let directory = scratch();
    let image = directory.path().join("disk.img");
    fs::write(&image, content()).unwrap();
    for (words, keys) in [("only=R21", "cache=none"), ("again=1", "cache=none,format=raw")] {
        let mut command = hostile("pci", words);
        command.arg("--disk").arg(format!("{},{keys}", image.display()));
        let mut running = Running::start(&mut command);
        running.line("R21 ");
        running.type_in("q");
        let (status, log) = running.end();
        assert_eq!(status, Some(exit(ALL_IS_WELL)), "{words}: {log}");
        must_be_as_before(&image, true, words);
    }
    // Without a word on it nobody guesses: the next boot says what it sees, and what to do.
    let mut command = hostile("pci", "again=1");
    command.args(["--console", "stdio"]);
    let ran = run(command.arg("--disk").arg(format!("{},cache=none", image.display())), b"");
    let log = ran.expect(FAILURE, "a header of qcow2").log;
    assert!(log.contains("looks like a qcow2 image") && log.contains("format=raw"), "{log}");
}
