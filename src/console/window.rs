//! The size of the terminal that a console stands for (virtio 5.3.4, VIRTIO_CONSOLE_F_SIZE).
//!
//! Owns the numbers that configuration space shows, and when the driver must be told of a change. Whoever
//! watches the terminal changes the size; the console's worker tells the driver.
//!
//! Only a device without MULTIPORT uses this. With MULTIPORT Linux ignores these fields and waits for the
//! control message RESIZE, in which some kernels read rows first and others read columns first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::doorbell;

/// VIRTIO_CONSOLE_F_SIZE.
pub const SIZE: u64 = 1 << 0;

/// The size of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// The number of characters in a line.
    pub columns: u16,
    /// The number of lines.
    pub rows: u16,
}

/// A window, shared by whoever watches the terminal, the device, and the device's worker.
#[derive(Debug)]
pub struct Window {
    /// Columns in the low half, rows in the high half, so that both change in one store.
    size: AtomicU32,
    /// `true` if the driver must still be told of a change.
    changed: AtomicBool,
    /// `true` once the guest has written to this console.
    written: AtomicBool,
    /// Wakes the console's worker.
    wake: Arc<EventFd>,
}

impl Window {
    /// Creates a window of this size. Changes wake the worker to which `wake` belongs.
    pub(super) fn new(size: WindowSize, wake: Arc<EventFd>) -> Self {
        let window = Self {
            size: AtomicU32::default(),
            changed: AtomicBool::new(false),
            written: AtomicBool::new(false),
            wake,
        };
        window.size.store(packed(size), Ordering::SeqCst);
        window
    }

    /// Changes the size. The driver is told only if the size differs.
    pub fn resize(&self, size: WindowSize) {
        if self.size.swap(packed(size), Ordering::SeqCst) == packed(size) {
            return;
        }
        self.changed.store(true, Ordering::SeqCst);
        if let Err(error) = doorbell::ring(&self.wake) {
            log::warn!("console: the guest is not told of the terminal's new size: {error}");
        }
    }

    /// Returns `true` if a program in the guest has written to this console; a program then also reads it.
    pub fn has_output(&self) -> bool {
        self.written.load(Ordering::SeqCst)
    }

    /// Returns the first four bytes of configuration space: columns and rows, little-endian.
    pub(super) fn config(&self) -> [u8; 4] {
        self.size.load(Ordering::SeqCst).to_le_bytes()
    }

    /// Marks the size as one that the driver has to be told of.
    pub(super) fn tell_again(&self) {
        self.changed.store(true, Ordering::SeqCst);
    }

    /// Records output of the guest. The first output means that Linux has set up its port. Linux drops a size
    /// that it is told before that, so it is told once more.
    pub(super) fn note_output(&self) {
        if !self.written.swap(true, Ordering::SeqCst) {
            self.tell_again();
        }
    }

    /// Returns `true`, once for each change, if the driver must be told now.
    pub(super) fn take_change(&self) -> bool {
        self.changed.swap(false, Ordering::SeqCst)
    }
}

fn packed(size: WindowSize) -> u32 {
    u32::from(size.rows) << 16 | u32::from(size.columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_told_once_and_the_first_output_repeats_it() {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let window = Window::new(WindowSize { columns: 0x102, rows: 0x304 }, Arc::clone(&wake));
        assert_eq!(window.config(), [2, 1, 4, 3]);
        assert!(!window.take_change() && !window.has_output());
        window.resize(WindowSize { columns: 0x102, rows: 0x304 });
        assert!(!window.take_change(), "the same size is no change");
        window.resize(WindowSize { columns: 80, rows: 24 });
        assert_eq!(wake.read().unwrap(), 1);
        assert_eq!(window.config(), [80, 0, 24, 0]);
        assert!(window.take_change() && !window.take_change());
        window.note_output();
        assert!(window.has_output() && window.take_change());
        window.note_output();
        assert!(!window.take_change());
    }
}
