//! The user's terminal as the guest's hvc0: a virtio console beside the serial port.
//!
//! Owns the path of typed bytes, the terminal's size, and the choice between hvc0 and the serial port. The
//! guest's first output on hvc0 decides: it shows that a program reads there. Until then typed bytes wait,
//! but not for ever: a guest without a driver for hvc0 gets them through its serial port.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::input::Console;
use crate::console::ConsoleDevice;
use crate::console::stream::{Sink, Source};
use crate::console::window::{Window, WindowSize};
use crate::terminal;

/// How long typed bytes wait for a program on hvc0.
const HOLD: Duration = Duration::from_secs(10);

/// Our end of hvc0.
pub struct HvcEnd {
    input: File,
    window: Arc<Window>,
}

/// Where typed bytes go at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// To hvc0.
    Hvc,
    /// Nowhere yet: they wait.
    Wait,
    /// To the serial port.
    Serial,
}

/// Makes the device, and our end of it.
pub fn console() -> io::Result<(ConsoleDevice, HvcEnd)> {
    let (from_us, input) = io::pipe()?;
    let input = OwnedFd::from(input);
    // Non-blocking: a guest that does not read must not block the main thread.
    // SAFETY: the call sets a flag of a descriptor that only this function owns.
    if unsafe { libc::fcntl(input.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let (device, window) =
        ConsoleDevice::terminal(Source::new(from_us)?, Sink::new(stdout)?, size().unwrap_or_default())?;
    Ok((device, HvcEnd { input: input.into(), window }))
}

/// Hands typed bytes to hvc0 if they belong there. Returns `Some(true)` if the caller must try again soon,
/// and `Some(false)` if nothing waits. Returns `None` if the bytes belong to the serial port.
pub fn serve(end: Option<&HvcEnd>, console: &mut Console, guest_start: Instant) -> Option<bool> {
    if !console.has_waiting() {
        return Some(false);
    }
    let end = end?;
    match end.way(guest_start.elapsed()) {
        Way::Serial => None,
        Way::Wait => Some(true),
        Way::Hvc => {
            console.hand_over(|bytes| end.offer(bytes));
            Some(console.has_waiting())
        }
    }
}

fn size() -> Option<WindowSize> {
    terminal::size().map(|(columns, rows)| WindowSize { columns, rows })
}

impl HvcEnd {
    /// Reports the terminal's current size to the guest.
    pub fn follow_terminal(&self) {
        if let Some(size) = size() {
            self.window.resize(size);
        }
    }

    /// Returns where typed bytes go when `since_start` has passed since the guest's start.
    fn way(&self, since_start: Duration) -> Way {
        match self.window.has_output() {
            true => Way::Hvc,
            false if since_start < HOLD => Way::Wait,
            false => Way::Serial,
        }
    }

    /// Offers bytes to the device, and returns how many were taken.
    fn offer(&self, bytes: &[u8]) -> usize {
        // A full pipe takes none; they are offered again later.
        (&self.input).write(bytes).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_waits_for_a_while_and_then_goes_to_the_serial_port() {
        let (_device, end) = console().unwrap();
        assert_eq!(end.way(Duration::ZERO), Way::Wait);
        assert_eq!(end.way(HOLD), Way::Serial);
    }

    #[test]
    fn a_guest_that_reads_nothing_stops_nobody() {
        let (_device, end) = console().unwrap();
        let mut taken = 0;
        loop {
            match end.offer(&[b'x'; 4096]) {
                0 => break,
                count => taken += count,
            }
        }
        assert!(taken > 0);
    }
}
