//! The size of the terminal that a console stands for (virtio 5.3.4, VIRTIO_CONSOLE_F_SIZE).
//!
//! Owns the figures that configuration space shows, and when the driver has to be told of them. Whoever
//! watches the terminal changes them; the console's worker tells the driver.
//!
//! Only a device without MULTIPORT uses this. With MULTIPORT Linux ignores these fields and waits for the
//! control message RESIZE, in which some kernels read rows first and others columns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::doorbell;

/// VIRTIO_CONSOLE_F_SIZE.
pub const SIZE: u64 = 1 << 0;

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// A window, shared by whoever watches it, the device and the device's worker.
#[derive(Debug)]
pub struct Window {
    /// Columns in the low half, rows in the high one: both change in one store.
    size: AtomicU32,
    /// The driver has yet to be told of a change.
    changed: AtomicBool,
    /// The guest has written to this console since it was made.
    written: AtomicBool,
    /// Wakes the console's worker.
    wake: Arc<EventFd>,
}

impl Window {
    /// A window of this size, whose changes wake the worker that `wake` belongs to.
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

    /// Changes the size. The driver is told only where it is another one.
    pub fn resize(&self, size: WindowSize) {
        if self.size.swap(packed(size), Ordering::SeqCst) == packed(size) {
            return;
        }
        self.changed.store(true, Ordering::SeqCst);
        if let Err(error) = doorbell::ring(&self.wake) {
            log::warn!("console: the guest is not told of the terminal's new size: {error}");
        }
    }

    /// Whether a program in the guest has written to this console: then there is one that reads it too.
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

    /// Records output of the guest's. The first means that Linux has set up its port: it drops what it is
    /// told of the size before that, so it is told once more.
    pub(super) fn note_output(&self) {
        if !self.written.swap(true, Ordering::SeqCst) {
            self.tell_again();
        }
    }

    /// Whether the driver has to be told now. The answer is `true` once for each change.
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
