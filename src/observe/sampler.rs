//! `--observe`: a thread that looks at every interval and writes what it has seen.
//!
//! Owns the thread, its clock and the file. A look that takes longer than the interval makes the next one
//! late, never two at once.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::csv;
use super::sample::Looker;
use crate::sandbox::{Role, Ticket};

/// An observation that runs.
#[derive(Debug)]
pub struct Observer {
    stop: Sender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Observer {
    /// Writes the header and the first sample, and from then on one each interval.
    pub fn start(mut looker: Looker, mut to: File, interval: Duration) -> io::Result<Self> {
        // Before the guest runs: a file that cannot be written is no surprise later.
        to.write_all(csv::header().as_bytes())?;
        to.write_all(csv::lines(&looker.look(false)).as_bytes())?;
        let (stop, stopped) = mpsc::channel();
        let ticket = Ticket::new(Role::Observe);
        let work = move || {
            ticket.enter();
            let mut next = Instant::now() + interval;
            loop {
                let running = match stopped.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) => true,
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => false,
                };
                // In one write: whoever follows the file sees whole samples.
                to.write_all(csv::lines(&looker.look(running)).as_bytes())?;
                if !running {
                    return Ok(());
                }
                next = (next + interval).max(Instant::now());
            }
        };
        let thread = std::thread::Builder::new().name("observe".into()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    /// The last sample, of how the guest has left everything; the first error, if there was one.
    pub fn finish(self) -> io::Result<()> {
        // A thread that has failed is not there any more.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the observing thread panicked")))
    }
}
