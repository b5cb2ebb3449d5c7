//! The device path against fio: the real block device and its real worker's thread over a real file,
//! driven by a fake driver on its own thread; fio at the same load in turn (docs/performance.md).
//!
//! Owns the arguments, the order of the runs and the report. It never fails because something is
//! slow: a figure is reported, not tested.
#![allow(clippy::cast_possible_truncation, reason = "offsets of a benchmark's own layout")]

#[path = "../common/image.rs"]
mod image;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/markdown.rs"]
mod markdown;
#[path = "../common/median.rs"]
mod median;
#[path = "../common/random.rs"]
mod random;

mod counted;
mod device;
mod driver;
mod fio;
mod host_loop;
mod load;
mod polling;
mod results;
mod rings;
mod show;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;

use device::{Count, Setup};
use driver::Waits;
use image::{BenchImage, Resident};
use load::{Contest, FioEngine, Load, Pattern, Who};
use machine::Machine;
use results::{Counted, Entry, Figures, Outcome};

/// Measures the device path against fio on the same file, in turn.
#[derive(Parser, Debug, Serialize)]
#[command(name = "cargo bench --bench device --")]
struct Arguments {
    /// Rounds of each load; in each round every competitor runs once, next round in reverse.
    #[arg(long, default_value = "5", default_value_if("quick", "true", "2"))]
    rounds: u32,
    /// Seconds that are measured in each run.
    #[arg(long, default_value = "2", default_value_if("quick", "true", "0.5"))]
    seconds: f64,
    /// Seconds before that.
    #[arg(long, default_value_t = 0.3)]
    warm_up: f64,
    /// Only loads whose name contains one of these words; `show`: those of the promises; `modes`: those that
    /// compare none, dontcache and writeback; `polling` first: those that compare the default with poll-us=0.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Every load, for hours.
    #[arg(long)]
    full: bool,
    /// Two rounds of half a second: whether it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// How the driver waits where a load does not say: interrupt or poll.
    #[arg(long, default_value_t = Waits::Interrupt)]
    driver: Waits,
    /// More keys of --disk for the device of every load (engine=sync,stable=group, ...).
    #[arg(long, default_value = "")]
    disk: String,
    /// The longest piece of data in one descriptor, in bytes; 4096 is a guest with scattered pages.
    #[arg(long, default_value_t = u32::MAX)]
    segment_bytes: u32,
    /// The image's directory; it must be on a file system with O_DIRECT.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// The image's size.
    #[arg(long, default_value_t = 1024)]
    image_mib: u64,
    /// No runs that count system calls and publishes.
    #[arg(long)]
    no_counts: bool,
    /// Names the loads and runs nothing.
    #[arg(long)]
    list: bool,
    /// Where the JSON goes; beside the image unless given.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Said by cargo.
    #[arg(long, hide = true)]
    #[serde(skip)]
    bench: bool,
}

/// The whole report as JSON.
#[derive(Serialize)]
struct Report<'a> {
    machine: &'a Machine,
    load_at_end: String,
    arguments: &'a Arguments,
    image_bytes: u64,
    image_extents: u64,
    promises: &'a [show::Row],
    contests: &'a [Outcome],
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let contests = plan(&arguments);
    ensure!(!contests.is_empty(), "no load's name contains {:?}; --list names them", arguments.only);
    if arguments.list {
        for contest in &contests {
            println!("{}", contest.load.name());
        }
        return Ok(());
    }
    measure(&arguments, &contests)
}

/// The promises' contests and the others, without doubles.
fn plan(arguments: &Arguments) -> Vec<Contest> {
    if let [first, words @ ..] = &*arguments.only
        && first == "polling"
    {
        let wanted = |contest: &Contest| {
            words.is_empty() || words.iter().any(|word| contest.load.name().contains(word))
        };
        return polling::contests().into_iter().filter(wanted).collect();
    }
    let (promised, modes) = (show::contests(), load::modes());
    let is_in = |list: &[Contest], load: &Load| list.iter().any(|contest| contest.load == *load);
    let others = if arguments.full { load::full() } else { load::usual() };
    let asks_modes = arguments.only.iter().any(|word| word == "modes");
    let modes_too = modes.iter().filter(|contest| asks_modes && !is_in(&others, &contest.load)).cloned();
    let others: Vec<_> = others.iter().cloned().chain(modes_too).collect();
    let others = others.into_iter().filter(|contest| !is_in(&promised, &contest.load));
    let wanted = |contest: &Contest| {
        let (name, load) = (contest.load.name(), &contest.load);
        let named = |word: &String| match word.as_str() {
            "show" => is_in(&promised, load),
            "modes" => is_in(&modes, load),
            word => name.contains(word),
        };
        arguments.only.is_empty() || arguments.only.iter().any(named)
    };
    promised.iter().cloned().chain(others).filter(wanted).collect()
}

fn measure(arguments: &Arguments, contests: &[Contest]) -> Result<()> {
    let fio = fio::version()?;
    let image = BenchImage::ready(arguments.dir.join("device.img"), arguments.image_mib << 20)?;
    let torn = BenchImage::ready(arguments.dir.join("discard.img"), 256 << 20)?;
    let machine = Machine::look(&arguments.dir, fio);
    println!("{}\n", machine.describe());
    println!(
        "{} rounds of {} s, interleaved; image of {} MiB in {} extents, wholly written; {} driver\n",
        arguments.rounds, arguments.seconds, arguments.image_mib, image.extents, arguments.driver
    );
    let mut outcomes = Vec::new();
    for (at, contest) in contests.iter().enumerate() {
        eprintln!("[{}/{}] {}", at + 1, contests.len(), contest.load.name());
        outcomes.push(Bench { arguments, image: &image, torn: &torn, contest }.run());
    }
    let promises = show::rows(&outcomes);
    println!("{}\n{}", table::contests(&outcomes), table::summary(&outcomes));
    if arguments.only.first().is_some_and(|first| first == "polling") {
        println!("{}", polling::table(&outcomes));
    }
    println!("{}\n{}", table::promises(&promises), table::gaps(&outcomes));
    let report = Report {
        machine: &machine,
        load_at_end: machine::load(),
        arguments,
        image_bytes: image.bytes,
        image_extents: image.extents,
        promises: &promises,
        contests: &outcomes,
    };
    let path = arguments.json.clone().unwrap_or_else(|| arguments.dir.join("device.json"));
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
    println!("JSON: {}", path.display());
    Ok(())
}

/// One contest at work.
struct Bench<'a> {
    arguments: &'a Arguments,
    image: &'a BenchImage,
    /// For DISCARDs, which make holes.
    torn: &'a BenchImage,
    contest: &'a Contest,
}

impl Bench<'_> {
    /// All rounds, then what is counted apart. A competitor that fails once is out, and says why.
    fn run(&self) -> Outcome {
        let mut outcome = Outcome::new(self.contest);
        for round in 0..self.arguments.rounds {
            let mut order: Vec<usize> = (0..outcome.entries.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                let entry = &mut outcome.entries[at];
                if entry.not_measured.is_none() {
                    self.turn(entry, &self.contest.who[at], round);
                }
            }
        }
        if !self.arguments.no_counts {
            for (entry, who) in outcome.entries.iter_mut().zip(&self.contest.who) {
                if let Who::Device { keys, waits } = who
                    && entry.not_measured.is_none()
                {
                    entry.counted = Some(self.count(keys, *waits));
                }
            }
        }
        outcome
    }

    fn turn(&self, entry: &mut Entry, who: &Who, round: u32) {
        match self.figures(who, round) {
            Ok(figures) => entry.rounds.push(figures),
            Err(error) => {
                eprintln!("  {}: {error:#}", entry.who);
                entry.rounds.clear();
                entry.not_measured = Some(format!("{error:#}"));
            }
        }
    }

    fn figures(&self, who: &Who, round: u32) -> Result<Figures> {
        let load = &self.contest.load;
        match who {
            Who::Fio(engine) => {
                let resident = self.settle()?;
                let times = (self.warm_up(), self.window());
                let fio = match engine {
                    FioEngine::Loop => host_loop::run(load, self.image_path(), times)?,
                    _ => fio::run(load, *engine, self.image_path(), times)?,
                };
                let after = self.image().cached_bytes();
                Ok(Figures { cached_bytes_after: after, ..Figures::of_fio(load, &fio, resident) })
            }
            Who::Device { keys, waits } => {
                let keys = self.keys(keys);
                device::understood(self.image_path(), load, &keys)?;
                let resident = self.settle()?;
                let setup = self.setup(&keys, *waits, u64::from(round));
                let run = device::run(load, &setup, Count::Nothing)?;
                Ok(Figures::of_device(load, &run, resident))
            }
        }
    }

    /// Two more runs, whose time does not count.
    fn count(&self, keys: &str, waits: Option<Waits>) -> Counted {
        let mut counted = Counted::default();
        let keys = self.keys(keys);
        let run = |count: Count| {
            let setup = self.setup(&keys, waits, 1000);
            self.settle()?;
            let run = device::run(&self.contest.load, &setup, count)?;
            let seen = &run.seen;
            let per_io = seen.counted.first().map(|&n| n as f64 / seen.ios.max(1) as f64);
            anyhow::Ok((per_io, seen.ios as f64 / seen.seconds, run.counters))
        };
        match run(Count::SystemCalls) {
            Ok((per_io, iops, counters)) => {
                counted.system_calls_per_io = per_io;
                counted.iops_while_counting_calls = Some(iops);
                counted.disk_counters = counters;
            }
            Err(error) => counted.not_counted.push(format!("system calls: {error:#}")),
        }
        match run(Count::Publishes) {
            Ok((per_io, iops, _)) => {
                counted.publishes_per_io = per_io;
                counted.iops_while_counting_publishes = Some(iops);
            }
            Err(error) => counted.not_counted.push(format!("used-index publishes: {error:#}")),
        }
        counted
    }

    fn keys(&self, keys: &str) -> String {
        [keys, &self.arguments.disk].into_iter().filter(|keys| !keys.is_empty()).collect::<Vec<_>>().join(",")
    }

    fn setup<'a>(&'a self, keys: &'a str, waits: Option<Waits>, seed: u64) -> Setup<'a> {
        Setup {
            image: self.image_path(),
            keys,
            waits: waits.unwrap_or(self.arguments.driver),
            segment_bytes: self.arguments.segment_bytes,
            warm_up: self.warm_up(),
            window: self.window(),
            seed,
        }
    }

    fn image_path(&self) -> &Path {
        &self.image().path
    }

    fn image(&self) -> &BenchImage {
        if self.contest.load.pattern == Pattern::Discard { self.torn } else { self.image }
    }

    /// Direct modes and dontcache begin with nothing of the image in the page cache, the others with all of it.
    fn settle(&self) -> Result<Option<u64>> {
        let resident = if self.contest.load.begins_uncached() { Resident::None } else { Resident::All };
        self.image().settle(resident)
    }

    fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.arguments.warm_up)
    }

    fn window(&self) -> Duration {
        Duration::from_secs_f64(self.arguments.seconds)
    }
}
