//! The driver's thread: keeps `depth` requests in flight, takes the time of each, and waits as a
//! guest would.
//!
//! Owns the loop, the window that is measured and what is counted in it. Requests in flight when the
//! window opens or closes count where they end. Nothing is allocated between the first request and
//! the last.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use minivmm::virtio::Interrupt;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::counted::{self, Counter};
use crate::load::{Load, Pattern};
use crate::random::Random;
use crate::rings::{Kind, Rings};

/// How the driver waits for the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Waits {
    /// It spins: a guest whose CPU never sleeps. It wants no interrupt.
    Poll,
    /// It asks for an interrupt and sleeps: a guest whose CPU halts.
    Interrupt,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
        })
    }
}

impl FromStr for Waits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "poll" => Ok(Self::Poll),
            "interrupt" => Ok(Self::Interrupt),
            other => Err(format!("{other}: the driver waits by poll or by interrupt")),
        }
    }
}

/// The interrupt line: an eventfd, as the irqfd is one, so that the device pays its system call; and
/// a count.
pub struct Line {
    /// Written for each interrupt; the driver sleeps on it.
    pub event: EventFd,
    /// Interrupts so far.
    pub count: AtomicU64,
    /// The device gave up.
    pub broken: AtomicBool,
}

impl Line {
    /// A line that sleeps until it is raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(0)?, count: AtomicU64::new(0), broken: AtomicBool::new(false) })
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.count.fetch_add(1, Ordering::Relaxed);
        // It fails only when the counter is full, and then the driver is awake.
        let _ = self.event.write(1);
    }

    fn config(&self) {}

    fn needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
        let _ = self.event.write(1);
    }
}

/// Times of one kind of request, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Times {
    /// Half are faster.
    pub p50_us: f64,
    /// One in a hundred is slower.
    pub p99_us: f64,
    /// One in a thousand is slower.
    pub p999_us: f64,
    /// The mean.
    pub mean_us: f64,
}

impl Times {
    /// The times in a histogram of nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        let (p50_us, p99_us, p999_us) = (at(0.5), at(0.99), at(0.999));
        Self { p50_us, p99_us, p999_us, mean_us: histogram.mean() / 1e3 }
    }
}

/// What the driver's thread has seen in its window.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Length of the window.
    pub seconds: f64,
    /// Reads or writes that ended in it.
    pub ios: u64,
    /// FLUSHes that ended in it.
    pub flushes: u64,
    /// From available to seen in the used ring.
    pub times: Times,
    /// The same for FLUSH.
    pub flush_times: Option<Times>,
    /// Times that the driver rang.
    pub doorbells: u64,
    /// Interrupts that it got.
    pub interrupts: u64,
    /// Times that it went to sleep.
    pub sleeps: u64,
    /// CPU time of the process without the driver's own thread: the device's.
    pub device_cpu_s: f64,
    /// CPU time of the driver's thread.
    pub driver_cpu_s: f64,
    /// What the counters counted in the window.
    pub counted: Vec<u64>,
}

/// What is known at the window's opening and again at its end.
struct Sample {
    at: Instant,
    doorbells: u64,
    interrupts: u64,
    sleeps: u64,
    process_cpu_s: f64,
    driver_cpu_s: f64,
    counted: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Slot {
    kind: Kind,
    offset: u64,
    since: Instant,
}

/// The driver of one run.
pub struct Driver {
    rings: Rings,
    load: Load,
    waits: Waits,
    image_blocks: u64,
    doorbell: Arc<EventFd>,
    line: Arc<Line>,
    counters: Vec<Counter>,
    slots: Vec<Slot>,
    random: Random,
    next_block: u64,
    writes: u64,
    ios: u64,
    flushes: u64,
    doorbells: u64,
    sleeps: u64,
    times: Histogram<u64>,
    flush_times: Histogram<u64>,
}

/// The last transfer that ended: whoever wants to know whether data really moved looks at it.
#[derive(Debug, Clone)]
pub struct LastTransfer {
    /// Where in the image.
    pub offset: u64,
    /// What the guest's memory holds of it.
    pub data: Vec<u8>,
}

impl Driver {
    /// A driver on these rings; `image_bytes` bounds its offsets.
    pub fn new(
        rings: Rings,
        load: Load,
        waits: Waits,
        image_bytes: u64,
        (doorbell, line): (Arc<EventFd>, Arc<Line>),
        counters: Vec<Counter>,
        seed: u64,
    ) -> Result<Self> {
        let histogram = || Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3);
        let slot = Slot { kind: Kind::Read, offset: 0, since: Instant::now() };
        Ok(Self {
            rings,
            load,
            waits,
            image_blocks: image_bytes / u64::from(load.block_bytes),
            doorbell,
            line,
            counters,
            slots: vec![slot; usize::from(load.depth)],
            random: Random::new(seed),
            next_block: 0,
            writes: 0,
            ios: 0,
            flushes: 0,
            doorbells: 0,
            sleeps: 0,
            times: histogram()?,
            flush_times: histogram()?,
        })
    }

    /// Runs the load: `warm_up` unmeasured, then `window`, then until nothing is in flight. `None` if it moves no
    /// data.
    pub fn run(mut self, warm_up: Duration, window: Duration) -> Result<(Seen, Option<LastTransfer>)> {
        let begin = Instant::now();
        for slot in 0..self.load.depth {
            self.submit(slot, begin);
        }
        self.ring_if_wanted()?;
        self.turn_until(begin + warm_up)?;
        let opened = self.open_window()?;
        self.turn_until(opened.at + window)?;
        let closed = self.sample()?;
        let seen = self.seen(&opened, &closed);
        let last = self.drain()?.map(|last| {
            let data = self.rings.data(last);
            LastTransfer { offset: self.slots[usize::from(last)].offset, data }
        });
        Ok((seen, last))
    }

    fn turn_until(&mut self, end: Instant) -> Result<()> {
        loop {
            let mut reaped = false;
            if Instant::now() >= end {
                return Ok(());
            }
            // At most once round, so that a device as fast as the driver cannot hide the clock.
            for _ in 0..self.load.depth {
                let Some(slot) = self.rings.reap()? else { break };
                let ended = Instant::now();
                self.record(slot, ended);
                self.submit(slot, ended);
                reaped = true;
            }
            self.ring_if_wanted()?;
            if !reaped {
                self.wait()?;
            }
        }
    }

    /// What follows in a free slot: a FLUSH when one is due, else the next block.
    fn submit(&mut self, slot: u16, since: Instant) {
        let beside = self.load.pattern == Pattern::ReadBesideFlush && slot == 0;
        let flush_due = match self.load.pattern {
            Pattern::Flush => true,
            Pattern::ReadBesideFlush => beside && self.slots[0].kind == Kind::Write,
            _ => self.load.flush_every().is_some_and(|every| self.writes == u64::from(every)),
        };
        let (kind, offset) = if flush_due {
            self.writes = 0;
            (Kind::Flush, 0)
        } else {
            let block = if self.load.pattern.random() {
                self.random.below(self.image_blocks)
            } else {
                self.next_block
            };
            self.next_block = (block + 1) % self.image_blocks;
            let kind = match self.load.pattern {
                Pattern::Discard => Kind::Discard,
                pattern if pattern.writes() || beside => Kind::Write,
                _ => Kind::Read,
            };
            self.writes += 1;
            (kind, block * u64::from(self.load.block_bytes))
        };
        self.slots[usize::from(slot)] = Slot { kind, offset, since };
        self.rings.submit(slot, kind, offset);
    }

    fn record(&mut self, slot: u16, now: Instant) {
        let Slot { kind, since, .. } = self.slots[usize::from(slot)];
        let nanoseconds = now.saturating_duration_since(since).as_nanos() as u64;
        let is_measured = match self.load.pattern {
            Pattern::Flush => true,
            Pattern::ReadBesideFlush => kind == Kind::Read,
            _ => kind != Kind::Flush,
        };
        if kind == Kind::Flush {
            self.flushes += 1;
            self.flush_times.saturating_record(nanoseconds);
        }
        if is_measured {
            self.ios += 1;
            self.times.saturating_record(nanoseconds);
        }
    }

    fn ring_if_wanted(&mut self) -> Result<()> {
        if self.rings.wants_doorbell() {
            self.doorbells += 1;
            self.doorbell.write(1).context("the doorbell cannot be rung")?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        match self.waits {
            Waits::Poll => {
                for _ in 0..64 {
                    if self.rings.has_used() {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
            }
            Waits::Interrupt => {
                if self.rings.ask_for_interrupt() {
                    self.sleeps += 1;
                    self.line.event.read().context("the interrupt line cannot be read")?;
                }
            }
        }
        ensure!(!self.line.broken.load(Ordering::SeqCst), "the device asks for a reset");
        Ok(())
    }

    fn open_window(&mut self) -> Result<Sample> {
        self.times.reset();
        self.flush_times.reset();
        (self.ios, self.flushes) = (0, 0);
        self.sample()
    }

    fn sample(&self) -> Result<Sample> {
        Ok(Sample {
            at: Instant::now(),
            doorbells: self.doorbells,
            interrupts: self.line.count.load(Ordering::Relaxed),
            sleeps: self.sleeps,
            process_cpu_s: counted::cpu_seconds(libc::CLOCK_PROCESS_CPUTIME_ID)?,
            driver_cpu_s: counted::cpu_seconds(libc::CLOCK_THREAD_CPUTIME_ID)?,
            counted: self.counters.iter().map(Counter::read).collect::<io::Result<_>>()?,
        })
    }

    fn seen(&self, from: &Sample, to: &Sample) -> Seen {
        let driver_cpu_s = to.driver_cpu_s - from.driver_cpu_s;
        Seen {
            seconds: (to.at - from.at).as_secs_f64(),
            ios: self.ios,
            flushes: self.flushes,
            times: Times::of(&self.times),
            flush_times: (self.flushes > 0).then(|| Times::of(&self.flush_times)),
            doorbells: to.doorbells - from.doorbells,
            interrupts: to.interrupts - from.interrupts,
            sleeps: to.sleeps - from.sleeps,
            device_cpu_s: to.process_cpu_s - from.process_cpu_s - driver_cpu_s,
            driver_cpu_s,
            counted: to.counted.iter().zip(&from.counted).map(|(to, from)| to - from).collect(),
        }
    }

    /// Reaps what is in flight; the slot of the last transfer, if there is any.
    fn drain(&mut self) -> Result<Option<u16>> {
        let mut last = None;
        let mut in_flight = self.load.depth;
        while in_flight > 0 {
            while let Some(slot) = self.rings.reap()? {
                in_flight -= 1;
                let is_transfer = matches!(self.slots[usize::from(slot)].kind, Kind::Read | Kind::Write);
                last = if is_transfer { Some(slot) } else { last };
            }
            self.ring_if_wanted()?;
            if in_flight > 0 {
                self.wait()?;
            }
        }
        // Only a FLUSH was in flight at depth 1: the slot's offset is not that of its data then.
        match last {
            Some(slot) => Ok(Some(slot)),
            None if !self.load.pattern.moves_data() => Ok(None),
            None => {
                self.writes = 0;
                self.submit(0, Instant::now());
                self.ring_if_wanted()?;
                while self.rings.reap()?.is_none() {
                    self.wait()?;
                }
                Ok(Some(0))
            }
        }
    }
}
