//! T5: without the host's cache a guest's performance is steadier.
//!
//! Owns the claims, the predictions and the meaning of the figures. The step of memory pressure measures it,
//! also for T8.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// The modes that are compared, on vda and vdb.
pub const MODES: [&str; 2] = ["none", "writeback"];
/// The phases: without and with a process that takes memory.
pub const PHASES: [&str; 2] = ["idle", "pressed"];

const IDLE: &str = "memory to spare";
const PRESSED: &str = "under memory pressure";

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T5",
    title: "Without the host\u{2019}s cache performance is more consistent",
    claims: &[Quote::of_2008(
        "Daniel P. Berrange",
        "They will find their guests perform more consistently. With the current system their guests will perform very erratically \
         depending on memory & I/O pressure on the host.",
    )],
    what: "The guest writes blocks of 16 KiB at random places, past its own cache and without a sync, for some seconds: on a disk in none \
           and on one in writeback, each first alone and then beside a process that takes 72 MiB, holds them, and gives them back, again \
           and again. VM, page cache and that process are in one cgroup of 272 MiB, whose cache is full of \
           another file when that begins. How many writes each moment has had is observed.",
    confounds: "A cgroup is a small host, not a host: the limit on its dirty pages is its own. A moment is a second; a quick run has 10 of them \
                in each phase, a full one 60. The processor is shared with the process beside the guest, in both modes.",
    steps: &["pressure"],
    measures: &[
        Measure {
            name: "unsteadiness",
            title: "Variation of the rate in writeback, by that in none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "Coefficient of variation (standard deviation by mean) of the writes in each moment, without the first and last moment.",
            rules: &[],
            control: false,
            predictions: &[expect(IDLE, Bound::Between(0.2, 5.0)), expect(PRESSED, Bound::AtLeast(1.5))],
        },
        Measure {
            name: "pressed",
            title: "The same under memory pressure, which the claim is about",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "As above.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(1.5),
                why: "\u{201c}very erratically\u{201d} is taken for half as much variation again, or more.",
            }],
            control: false,
            predictions: &[expect(PRESSED, Bound::AtLeast(1.5))],
        },
        Measure {
            name: "hits",
            title: "Times that the limit was hit",
            unit: "",
            kind: FigureKind::Count,
            how: "\u{201c}max\u{201d} of memory.events while the process was beside the guest in writeback: it shows that there was pressure.",
            rules: &[],
            control: true,
            predictions: &[expect("writeback", Bound::AtLeast(1.0))],
        },
        Measure {
            name: "tail",
            title: "Slowest in a thousand writes under pressure, writeback by none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "fio\u{2019}s 99.9th percentile of completion latency.",
            rules: &[],
            control: false,
            predictions: &[expect(PRESSED, Bound::AtLeast(1.5))],
        },
    ],
    measured,
    plots,
};

/// Divides a figure in writeback by the same figure in none.
pub fn by_none(step: &StepRecord, phase: &str, what: &str) -> Option<f64> {
    let of = |mode: &str| step.get(&format!("P.{mode}.{phase}.{what}")).filter(|figure| *figure > 0.0);
    Some(of("writeback")? / of("none")?)
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    [
        value("unsteadiness", IDLE, by_none(step, "idle", "variation")),
        value("unsteadiness", PRESSED, by_none(step, "pressed", "variation")),
        value("pressed", PRESSED, by_none(step, "pressed", "variation")),
        value(
            "hits",
            "writeback",
            step.grown("P.writeback.pressed.limit-hits.before", "P.writeback.pressed.limit-hits.after"),
        ),
        value("tail", PRESSED, by_none(step, "pressed", "p999-us")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let plot = |title: &str, phase: &str, note: &str| {
        MODES
            .iter()
            .fold(Plot::lines(title, "seconds", "writes/s"), |plot, mode| {
                plot.with(
                    *mode,
                    step.curves.get(&format!("P.{mode}.{phase}.rate")).cloned().unwrap_or_default(),
                )
            })
            .note(note)
    };
    vec![
        plot(
            "Writes a second, memory to spare",
            "idle",
            "First repetition; blocks of 16 KiB, one at a time, no sync.",
        ),
        plot(
            "Writes a second under memory pressure",
            "pressed",
            "The same beside a process that takes and gives back 72 MiB.",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variation_is_compared_with_that_of_none() {
        let mut step = StepRecord::new("pressure", 1);
        step.put("P.none.pressed.variation", 0.1);
        step.put("P.writeback.pressed.variation", 0.4);
        step.put("P.none.idle.variation", 0.0);
        step.put("P.writeback.idle.variation", 0.4);
        let found = measured(&step);
        assert_eq!(
            found.iter().map(|found| (found.measure, found.value)).collect::<Vec<_>>(),
            [("unsteadiness", 4.0), ("pressed", 4.0)]
        );
    }
}
