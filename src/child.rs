//! A child process, watched.
//!
//! Owns the wait that three things may end: the process itself, its time, and a stop of all.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How often it is looked whether all is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What has ended a child, or the wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Itself.
    ByItself,
    /// All was to stop.
    Interrupted,
    /// Its time was over.
    Late,
}

/// Waits until the process has ended by itself, or must not go on. It is not waited for in the sense of wait(2):
/// its number stays its own.
pub fn watch(process: Pid, deadline: Instant, stop: &AtomicBool) -> io::Result<How> {
    let pidfd = pidfd_open(process, PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(LOOK_EVERY);
        let left = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(How::ByItself),
            Err(errno) => return Err(errno.into()),
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(How::Interrupted);
        }
        if Instant::now() >= deadline {
            return Ok(How::Late);
        }
    }
}
