//! `--observe`: a thread that takes a sample at every interval and writes it.
//!
//! Owns the thread, its clock and the file. If a sample takes longer than the interval, the next one is late;
//! two never overlap.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::csv;
use super::sample::Sampler;
use crate::sandbox::{Role, SandboxEntry};

/// A running observation.
#[derive(Debug)]
pub struct Observer {
    stop: Sender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Observer {
    /// Writes the header and the first sample, and starts a thread that adds a sample at every interval.
    pub fn start(mut sampler: Sampler, mut to: File, interval: Duration) -> io::Result<Self> {
        // Written before the guest runs, so that an unwritable file is reported at the start.
        to.write_all(csv::header().as_bytes())?;
        to.write_all(csv::lines(&sampler.sample(false)).as_bytes())?;
        let (stop, stopped) = mpsc::channel();
        let entry = SandboxEntry::new(Role::Observe);
        let work = move || {
            entry.enter();
            let mut next = Instant::now() + interval;
            loop {
                let running = match stopped.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) => true,
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => false,
                };
                // Each sample is one write, so that a reader who follows the file sees whole samples.
                to.write_all(csv::lines(&sampler.sample(running)).as_bytes())?;
                if !running {
                    return Ok(());
                }
                next = (next + interval).max(Instant::now());
            }
        };
        let thread = std::thread::Builder::new().name("observe".into()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    /// Writes a last sample, which shows the state that the guest left behind. Returns the first error of the
    /// observation, if there was one.
    pub fn finish(self) -> io::Result<()> {
        // Sending fails only if the thread has already ended with an error, which `join` returns.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the observing thread panicked")))
    }
}
