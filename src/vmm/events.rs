//! What the main thread waits for: threads' reports, signals, standard input, deadlines.
//!
//! Owns the waiting. What an event means is `vmm`'s business.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::vcpu::End;

/// What a thread reports.
#[derive(Debug)]
pub enum Report {
    /// A vCPU has ended.
    Vcpu(u8, End),
    /// A vCPU's thread has panicked: an error of ours.
    Panicked(u8),
}

/// A thread's way to the main thread. A report is never lost, even if the thread panics.
#[derive(Debug)]
pub struct Reporter {
    reports: mpsc::Sender<Report>,
    wake: EventFd,
}

impl Reporter {
    /// Sends `report` and wakes the main thread.
    pub fn send(&self, report: Report) {
        // Neither can fail while the main thread waits; and when it does not, nobody wants to know.
        let _ = self.reports.send(report);
        let _ = self.wake.write(1);
    }
}

/// The main thread's end.
pub struct Reports {
    receiver: mpsc::Receiver<Report>,
    sender: mpsc::Sender<Report>,
    wake: EventFd,
}

impl Reports {
    /// No reports yet.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { receiver, sender, wake })
    }

    /// A way to here for one more thread.
    pub fn reporter(&self) -> io::Result<Reporter> {
        Ok(Reporter { reports: self.sender.clone(), wake: self.wake.try_clone()? })
    }

    /// The next report, if there is one.
    pub fn take(&self) -> Option<Report> {
        let _ = self.wake.read();
        self.receiver.try_recv().ok()
    }
}

impl AsRawFd for Reports {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Signals that end the VM in order.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Signals that end nothing: the terminal is ours again; the statistics are wanted.
const HARMLESS: [libc::c_int; 2] = [libc::SIGCONT, libc::SIGUSR1];

/// Whether this signal ends the VM, or whatever keeps it from ending.
pub fn is_ending(signal: libc::c_int) -> bool {
    ENDING.contains(&signal)
}

/// The ending signals, SIGCONT and SIGUSR1, as something to read: blocked in this thread and in all that it
/// starts, for as long as this lives.
pub struct Signals {
    fd: OwnedFd,
    old: libc::sigset_t,
}

impl Signals {
    /// Blocks them, and ignores SIGXFSZ. Called before any other thread is started. A SIGHUP that whoever started us has
    /// ignored (nohup) stays so.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        let mut old = MaybeUninit::uninit();
        // SAFETY: the sets are initialised by sigemptyset and by pthread_sigmask before they are
        // read; the other calls take numbers.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING.into_iter().chain(HARMLESS) {
                if signal != libc::SIGHUP || !is_ignored(signal) {
                    libc::sigaddset(set.as_mut_ptr(), signal);
                }
            }
            // A file that may not grow any more (RLIMIT_FSIZE) is an answer to a write, EFBIG, and no end.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), old.as_mut_ptr());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { fd: OwnedFd::from_raw_fd(fd), old: old.assume_init() })
        }
    }

    /// The next signal, if one has come.
    pub fn take(&self) -> Option<libc::c_int> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes a whole structure or nothing, and only a whole one is read.
        unsafe {
            let count = libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len);
            (usize::try_from(count) == Ok(len)).then(|| info.assume_init().ssi_signo.cast_signed())
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Signals {
    /// From here on a signal kills: nothing is left that would have to be ended in order.
    fn drop(&mut self) {
        // SAFETY: the set is the one that pthread_sigmask gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.old, std::ptr::null_mut()) };
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

/// Waits until one of `fds` can be read, or is at its end, or `timeout` has passed; says which can.
pub fn wait<const N: usize>(fds: [Option<RawFd>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let timeout_ms = timeout.map_or(-1, |timeout| {
        // Rounded up: a deadline has passed when we say so.
        i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    let count = libc::nfds_t::try_from(N).unwrap_or_default();
    // SAFETY: the pointer and the count are those of one array.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), count, timeout_ms) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|fd| fd.revents != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_wakes_whoever_waits() {
        let reports = Reports::new().unwrap();
        let fds = || [Some(reports.as_raw_fd()), None];
        assert_eq!(wait(fds(), Some(Duration::ZERO)).unwrap(), [false, false]);
        let reporter = reports.reporter().unwrap();
        std::thread::spawn(move || reporter.send(Report::Panicked(3))).join().unwrap();
        assert_eq!(wait(fds(), None).unwrap(), [true, false]);
        assert!(matches!(reports.take(), Some(Report::Panicked(3))));
        assert!(reports.take().is_none());
    }
}
