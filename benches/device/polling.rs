//! Whether polling ever loses: the device as a user gets it beside `poll-us=0`.
//!
//! Owns the loads and the table. A driver that polls leaves no CPU free on a machine with two; one that sleeps leaves
//! one.

use crate::driver::Waits;
use crate::load::{Contest, Load, Pattern, Sync, Who};
use crate::markdown::table as markdown;
use crate::results::{Outcome, Ratio};

const fn device(keys: &'static str, waits: Waits) -> Who {
    Who::Device { keys, waits: Some(waits) }
}

const DRIVERS: [Waits; 2] = [Waits::Interrupt, Waits::Poll];

/// Every kind of request at three depths.
pub fn contests() -> Vec<Contest> {
    let kinds = [
        (Pattern::RandRead, Sync::Plain),
        (Pattern::RandWrite, Sync::Plain),
        (Pattern::Flush, Sync::Plain),
        (Pattern::RandWrite, Sync::Flush(1)),
        (Pattern::RandWrite, Sync::CacheOff),
        (Pattern::Discard, Sync::Plain),
    ];
    let who = DRIVERS.iter().flat_map(|&waits| [device("poll-us=0", waits), device("", waits)]);
    let who: Vec<Who> = who.collect();
    let load = |(pattern, sync), depth| Load { pattern, block_bytes: 4 << 10, depth, cache: "none", sync };
    let contest = |kind, depth| Contest { load: load(kind, depth), who: who.clone() };
    kinds.iter().flat_map(|&kind| [1, 4, 32].map(|depth| contest(kind, depth))).collect()
}

/// The default over `poll-us=0`, of I/Os a second, and what both cost.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut rows = Vec::new();
    for outcome in outcomes {
        for waits in DRIVERS {
            let found = |keys| outcome.entry(&device(keys, waits).name());
            let (Some(off), Some(on)) = (found("poll-us=0"), found("")) else { continue };
            let Some(ratio) = Ratio::new(on, off) else { continue };
            let both = |figure: fn(&crate::results::Figures) -> f64| {
                let of = |entry: &crate::results::Entry| entry.median(figure).unwrap_or_default();
                format!("{:.1} / {:.1}", of(off), of(on))
            };
            let free = if waits == Waits::Interrupt { "1" } else { "none" };
            rows.push(vec![
                outcome.name.clone(),
                free.to_owned(),
                format!("{:.2} ({:.2} to {:.2})", ratio.of_medians, ratio.least, ratio.most),
                both(|f| f.iops / 1e3),
                both(|f| f.times.p50_us),
                both(|f| f.cpu_s_per_million),
            ]);
        }
    }
    let head = ["load", "CPUs free", "default over poll-us=0", "kIOPS, 0 / default", "p50 us", "CPU s/M"];
    markdown(&head, &rows)
}
