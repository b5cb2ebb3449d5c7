//! The bare-metal guest (`guest-images/bare/guest.S`) under real KVM, through the real binary.
//!
//! Owns what only a running machine shows: both entries, one write, flush and read through the
//! virtio-mmio registers in every cache mode, the host's system calls behind them, and every way a
//! machine can end. Needs /dev/kvm, also one that cannot run Linux; without it each test says that
//! it is skipped. The guest's exit codes are told in its source.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use minivmm::layout;
use tempfile::TempDir;

/// Exit statuses of the program, as `--help` documents them.
const ORDERLY: i32 = 0;
const FAILURE: i32 = 125;
const TIMED_OUT: i32 = 124;
const GUEST_PANIC: i32 = 123;

/// The status that a code at the exit port becomes.
const fn exit(code: i32) -> i32 {
    code << 1 | 1
}

/// Longer than any run takes; who meets it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

const BLOCK_BYTES: usize = 4096;
const IMAGE_BYTES: usize = 1 << 20;

// ------------------------------------------------------------------------------- the machinery

/// Can tests run here? If not, says why.
fn kvm() -> bool {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skip(&format!("cannot open /dev/kvm: {error}"));
    }
    opened.is_ok()
}

#[expect(clippy::explicit_write, reason = "the test harness swallows what eprintln prints")]
fn skip(reason: &str) {
    writeln!(std::io::stderr(), "skipped: {reason}").unwrap();
}

/// Does this KVM run guest code on the processor, or emulate CPL 0?
fn hardware_virtualization() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    cpuinfo
        .lines()
        .any(|line| line.starts_with("flags") && line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
}

/// How a guest is entered, and therefore which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Elf,
    Pvh,
}

const ENTRIES: [Entry; 2] = [Entry::Elf, Entry::Pvh];

impl Entry {
    fn kernel(self) -> PathBuf {
        static BUILT: OnceLock<PathBuf> = OnceLock::new();
        let directory = BUILT.get_or_init(build_guests);
        directory.join(match self {
            Self::Elf => "elf.elf",
            Self::Pvh => "pvh.elf",
        })
    }

    fn greeting(self) -> &'static str {
        match self {
            Self::Elf => "entered by ELF",
            Self::Pvh => "entered by PVH",
        }
    }
}

fn build_guests() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bare");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/bare/build.sh");
    let built = Command::new(&script)
        .arg(&directory)
        .arg(format!("VIRTIO_MMIO_BASE={:#x}", layout::VIRTIO_MMIO))
        .arg(format!("PORT_ACPI={:#x}", layout::PORT_ACPI))
        .status()
        .unwrap();
    assert!(built.success(), "{} failed", script.display());
    directory
}

/// What a run left behind.
#[derive(Debug)]
struct Ran {
    status: i32,
    console: String,
    log: String,
}

impl Ran {
    #[track_caller]
    fn expect(self, status: i32, what: &str) -> Self {
        assert_eq!(self.status, status, "{what}\n--- console\n{}\n--- log\n{}", self.console, self.log);
        self
    }
}

fn minivmm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_minivmm"))
}

/// Adds what every guest here is started with.
fn start<'a>(command: &'a mut Command, entry: Entry, cmdline: &str) -> &'a mut Command {
    command.arg("--kernel").arg(entry.kernel()).args(["--initrd", "none", "--cmdline", cmdline])
}

/// Runs to the end, with `input` on standard input.
fn run(command: &mut Command, input: &[u8]) -> Ran {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A guest that ends early closes the pipe: what counts is what it did.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ran {
        status: output.status.code().unwrap_or_else(|| panic!("killed: {output:?}")),
        console: String::from_utf8_lossy(&output.stdout).into_owned(),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A guest without a disk, on the console of this process.
fn run_plain(entry: Entry, cmdline: &str, more: &[&str]) -> Ran {
    run(start(&mut minivmm(), entry, cmdline).args(["--console", "stdio", "--timeout", "60"]).args(more), b"")
}

/// Kills a process that outlives all patience, so that a hang fails instead of lasting.
struct Watchdog(#[allow(dead_code, reason = "dropping it calls the dog off")] Sender<()>);

impl Watchdog {
    fn over(child: &Child) -> Self {
        let pid = i32::try_from(child.id()).unwrap();
        let (off, calm) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if calm.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                kill(pid, libc::SIGKILL);
            }
        });
        Self(off)
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: kill takes two integers; `pid` is a child that this process has not reaped.
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "kill({pid}, {signal})");
}

/// An image whose every byte is known, in a directory of its own on a real file system.
struct Image {
    _directory: TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, Self::before()).unwrap();
        Self { _directory: directory, path }
    }

    /// What is in it before the guest runs.
    fn before() -> Vec<u8> {
        (0..IMAGE_BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    /// What must be in it when the guest has written its block at sector 8.
    fn after() -> Vec<u8> {
        let mut bytes = Self::before();
        let block =
            (0..u32::try_from(BLOCK_BYTES / 4).unwrap()).flat_map(|i| (0x6d76_0000 + i).to_le_bytes());
        bytes.splice(8 * 512..8 * 512 + BLOCK_BYTES, block);
        bytes
    }

    #[track_caller]
    fn must_hold(&self, expected: &[u8], what: &str) {
        let found = fs::read(&self.path).unwrap();
        assert_eq!(found.len(), expected.len(), "{what}: the image's size has changed");
        let differing = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differing, None, "{what}: the image differs first at this byte");
    }

    fn disk(&self, keys: &str) -> String {
        format!("{},{keys}", self.path.display())
    }
}

// ------------------------------------------------------------------------------- the cache modes

/// One row of the modes' table, as a guest and the host's kernel see it.
#[derive(Debug, Clone, Copy)]
struct Mode {
    name: &'static str,
    direct: bool,
    write_cache: bool,
    honours_flush: bool,
}

const MODES: [Mode; 5] = [
    Mode { name: "none", direct: true, write_cache: true, honours_flush: true },
    Mode { name: "writeback", direct: false, write_cache: true, honours_flush: true },
    Mode { name: "writethrough", direct: false, write_cache: false, honours_flush: true },
    Mode { name: "directsync", direct: true, write_cache: false, honours_flush: true },
    Mode { name: "unsafe", direct: false, write_cache: true, honours_flush: false },
];

fn run_io(mode: Mode, entry: Entry, words: &str, image: &Image) -> Ran {
    let cmdline = format!("scenario=io {words}");
    let disk = image.disk(&format!("cache={}", mode.name));
    run_plain(entry, &cmdline, &["--disk", &disk])
}

#[test]
fn a_guest_writes_flushes_and_reads_back_in_every_mode_by_both_entries() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        for entry in ENTRIES {
            let what = format!("cache={} by {entry:?}", mode.name);
            let image = Image::new();
            let ran = run_io(mode, entry, "", &image).expect(exit(0x20), &what);
            let writeback = format!("writeback 0x0{}", u8::from(mode.write_cache));
            let lines = [
                entry.greeting(),
                &writeback,
                "wrote",
                "flushed",
                "read back what was written",
                "reset the device",
            ];
            for line in lines {
                assert!(ran.console.contains(line), "{what}: no {line:?} in\n{}", ran.console);
            }
            image.must_hold(&Image::after(), &what);
        }
    }
}

#[test]
fn a_readonly_disk_refuses_the_write_and_stays_as_it_was() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let image = Image::new();
        let disk = image.disk(&format!("cache={},readonly", mode.name));
        let ran = run_plain(Entry::Elf, "scenario=io", &["--disk", &disk]).expect(exit(0x18), mode.name);
        assert!(!ran.console.contains("wrote"), "{}", ran.console);
        image.must_hold(&Image::before(), mode.name);
    }
}

#[test]
fn the_guest_reads_the_serial_number_it_was_given() {
    if !kvm() {
        return;
    }
    for serial in ["x", "disk-7", "12345678901234567890"] {
        let image = Image::new();
        let disk = image.disk(&format!("cache=writeback,serial={serial}"));
        let ran = run_plain(Entry::Pvh, "scenario=io", &["--disk", &disk]).expect(exit(0x20), serial);
        assert!(ran.console.contains(&format!("id {serial}\r\n")), "{}", ran.console);
    }
}

#[test]
fn without_flush_writeback_cannot_be_turned_on() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let image = Image::new();
        run_io(mode, Entry::Elf, "noflush wb=1", &image).expect(exit(0x25), mode.name);
        image.must_hold(&Image::before(), mode.name);
    }
}

#[test]
fn two_disks_are_two_devices() {
    if !kvm() {
        return;
    }
    let (first, second) = (Image::new(), Image::new());
    for (words, first_holds, second_holds) in
        [("second", Image::before(), Image::after()), ("", Image::after(), Image::after())]
    {
        let (a, b) = (first.disk("cache=writeback,serial=a"), second.disk("cache=none,serial=b"));
        let cmdline = format!("scenario=io {words}");
        run_plain(Entry::Elf, &cmdline, &["--disk", &a, "--disk", &b]).expect(exit(0x20), words);
        first.must_hold(&first_holds, "the first disk");
        second.must_hold(&second_holds, "the second disk");
    }
}

#[test]
fn after_a_reset_the_device_works_again_with_its_configured_cache() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let image = Image::new();
        let other = u8::from(!mode.write_cache);
        let ran =
            run_io(mode, Entry::Pvh, &format!("twice wb={other}"), &image).expect(exit(0x20), mode.name);
        let values: Vec<_> = ran.console.lines().filter(|line| line.contains("writeback 0x")).collect();
        let expected = [other, 1 - other].map(|value| format!("bare guest: writeback 0x0{value}"));
        assert_eq!(values, expected, "cache={}", mode.name);
        image.must_hold(&Image::after(), mode.name);
    }
}

#[test]
fn a_reset_waits_for_the_write_in_flight() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let image = Image::new();
        let disk = image.disk(&format!("cache={}", mode.name));
        run_plain(Entry::Elf, "scenario=inflight", &["--disk", &disk]).expect(exit(0x23), mode.name);
        // The write was taken or was not, but it was not torn.
        let found = fs::read(&image.path).unwrap();
        assert!(found == Image::before() || found == Image::after(), "cache={}: torn", mode.name);
    }
}

#[test]
fn no_device_answers_where_no_disk_was_given() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        run_plain(entry, "scenario=io", &[]).expect(exit(0x11), "without a disk");
    }
}

// ------------------------------------------------------------------------------- system calls

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
    strace.arg("-o").arg(&log).arg(env!("CARGO_BIN_EXE_minivmm"));
    start(&mut strace, Entry::Elf, &format!("scenario=io {words}"));
    strace.args(["--console", "stdio", "--timeout", "60", "--disk"]);
    strace.arg(image.disk(&format!("cache={}", mode.name)));
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

#[test]
fn the_host_syncs_as_often_as_mode_and_negotiation_demand() {
    if !kvm() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace is not installed, host syncs are not counted");
        return;
    }
    for mode in MODES {
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

// ------------------------------------------------------------------------------- the ways to end

#[test]
fn every_way_to_end_has_its_exit_status() {
    if !kvm() {
        return;
    }
    let endings = [
        ("scenario=exit=0", exit(0)),
        ("scenario=exit=7", exit(7)),
        ("scenario=exit=127", exit(127)),
        ("scenario=reset", ORDERLY),
        ("scenario=i8042", ORDERLY),
        ("scenario=poweroff", ORDERLY),
        ("scenario=panic", GUEST_PANIC),
        ("scenario=triple", FAILURE),
        ("scenario=unheard-of", exit(0x01)),
        ("", exit(0x01)),
    ];
    for entry in ENTRIES {
        for cpus in ["1", "2"] {
            for (cmdline, status) in endings {
                let what = format!("{cmdline:?} by {entry:?} with {cpus} CPUs");
                let ran = run_plain(entry, cmdline, &["--cpus", cpus]).expect(status, &what);
                assert!(ran.console.contains(entry.greeting()), "{what}: {}", ran.console);
            }
        }
    }
}

#[test]
fn a_triple_fault_shows_the_registers() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "scenario=triple", &[]).expect(FAILURE, "a triple fault");
        let log = ran.log.to_lowercase();
        for word in ["triple fault", "rip", "rsp", "cr3"] {
            assert!(log.contains(word), "no {word:?} in\n{}", ran.log);
        }
    }
}

/// On a KVM that emulates CPL 0 the instruction is missing: the program must say so and end.
#[test]
fn an_instruction_that_kvm_lacks_ends_with_registers_and_bytes() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "scenario=badinsn", &[]);
        if hardware_virtualization() {
            ran.expect(exit(0x22), "cmpxchg16b on hardware");
            continue;
        }
        let ran = ran.expect(FAILURE, "cmpxchg16b where KVM emulates");
        let log = ran.log.to_lowercase();
        for word in ["internal error", "rip", "rax", "f0 48 0f c7"] {
            assert!(log.contains(word), "no {word:?} in\n{}", ran.log);
        }
    }
}

#[test]
fn the_timeout_ends_a_machine_that_hangs() {
    if !kvm() {
        return;
    }
    for scenario in ["hang", "spin"] {
        for cpus in ["1", "2"] {
            let image = Image::new();
            let cmdline = format!("scenario={scenario}");
            let mut command = minivmm();
            start(&mut command, Entry::Elf, &cmdline).args(["--timeout", "1", "--cpus", cpus]);
            command.arg("--disk").arg(image.disk("cache=writeback"));
            run(&mut command, b"").expect(TIMED_OUT, &format!("{scenario} with {cpus} CPUs"));
        }
    }
}

#[test]
fn a_machine_with_any_memory_starts() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        for memory in ["16M", "128M", "3G", "4G", "5G"] {
            run_plain(entry, "scenario=exit=7", &["--memory", memory]).expect(exit(7), memory);
        }
    }
}

// ------------------------------------------------------------------------------- the console

#[test]
fn the_guest_gets_the_command_line_and_what_append_adds() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "one scenario=exit=3", &["--append", "two"]).expect(exit(3), "--append");
        let line = ran.console.lines().find(|line| line.contains("command line: ")).unwrap();
        assert!(line.contains("one scenario=exit=3 two"), "{line}");
    }
}

#[test]
fn every_byte_of_piped_input_reaches_the_guest() {
    if !kvm() {
        return;
    }
    // Longer than any FIFO. Only `q` ends the guest.
    let mut typed: Vec<u8> = (b' '..=b'~').filter(|byte| *byte != b'q').cycle().take(5000).collect();
    typed.push(b'q');
    let ran = run(
        start(&mut minivmm(), Entry::Elf, "scenario=echo").args(["--console", "stdio", "--timeout", "60"]),
        &typed,
    )
    .expect(exit(0x21), "echo");
    let echoed = ran.console.split_once("until q\r\n").expect("the prompt").1;
    assert_eq!(echoed, String::from_utf8(typed).unwrap());
}

#[test]
fn the_end_of_piped_input_is_not_the_end_of_the_machine() {
    if !kvm() {
        return;
    }
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=echo").args(["--console", "stdio", "--timeout", "2"]);
    let ran = run(&mut command, b"abc").expect(TIMED_OUT, "echo without a q");
    assert!(ran.console.ends_with("until q\r\nabc"), "{}", ran.console);
}

#[test]
fn the_console_can_be_off_or_a_file() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("console");
    let option = format!("file={}", path.display());
    for (console, in_file) in [("off", false), (option.as_str(), true)] {
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=exit=7").args(["--timeout", "60", "--console", console]);
        let ran = run(&mut command, b"").expect(exit(7), console);
        assert!(!ran.console.contains("bare guest"), "{console}: {}", ran.console);
        assert_eq!(path.exists(), in_file, "{console}");
    }
    assert!(fs::read_to_string(path).unwrap().contains("entered by ELF"));
}

// ------------------------------------------------------------------------------- a terminal

/// A pseudo-terminal with a machine on it.
struct Session {
    child: Child,
    terminal: File,
    /// Keeps the terminal and its settings alive when the child is gone.
    slave: OwnedFd,
    before: libc::termios,
    _watchdog: Watchdog,
}

impl Session {
    fn start(command: &mut Command) -> Self {
        let (terminal, slave) = open_terminal();
        let before = settings(&slave);
        let io = || Stdio::from(slave.try_clone().unwrap());
        let child =
            command.args(["--console", "stdio"]).stdin(io()).stdout(io()).stderr(io()).spawn().unwrap();
        let _watchdog = Watchdog::over(&child);
        Self { child, terminal: File::from(terminal), slave, before, _watchdog }
    }

    /// Reads until `text` has come; returns all that was read.
    #[track_caller]
    fn read_until(&mut self, text: &str) -> String {
        let mut read = String::new();
        let mut byte = [0];
        while !read.contains(text) {
            // The slave is open here too, so a dead child is seen by asking, never by end of file.
            assert!(self.readable() || self.child.try_wait().unwrap().is_none(), "ended after {read:?}");
            if self.readable() {
                self.terminal.read_exact(&mut byte).unwrap();
                read.push(char::from(byte[0]));
            }
        }
        read
    }

    /// Waits a little for output.
    fn readable(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.terminal.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `poll` is one valid pollfd, for the length of the call.
        unsafe { libc::poll(&raw mut poll, 1, 100) == 1 }
    }

    fn is_raw(&self) -> bool {
        settings(&self.slave).c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// The exit status, once the machine has ended and its last words are read.
    fn end(mut self) -> (i32, bool) {
        let mut last_words = [0; 1024];
        let status = loop {
            if self.readable() {
                let _ = self.terminal.read(&mut last_words).unwrap();
            } else if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
        };
        let after = settings(&self.slave);
        let restored = (after.c_iflag, after.c_oflag, after.c_cflag, after.c_lflag, after.c_cc)
            == (
                self.before.c_iflag,
                self.before.c_oflag,
                self.before.c_cflag,
                self.before.c_lflag,
                self.before.c_cc,
            );
        (status.code().unwrap_or_else(|| panic!("not ended in order: {status}")), restored)
    }
}

fn open_terminal() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: the two integers are ours; name, settings and window size may be null.
    let result = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(result, 0, "openpty");
    for fd in [master, slave] {
        // SAFETY: fcntl takes integers here; `fd` is open, by openpty.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
    }
    // SAFETY: openpty succeeded, so both are open and nobody else owns them.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

fn settings(fd: &OwnedFd) -> libc::termios {
    let mut settings = std::mem::MaybeUninit::uninit();
    // SAFETY: `fd` is an open terminal, and `settings` has room for one termios.
    let result = unsafe { libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) };
    assert_eq!(result, 0, "tcgetattr");
    // SAFETY: tcgetattr succeeded, so it has filled it.
    unsafe { settings.assume_init() }
}

#[test]
fn signals_stop_the_machine_in_order_and_restore_the_terminal() {
    if !kvm() {
        return;
    }
    for (scenario, seen) in [("hang", "halting"), ("spin", "spinning"), ("echo", "until q")] {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            let what = format!("signal {signal} in {scenario}");
            let image = Image::new();
            let mut command = minivmm();
            start(&mut command, Entry::Elf, &format!("scenario={scenario}")).args([
                "--timeout",
                "60",
                "--disk",
            ]);
            let mut session = Session::start(command.arg(image.disk("cache=none")));
            session.read_until(seen);
            assert!(session.is_raw(), "{what}: the terminal is not raw while the machine runs");
            kill(i32::try_from(session.child.id()).unwrap(), signal);
            assert_eq!(session.end(), (128 + signal, true), "{what}: (status, terminal restored)");
        }
    }
}

#[test]
fn the_terminal_is_restored_however_the_machine_ends() {
    if !kvm() {
        return;
    }
    let endings = [
        ("exit=7", "60", exit(7)),
        ("reset", "60", ORDERLY),
        ("poweroff", "60", ORDERLY),
        ("panic", "60", GUEST_PANIC),
        ("triple", "60", FAILURE),
        ("hang", "1", TIMED_OUT),
    ];
    for (scenario, timeout, status) in endings {
        let mut command = minivmm();
        start(&mut command, Entry::Pvh, &format!("scenario={scenario}")).args(["--timeout", timeout]);
        let session = Session::start(&mut command);
        assert_eq!(session.end(), (status, true), "{scenario}: (status, terminal restored)");
    }
}

#[test]
fn keys_on_a_terminal_reach_the_guest_and_control_a_x_ends_it() {
    if !kvm() {
        return;
    }
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=echo").args(["--timeout", "60"]);
    let mut session = Session::start(&mut command);
    session.read_until("until q");
    // Control-C and Control-D are the guest's, once the terminal is raw.
    session.terminal.write_all(b"ab\x03\x04cd").unwrap();
    session.read_until("ab\x03\x04cd");
    session.terminal.write_all(b"\x01h").unwrap();
    let help = session.read_until("Ctrl-A x");
    assert!(!help.contains('\x01'), "{help:?}");
    session.terminal.write_all(b"\x01x").unwrap();
    assert_eq!(session.end(), (ORDERLY, true), "(status, terminal restored)");
}
