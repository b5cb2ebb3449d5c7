//! The console on a pseudo-terminal: raw mode, keys, signals, and the terminal put back.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use minivmm_testkit::machine::*;
use minivmm_testkit::pty::{self, Modes, is_stopped, wait_until};
use minivmm_testkit::signalled::with_default_signals;

/// A pseudo-terminal with a machine on it.
pub struct Session {
    child: Child,
    terminal: File,
    /// Keeps the terminal and its settings alive when the child is gone.
    slave: OwnedFd,
    before: Modes,
    #[allow(dead_code, reason = "it watches while the session lives")]
    watchdog: Watchdog,
}

impl Session {
    pub fn start(command: &mut Command) -> Self {
        let (terminal, slave) = pty::open();
        let before = Modes::of(&slave);
        let io = || Stdio::from(slave.try_clone().unwrap());
        let child = with_default_signals(command)
            .args(["--console", "stdio"])
            .stdin(io())
            .stdout(io())
            .stderr(io())
            .spawn()
            .unwrap();
        let watchdog = Watchdog::over(&child);
        Self { child, terminal: File::from(terminal), slave, before, watchdog }
    }

    /// Reads until `text` has come; returns all that was read.
    #[track_caller]
    pub fn read_until(&mut self, text: &str) -> String {
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

    /// Types.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.terminal.write_all(keys).unwrap();
    }

    /// Waits a little for output.
    fn readable(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.terminal.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `poll` is one valid pollfd, for the length of the call.
        unsafe { libc::poll(&raw mut poll, 1, 100) == 1 }
    }

    fn is_raw(&self) -> bool {
        Modes::of(&self.slave).is_raw()
    }

    /// The exit status, once the machine has ended and its last words are read.
    pub fn end(mut self) -> (i32, bool) {
        let mut last_words = [0; 1024];
        let status = loop {
            if self.readable() {
                let _ = self.terminal.read(&mut last_words).unwrap();
            } else if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
        };
        let restored = Modes::of(&self.slave) == self.before;
        (status.code().unwrap_or_else(|| panic!("not ended in order: {status}")), restored)
    }
}

#[test]
fn signals_stop_the_machine_in_order_and_restore_the_terminal() {
    if !kvm() {
        return;
    }
    for (scenario, seen) in [("hang", "halting"), ("spin", "spinning"), ("echo", "until q")] {
        // All kinds in one scenario, and those that are sent every day in all.
        let rare = [
            libc::SIGQUIT,
            libc::SIGALRM,
            libc::SIGUSR2,
            libc::SIGVTALRM,
            libc::SIGPROF,
            libc::SIGIO,
            libc::SIGPWR,
            libc::SIGSTKFLT,
            libc::SIGXCPU,
            libc::SIGRTMIN() + 1,
            libc::SIGRTMAX(),
        ];
        let rare = if scenario == "hang" { &rare[..] } else { &[] };
        for &signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP].iter().chain(rare) {
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
            let pid = i32::try_from(session.child.id()).unwrap();
            kill(pid, signal);
            // What comes after the first one changes nothing. (Where both are there before minivmm has run, the
            // lower number is taken first.) The child is not reaped before `end`.
            let later = [libc::SIGQUIT, libc::SIGALRM, libc::SIGTERM, libc::SIGUSR2, libc::SIGRTMAX()];
            for more in later.into_iter().filter(|&more| more >= signal).chain([libc::SIGUSR1, libc::SIGPIPE])
            {
                kill(pid, more);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            assert_eq!(session.end(), (128 + signal, true), "{what}: (status, terminal restored)");
        }
    }
}

#[test]
fn a_signal_that_kills_leaves_no_raw_terminal() {
    if !kvm() {
        return;
    }
    for sandbox in ["on", "off"] {
        for signal in [libc::SIGSEGV, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS] {
            let mut command = minivmm();
            start(&mut command, Entry::Elf, "scenario=hang").args(["--timeout", "60", "--sandbox", sandbox]);
            let mut session = Session::start(&mut command);
            session.read_until("halting");
            assert!(session.is_raw());
            kill(i32::try_from(session.child.id()).unwrap(), signal);
            session.child.wait().unwrap();
            assert!(!session.is_raw(), "signal {signal} with --sandbox={sandbox}");
        }
    }
}

#[test]
fn only_a_key_ends_the_wait_for_a_disk_that_hangs_and_no_signal_does() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=io").args(["--timeout", "1", "--disk"]);
    command.arg(image.disk("cache=writeback,fault=delay=300s:flush"));
    // SAFETY: what it calls may be called between fork and exec.
    unsafe { command.pre_exec(pty::take_control) };
    let mut session = Session::start(command.args(["--stop-timeout", "100"]));
    session.read_until("Ctrl-C on the terminal gives up now");
    let pid = i32::try_from(session.child.id()).unwrap();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGALRM].repeat(5) {
        kill(pid, signal);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(session.child.try_wait().unwrap().is_none(), "signal {signal} has ended it");
    }
    session.type_in(b"\x03");
    session.read_until("gave up waiting for requests in flight");
    assert_eq!(session.end(), (FAILURE, true), "(status, terminal restored)");
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
    session.type_in(b"ab\x03\x04cd");
    session.read_until("ab\x03\x04cd");
    session.type_in(b"\x01h");
    let help = session.read_until("Ctrl-A x");
    assert!(!help.contains('\x01'), "{help:?}");
    session.type_in(b"\x01x");
    assert_eq!(session.end(), (ORDERLY, true), "(status, terminal restored)");
}

#[test]
fn a_signal_that_stops_it_gives_the_terminal_back_until_it_goes_on() {
    if !kvm() {
        return;
    }
    for sandbox in ["on", "off"] {
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=echo").args(["--timeout", "60", "--sandbox", sandbox]);
        let mut session = Session::start(&mut command);
        session.read_until("until q");
        let pid = i32::try_from(session.child.id()).unwrap();
        for (signal, key) in [(libc::SIGTSTP, "a"), (libc::SIGTTIN, "b"), (libc::SIGTTOU, "c")].repeat(3) {
            let what = format!("signal {signal} with --sandbox={sandbox}");
            assert!(session.is_raw(), "{what}");
            kill(pid, signal);
            wait_until(|| is_stopped(pid), &what);
            assert_eq!(Modes::of(&session.slave), session.before, "{what}: the terminal while it is stopped");
            kill(pid, libc::SIGCONT);
            wait_until(|| session.is_raw(), &what);
            session.type_in(key.as_bytes());
            session.read_until(key);
        }
        session.type_in(b"\x01x");
        assert_eq!(session.end(), (ORDERLY, true), "(status, terminal restored)");
    }
}

/// A shell stops it, continues it in the background, and gives it the terminal back.
#[test]
fn in_the_background_it_waits_for_its_terminal_and_leaves_the_modes_alone() {
    if !kvm() {
        return;
    }
    let mut shell = Command::new("bash");
    // A shell sends no SIGCONT to a job of which it has not yet heard that it has stopped: `fg` waits for that.
    let script = r#"set -m; "$@"; echo "stopped by $(($? - 128))"; bg; echo continued
        until jobs -s | grep -q .; do sleep 0.05; done; echo "stopped again"; read -r; fg; exit $?"#;
    shell.args(["-c", script, "bash"]);
    shell.arg(binary());
    start(&mut shell, Entry::Elf, "scenario=echo").args(["--timeout", "60"]);
    // SAFETY: what it calls may be called between fork and exec.
    unsafe { shell.pre_exec(pty::take_control) };
    let mut session = Session::start(&mut shell);
    session.read_until("until q");
    assert!(session.is_raw());
    let shell = session.child.id();
    let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
    let pid: i32 = children.split_whitespace().next().unwrap().parse().unwrap();
    kill(pid, libc::SIGTSTP);
    session.read_until(&format!("stopped by {}", libc::SIGSTOP));
    session.read_until("continued");
    session.read_until("stopped again");
    assert!(is_stopped(pid), "it wants the terminal");
    assert_eq!(Modes::of(&session.slave), session.before, "the terminal is the shell's");
    session.type_in(b"\n");
    wait_until(|| session.is_raw(), "it is in the foreground again");
    session.type_in(b"x");
    session.read_until("x");
    session.type_in(b"q");
    assert_eq!(session.end(), (exit(0x21), true), "(status, terminal restored)");
}
