//! Tables and JSON of the runs.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::Load;
use crate::machine::Machine;
use crate::markdown::{number, table};
use crate::median::median;

/// What one run gives.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// Requests a second; FLUSHes are not among them.
    pub iops: f64,
    /// Latency that half of the requests did not exceed, in microseconds.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// How often the guest had to ring.
    pub doorbells_per_io: Option<f64>,
}

/// One competitor at one load.
#[derive(Debug, Serialize)]
pub struct Cell {
    /// Who.
    pub who: &'static str,
    /// Each round.
    pub rounds: Vec<Figures>,
    /// Why there are no more.
    pub failed: Option<String>,
}

impl Cell {
    /// No run yet.
    pub fn new(who: &'static str) -> Self {
        Self { who, rounds: Vec::new(), failed: None }
    }

    fn median(&self, figure: impl Fn(&Figures) -> f64) -> Option<f64> {
        median(self.rounds.iter().map(figure).collect())
    }
}

/// One load.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What the guest did.
    pub load: Load,
    /// Competitors, minivmm's default first.
    pub cells: Vec<Cell>,
}

impl Row {
    /// The first one's rate over another's: of the medians, and the least and most of one round.
    fn ratio(&self, other: &Cell) -> Option<(f64, f64, f64)> {
        let ours = self.cells.first()?;
        let of_medians = ours.median(|run| run.iops)? / other.median(|run| run.iops)?;
        let rounds = ours.rounds.iter().zip(&other.rounds).map(|(a, b)| a.iops / b.iops);
        let (least, most) =
            rounds.fold((f64::MAX, 0.0_f64), |(least, most), ratio| (least.min(ratio), most.max(ratio)));
        Some((of_medians, least, most))
    }
}

/// All tables, for the JSON.
#[derive(Serialize)]
pub struct Report<'a> {
    machine: &'a Machine,
    with: String,
    tables: Vec<(String, Vec<Row>)>,
}

impl<'a> Report<'a> {
    /// Nothing yet.
    pub fn new(machine: &'a Machine, with: String) -> Self {
        Self { machine, with, tables: Vec::new() }
    }

    /// Keeps a table; as text.
    pub fn add(&mut self, name: &str, rows: Vec<Row>) -> String {
        let text = format!("## {}\n\n{}\n{}", title(name), rates(&rows), verdicts(&rows));
        self.tables.push((name.to_owned(), rows));
        text
    }

    /// As JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(serde_json::to_writer_pretty(File::create(path)?, self)?)
    }
}

fn title(name: &str) -> &'static str {
    match name {
        "direct" => "On a file system, O_DIRECT (cache=none)",
        _ => "In memory (cache=writeback on tmpfs)",
    }
}

/// A row a competitor and load: rate, minivmm's ratio to it, latencies.
fn rates(rows: &[Row]) -> String {
    let head =
        ["load", "who", "k IOPS", "minivmm over it", "spread", "p50 us", "p99 us", "p99.9 us", "doorbells"];
    let mut lines = Vec::new();
    for row in rows {
        for cell in &row.cells {
            let ratio = row.ratio(cell);
            let what = if let Some(why) = &cell.failed {
                format!("{} (not measured: {why})", cell.who)
            } else {
                cell.who.into()
            };
            lines.push(vec![
                row.load.name(),
                what,
                number(cell.median(|run| run.iops / 1e3), 1),
                number(ratio.map(|ratio| ratio.0), 2),
                ratio.map_or(String::new(), |(_, least, most)| format!("{least:.2}–{most:.2}")),
                number(cell.median(|run| run.p50_us), 1),
                number(cell.median(|run| run.p99_us), 1),
                number(cell.median(|run| run.p999_us), 1),
                number(cell.median(|run| run.doorbells_per_io.unwrap_or_default()), 3),
            ]);
        }
    }
    table(&head, &lines)
}

/// Geometric means over the rows of the promise, and the latency that the VM adds at depth 1.
fn verdicts(rows: &[Row]) -> String {
    let mut text = String::new();
    let others = rows.first().map_or(&[][..], |row| row.cells.get(1..).unwrap_or_default());
    for (at, other) in others.iter().enumerate() {
        let ratios: Vec<(String, f64)> = rows
            .iter()
            .filter(|row| row.load.promised)
            .filter_map(|row| Some((row.load.name(), row.ratio(&row.cells[at + 1])?.0)))
            .collect();
        if ratios.is_empty() {
            continue;
        }
        let mean = (ratios.iter().map(|(_, ratio)| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
        let below: Vec<_> = ratios
            .iter()
            .filter(|(_, ratio)| *ratio < 1.0)
            .map(|(name, ratio)| format!("{name} {ratio:.2}"))
            .collect();
        let below = if below.is_empty() { "none".into() } else { below.join(", ") };
        text += &format!(
            "- over {}: geometric mean {mean:.2} of {} rows; rows below 1: {below}\n",
            other.who,
            ratios.len()
        );
    }
    let depth_1 = rows.iter().find(|row| row.load.name() == "randread-4k-d1");
    if let Some(row) = depth_1 {
        let p50 = |who: &str| row.cells.iter().find(|cell| cell.who == who)?.median(|run| run.p50_us);
        if let (Some(ours), Some(fio)) = (p50("minivmm pci"), p50("fio on the host")) {
            text += &format!(
                "- randread-4k-d1: {:+.1} us added to fio's median ({ours:.1} against {fio:.1})\n",
                ours - fio
            );
        }
    }
    text
}
