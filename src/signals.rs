//! The signals that ask this process to end. They are blocked from its first instruction to its last, and read.
//!
//! Owns the list of these signals. Owns the rule that none of them is lost or kills the process: not while a VM
//! is being built or stopped, and not between its end and the exit. What a signal ends is decided elsewhere.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::sync::unpoisoned;

/// Signals that anybody may send and that kill by default. Not among them: SIGKILL; signals that report an
/// error of the program itself (SIGSEGV and the like, SIGABRT, SIGTRAP, SIGSYS); SIGPIPE, which Rust ignores;
/// SIGXFSZ, which [`Signals::block`] ignores; SIGUSR1.
const ENDING: [libc::c_int; 12] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGUSR2,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
];

/// Signals that are also read, but end nothing.
const HARMLESS: [libc::c_int; 3] = [libc::SIGCONT, libc::SIGUSR1, libc::SIGWINCH];

/// How long a starting process has to reach the point where it reads its signals itself.
const START_GRACE: Duration = Duration::from_secs(2);

/// A signal that has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// The number of the signal.
    pub number: libc::c_int,
    /// `true` if the kernel sent it because a key was pressed on our terminal.
    pub typed: bool,
}

impl Arrived {
    /// Returns `true` if the signal asks the process to end.
    pub fn is_ending(self) -> bool {
        ENDING.contains(&self.number) || real_time().contains(&self.number)
    }
}

/// Returns the real-time signals that end the process; they kill by default, too. The first one is left out,
/// because it interrupts vCPUs (`vmm`).
fn real_time() -> std::ops::RangeInclusive<libc::c_int> {
    libc::SIGRTMIN() + 1..=libc::SIGRTMAX()
}

/// The blocked signals, as a descriptor to read. Threads that are started later inherit the blocked signals. So
/// does a program that replaces this one (`program::replace`): a signal that arrives meanwhile stays pending
/// for it.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
    set: libc::sigset_t,
    starting: Mutex<Option<Starting>>,
}

/// The thread that waits for a signal while the main thread is busy starting.
#[derive(Debug)]
struct Starting {
    thread: JoinHandle<()>,
    over: EventFd,
}

impl Signals {
    /// Blocks the signals, and ignores SIGXFSZ and SIGPIPE. Call it before any other thread is started. If
    /// whoever started us ignored a signal (nohup ignores SIGHUP), it stays ignored, except SIGTERM and SIGINT.
    pub fn block() -> io::Result<Self> {
        let set = set_of(ENDING.into_iter().chain(HARMLESS).chain(real_time()));
        // SAFETY: the calls take numbers, and a set that is initialised.
        unsafe {
            // With these ignored, writing to a file that may not grow (RLIMIT_FSIZE) fails with EFBIG. Writing to a
            // pipe without a reader fails with EPIPE.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
        }
        Ok(Self { fd: signalfd(&set)?, set, starting: Mutex::new(None) })
    }

    /// Restores the default effect of the signals, including those that have arrived meanwhile. For a command
    /// that has nothing to clean up: a signal then kills it, as it kills `cat`.
    pub fn release(self) {
        // SAFETY: the set is initialised, and only read.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const self.set, std::ptr::null_mut()) };
    }

    /// Returns the next signal that has arrived; `None` if there is none. If several are pending, the lowest
    /// number comes first, because the kernel does not keep their order.
    pub fn take(&self) -> Option<Arrived> {
        take(self.fd.as_fd())
    }

    /// Waits for a signal in a separate thread until [`Self::started`]. Building a VM may take long
    /// (`host-cache=warm`), or for ever (a FIFO that nobody opens). After an ending signal the start has two
    /// seconds to finish; [`Self::take`] then returns the signal. After that, `end` is called with the signal's
    /// number and must end the process.
    pub fn while_starting(&self, end: impl FnOnce(libc::c_int) + Send + 'static) -> io::Result<()> {
        let ending = signalfd(&set_of(ENDING.into_iter().chain(real_time())))?;
        let over = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let end_of_start = over.try_clone()?;
        // This thread allocates from the first arena, like all threads in the sandbox (`sandbox::arm`).
        // SAFETY: sets a number of the allocator's; no other thread is there yet.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        let thread = thread::Builder::new().name("start".into()).spawn(move || {
            if is_over(&end_of_start, Some(&ending), None) || is_over(&end_of_start, None, Some(START_GRACE))
            {
                return;
            }
            if let Some(arrived) = take(ending.as_fd()) {
                end(arrived.number);
            }
        })?;
        *unpoisoned(self.starting.lock()) = Some(Starting { thread, over });
        Ok(())
    }

    /// Ends the thread of [`Self::while_starting`], if there is one. From now on, the caller of [`Self::take`]
    /// must call it soon.
    pub fn started(&self) {
        if let Some(starting) = unpoisoned(self.starting.lock()).take() {
            // The write fails only if the counter would overflow.
            let _ = starting.over.write(1);
            let _ = starting.thread.join();
        }
    }

    /// Reads the signals in a separate thread from now on. The first ending signal sets the [`Stop`] that is
    /// returned. If the process still exists after `limit`, `end` is called with the signal's number and must
    /// end the process. Later signals have no effect.
    pub fn into_stop(
        self,
        limit: Duration,
        end: impl FnOnce(libc::c_int) + Send + 'static,
    ) -> io::Result<Stop> {
        let stop = Stop::default();
        let told = stop.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            let first = loop {
                wait([Some(self.fd.as_raw_fd())], None);
                if let Some(arrived) = self.take().filter(|arrived| arrived.is_ending()) {
                    break arrived.number;
                }
            };
            told.first.store(first, Ordering::SeqCst);
            told.flag.store(true, Ordering::SeqCst);
            thread::sleep(limit);
            end(first);
        })?;
        Ok(stop)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Whether everything is to stop, and because of which signal.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    flag: Arc<AtomicBool>,
    first: Arc<AtomicI32>,
}

impl Stop {
    /// Returns the flag, which is `true` from the first ending signal on.
    pub fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    /// Returns the first ending signal; `None` if none has arrived.
    pub fn signal(&self) -> Option<libc::c_int> {
        // `first` is stored before the flag.
        self.flag.load(Ordering::SeqCst).then(|| self.first.load(Ordering::SeqCst))
    }
}

/// Returns the given signals without those that are ignored, but always with SIGTERM and SIGINT. A shell
/// without job control makes its background processes ignore those two, and its user still wants to end them.
fn set_of(signals: impl Iterator<Item = libc::c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the other calls take numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            if matches!(signal, libc::SIGTERM | libc::SIGINT) || !is_ignored(signal) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
        }
        set.assume_init()
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only asks; the structure is plain data, for which zero is a value.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

fn signalfd(set: &libc::sigset_t) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised, and only read; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::signalfd(-1, set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn take(fd: BorrowedFd<'_>) -> Option<Arrived> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    let len = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the kernel writes a whole structure or nothing, and only a whole one is read.
    let info = unsafe {
        let count = libc::read(fd.as_raw_fd(), info.as_mut_ptr().cast(), len);
        (usize::try_from(count) == Ok(len)).then(|| info.assume_init())?
    };
    Some(Arrived { number: info.ssi_signo.cast_signed(), typed: info.ssi_code == libc::SI_KERNEL })
}

/// Waits until the start is over, a signal has arrived, or the time has passed. Returns `true` if the start is
/// over.
fn is_over(over: &EventFd, ending: Option<&OwnedFd>, timeout: Option<Duration>) -> bool {
    let [over, _] = wait([Some(over.as_raw_fd()), ending.map(AsRawFd::as_raw_fd)], timeout);
    over
}

/// Waits until one of the descriptors can be read or the time has passed. Returns which can be read.
fn wait<const N: usize>(fds: [Option<RawFd>; N], timeout: Option<Duration>) -> [bool; N] {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let timeout_ms = timeout.map_or(-1, |it| i32::try_from(it.as_millis()).unwrap_or(i32::MAX));
    let count = libc::nfds_t::try_from(N).unwrap_or_default();
    // SAFETY: the pointer and the count are those of one array. The signals that could interrupt it are blocked.
    unsafe { libc::poll(polled.as_mut_ptr(), count, timeout_ms) };
    polled.map(|fd| fd.revents != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_would_kill_ends_in_order_but_those_of_our_own_errors() {
        let arrived = |number| Arrived { number, typed: false };
        let own = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGABRT,
            libc::SIGTRAP,
            libc::SIGSYS,
        ];
        // signal(7): signals that do not end the process by default, or cannot be blocked.
        let harmless = [
            libc::SIGCHLD,
            libc::SIGCONT,
            libc::SIGURG,
            libc::SIGWINCH,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
            libc::SIGSTOP,
            libc::SIGKILL,
            libc::SIGPIPE,
            libc::SIGXFSZ,
            libc::SIGUSR1,
        ];
        for number in 1..=31 {
            let spared = own.contains(&number) || harmless.contains(&number);
            assert_eq!(arrived(number).is_ending(), !spared, "signal {number}");
        }
        assert!(arrived(libc::SIGRTMAX()).is_ending() && !arrived(libc::SIGRTMIN()).is_ending());
    }
}
