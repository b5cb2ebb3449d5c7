//! Signals, any number and of any kind: the first one decides the status, and none keeps minivmm from its ending.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use minivmm_testkit::machine::*;
use minivmm_testkit::signalled::{Chance, with_default_signals};
use serde_json::Value;

/// A guest that hangs, with a disk and a status file.
fn hanging(image: &Image, status_file: &Path) -> Command {
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=hang").args(["--console", "stdio", "--timeout", "60"]);
    command.arg("--status-file").arg(status_file).arg("--disk").arg(image.disk("cache=writeback"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// What the status file says: the exit status, when it was a signal that ended the VM.
#[track_caller]
fn signal_status(file: &Path, what: &str) -> i32 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let status: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{what}: {text:?}"));
    assert_eq!(status["cause"], "signal", "{what}: {text}");
    i32::try_from(status["exit_status"].as_i64().unwrap()).unwrap()
}

fn pid(child: &Child) -> i32 {
    i32::try_from(child.id()).unwrap()
}

/// GNU timeout signals its child and then the child's group: two signals, one directly after the other.
#[test]
fn gnu_timeout_finds_143_and_a_whole_status_file_every_time() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    for round in 0..25 {
        let file = image.path.with_file_name(format!("{round}.json"));
        let command = hanging(&image, &file);
        let mut timeout = Command::new("timeout");
        timeout.args(["--preserve-status", "-s", "TERM", &format!("0.{:02}", 15 + round)]);
        timeout.arg(command.get_program()).args(command.get_args());
        let status = timeout.stdin(Stdio::null()).output().unwrap().status;
        if file.exists() {
            assert_eq!(status.code(), Some(143), "round {round}: {status}");
            assert_eq!(signal_status(&file, "timeout"), 143, "round {round}");
        } else {
            // So slow a machine that minivmm's first line was not reached.
            assert!(status.code() == Some(143), "round {round}: {status}");
        }
    }
}

#[test]
fn a_burst_of_signals_at_any_moment_ends_it_in_order_with_the_first() {
    if !kvm() {
        return;
    }
    // A process that signals itself to death before its first line has nothing to put in order.
    let ended_early = |status: ExitStatus, file: &Path| status.signal().is_some() && !file.exists();
    let kinds = [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGALRM,
        libc::SIGUSR2,
        libc::SIGXCPU,
        libc::SIGRTMAX(),
        // These end nothing.
        libc::SIGUSR1,
        libc::SIGPIPE,
        libc::SIGCONT,
    ];
    let image = Image::new();
    let mut in_order = 0;
    for seed in 1..=60_u64 {
        let mut chance = Chance::new(seed);
        let file = image.path.with_file_name(format!("{seed}.json"));
        let mut command = hanging(&image, &file);
        let mut child = with_default_signals(&mut command).spawn().unwrap();
        let _watchdog = Watchdog::over(&child);
        std::thread::sleep(Duration::from_micros(chance.below(250_000)));
        // The kernel hands over those that are there at the same time by their numbers: the lowest is first.
        kill(pid(&child), libc::SIGHUP);
        for _ in 0..chance.below(40) {
            // The child is not reaped before `wait`, so its number is its own.
            kill(pid(&child), kinds[usize::try_from(chance.below(kinds.len() as u64)).unwrap()]);
            std::thread::sleep(Duration::from_micros(chance.below(600)));
        }
        let status = child.wait().unwrap();
        if ended_early(status, &file) {
            continue;
        }
        in_order += 1;
        assert_eq!(status.code(), Some(128 + libc::SIGHUP), "seed {seed}: {status}");
        assert_eq!(signal_status(&file, "a burst"), 128 + libc::SIGHUP, "seed {seed}");
    }
    assert!(in_order > 30, "only {in_order} of 60 had begun");
}

#[test]
fn a_start_that_hangs_is_ended_by_a_signal_and_says_so() {
    let directory = scratch();
    let (fifo, file) = (directory.path().join("fifo"), directory.path().join("status.json"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=hang").arg("--status-file").arg(&file);
    // Opening it waits for a reader.
    command.arg("--console").arg(format!("file={}", fifo.display()));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    while !file.exists() {
        assert!(child.try_wait().unwrap().is_none(), "ended before it began");
        std::thread::sleep(Duration::from_millis(1));
    }
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGTERM, libc::SIGALRM] {
        kill(pid(&child), signal);
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = child.wait().unwrap();
    if kvm() {
        assert!([130, 142, 143].contains(&status.code().unwrap()), "{status}");
        assert_eq!(signal_status(&file, "a start that hangs"), status.code().unwrap());
    }
}

/// Nobody reads standard error, whose pipe is full.
#[test]
fn a_reader_that_does_not_read_keeps_the_status_file_from_nothing() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let file = image.path.with_file_name("status.json");
    let (reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: fcntl takes a descriptor that is open, and numbers.
    unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&writer), libc::F_SETPIPE_SZ, 4096) };
    std::io::Write::write_all(&mut writer, &[b'x'; 4096]).unwrap();
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=hang").args(["--console", "off", "--status-file"]);
    // A command's end by a signal is told on standard error.
    command.arg(&file).args(["--disk", &image.disk("cache=writeback"), "--", "true"]);
    // A command needs an initrd, which this guest does not look at.
    let initrd = image.path.with_file_name("initrd");
    fs::write(&initrd, [0; 512]).unwrap();
    let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let args = args.iter().map(|arg| if arg == "none" { initrd.as_os_str() } else { arg });
    let mut command = minivmm();
    let mut child =
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    kill(pid(&child), libc::SIGTERM);
    let status = child.wait().unwrap();
    drop(reader);
    assert_eq!(status.code(), Some(143), "{status}");
    assert_eq!(signal_status(&file, "a pipe that is full"), 143);
    assert!(begun.elapsed() < PATIENCE);
}
