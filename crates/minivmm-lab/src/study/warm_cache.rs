//! T6: with an empty host cache that has room, guests are fast.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of reads
//! measures it.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T6",
    title: "With room in the host\u{2019}s cache and no load, guests are fast",
    claims: &[Quote::of_2008(
        "Daniel P. Berrange",
        "If the host I/O cache is empty & has no I/O load, current guests will be \"fast\"",
    )],
    what: "The guest reads its disk with both caches dropped, then with only its own dropped. The host\u{2019}s \
           cache has room for all of it, and nothing else runs. \u{201c}Fast\u{201d} is taken to mean: what was read or written before is had \
           without the host\u{2019}s disk.",
    confounds: "A disk with a cache of its own, or a hypervisor above this host that caches, makes the disk\u{2019}s speed look like \
                memory\u{2019}s: bytes decide, speeds illustrate. The host\u{2019}s counters are of its whole disk.",
    steps: &["reads"],
    measures: &[
        Measure {
            name: "from-disk",
            title: "Read again, the guest\u{2019}s cache dropped: bytes from the host\u{2019}s disk",
            unit: "share",
            kind: FigureKind::Share,
            how: "Bytes that the host\u{2019}s disk has read meanwhile, by the bytes that the guest has read.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtMost(0.1),
                why: "nine tenths or more come without the disk.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::about(1.0, 0.1)),
                expect("directsync", Bound::about(1.0, 0.1)),
                expect("writethrough", Bound::AtMost(0.05)),
                expect("writeback", Bound::AtMost(0.05)),
                expect("dontcache", Bound::AtLeast(0.9)),
                expect("unsafe", Bound::AtMost(0.05)),
            ],
        },
        Measure {
            name: "cold",
            title: "Both dropped: bytes from the host\u{2019}s disk",
            unit: "share",
            kind: FigureKind::Share,
            how: "The same with nothing in either cache: it shows that dropping works, and that the disk\u{2019}s counter counts.",
            rules: &[],
            control: true,
            predictions: &[
                expect("none", Bound::about(1.0, 0.1)),
                expect("directsync", Bound::about(1.0, 0.1)),
                expect("writethrough", Bound::about(1.0, 0.1)),
                expect("writeback", Bound::about(1.0, 0.1)),
                expect("dontcache", Bound::AtLeast(0.9)),
                expect("unsafe", Bound::about(1.0, 0.1)),
            ],
        },
        Measure {
            name: "gain",
            title: "Speed read again, by that with both dropped",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "fio, reads of 128 KiB through the guest\u{2019}s cache.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::about(1.0, 0.5)),
                expect("directsync", Bound::about(1.0, 0.5)),
                expect("writethrough", Bound::AtLeast(1.2)),
                expect("writeback", Bound::AtLeast(1.2)),
                expect("dontcache", Bound::about(1.0, 0.5)),
                expect("unsafe", Bound::AtLeast(1.2)),
            ],
        },
    ],
    measured,
    plots,
};

/// The readings, and whether the host's cache is dropped before. The guest's cache always is.
const READINGS: [(&str, bool); 2] = [("cold", true), ("again", false)];

/// Returns the guest's script for one disk.
pub fn script(mode: &str, device: &str, mib: u64) -> String {
    let one = |(name, both): (&str, bool)| {
        let drop = if both { format!("ask drop {device}; ") } else { String::new() };
        let name = format!("T6.{mode}.{name}");
        format!(
            "forget; {drop}ask look {name}.before {device}
job {name} {device} --rw=read --bs=128k --size={mib}m
ask look {name}.after {device}\n"
        )
    };
    READINGS.into_iter().map(one).collect()
}

fn from_disk(step: &StepRecord, mode: &str, reading: &str) -> Option<f64> {
    let name = format!("T6.{mode}.{reading}");
    let read =
        step.grown(&format!("{name}.before.disk-read-bytes"), &format!("{name}.after.disk-read-bytes"))?;
    Some(read / step.get(&format!("{name}.bytes"))?)
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    for mode in MODES {
        let speed = |reading: &str| step.get(&format!("T6.{mode}.{reading}.mb-s"));
        found.extend(value("from-disk", mode, from_disk(step, mode, "again")));
        found.extend(value("cold", mode, from_disk(step, mode, "cold")));
        let gain = speed("again").zip(speed("cold")).map(|(again, cold)| again / cold);
        found.extend(value("gain", mode, gain));
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let bars = |reading: &'static str| {
        MODES
            .iter()
            .enumerate()
            .filter_map(move |(at, mode)| Some((at as f64, step.get(&format!("T6.{mode}.{reading}.mb-s"))?)))
    };
    vec![
        Plot::bars("Reading the whole disk", "MB/s", MODES)
            .with("both dropped", bars("cold"))
            .with("the guest\u{2019}s dropped", bars("again"))
            .note("First repetition. Speeds: on an emulated host they are the emulator\u{2019}s."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_guests_bytes() {
        let mut step = StepRecord::new("reads", 1);
        for (name, figure) in [
            ("T6.none.again.before.disk-read-bytes", 1000.0),
            ("T6.none.again.after.disk-read-bytes", 1900.0),
            ("T6.none.again.bytes", 1000.0),
            ("T6.none.again.mb-s", 30.0),
            ("T6.none.cold.mb-s", 20.0),
        ] {
            step.put(name, figure);
        }
        let of = |measure: &str| {
            measured(&step).into_iter().find(|found| found.measure == measure).map(|found| found.value)
        };
        assert_eq!((of("from-disk"), of("gain"), of("cold")), (Some(0.9), Some(1.5), None));
        assert!(script("none", "vda", 32).matches("ask drop vda").count() == 1);
    }
}
