//! The user's terminal: in raw mode while a guest uses it, and restored whatever happens.
//!
//! Owns the terminal's modes and their restoration: at the end, when a thread panics, when a fatal signal kills
//! this process, and while a signal stops it. Typed input is read elsewhere.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

const STDIN: libc::c_int = libc::STDIN_FILENO;

/// The modes to restore. A signal handler reads this, so it is written once and never freed.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// `true` while the terminal is in raw mode.
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that report an error of the program itself, and kill it. All others belong to `signals`.
const FATAL: [libc::c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

/// The earlier action of each fatal signal. Rust's own handler reports an overflowed stack.
static BEFORE: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// Signals that stop a process and can be handled. SIGSTOP cannot.
const STOPPING: [libc::c_int; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
/// `true` if a stopping signal is left to [`take_stop`], because more than the modes must be restored first.
static DEFERRED: AtomicBool = AtomicBool::new(false);
/// `true` while a stopping signal waits for [`take_stop`].
static STOP_ASKED: AtomicBool = AtomicBool::new(false);

/// Raw mode, which lasts until this value is dropped.
#[derive(Debug)]
pub struct RawMode(());

/// The kind of standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// A terminal in whose foreground we run: Ctrl-A is our key.
    Terminal,
    /// A terminal that another job has. Reading it, or changing its modes, would stop us.
    Background,
    /// A file, a pipe or /dev/null. All bytes pass unchanged.
    Stream,
}

/// Returns the terminal's columns and rows. `None` if no standard stream is a terminal that knows them.
pub fn size() -> Option<(u16, u16)> {
    let mut window = MaybeUninit::<libc::winsize>::zeroed();
    [STDIN, libc::STDOUT_FILENO].into_iter().find_map(|fd| {
        // SAFETY: the kernel fills the structure, for whose plain data zero is a value too.
        let asked = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, window.as_mut_ptr()) };
        // SAFETY: as above.
        let window = unsafe { window.assume_init() };
        (asked == 0 && window.ws_col > 0 && window.ws_row > 0).then_some((window.ws_col, window.ws_row))
    })
}

/// Finds out what standard input is.
pub fn input() -> Input {
    // SAFETY: three questions about a descriptor and about this process, without memory.
    let (is_terminal, foreground, own) =
        unsafe { (libc::isatty(STDIN) == 1, libc::tcgetpgrp(STDIN), libc::getpgrp()) };
    match is_terminal {
        false => Input::Stream,
        // -1 means a terminal that is not our controlling terminal, so job control does not apply.
        true if foreground == own || foreground == -1 => Input::Terminal,
        true => Input::Background,
    }
}

impl RawMode {
    /// Puts the terminal on standard input into raw mode. Output processing stays on, so that our own messages
    /// look right.
    pub fn enter() -> io::Result<Self> {
        let now = current()?;
        let saved = *SAVED.get_or_init(|| now);
        install_restorers();
        RAW.store(true, Ordering::SeqCst);
        set(&raw(saved))?;
        Ok(Self(()))
    }

    /// Enters raw mode again after the process was stopped and continued. In the background this stops the
    /// process (SIGTTOU) until its job has the terminal again.
    pub fn renew(&self) {
        let Some(saved) = SAVED.get() else { return };
        RAW.store(true, Ordering::SeqCst);
        if let Err(error) = set(&raw(*saved)) {
            RAW.store(false, Ordering::SeqCst);
            log::warn!("cannot put the terminal into raw mode again: {error}");
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the modes, if they are raw. Safe to call at any time, even in a signal handler.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        // SAFETY: tcsetattr(3) is async-signal-safe and only reads the structure.
        unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, saved) };
    }
}

/// Leaves every signal that stops the process to [`take_stop`] from now on.
pub fn defer_stops() {
    DEFERRED.store(true, Ordering::SeqCst);
    handle_stops();
}

/// Returns `true` once for each pending request to stop the process. The caller then restores the terminal and
/// calls [`stop`].
pub fn take_stop() -> bool {
    STOP_ASKED.swap(false, Ordering::SeqCst)
}

/// Stops the process, and returns when it is continued. Safe to call in a signal handler.
pub fn stop() {
    // SAFETY: raise(3) is async-signal-safe, and takes a number.
    unsafe { libc::raise(libc::SIGSTOP) };
}

fn raw(saved: libc::termios) -> libc::termios {
    let mut modes = saved;
    // SAFETY: changes the fields of the structure it is given, nothing else.
    unsafe { libc::cfmakeraw(&raw mut modes) };
    modes.c_oflag = saved.c_oflag;
    modes
}

fn current() -> io::Result<libc::termios> {
    let mut modes = MaybeUninit::uninit();
    // SAFETY: the pointer is to a termios; it is taken as initialised only if the call succeeded.
    unsafe {
        if libc::tcgetattr(STDIN, modes.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(modes.assume_init())
    }
}

/// Returns a C structure of zeroes. Only for the structures of this file.
fn zeroed<T: Copy>() -> T {
    // SAFETY: termios and sigaction are plain data, for which zero is a value (no handler, no flags).
    unsafe { std::mem::zeroed() }
}

fn set(modes: &libc::termios) -> io::Result<()> {
    // SAFETY: only reads the structure.
    match unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, modes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn install_restorers() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            next(info);
        }));
        handle_stops();
        for (signal, before) in FATAL.into_iter().zip(&BEFORE) {
            // The sandbox has its own handler, which restores the terminal too.
            if signal == libc::SIGSYS && is_handled(signal) {
                continue;
            }
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = on_fatal as *const () as libc::sighandler_t;
            // On the alternative stack, because the stack may have overflowed.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let mut old = zeroed();
            // SAFETY: both are whole structures; the handler calls async-signal-safe functions only.
            if unsafe { libc::sigaction(signal, &raw const action, &raw mut old) } == 0 {
                let _ = before.set(old);
            }
        }
    });
}

/// Handles the signals that stop the process. A signal that whoever started us ignored stays ignored.
fn handle_stops() {
    for signal in STOPPING.into_iter().filter(|signal| !is_handled(*signal)) {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = on_stop as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: the structure is whole; the handler calls async-signal-safe functions only.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
}

/// Returns `true` if the signal's action is not the default.
fn is_handled(signal: libc::c_int) -> bool {
    let mut action: libc::sigaction = zeroed();
    // SAFETY: only asks; the structure is whole.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction != libc::SIG_DFL
    }
}

/// Restores the terminal and stops the process. SIGCONT is read elsewhere, and makes the terminal raw again.
extern "C" fn on_stop(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel hands a siginfo_t.
    let is_of_kernel = unsafe { (*info).si_code } > 0;
    // The kernel sends SIGTTIN and SIGTTOU to a background job. The terminal and its modes then belong to
    // another job.
    let is_ours = signal == libc::SIGTSTP || !is_of_kernel;
    if is_ours && DEFERRED.load(Ordering::SeqCst) {
        STOP_ASKED.store(true, Ordering::SeqCst);
        return;
    }
    if is_ours {
        restore();
    }
    stop();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Restores the terminal. A fault then recurs, because its instruction is retried, and reaches the earlier
/// handler. A signal that was sent does not recur, so it kills here.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    let before = FATAL.iter().zip(&BEFORE).find(|(number, _)| **number == signal);
    // SAFETY: all calls are async-signal-safe; the kernel hands a siginfo_t; the action is one that
    // sigaction gave.
    unsafe {
        match before.and_then(|(_, before)| before.get()) {
            Some(action) if (*info).si_code > 0 => {
                libc::sigaction(signal, action, std::ptr::null_mut());
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}
