//! A2: directsync compared with none, for bulk writes.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of stable writes
//! measures it.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, values};
use super::log_appends::MODES;
use super::plot::Plot;

const CASE: &str = "directsync / none";

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "A2",
    title: "directsync against none: bulk writes",
    claims: &[
        Quote {
            text: "`none` bypasses the host page cache (via `O_DIRECT`) but reports writeback cache to the guest, causing QEMU to issue \
                   `fdatasync()` on every guest write.",
            author: "mhenriks",
            source: "kubevirt/enhancements, pull request 327 (VEP 326), 2026",
        },
        Quote {
            text: "`directsync` also bypasses the host cache but issues `fdatasync()` only on guest-initiated flush commands",
            author: "mhenriks",
            source: "kubevirt/enhancements, pull request 327 (VEP 326), 2026",
        },
    ],
    what: "fio in the guest writes a lot in pieces of 64 KiB past its cache, with one sync at the end: a copy, a restore, a file system that \
           writes back. Counted is how many of the writes minivmm makes stable one by one, and how many fdatasyncs it makes.",
    confounds: "The claims are about QEMU; the modes\u{2019} rows are the same (docs/results/qemu-calls.md), and there too a write in none is a plain one. \
                How much a stable write costs depends on the disk; where the host is emulated its FLUSH is nearly free.",
    steps: &["stable"],
    measures: &[
        Measure {
            name: "none-syncs",
            title: "Stable writes and fdatasyncs for each write in none",
            unit: "",
            kind: FigureKind::Count,
            how: "minivmm\u{2019}s counters: writes with RWF_DSYNC and fdatasyncs, by the guest\u{2019}s writes.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(0.9),
                why: "an fdatasync on every guest write is about one for each.",
            }],
            control: false,
            predictions: &[expect("none", Bound::AtMost(0.1))],
        },
        Measure {
            name: "directsync-syncs",
            title: "Stable writes and fdatasyncs for each write in directsync",
            unit: "",
            kind: FigureKind::Count,
            how: "The same. The guest has sent no FLUSH: it sees no write cache.",
            rules: &[Rule {
                claim: 1,
                is_true: Bound::AtMost(0.1),
                why: "only on flush commands would be none at all while the guest sends none.",
            }],
            control: false,
            predictions: &[expect("directsync", Bound::about(1.0, 0.05))],
        },
        Measure {
            name: "gain",
            title: "Bytes a second, directsync by none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "fio\u{2019}s figures with the sync at the end, of the same guest and repetition.",
            rules: &[],
            control: false,
            predictions: &[expect(CASE, Bound::AtMost(0.9))],
        },
        Measure {
            name: "flushes",
            title: "FLUSHes of the host\u{2019}s disk for each write",
            unit: "",
            kind: FigureKind::Count,
            how: "Of its stat. On a disk with FUA directsync needs none.",
            rules: &[],
            control: false,
            predictions: &[expect("none", Bound::AtMost(0.1)), expect("directsync", Bound::AtMost(2.5))],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script: a job that writes `mib` MiB, run `times` times.
pub fn script(mode: &str, device: &str, mib: u64, times: usize) -> String {
    let one = format!(
        "ask stats A2.{mode}.before {device}; ask look A2.{mode}.before {device}
job A2.{mode} {device} --rw=write --bs=64k --direct=1 --size={mib}m --end_fsync=1
ask look A2.{mode}.after {device}; ask stats A2.{mode}.after {device}\n"
    );
    one.repeat(times)
}

/// Returns the growth of these counters per write of the guest, for each repetition.
fn for_each(step: &StepRecord, mode: &str, what: &[&str]) -> Vec<f64> {
    let name = format!("A2.{mode}");
    step.growths_for_each(&name, what, &step.growths(&name, "writes"))
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found: Vec<_> =
        values("gain", CASE, &step.ratios("A2.directsync.mb-s", "A2.none.mb-s")).collect();
    for (mode, measure) in [("none", "none-syncs"), ("directsync", "directsync-syncs")] {
        for (measure, what) in
            [(measure, &["dsync-writes", "fdatasyncs"][..]), ("flushes", &["disk-flushes"][..])]
        {
            found.extend(values(measure, mode, &for_each(step, mode, what)));
        }
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let bars = (0u8..).zip(MODES);
    let bars = bars.filter_map(|(at, mode)| Some((at.into(), step.mean(&format!("A2.{mode}.mb-s"))?)));
    vec![
        Plot::bars("Bulk writes", "MB/s", MODES)
            .with("written", bars)
            .note("64 KiB at a time, one sync at the end."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syncs_are_told_for_each_write() {
        let mut step = StepRecord::new("stable", 1);
        for (what, after) in [("writes", 256.0), ("dsync-writes", 256.0), ("fdatasyncs", 0.0)] {
            step.put(&format!("A2.directsync.before.{what}"), 0.0);
            step.put(&format!("A2.directsync.after.{what}"), after);
        }
        assert_eq!(for_each(&step, "directsync", &["dsync-writes", "fdatasyncs"]), [1.0]);
    }
}
