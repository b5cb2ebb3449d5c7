//! `minivmm export` beside qemu-storage-daemon: the same front end (the crate virtio-driver), the same image, in turn
//! (benches/README.md).
//!
//! Owns the rows, the order of the runs and the report. It never fails because something is slow: a figure is reported,
//! not tested.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "figures of a benchmark")]

mod back_end;
#[path = "../common/image.rs"]
mod image;
mod load;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/markdown.rs"]
mod markdown;
#[path = "../common/median.rs"]
mod median;
#[path = "../common/random.rs"]
mod random;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use serde::Serialize;

use back_end::BackEnd;
use image::{BenchImage, Resident};
use load::{Load, Pattern, Window};
use machine::Machine;
use report::{Cell, Report, Row};

/// Runs one front end against minivmm and qemu-storage-daemon in turn.
#[derive(Parser, Debug, Serialize)]
#[command(name = "cargo bench --bench export --")]
struct Arguments {
    /// Rounds of each row; in each round every back end runs once, next round in reverse.
    #[arg(long, default_value = "5", default_value_if("quick", "true", "1"))]
    rounds: u32,
    /// Seconds that are measured in each run.
    #[arg(long, default_value = "0.5", default_value_if("quick", "true", "0.1"))]
    seconds: f64,
    /// Only rows whose name contains one of these words.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// One round of a tenth of a second: whether it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// How the front end waits for completions.
    #[arg(long, default_value = "interrupt")]
    driver: Driver,
    /// More keys of --disk for minivmm (engine=sync, poll-us=0, ...).
    #[arg(long, default_value = "")]
    disk: String,
    /// The image's directory; it must be on a file system with O_DIRECT.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// The image's size.
    #[arg(long, default_value_t = 512)]
    image_mib: u64,
    /// Where the JSON goes; beside the image unless given.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Said by cargo.
    #[arg(long, hide = true)]
    #[serde(skip)]
    bench: bool,
}

/// How the front end learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
enum Driver {
    /// It sleeps on the eventfd, as a guest whose CPU halts.
    Interrupt,
    /// It spins, as a guest whose CPU never sleeps.
    Poll,
}

/// Every pattern at depth 1 and 32, past the page cache and through it.
fn loads() -> Vec<Load> {
    let patterns = [Pattern::Read, Pattern::Write, Pattern::Flush, Pattern::WriteFlush];
    let rows = ["none", "writeback"].into_iter().flat_map(|mode| patterns.map(|pattern| (mode, pattern)));
    rows.flat_map(|(mode, pattern)| [1, 32].map(|depth| Load { mode, pattern, depth })).collect()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let is_wanted = |load: &Load| {
        arguments.only.is_empty() || arguments.only.iter().any(|word| load.name().contains(word.as_str()))
    };
    let loads: Vec<Load> = loads().into_iter().filter(is_wanted).collect();
    ensure!(!loads.is_empty(), "no row's name contains {:?}", arguments.only);
    let image = BenchImage::ready(arguments.dir.join("export.img"), arguments.image_mib << 20)?;
    let with = back_end::describe()?;
    let machine = Machine::look(&arguments.dir, String::new());
    println!("{}\n{with}; driver: {:?}; {} extents\n", machine.describe(), arguments.driver, image.extents);
    let mut rows = Vec::new();
    for (at, load) in loads.iter().enumerate() {
        eprintln!("[{}/{}] {}", at + 1, loads.len(), load.name());
        rows.push(measure(&arguments, load, &image)?);
    }
    let report = Report { machine: &machine, with, rows };
    println!("{}", report.text());
    let path = arguments.json.clone().unwrap_or_else(|| arguments.dir.join("export.json"));
    report.write(&path).with_context(|| format!("cannot write {}", path.display()))?;
    println!("JSON: {}", path.display());
    Ok(())
}

fn measure(arguments: &Arguments, load: &Load, image: &BenchImage) -> Result<Row> {
    let window = Window {
        warm_up: Duration::from_secs_f64(arguments.seconds / 5.0),
        measured: Duration::from_secs_f64(arguments.seconds),
        poll: arguments.driver == Driver::Poll,
    };
    let back_ends = back_end::all(load.mode);
    let mut cells: Vec<Cell> = back_ends.iter().map(|who| Cell::new(who.name)).collect();
    for round in 0..arguments.rounds {
        let mut order: Vec<usize> = (0..back_ends.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            image.settle(if load.mode == "none" { Resident::None } else { Resident::All })?;
            let cell = &mut cells[at];
            if cell.failed.is_none() {
                let run = || {
                    let running = BackEnd::start(&back_ends[at], &image.path, load.mode, &arguments.disk)?;
                    let figures = load::run(load, &running.socket, image.bytes, &window, u64::from(round));
                    running.stop()?;
                    figures
                };
                match run() {
                    Ok(figures) => cell.rounds.push(figures),
                    Err(error) => cell.failed = Some(format!("{error:#}")),
                }
            }
        }
    }
    Ok(Row { load: *load, cells })
}
