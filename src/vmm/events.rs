//! The events that the main thread waits for: reports of threads, signals, standard input, deadlines.
//!
//! Owns the waiting. `vmm` decides what an event means.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::vcpu::End;

/// A thread's report to the main thread.
#[derive(Debug)]
pub enum ThreadReport {
    /// This vCPU ended.
    Vcpu(u8, End),
    /// This vCPU's thread panicked, which is an error in minivmm.
    Panicked(u8),
}

/// A thread's channel to the main thread. A report is never lost, even if the thread panics.
#[derive(Debug)]
pub struct Reporter {
    reports: mpsc::Sender<ThreadReport>,
    wake: EventFd,
}

impl Reporter {
    /// Sends `report` and wakes the main thread.
    pub fn send(&self, report: ThreadReport) {
        // Neither call can fail while the main thread waits. Once it no longer waits, nobody needs the
        // report.
        let _ = self.reports.send(report);
        let _ = self.wake.write(1);
    }
}

/// The main thread's end of the channel.
pub struct Reports {
    receiver: mpsc::Receiver<ThreadReport>,
    sender: mpsc::Sender<ThreadReport>,
    wake: EventFd,
}

impl Reports {
    /// Creates the channel, without reports.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { receiver, sender, wake })
    }

    /// Returns a sending end for one more thread.
    pub fn reporter(&self) -> io::Result<Reporter> {
        Ok(Reporter { reports: self.sender.clone(), wake: self.wake.try_clone()? })
    }

    /// Returns the next report, or `None` if there is none.
    pub fn take(&self) -> Option<ThreadReport> {
        let _ = self.wake.read();
        self.receiver.try_recv().ok()
    }
}

impl AsRawFd for Reports {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Waits until one of `fds` is readable or at its end, or until `timeout` has passed. Returns which of `fds`
/// are ready; a signal makes it return early, with none.
pub fn wait<const N: usize>(fds: [Option<RawFd>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let timeout_ms = timeout.map_or(-1, |timeout| {
        // Rounded up, so that a deadline has passed when this returns.
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
        std::thread::spawn(move || reporter.send(ThreadReport::Panicked(3))).join().unwrap();
        assert_eq!(wait(fds(), None).unwrap(), [true, false]);
        assert!(matches!(reports.take(), Some(ThreadReport::Panicked(3))));
        assert!(reports.take().is_none());
    }
}
