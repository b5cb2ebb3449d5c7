//! The front end's side of a run: keeps `depth` requests in flight on one queue and takes the time of each.
//!
//! Owns the loop and the window that is measured. A request in flight when the window opens or closes counts where it
//! completes.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use minivmm_testkit::front_end::{FrontEnd, Queue, Request};
use serde::Serialize;

use crate::random::Random;
use crate::report::Figures;

const BLOCK: usize = 4096;
const QUEUE_SIZE: u16 = 128;
/// Who meets it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked for again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Pattern {
    /// 4 KiB at a random place.
    Read,
    /// 4 KiB at a random place.
    Write,
    /// FLUSH alone.
    Flush,
    /// A write and, when it has completed, a FLUSH; the two count as one.
    WriteFlush,
}

/// One row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// The cache mode.
    pub mode: &'static str,
    /// What is asked for.
    pub pattern: Pattern,
    /// Requests in flight.
    pub depth: usize,
}

impl Load {
    /// `none-randread-d32`.
    pub fn name(&self) -> String {
        let pattern = match self.pattern {
            Pattern::Read => "randread",
            Pattern::Write => "randwrite",
            Pattern::Flush => "flush",
            Pattern::WriteFlush => "write+flush",
        };
        format!("{}-{pattern}-d{}", self.mode, self.depth)
    }
}

/// How long, and how the front end waits.
pub struct Window {
    /// Not measured.
    pub warm_up: Duration,
    /// Measured.
    pub measured: Duration,
    /// Whether the front end spins.
    pub poll: bool,
}

/// A request in flight, or a write that its FLUSH follows.
struct Slot {
    begun: Instant,
    flushing: bool,
}

/// Runs the load once against the back end at `socket`.
pub fn run(load: &Load, socket: &Path, image_bytes: u64, window: &Window, seed: u64) -> Result<Figures> {
    let connected = FrontEnd::connect(socket, 1, QUEUE_SIZE, (load.depth, BLOCK));
    let mut front_end = connected.context("the front end cannot connect")?;
    let queue = front_end.queues.first_mut().context("no queue")?;
    queue.set_notified(!window.poll);
    let mut random = Random::new(seed + 1);
    let blocks = image_bytes / BLOCK as u64;
    let mut begin = |queue: &mut Queue, slot: usize| {
        let at = random.below(blocks) * BLOCK as u64;
        let request = match load.pattern {
            Pattern::Read => Request::Read { at, bytes: BLOCK },
            Pattern::Write | Pattern::WriteFlush => Request::Write { at, bytes: BLOCK },
            Pattern::Flush => Request::Flush,
        };
        queue.submit(slot, request)
    };

    let start = Instant::now();
    let mut slots: Vec<Slot> = (0..load.depth).map(|_| Slot { begun: start, flushing: false }).collect();
    for slot in 0..load.depth {
        queue.buffer(slot).fill(0x5a);
        begin(queue, slot)?;
    }
    queue.notify()?;
    let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    let (opens, closes) = (start + window.warm_up, start + window.warm_up + window.measured);
    let (mut doorbells, mut first, mut last) = (0_u64, None, opens);
    let mut completed = Vec::with_capacity(load.depth);
    loop {
        queue.take(&mut completed);
        if completed.is_empty() {
            if !window.poll {
                queue.wait(PATIENCE)?;
            } else if last.elapsed() > PATIENCE {
                anyhow::bail!("nothing has completed for {PATIENCE:?}");
            }
            continue;
        }
        let now = Instant::now();
        let counts = now >= opens;
        if now >= closes {
            break;
        }
        first = first.or(counts.then_some(now));
        for (at, result) in completed.drain(..) {
            ensure!(result == 0, "{} has failed: {result}", load.name());
            let slot = &mut slots[at];
            if load.pattern == Pattern::WriteFlush && !slot.flushing {
                slot.flushing = true;
                queue.submit(at, Request::Flush)?;
                continue;
            }
            if counts {
                times.saturating_record((now - slot.begun).as_nanos() as u64);
            }
            *slot = Slot { begun: now, flushing: false };
            begin(queue, at)?;
        }
        doorbells += u64::from(queue.notify()? && counts);
        last = now;
    }
    drain(queue, load.depth - completed.len())?;
    let seconds = (last - first.context("nothing has completed in the time that is measured")?).as_secs_f64();
    ensure!(seconds > 0.0, "one round of completions was all");
    let count = times.len() as f64;
    Ok(Figures {
        iops: count / seconds,
        p50_us: times.value_at_quantile(0.5) as f64 / 1e3,
        p99_us: times.value_at_quantile(0.99) as f64 / 1e3,
        doorbells_per_io: doorbells as f64 / count,
    })
}

/// Waits for what is in flight: the back end is not to be ended in the middle of it.
fn drain(queue: &mut Queue, mut in_flight: usize) -> Result<()> {
    queue.set_notified(true);
    let mut completed = Vec::new();
    while in_flight > 0 {
        queue.take(&mut completed);
        in_flight -= completed.drain(..).len();
        if in_flight > 0 {
            queue.wait(PATIENCE)?;
        }
    }
    Ok(())
}
