//! A pseudo-terminal, and a process on it: for tests of whoever puts its terminal into raw mode.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Opens a pseudo-terminal of 100 columns and 30 lines: (what a terminal's user has, what a program has).
pub fn open() -> (OwnedFd, OwnedFd) {
    let (mut user, mut program) = (-1, -1);
    let size = libc::winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the two integers are ours, the size is a whole structure; name and settings may be null.
    let result = unsafe {
        libc::openpty(
            &raw mut user,
            &raw mut program,
            std::ptr::null_mut(),
            std::ptr::null(),
            &raw const size,
        )
    };
    assert_eq!(result, 0, "openpty");
    for fd in [user, program] {
        // SAFETY: fcntl takes integers here; `fd` is open, by openpty.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
    }
    // SAFETY: openpty succeeded, so both are open and nobody else owns them.
    unsafe { (OwnedFd::from_raw_fd(user), OwnedFd::from_raw_fd(program)) }
}

/// Makes standard input the terminal that controls this process, in a session of its own: its keys then become
/// signals. For `pre_exec`.
pub fn take_control() -> std::io::Result<()> {
    // SAFETY: setsid and ioctl take numbers here, and may be called between fork and exec.
    unsafe {
        libc::setsid();
        libc::ioctl(0, libc::TIOCSCTTY, 0);
    }
    Ok(())
}

/// The terminal's modes.
#[derive(Debug, PartialEq, Eq)]
pub struct Modes {
    input: libc::tcflag_t,
    output: libc::tcflag_t,
    control: libc::tcflag_t,
    local: libc::tcflag_t,
    keys: [libc::cc_t; libc::NCCS],
}

impl Modes {
    /// Asks the terminal.
    pub fn of(terminal: &OwnedFd) -> Self {
        let mut found = std::mem::MaybeUninit::uninit();
        // SAFETY: the descriptor is an open terminal, and `found` has room for one termios.
        let result = unsafe { libc::tcgetattr(terminal.as_raw_fd(), found.as_mut_ptr()) };
        assert_eq!(result, 0, "tcgetattr");
        // SAFETY: tcgetattr succeeded, so it has filled it.
        let found = unsafe { found.assume_init() };
        Self {
            input: found.c_iflag,
            output: found.c_oflag,
            control: found.c_cflag,
            local: found.c_lflag,
            keys: found.c_cc,
        }
    }

    /// Returns whether the terminal is raw: neither lines, echo nor signals.
    pub fn is_raw(&self) -> bool {
        self.local & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }
}

/// Waits until `done`.
#[track_caller]
pub fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what}: not in 30 s");
}

/// Whether the process is stopped, all its threads.
pub fn is_stopped(pid: i32) -> bool {
    let state = |stat: std::io::Result<String>| {
        let stat = stat.unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().all(|task| state(std::fs::read_to_string(task.path().join("stat"))))
}
