//! T9: dirty pages cannot be reclaimed until they are on the disk.
//!
//! Owns the claim, the prediction and the meaning of the figures. `steps::host::dirty` makes the system calls.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// Number of bytes that are written.
pub const BYTES: u64 = 8 << 20;
/// Number of repetitions in one step.
pub const REPETITIONS: u32 = 3;
const PAGES: f64 = 2048.0;
const PAGE: f64 = 4096.0;

const DIRTY: &str = "written, not synced";
const SYNCED: &str = "written and synced";

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T9",
    title: "Dirty pages are not reclaimable until written",
    claims: &[Quote::of_2008(
        "Anthony Liguori",
        "Dirty pages in the host page cache are not reclaimable until they're written to disk.",
    )],
    what: "On the host 8 MiB (2048 pages) of a file are read and the kernel is told to let go of them (POSIX_FADV_DONTNEED); then \
           they are written and the same is done; then they are synced by fdatasync, and it is done once more. cachestat(2) counts \
           the pages after each.",
    confounds: "POSIX_FADV_DONTNEED is a request, as memory pressure is one; the kernel may begin to write dirty pages when it is \
                told so. On a fast disk they are there before it looks which it can let go: then fewer stay, and the claim holds all \
                the same. Bytes written by others to that disk would hide a page that was lost.",
    steps: &["dirty"],
    measures: &[
        Measure {
            name: "kept",
            title: "Synced pages still in the cache after they were to go",
            unit: "share of 2048",
            kind: FigureKind::Share,
            how: "cachestat after fdatasync and POSIX_FADV_DONTNEED: it shows what the dirty pages had lacked. (How many of those \
                  stayed is in the picture; on a fast disk some are written, and go, while the request is carried out.)",
            rules: &[],
            control: false,
            // No prediction says how many dirty pages stay, because that depends on the disk.
            // POSIX_FADV_DONTNEED starts their writeback, and the kernel drops those that are written by the
            // time it looks. The measure `unwritten` judges this.
            predictions: &[expect(SYNCED, Bound::AtMost(0.02))],
        },
        Measure {
            name: "unwritten",
            title: "Dirty pages gone that the disk had not been given",
            unit: "share of 2048",
            kind: FigureKind::Share,
            how: "Bytes that have left the cache, less bytes that the host\u{2019}s disk has written since they were made dirty, at least 0.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtMost(0.02),
                why: "no dirty page is taken away before it is on the disk. (One that the kernel writes at once, and then lets go, is no \
                      counterexample.)",
            }],
            control: false,
            predictions: &[expect(DIRTY, Bound::AtMost(0.02))],
        },
        Measure {
            name: "clean",
            title: "Clean pages still there after they were to go",
            unit: "share of 2048",
            kind: FigureKind::Share,
            how: "The same with pages that were only read: it shows that the request is heeded.",
            rules: &[],
            control: true,
            predictions: &[expect("read only", Bound::AtMost(0.02))],
        },
        Measure {
            name: "dirty",
            title: "Dirty pages after writing",
            unit: "pages",
            kind: FigureKind::Count,
            how: "cachestat after 8 MiB were written: it shows that there was something to be refused.",
            rules: &[],
            control: true,
            predictions: &[expect("written", Bound::Between(PAGES * 0.98, PAGES))],
        },
    ],
    measured,
    plots,
};

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let all = |stage: &str, what: &str| step.all(&format!("T9.{stage}.{what}")).to_vec();
    let shares = |stage: &str| all(stage, "cached").iter().map(|pages| pages / PAGES).collect::<Vec<_>>();
    let mut found = Vec::new();
    for (measure, case, stage) in [("kept", SYNCED, "let-go-again"), ("clean", "read only", "clean")] {
        found.extend(shares(stage).iter().filter_map(|&share| value(measure, case, Some(share))));
    }
    // Both series are in the order of the repetitions.
    let written = all("let-go", "disk-written-bytes");
    let gone = all("let-go", "cached").into_iter().zip(written);
    let unwritten = gone.map(|(cached, written)| (PAGES - cached - written / PAGE).max(0.0) / PAGES);
    found.extend(unwritten.filter_map(|share| value("unwritten", DIRTY, Some(share))));
    found.extend(all("written", "dirty").iter().filter_map(|&pages| value("dirty", "written", Some(pages))));
    found
}

/// The stages in order: name in the record, and name on the page.
const STAGES: [(&str, &str); 6] = [
    ("read", "read"),
    ("clean", "let go"),
    ("written", "written"),
    ("let-go", "let go"),
    ("synced", "synced"),
    ("let-go-again", "let go"),
];

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let curve = |what: &'static str| {
        STAGES.iter().enumerate().filter_map(move |(at, (stage, _))| {
            step.get(&format!("T9.{stage}.{what}")).map(|pages| (at as f64, pages))
        })
    };
    vec![
        Plot::bars("Pages in the host\u{2019}s cache, stage by stage", "pages", STAGES.map(|stage| stage.1))
            .with("in the cache", curve("cached"))
            .with("dirty", curve("dirty"))
            .with("being written", curve("writeback"))
            .note("8 MiB of a file, first time of the first repetition."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_was_written() {
        let mut step = StepRecord::new("dirty", 1);
        // All pages stay; then half of them go after they were written; then half of them go unwritten.
        for (left, written) in [(2048.0, 0.0), (1024.0, 1024.0 * PAGE), (1024.0, 0.0)] {
            step.put("T9.let-go.cached", left);
            step.put("T9.let-go.disk-written-bytes", written);
        }
        for (stage, pages) in [("let-go-again", 0.0), ("clean", 0.0)] {
            step.put(&format!("T9.{stage}.cached"), pages);
        }
        step.put("T9.written.dirty", 2048.0);
        let found = measured(&step);
        let of = |measure: &str, case: &str| -> Vec<f64> {
            let of = found.iter().filter(|found| found.measure == measure && found.case == case);
            of.map(|found| found.value).collect()
        };
        assert_eq!(of("kept", SYNCED), [0.0]);
        assert_eq!(of("unwritten", DIRTY), [0.0, 0.0, 0.5]);
        assert_eq!(of("dirty", "written"), [2048.0]);
        assert!(measured(&StepRecord::new("dirty", 1)).is_empty());
    }
}
