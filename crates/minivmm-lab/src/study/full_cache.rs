//! T8: a full host cache ruins the performance of all guests, or it makes them no slower than guests without
//! it.
//!
//! Owns the claims, the predictions and the meaning of the figures. The step of memory pressure measures it.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::{Form, Plot};
use super::steadiness::{MODES, PHASES, by_none};

const MIB: f64 = (1u64 << 20) as f64;
const WRITEBACK: &str = "writeback";
const VICTIM: &str = "none, beside one in writeback";

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T8",
    title: "A full host cache: all guests trashed, or no worse than without",
    claims: &[
        Quote::of_2008(
            "Daniel P. Berrange",
            "but if host I/O cache is full and they do something which requires more host memory (eg start up another guest), then all \
             existing guests get their I/O performance trashed as the I/O cache has to be flushed out, and future I/O is unable to be \
             cached.",
        ),
        Quote::of_2008(
            "Anthony Liguori",
            "This is not accurate. Dirty pages in the host page cache are not reclaimable until they're written to disk. If you're in a \
             seriously low memory situation, they the thing allocating memory is going to sleep until the data is written to disk. If an \
             existing guest is trying to do I/O, then what things will degenerate to is basically cache=off since the guest must wait for \
             other pending IO to complete",
        ),
    ],
    what: "T5\u{2019}s jobs: a writer in writeback, whose page cache is full, with and without a process beside it that takes memory, and the \
           same in none. Then a job in none beside another writer, which is once in writeback and once in none, under the same pressure. How \
           long the process has to wait for its memory is timed.",
    confounds: "As in T5. The job in none and the writer beside it are in one guest and share its processor, whatever the modes; that is why \
                the two pairs are compared with each other. On a fast disk there is little to be lost by a cache that is gone.",
    steps: &["pressure"],
    measures: &[
        Measure {
            name: "left",
            title: "What pressure leaves of the speed",
            unit: "share",
            kind: FigureKind::SpeedRatio,
            how: "Writes a second under pressure by those with memory to spare; of none, beside a writer in writeback by beside one in none.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtMost(0.5),
                why: "\u{201c}trashed\u{201d} is taken for half the speed or less.",
            }],
            control: false,
            predictions: &[expect(WRITEBACK, Bound::AtMost(0.8)), expect(VICTIM, Bound::Between(0.5, 1.5))],
        },
        Measure {
            name: "by-none",
            title: "Under pressure: speed in writeback, by that in none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "Writes a second of the two, each beside the process that takes memory.",
            rules: &[Rule {
                claim: 1,
                is_true: Bound::Between(0.75, 1.25),
                why: "\u{201c}basically cache=off\u{201d} is the speed of none, a quarter more or less.",
            }],
            control: false,
            predictions: &[expect(WRITEBACK, Bound::Between(0.75, 1.25))],
        },
        Measure {
            name: "idle-by-none",
            title: "With memory to spare: the same",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "What there was to be lost.",
            rules: &[],
            control: false,
            predictions: &[expect(WRITEBACK, Bound::AtLeast(1.0))],
        },
        Measure {
            name: "hits",
            title: "Times that the limit was hit",
            unit: "",
            kind: FigureKind::Count,
            how: "\u{201c}max\u{201d} of memory.events: it shows that there was pressure.",
            rules: &[],
            control: true,
            predictions: &[expect(WRITEBACK, Bound::AtLeast(1.0))],
        },
        Measure {
            name: "stall",
            title: "Time to get 72 MiB beside the writer in writeback, by that beside the one in none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "Means of all times that it was taken.",
            rules: &[],
            control: false,
            predictions: &[expect(WRITEBACK, Bound::AtLeast(1.2))],
        },
    ],
    measured,
    plots,
};

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let of = |name: &str| step.get(&format!("P.{name}")).filter(|figure| *figure > 0.0);
    let ratio = |above: &str, below: &str| Some(of(above)? / of(below)?);
    let mean = |mode: &str| {
        let all = step.all(&format!("P.{mode}.pressed.hog-seconds"));
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    };
    [
        value("left", WRITEBACK, ratio("writeback.pressed.iops", "writeback.idle.iops")),
        value("left", VICTIM, ratio("victim.writeback.iops", "victim.none.iops")),
        value("by-none", WRITEBACK, by_none(step, "pressed", "iops")),
        value("idle-by-none", WRITEBACK, by_none(step, "idle", "iops")),
        value(
            "hits",
            WRITEBACK,
            step.grown("P.writeback.pressed.limit-hits.before", "P.writeback.pressed.limit-hits.after"),
        ),
        value("stall", WRITEBACK, mean("writeback").zip(mean("none")).map(|(own, none)| own / none)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let cache = PHASES.iter().fold(
        Plot::lines("The writer\u{2019}s image in the host\u{2019}s cache", "seconds", "MiB")
            .form(Form::Steps),
        |plot, phase| {
            let of = |what: &str| {
                let points =
                    step.curves.get(&format!("P.writeback.{phase}.{what}")).cloned().unwrap_or_default();
                points.into_iter().map(|(at, bytes)| (at, bytes / MIB)).collect::<Vec<_>>()
            };
            plot.with(format!("cached, {phase}"), of("host_cached_bytes"))
                .with(format!("dirty, {phase}"), of("host_dirty_bytes"))
        },
    );
    let speeds = PHASES.iter().fold(Plot::bars("Writes a second", "writes/s", MODES), |plot, phase| {
        let bars = MODES
            .iter()
            .enumerate()
            .filter_map(|(at, mode)| Some((at as f64, step.get(&format!("P.{mode}.{phase}.iops"))?)));
        plot.with(*phase, bars)
    });
    vec![
        cache.note("In writeback, idle and beside the process that takes memory (pressed)."),
        speeds.note("First repetition: alone (idle), and beside that process (pressed)."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_compared_with_itself() {
        let mut step = StepRecord::new("pressure", 1);
        for (name, figure) in [
            ("writeback.idle.iops", 100.0),
            ("writeback.pressed.iops", 40.0),
            ("none.pressed.iops", 50.0),
            ("victim.writeback.iops", 30.0),
            ("victim.none.iops", 60.0),
        ] {
            step.put(&format!("P.{name}"), figure);
        }
        let of = |measure: &str, case: &str| {
            measured(&step)
                .into_iter()
                .find(|found| found.measure == measure && found.case == case)
                .map(|found| found.value)
        };
        assert_eq!(of("left", WRITEBACK), Some(0.4));
        assert_eq!(of("left", VICTIM), Some(0.5));
        assert_eq!(of("by-none", WRITEBACK), Some(0.8));
    }
}
