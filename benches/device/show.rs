//! The figures that the project promises, each with its target: which contests they need, and the
//! verdict. What a machine cannot give is "not measured", never "reached".

use serde::Serialize;

use crate::driver::Waits;
use crate::load::{Contest, FioEngine, Load, Pattern, Sync, Who};
use crate::results::{Entry, Outcome, Ratio};

const POLLS: Who = Who::Device { keys: "", waits: Some(Waits::Poll) };
const SLEEPS: Who = Who::Device { keys: "", waits: Some(Waits::Interrupt) };
const GROUP: Who = Who::with("engine=io_uring,stable=group");
const DSYNC: Who = Who::with("engine=io_uring,stable=dsync");
const FDATASYNC: Who = Who::with("engine=io_uring,stable=fdatasync");
const FIXED: Who = Who::with("engine=io_uring,buffers=fixed");
const FIO_FIXED: Who = Who::Fio(FioEngine::IoUringFixed);
const WHOLE: Who = Who::with("engine=io_uring,batch=1024");
const RING: Who = Who::with("engine=io_uring");
const SYNC: Who = Who::with("engine=sync");

const fn load(pattern: Pattern, kib: u32, depth: u16, cache: &'static str, sync: Sync) -> Load {
    Load { pattern, block_bytes: kib << 10, depth, cache, sync }
}

const READ_32: Load = load(Pattern::RandRead, 4, 32, "none", Sync::Plain);
const WRITE_32: Load = load(Pattern::RandWrite, 4, 32, "none", Sync::Plain);
const READ_1: Load = load(Pattern::RandRead, 4, 1, "none", Sync::Plain);
const SEQ_READ: Load = load(Pattern::SeqRead, 128, 8, "none", Sync::Plain);
const SEQ_WRITE: Load = load(Pattern::SeqWrite, 128, 8, "none", Sync::Plain);
const FLUSH_EACH: Load = load(Pattern::RandWrite, 4, 1, "none", Sync::Flush(1));
const CACHE_OFF: Load = load(Pattern::RandWrite, 4, 32, "none", Sync::CacheOff);
const FLUSH_ALONE: Load = load(Pattern::Flush, 4, 1, "none", Sync::Plain);
const READ_BESIDE: Load = load(Pattern::ReadBesideFlush, 4, 5, "none", Sync::Plain);
const CACHED_1: Load = load(Pattern::RandRead, 4, 1, "writeback", Sync::Plain);
const CACHED_32: Load = load(Pattern::RandRead, 4, 32, "writeback", Sync::Plain);

/// The contests that the promises need.
pub fn contests() -> Vec<Contest> {
    use FioEngine::{IoUring, IoUringBatched, IoUringFixed, Loop, Pvsync2};
    let fio = |engines: &[FioEngine]| engines.iter().map(|&engine| Who::Fio(engine)).collect::<Vec<_>>();
    let contest = |load, engines: &[FioEngine], devices: &[Who]| Contest {
        load,
        who: [fio(engines), devices.to_vec()].concat(),
    };
    vec![
        contest(READ_32, &[IoUring, IoUringBatched, IoUringFixed], &[SLEEPS, POLLS, FIXED, WHOLE]),
        contest(WRITE_32, &[IoUring, IoUringBatched], &[SLEEPS, POLLS, FIXED, WHOLE]),
        contest(READ_1, &[IoUring, Pvsync2], &[SLEEPS, POLLS]),
        contest(SEQ_READ, &[IoUring, IoUringBatched], &[SLEEPS, POLLS]),
        contest(SEQ_WRITE, &[IoUring, IoUringBatched], &[SLEEPS, POLLS]),
        contest(FLUSH_EACH, &[IoUring, Pvsync2], &[SLEEPS, POLLS]),
        contest(FLUSH_ALONE, &[Loop], &[SLEEPS, POLLS]),
        contest(READ_BESIDE, &[], &[SLEEPS, POLLS]),
        contest(CACHE_OFF, &[IoUring], &[Who::DEVICE, GROUP, FDATASYNC, DSYNC]),
        contest(CACHED_1, &[IoUring, Pvsync2], &[Who::DEVICE, RING, SYNC]),
        contest(CACHED_32, &[IoUring, Pvsync2], &[Who::DEVICE, RING, SYNC]),
    ]
}

/// A promise and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What is promised, with the target.
    pub measure: String,
    /// The figure, in words.
    pub figure: String,
    /// `None`: not measured, or there is no target.
    pub reached: Option<bool>,
}

impl Row {
    fn new(measure: impl Into<String>, figure: Option<(String, bool)>) -> Self {
        let (figure, reached) = match figure {
            Some((figure, reached)) => (figure, Some(reached)),
            None => ("not measured".to_owned(), None),
        };
        Self { measure: measure.into(), figure, reached }
    }

    /// The verdict in words.
    pub fn verdict(&self) -> &'static str {
        match self.reached {
            Some(true) => "reached",
            Some(false) => "not reached",
            None => "",
        }
    }
}

/// Finds contests and their entries.
struct Finder<'a>(&'a [Outcome]);

impl<'a> Finder<'a> {
    fn contest(&self, load: &Load) -> Option<&'a Outcome> {
        self.0.iter().find(|outcome| outcome.load == *load)
    }

    fn entry(&self, load: &Load, who: &Who) -> Option<&'a Entry> {
        self.contest(load)?.entry(&who.name())
    }

    /// The device over the best fio.
    fn over_fio(&self, load: &Load, who: &Who, target: f64) -> Option<(String, bool)> {
        let fio = self.contest(load)?.best_fio()?;
        let ratio = Ratio::new(self.entry(load, who)?, fio)?;
        Some((format!("{} over {}", words(ratio), fio.who), ratio.of_medians >= target))
    }

    /// CPU time of the device for one I/O over that of the fio that is fastest.
    fn cpu_over_fio(&self, load: &Load, who: &Who, most: f64) -> Option<(String, bool)> {
        let fio = self.contest(load)?.best_fio()?;
        let cpu = |entry: &Entry| entry.median(|f| f.cpu_s_per_million);
        let (device_s, fio_s) = (cpu(self.entry(load, who)?)?, cpu(fio)?);
        let ratio = device_s / fio_s;
        Some((format!("{ratio:.2} ({device_s:.2} against {fio_s:.2} s/M of {})", fio.who), ratio <= most))
    }

    fn over(&self, load: &Load, who: &Who, other: &Who, target: f64) -> Option<(String, bool)> {
        let ratio = Ratio::new(self.entry(load, who)?, self.entry(load, other)?)?;
        Some((words(ratio), ratio.of_medians >= target))
    }

    /// What the device adds to the median of the fio that is fastest at it.
    fn added_us(&self, load: &Load, who: &Who, most_us: f64) -> Option<(String, bool)> {
        let p50 = |entry: &Entry| entry.median(|f| f.times.p50_us);
        let fios = self.contest(load)?.entries.iter().filter(|entry| entry.fio);
        let (fio, fio_us) =
            fios.filter_map(|fio| Some((fio, p50(fio)?))).min_by(|a, b| a.1.total_cmp(&b.1))?;
        let device_us = p50(self.entry(load, who)?)?;
        let added_us = device_us - fio_us;
        let figure = format!("{added_us:+.1} us ({device_us:.1} against {fio_us:.1} of {})", fio.who);
        Some((figure, added_us <= most_us))
    }

    /// The largest of a count per I/O over both directions at depth 32.
    fn count_at_32(&self, who: &Who, what: Count, most: f64) -> Option<(String, bool)> {
        let read = what(self.entry(&READ_32, who)?)?;
        let write = what(self.entry(&WRITE_32, who)?)?;
        Some((format!("randread {read:.3}, randwrite {write:.3} per I/O"), read.max(write) <= most))
    }
}

/// A count per I/O, if it was counted.
type Count = fn(&Entry) -> Option<f64>;

fn words(ratio: Ratio) -> String {
    format!("{:.2} ({:.2} to {:.2})", ratio.of_medians, ratio.least, ratio.most)
}

fn system_calls(entry: &Entry) -> Option<f64> {
    entry.counted.as_ref()?.system_calls_per_io
}

fn publishes(entry: &Entry) -> Option<f64> {
    entry.counted.as_ref()?.publishes_per_io
}

fn interrupts(entry: &Entry) -> Option<f64> {
    entry.median_of(|f| f.interrupts_per_io)
}

/// The verdicts.
pub fn rows(outcomes: &[Outcome]) -> Vec<Row> {
    let find = Finder(outcomes);
    let mut rows = Vec::new();
    let mut promise = |needs: &[Load], row: Row| {
        if needs.iter().all(|load| find.contest(load).is_some()) {
            rows.push(row);
        }
    };
    for (words, load, target) in [
        ("4k randread, depth 32, none, over fio >= 0.95", READ_32, 0.95),
        ("4k randwrite, depth 32, none, over fio >= 0.95", WRITE_32, 0.95),
        ("128k sequential read, depth 8, over fio with huge pages >= 0.95", SEQ_READ, 0.95),
        ("128k sequential write, depth 8, over fio with huge pages >= 0.95", SEQ_WRITE, 0.95),
    ] {
        for (driver, who) in [("sleeping", SLEEPS), ("polling", POLLS)] {
            let row = Row::new(format!("{words} ({driver} driver)"), find.over_fio(&load, &who, target));
            promise(&[load], row);
        }
    }
    for (words, load, driver, who, target) in [
        ("FLUSH alone, depth 1, over a loop of fdatasync", FLUSH_ALONE, "sleeping", SLEEPS, 0.80),
        ("FLUSH alone, depth 1, over a loop of fdatasync", FLUSH_ALONE, "polling", POLLS, 0.97),
        ("write + FLUSH each, depth 1, over fio fdatasync=1", FLUSH_EACH, "sleeping", SLEEPS, 0.85),
        ("write + FLUSH each, depth 1, over fio fdatasync=1", FLUSH_EACH, "polling", POLLS, 1.10),
    ] {
        let words = format!("{words} >= {target:.2} ({driver} driver)");
        promise(&[load], Row::new(words, find.over_fio(&load, &who, target)));
    }
    for (load, words) in [(READ_32, "4k randread"), (WRITE_32, "4k randwrite")] {
        let words = format!("{words}, depth 32: CPU time over fio's <= 1.15 (sleeping driver)");
        promise(&[load], Row::new(words, find.cpu_over_fio(&load, &SLEEPS, 1.15)));
    }
    for (driver, who) in [("sleeping", SLEEPS), ("polling", POLLS)] {
        let words = format!("4k randread, depth 1, none: added to fio's median <= 12 us ({driver} driver)");
        promise(&[READ_1], Row::new(words, find.added_us(&READ_1, &who, 12.0)));
    }
    for (words, other, target) in
        [("an fdatasync per write >= 3", FDATASYNC, 3.0), ("parallel RWF_DSYNC >= 1", DSYNC, 1.0)]
    {
        for (stable, who) in [("auto", Who::DEVICE), ("group", GROUP)] {
            let words = format!("write cache off, depth 32: group commit (stable={stable}) over {words}");
            promise(&[CACHE_OFF], Row::new(words, find.over(&CACHE_OFF, &who, &other, target)));
        }
    }
    let counts: [(_, _, Count, _); 4] = [
        ("system calls, depth 32 <= 0.2 per I/O (default)", SLEEPS, system_calls, 0.2),
        ("system calls, depth 32 <= 0.2 per I/O (batch=1024)", WHOLE, system_calls, 0.2),
        ("interrupts, depth 32 <= 0.25 per I/O", SLEEPS, interrupts, 0.25),
        ("used-index publishes, depth 32 <= 0.25 per I/O", SLEEPS, publishes, 0.25),
    ];
    for (words, who, count, most) in counts {
        promise(&[READ_32, WRITE_32], Row::new(words, find.count_at_32(&who, count, most)));
    }
    for (words, load, who, other) in [
        ("in the page cache, depth 1: engine=io_uring over engine=sync", CACHED_1, RING, SYNC),
        ("in the page cache, depth 32: engine=io_uring over engine=sync", CACHED_32, RING, SYNC),
        ("4k randread, depth 32, none: buffers=fixed over fio fixedbufs", READ_32, FIXED, FIO_FIXED),
    ] {
        let row = Row::new(format!("{words} (no target)"), find.over(&load, &who, &other, 0.0));
        promise(&[load], Row { reached: None, ..row });
    }
    rows
}
