//! What is printed: tables that can be pasted into a document, and their reading.

use crate::load::Load;
use crate::markdown::{number, table};
use crate::results::{Counted, Entry, Figures, Outcome, Ratio};
use crate::show::Row;

fn rate(load: &Load, entry: &Entry) -> String {
    let figure = if load.block_bytes >= 64 << 10 {
        entry.median(|f| f.mib_s).map(|rate| format!("{rate:.0} MiB/s"))
    } else {
        entry.median(|f| f.iops).map(|rate| format!("{:.1}k", rate / 1e3))
    };
    figure.unwrap_or_default()
}

fn percentiles(entry: &Entry) -> String {
    let figure = |of: fn(&crate::driver::Times) -> f64| number(entry.median(|f| of(&f.times)), 0);
    format!("{}/{}/{}", figure(|t| t.p50_us), figure(|t| t.p99_us), figure(|t| t.p999_us))
}

const HEAD: [&str; 12] = [
    "load",
    "who",
    "rate",
    "over best fio",
    "spread",
    "CPU s/M",
    "cached MiB",
    "syscalls",
    "publishes",
    "interrupts",
    "doorbells",
    "p50/p99/p99.9 us",
];

/// A line for each competitor of each contest.
pub fn contests(outcomes: &[Outcome]) -> String {
    let mut rows = Vec::new();
    for outcome in outcomes {
        let best = outcome.best_fio();
        for (at, entry) in outcome.entries.iter().enumerate() {
            let name = if at == 0 { outcome.name.clone() } else { String::new() };
            rows.push(competitor(name, &outcome.load, entry, best));
        }
    }
    table(&HEAD, &rows)
}

fn competitor(name: String, load: &Load, entry: &Entry, best: Option<&Entry>) -> Vec<String> {
    if entry.rounds.is_empty() {
        let mut cells = vec![name, entry.who.clone(), "not measured".into()];
        cells.resize(HEAD.len(), String::new());
        return cells;
    }
    let ratio = best.and_then(|best| Ratio::new(entry, best));
    let of_medians = number(ratio.map(|r| r.of_medians), 2);
    let spread = ratio.map_or(String::new(), |r| format!("{:.2}–{:.2}", r.least, r.most));
    let engine = entry.rounds.first().and_then(|f| f.engine).filter(|_| !entry.who.contains("engine="));
    let counted = |of: fn(&Counted) -> Option<f64>| number(entry.counted.as_ref().and_then(of), 3);
    vec![
        name,
        engine.map_or(entry.who.clone(), |engine| format!("{} ({engine})", entry.who)),
        rate(load, entry),
        of_medians,
        spread,
        number(entry.median(|f| f.cpu_s_per_million), 1),
        number(entry.median_of(|f| Some(f.cached_bytes_after? as f64 / f64::from(1 << 20))), 0),
        counted(|c| c.system_calls_per_io),
        counted(|c| c.publishes_per_io),
        number(entry.median_of(|f| f.interrupts_per_io), 3),
        number(entry.median_of(|f| f.doorbells_per_io), 3),
        percentiles(entry),
    ]
}

/// A line for each contest, the device as a user gets it against the best fio: what documents quote.
pub fn summary(outcomes: &[Outcome]) -> String {
    let head = ["load", "fio", "device", "ratio (spread)", "CPU s/M", "calls", "p50 us", "p99 us"];
    let line = |outcome: &Outcome| {
        let (fio, device) = (outcome.best_fio()?, outcome.entries.iter().find(|e| !e.fio)?);
        let ratio = Ratio::new(device, fio)?;
        let both = |figure: fn(&Figures) -> f64, digits| {
            format!("{} / {}", number(fio.median(figure), digits), number(device.median(figure), digits))
        };
        Some(vec![
            outcome.name.clone(),
            rate(&outcome.load, fio),
            rate(&outcome.load, device),
            format!("{:.2} ({:.2}–{:.2})", ratio.of_medians, ratio.least, ratio.most),
            both(|f| f.cpu_s_per_million, 1),
            number(device.counted.as_ref().and_then(|c| c.system_calls_per_io), 2),
            both(|f| f.times.p50_us, 0),
            both(|f| f.times.p99_us, 0),
        ])
    };
    table(&head, &outcomes.iter().filter_map(line).collect::<Vec<_>>())
}

/// What did not run or was not counted, and why, each reason once.
pub fn gaps(outcomes: &[Outcome]) -> String {
    let mut reasons: Vec<String> = Vec::new();
    for outcome in outcomes {
        for entry in &outcome.entries {
            let counted = entry.counted.iter().flat_map(|counted| counted.not_counted.iter().cloned());
            let run = entry.not_measured.iter().map(|why| format!("{}: {why}", entry.who));
            for reason in run.chain(counted) {
                if !reasons.contains(&reason) {
                    reasons.push(reason);
                }
            }
        }
    }
    reasons.into_iter().map(|reason| format!("not measured: {reason}\n")).collect()
}

/// The promises.
pub fn promises(rows: &[Row]) -> String {
    let cells = |row: &Row| vec![row.measure.clone(), row.figure.clone(), row.verdict().to_owned()];
    table(&["measure", "figure", "verdict"], &rows.iter().map(cells).collect::<Vec<_>>())
}
