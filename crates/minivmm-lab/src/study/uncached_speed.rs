//! T4: without the host's cache guests are much slower.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of writes
//! measures it. The writes with and without syncs are the jobs of T3.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, values};
use super::plot::Plot;
use super::unsynced_data;
use super::unsynced_data::JobSize;

const WRITES: &str = "writes, no sync";
const END: &str = "writes, sync at the end";
const EACH: &str = "writes, sync after each";
const RE_READS: &str = "reads of what was read";
const MIXED: &str = "reads and writes, no sync";
const CASES: [&str; 5] = [WRITES, END, EACH, RE_READS, MIXED];

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T4",
    title: "Switching caching off makes guests much slower",
    claims: &[Quote::of_2008(
        "Chris Lalancette",
        "People are going to upgrade to 0.4.7 (or whatever), and suddenly find that their KVM guests perform much more slowly.",
    )],
    what: "The same jobs of 4 KiB at random places, one at a time and past the guest\u{2019}s cache, on a disk in none and on one in writeback, \
           with enough free memory on the host: writes without a sync, with one at the end, with one after each, reads of what has been \
           read before, and reads and writes mixed.",
    confounds: "The host has memory to spare, which is the best case for caching (T5 and T8 take it away). What none costs depends on the disk: \
                on one as fast as memory it costs nothing. In 2008 a guest had no usable FLUSH, so its syncs cost nothing either.",
    steps: &["writes"],
    measures: &[Measure {
        name: "speed",
        title: "Operations a second in none, by those in writeback",
        unit: "times",
        kind: FigureKind::SpeedRatio,
        how: "fio\u{2019}s figures of the same repetition, in one guest.",
        rules: &[Rule {
            claim: 0,
            is_true: Bound::AtMost(0.5),
            why: "\u{201c}much more slowly\u{201d} is taken for half the speed or less.",
        }],
        control: false,
        predictions: &[
            expect(WRITES, Bound::AtMost(0.7)),
            expect(END, Bound::Between(0.4, 1.5)),
            expect(EACH, Bound::Between(0.7, 1.5)),
            expect(RE_READS, Bound::AtMost(0.7)),
            expect(MIXED, Bound::AtMost(0.7)),
        ],
    }],
    measured,
    plots,
};

/// Returns the guest's script for one disk.
pub fn script(mode: &str, device: &str, size: JobSize) -> String {
    let kib = size.blocks * 4;
    let mut script =
        format!("ask drop {device}; dd if=/dev/{device} of=/dev/null bs=1M count=16 2>/dev/null; forget\n");
    for _ in 0..size.times {
        for (name, options) in [("re-reads", "--rw=randread"), ("mixed", "--rw=randrw --rwmixread=70")] {
            script += &format!(
                "job T4.{mode}.{name} {device} {options} --bs=4k --direct=1 --size=16m --io_size={kib}k\n"
            );
        }
    }
    script + &format!("ask sync T4.{mode} {device}\n")
}

fn job(mode: &str, case: &str) -> String {
    match case {
        WRITES => format!("T3.{mode}.{}.iops", unsynced_data::slug(unsynced_data::NO_SYNC)),
        END => format!("T3.{mode}.{}.iops", unsynced_data::slug(unsynced_data::END)),
        EACH => format!("T3.{mode}.{}.iops", unsynced_data::slug(unsynced_data::EACH)),
        RE_READS => format!("T4.{mode}.re-reads.iops"),
        _ => format!("T4.{mode}.mixed.iops"),
    }
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let of = |case: &'static str| {
        let ratios = step.ratios(&job("none", case), &job("writeback", case));
        values("speed", case, &ratios).collect::<Vec<_>>()
    };
    CASES.into_iter().flat_map(of).collect()
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let short = ["no sync", "at the end", "after each", "re-reads", "mixed"];
    let mut plot = Plot::bars("Operations a second by mode", "operations/s", short);
    for mode in super::experiment::MODES {
        let bars = CASES.iter().enumerate().filter_map(|(at, case)| {
            let all = step.all(&job(mode, case));
            (!all.is_empty()).then(|| (at as f64, all.iter().sum::<f64>() / all.len() as f64))
        });
        plot = plot.with(mode, bars);
    }
    vec![plot.note("Means of the first repetition: writes without, with one and with many syncs, reads of what was read, 70 % reads.")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_repetition() {
        let mut step = StepRecord::new("writes", 1);
        for (none, writeback) in [(10.0, 20.0), (30.0, 40.0)] {
            step.put(&job("none", RE_READS), none);
            step.put(&job("writeback", RE_READS), writeback);
        }
        let found: Vec<_> = measured(&step).into_iter().map(|found| found.value).collect();
        assert_eq!(found, [0.5, 0.75]);
    }
}
