//! The destination of the serial port's output, and the watch on it for a kernel panic.
//!
//! Owns the writing: a reader that stalls must never keep the VM from being stopped. Also owns the watch for
//! a kernel panic. Until a guest has loaded its pvpanic driver, only the line that its kernel prints
//! distinguishes a panic's reset from a reboot. The last lines are kept for the report of the guest's end
//! ([`kernel_log`]).
//!
//! [`kernel_log`]: super::kernel_log

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::kernel_log::{KernelLog, without_time};

/// A flag set once, when the machine begins to stop. Whoever waits for something outside then gives up.
#[derive(Debug, Clone, Default)]
pub struct Stopping(Arc<AtomicBool>);

impl Stopping {
    /// Sets the flag.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Returns `true` if the machine is being stopped.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The serial port's output.
pub struct ConsoleOutput {
    /// `None`: output is discarded.
    file: Option<File>,
    stopping: Stopping,
    watch: PanicWatch,
    log: KernelLog,
}

impl ConsoleOutput {
    /// Creates output to `file`, or output that is discarded.
    pub fn new(file: Option<File>, stopping: Stopping) -> Self {
        Self { file, stopping, watch: PanicWatch::default(), log: KernelLog::default() }
    }

    /// Keeps the last lines in `log`, and writes `alarm` when the guest's kernel panics.
    pub fn kept_in(mut self, log: KernelLog, alarm: EventFd) -> Self {
        self.log = log;
        self.watch.alarm = Some(alarm);
        self
    }

    /// Returns the flag that tells, after a reset, whether the guest's kernel had panicked.
    pub fn panicked(&self) -> Panicked {
        self.watch.panicked.clone()
    }

    /// Writes all of `bytes`. Returns early when the machine is being stopped: the vCPU's kick interrupts the
    /// system call.
    fn write_out(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let mut rest = bytes;
        while !rest.is_empty() {
            match file.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(_) if self.stopping.is_set() => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another process that shares the descriptor has made it non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => {
                    log::warn!("the guest's console output is thrown away from here on: {error}");
                    self.file = None;
                    return;
                }
            }
        }
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.feed(bytes);
        self.watch.feed(bytes);
        self.write_out(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A flag that is set if the last line that the guest's kernel printed about its end was a panic's.
#[derive(Debug, Clone, Default)]
pub struct Panicked(Arc<AtomicBool>);

impl Panicked {
    /// Returns `true` if the kernel panicked.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// How many bytes of a line are examined: printk's time and caller, and the words that identify a panic.
const LINE_BYTES_MAX: usize = 96;

/// Watches the beginning of each line for what Linux prints when it panics, and for what it prints when it
/// restarts in order after all.
#[derive(Debug, Default)]
struct PanicWatch {
    line: Vec<u8>,
    panicked: Panicked,
    alarm: Option<EventFd>,
}

impl PanicWatch {
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_of_line();
            } else if self.line.len() < LINE_BYTES_MAX {
                self.line.push(byte);
            }
        }
    }

    fn end_of_line(&mut self) {
        let text = without_time(&self.line);
        if text.starts_with(b"Kernel panic - not syncing") {
            self.panicked.0.store(true, Ordering::SeqCst);
            // An eventfd whose counter is full is readable anyway.
            let _ = self.alarm.as_ref().map(|alarm| alarm.write(1));
        } else if text.starts_with(b"reboot: ") {
            self.panicked.0.store(false, Ordering::SeqCst);
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_known_by_the_line_that_linux_prints() {
        for (output, panicked) in [
            ("Kernel panic - not syncing: VFS\r\n", true),
            ("[    0.512345] Kernel panic - not syncing: VFS\n", true),
            ("[    0.512345][    T1] Kernel panic - not syncing: x\n", true),
            ("[    0.512345] Kernel panic - not syncing: x", false),
            ("echo Kernel panic - not syncing\n", false),
            ("[    1.0] Kernel panic - not syncing: x\n[   2.0] reboot: Restarting system\n", false),
            ("[   2.0] reboot: Restarting system\nKernel panic - not syncing: x\n", true),
            ("[[[[\n]]\n\n[] \n[", false),
        ] {
            let mut console = ConsoleOutput::new(None, Stopping::default());
            console.write_all(output.as_bytes()).unwrap();
            assert_eq!(console.panicked().get(), panicked, "{output:?}");
        }
    }

    #[test]
    fn a_long_line_takes_no_memory() {
        let mut console = ConsoleOutput::new(None, Stopping::default());
        console.write_all(&[b'x'; 100_000]).unwrap();
        assert_eq!(console.watch.line.len(), LINE_BYTES_MAX);
    }

    #[test]
    fn a_reader_that_went_away_is_no_error_of_the_guest() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let mut console = ConsoleOutput::new(Some(file), Stopping::default());
        console.write_all(b"hello").unwrap();
        assert!(console.file.is_none());
    }
}
