//! The same freestanding guest under minivmm and under QEMU, on this machine's KVM, in turn; fio on the host
//! beside them (benches/README.md).
//!
//! Owns the rows, the order of the runs and the report. It never fails because something is slow: a figure
//! is reported, not tested.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "figures of a benchmark")]

mod fio;
mod guest;
#[path = "../common/image.rs"]
#[allow(dead_code, reason = "shared with benches that need more of it")]
mod image;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/markdown.rs"]
mod markdown;
#[path = "../common/median.rs"]
mod median;
#[path = "../common/random.rs"]
#[allow(dead_code, reason = "shared with benches that need more of it")]
mod random;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;

use guest::{Bench, Competitor};
use image::{BenchImage, Resident};
use machine::Machine;
use report::{Cell, Report, Row};

/// Runs the benchmark guest under minivmm and QEMU in turn.
#[derive(Parser, Debug, Serialize)]
#[command(name = "cargo bench --bench bare --")]
struct Arguments {
    /// Rounds of each row; in each round every competitor runs once, next round in reverse.
    #[arg(long, default_value = "5", default_value_if("quick", "true", "1"))]
    rounds: u32,
    /// Milliseconds that are measured in each run.
    #[arg(long, default_value = "500", default_value_if("quick", "true", "100"))]
    ms: u32,
    /// Only rows whose name contains one of these words.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these tables: direct, memory.
    #[arg(long, value_delimiter = ',', default_value = "direct,memory")]
    tables: Vec<String>,
    /// Only minivmm, over both transports.
    #[arg(long)]
    alone: bool,
    /// One round of a tenth of a second: whether it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// More keys of --disk for minivmm (engine=sync, poll-us=0, ...).
    #[arg(long, default_value = "")]
    disk: String,
    /// The image's directory; it must be on a file system with O_DIRECT.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// The directory in memory.
    #[arg(long, default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// The image's size.
    #[arg(long, default_value_t = 256)]
    image_mib: u64,
    /// Where the JSON goes; beside the image unless given.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Said by cargo.
    #[arg(long, hide = true)]
    #[serde(skip)]
    bench: bool,
}

/// One load.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
pub struct Load {
    /// As the guest calls it.
    pub pattern: &'static str,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// One of the rows of the promise; the others are there because they tell something.
    pub promised: bool,
}

impl Load {
    /// `randread-4k-d32`.
    pub fn name(&self) -> String {
        format!("{}-{}k-d{}", self.pattern, self.block_bytes >> 10, self.depth)
    }
}

fn loads() -> Vec<Load> {
    let rows = [
        ("randread", 4, true),
        ("randwrite", 4, true),
        ("seqread", 128, true),
        ("seqwrite", 128, true),
        ("mixed", 4, true),
        ("writeflush", 4, true),
        // QEMU makes one request of neighbours that wait together; minivmm does not.
        ("seqread", 4, false),
        ("seqwrite", 4, false),
    ];
    let load = |(pattern, kib, promised): (&'static str, u32, bool), depth| Load {
        pattern,
        block_bytes: kib << 10,
        depth,
        promised,
    };
    rows.into_iter().flat_map(|row| [load(row, 1), load(row, 32)]).collect()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let loads: Vec<Load> = loads()
        .into_iter()
        .filter(|load| {
            arguments.only.is_empty() || arguments.only.iter().any(|word| load.name().contains(word.as_str()))
        })
        .collect();
    ensure!(!loads.is_empty(), "no row's name contains {:?}", arguments.only);
    let image = BenchImage::ready(arguments.dir.join("bare.img"), arguments.image_mib << 20)?;
    let bench = Bench::new(&arguments.dir, &arguments.disk)?;
    let competitors = guest::competitors(arguments.alone);
    let machine = Machine::look(&arguments.dir, fio::version());
    println!("{}\n{}\n", machine.describe(), bench.describe());
    let mut report = Report::new(&machine, bench.describe());
    for table in &arguments.tables {
        let rows = match table.as_str() {
            "direct" => {
                let settle = || image.settle(Resident::None).map(drop);
                let all: Vec<&Competitor> = competitors.iter().collect();
                measure(&arguments, &loads, &all, &bench, &Place::direct(&image.path), &settle)
            }
            "memory" => in_memory(&arguments, &loads, &competitors, &bench, &image),
            other => Err(anyhow::anyhow!("--tables takes direct and memory, not {other}")),
        }?;
        println!("{}", report.add(table, rows));
    }
    let path = arguments.json.clone().unwrap_or_else(|| arguments.dir.join("bare.json"));
    report.write(&path).with_context(|| format!("cannot write {}", path.display()))?;
    println!("JSON: {}", path.display());
    Ok(())
}

/// Where the image is, and how it is opened.
pub struct Place<'a> {
    /// The image.
    pub path: &'a Path,
    /// Past the host's page cache: cache=none, cache.direct=on.
    pub direct: bool,
}

impl<'a> Place<'a> {
    fn direct(path: &'a Path) -> Self {
        Self { path, direct: true }
    }
}

/// The same on a copy in memory, cache=writeback.
fn in_memory(
    arguments: &Arguments,
    loads: &[Load],
    competitors: &[Competitor],
    bench: &Bench,
    image: &BenchImage,
) -> Result<Vec<Row>> {
    let copy = tempfile::NamedTempFile::new_in(&arguments.memory_dir)
        .with_context(|| format!("{} takes no file", arguments.memory_dir.display()))?;
    std::fs::copy(&image.path, copy.path()).context("the image does not fit into memory")?;
    let place = Place { path: copy.path(), direct: false };
    let those: Vec<&Competitor> = competitors.iter().filter(|who| !who.wants_direct()).collect();
    measure(arguments, loads, &those, bench, &place, &|| Ok(()))
}

fn measure(
    arguments: &Arguments,
    loads: &[Load],
    competitors: &[&Competitor],
    bench: &Bench,
    place: &Place<'_>,
    settle: &dyn Fn() -> Result<()>,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (at, load) in loads.iter().enumerate() {
        eprintln!("[{}/{}] {}", at + 1, loads.len(), load.name());
        let mut cells: Vec<Cell> = competitors.iter().map(|who| Cell::new(who.name)).collect();
        for round in 0..arguments.rounds {
            let mut order: Vec<usize> = (0..competitors.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                settle()?;
                let (cell, who) = (&mut cells[at], competitors[at]);
                if cell.failed.is_none() {
                    match bench.run(who, load, place, arguments.ms, round) {
                        Ok(figures) => cell.rounds.push(figures),
                        Err(error) => cell.failed = Some(format!("{error:#}")),
                    }
                }
            }
        }
        rows.push(Row { load: *load, cells });
    }
    Ok(rows)
}
