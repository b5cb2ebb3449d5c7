//! The table and the JSON of the runs.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::load::Load;
use crate::machine::Machine;
use crate::markdown::{number, table};
use crate::median::median;

/// What one run gives.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// Requests a second; a write and its FLUSH are one.
    pub iops: f64,
    /// Latency that half of the requests did not exceed, in microseconds.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// How often the front end had to ring.
    pub doorbells_per_io: f64,
}

/// One back end at one load.
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

    fn iops(&self) -> Option<f64> {
        self.median(|run| run.iops)
    }
}

/// One load.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What the front end did.
    pub load: Load,
    /// minivmm first.
    pub cells: Vec<Cell>,
}

impl Row {
    /// minivmm's rate over another's: of the medians, and the least and most of one round.
    fn ratio(&self, other: &Cell) -> Option<(f64, f64, f64)> {
        let ours = self.cells.first()?;
        let of_medians = ours.iops()? / other.iops()?;
        let rounds = ours.rounds.iter().zip(&other.rounds).map(|(a, b)| a.iops / b.iops);
        let spread = |(least, most): (f64, f64), ratio: f64| (least.min(ratio), most.max(ratio));
        let (least, most) = rounds.fold((f64::MAX, 0.0), spread);
        Some((of_medians, least, most))
    }

    /// The ratio to the best of the others.
    fn over_best(&self) -> Option<f64> {
        let others = self.cells.get(1..)?.iter().filter_map(|cell| self.ratio(cell));
        others.map(|(ratio, _, _)| ratio).min_by(f64::total_cmp)
    }
}

/// All that was measured.
#[derive(Serialize)]
pub struct Report<'a> {
    /// On what.
    pub machine: &'a Machine,
    /// The programs.
    pub with: String,
    /// Row by row.
    pub rows: Vec<Row>,
}

impl Report<'_> {
    /// As tables that can be pasted into a document.
    pub fn text(&self) -> String {
        let head = ["load", "who", "k/s", "minivmm over it", "spread", "p50 us", "p99 us", "doorbells"];
        let lines: Vec<_> =
            self.rows.iter().flat_map(|row| row.cells.iter().map(|cell| line(row, cell))).collect();
        let rows = self.rows.iter().filter_map(|row| Some((row.load.name(), row.over_best()?)));
        let ratios: Vec<(String, f64)> = rows.collect();
        format!("{}\n{}", table(&head, &lines), verdict(&ratios))
    }

    /// As JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(serde_json::to_writer_pretty(File::create(path)?, self)?)
    }
}

fn line(row: &Row, cell: &Cell) -> Vec<String> {
    let ratio = row.ratio(cell);
    let failed = cell.failed.as_ref().map(|why| format!(" (not measured: {why})"));
    vec![
        row.load.name(),
        format!("{}{}", cell.who, failed.unwrap_or_default()),
        number(cell.median(|run| run.iops / 1e3), 1),
        number(ratio.map(|ratio| ratio.0), 2),
        ratio.map_or(String::new(), |(_, least, most)| format!("{least:.2}–{most:.2}")),
        number(cell.median(|run| run.p50_us), 1),
        number(cell.median(|run| run.p99_us), 1),
        number(cell.median(|run| run.doorbells_per_io), 3),
    ]
}

/// Geometric means over the best of the others: all rows, those of each depth, and the rows below 1. Apart from them,
/// the mean without the rows of FLUSHes that follow no write: QEMU makes no sync for such a one, minivmm always does.
fn verdict(ratios: &[(String, f64)]) -> String {
    let mean = |is_wanted: &dyn Fn(&str) -> bool| {
        let wanted = ratios.iter().filter(|(name, _)| is_wanted(name));
        let logs: Vec<f64> = wanted.map(|(_, ratio)| ratio.ln()).collect();
        number((!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp()), 2)
    };
    let below: Vec<_> = ratios
        .iter()
        .filter(|(_, ratio)| *ratio < 1.0)
        .map(|(name, ratio)| format!("{name} {ratio:.2}"))
        .collect();
    let below = if below.is_empty() { "none".into() } else { below.join(", ") };
    format!(
        "- over the best of QEMU's in each of {} rows: geometric mean {} (depth 1: {}, depth 32: {}); \
         without FLUSHes that follow no write: {}; the aim is 1.20; rows below 1: {below}\n",
        ratios.len(),
        mean(&|_| true),
        mean(&|name| name.ends_with("-d1")),
        mean(&|name| name.ends_with("-d32")),
        mean(&|name| !name.contains("-flush-"))
    )
}
