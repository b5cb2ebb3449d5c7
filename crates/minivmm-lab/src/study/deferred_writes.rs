//! T11: the speed of a cached disk is an illusion that somebody pays for later.
//!
//! Owns the claim, the prediction and the meaning of the figures. The step of writes measures it, with the job
//! of T3 that does not sync.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value, values};
use super::plot::{Form, Plot};

const MIB: f64 = (1u64 << 20) as f64;

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T11",
    title: "The default\u{2019}s performance is an illusion",
    claims: &[Quote::of_2008(
        "Daniel P. Berrange",
        "The current system merely provides an illusion of performance - any attempt to show that performance has decreased is \
         impossible because any attempt to run benchmarks with existing caching just results in meaningless garbage.",
    )],
    what: "fio in the guest writes without a sync (T3\u{2019}s first job). When it has ended and told its figure, cachestat(2) counts what of the \
           image is still to be written, and the host\u{2019}s fdatasync of it is timed.",
    confounds: "As in T3. A guest that syncs is told the truth in writeback (T3, with a sync at the end); in 2008 it could not sync.",
    steps: &["writes"],
    measures: &[
        Measure {
            name: "owed",
            title: "Still to be written when the benchmark has ended",
            unit: "share",
            kind: FigureKind::Share,
            how: "Dirty pages and pages under writeback of the image, by the bytes of fio\u{2019}s writes.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(0.5),
                why: "the benchmark has told a figure for work of which half or more was not done.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(0.02)),
                expect("directsync", Bound::AtMost(0.02)),
                expect("writethrough", Bound::AtMost(0.02)),
                expect("writeback", Bound::AtLeast(0.9)),
                expect("dontcache", Bound::AtMost(0.2)),
                expect("unsafe", Bound::AtLeast(0.9)),
            ],
        },
        Measure {
            name: "seconds",
            title: "The host\u{2019}s fdatasync afterwards",
            unit: "ms",
            kind: FigureKind::Time,
            how: "By the host\u{2019}s clock, right behind the count.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(50.0)),
                expect("directsync", Bound::AtMost(50.0)),
                expect("writethrough", Bound::AtMost(50.0)),
                expect("writeback", Bound::AtLeast(1.0)),
                expect("dontcache", Bound::AtMost(50.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
            ],
        },
    ],
    measured,
    plots,
};

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    for mode in MODES {
        let all = |what: &str| step.all(&format!("T3.{mode}.no-sync.{what}")).to_vec();
        let left = all("after.dirty").into_iter().zip(all("after.writeback"));
        let owed = left.zip(all("bytes")).map(|((dirty, writeback), bytes)| (dirty + writeback) / bytes);
        found.extend(owed.filter_map(|share| value("owed", mode, Some(share))));
        let millis: Vec<f64> = all("sync-seconds").iter().map(|seconds| seconds * 1e3).collect();
        found.extend(values("seconds", mode, &millis));
    }
    found
}

/// Removes the curves that are not drawn.
pub fn trim(step: &mut StepRecord) {
    step.curves
        .retain(|name, _| [".bytes_at_risk", ".host_dirty_bytes"].iter().any(|end| name.ends_with(end)));
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let plot = |title: &str, column: &str| {
        MODES.iter().fold(
            Plot::lines(title, "seconds since the first job", "MiB").form(Form::Steps),
            |plot, mode| {
                let points = step.curves.get(&format!("W.{mode}.{column}")).cloned().unwrap_or_default();
                plot.with(*mode, points.into_iter().map(|(at, bytes)| (at, bytes / MIB)))
            },
        )
    };
    vec![
        plot("Bytes at risk while T3\u{2019}s and T4\u{2019}s jobs run", "bytes_at_risk").note(
            "Acknowledged to the guest and not yet stable: what a crash of the host, or of its power, could cost (docs/statistics.md). In \
             writethrough and directsync 0 at all times. The host\u{2019}s own syncs between the jobs are not minivmm\u{2019}s, so unsafe only grows.",
        ),
        plot("Dirty pages of the image meanwhile", "host_dirty_bytes")
            .note("After each job the host syncs the image and drops it from its cache."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_is_dirty_or_on_its_way() {
        let mut step = StepRecord::new("writes", 1);
        for (name, figure) in
            [("after.dirty", 30.0), ("after.writeback", 20.0), ("bytes", 100.0), ("sync-seconds", 0.25)]
        {
            step.put(&format!("T3.unsafe.no-sync.{name}"), figure);
        }
        let found = measured(&step);
        assert_eq!(found.iter().map(|found| found.value).collect::<Vec<_>>(), [0.5, 250.0]);
    }
}
