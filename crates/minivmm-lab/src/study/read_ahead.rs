//! T7: if the host's page cache is bypassed, the host cannot read ahead.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of reads
//! measures it.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// Amount that is read, from the start of the disk.
const KIB: u64 = 512;

const DIRECT: &str = "direct";
const BUFFERED: &str = "buffered";
const BUFFERED_MODES: [&str; 3] = ["none", "directsync", "writeback"];

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T7",
    title: "Without the host\u{2019}s cache there is no read-ahead of the host\u{2019}s",
    claims: &[
        Quote::of_2008(
            "Anthony Liguori",
            "When using cache=off, the host cannot perform any sort of read-ahead.",
        ),
        Quote::of_2008("Anthony Liguori", "They will perform marginally better than if cache=off."),
    ],
    what: "With both caches dropped the guest reads 512 KiB in pieces of 4 KiB, one after the other, past its own cache. Seen from the host: \
           how large the reads of its disk are, and how much of the image is in its cache beyond the last byte that was asked for. Then \
           the same through the guest\u{2019}s cache, which reads ahead itself.",
    confounds: "Sizes of reads are those of the host\u{2019}s whole disk. A disk may read ahead too; that is not seen here. The second claim is \
                about speed: what a missing read-ahead costs depends on the disk.",
    steps: &["reads"],
    measures: &[
        Measure {
            name: "ahead",
            title: "In the host\u{2019}s cache beyond what was asked for",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "cachestat of the image when 512 KiB were read past the guest\u{2019}s cache, less 512 KiB, at least 0.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(0.0)),
                expect("directsync", Bound::AtMost(0.0)),
                expect("writethrough", Bound::AtLeast(4.0)),
                expect("writeback", Bound::AtLeast(4.0)),
                expect("unsafe", Bound::AtLeast(4.0)),
            ],
        },
        Measure {
            name: "size",
            title: "A read of the host\u{2019}s disk, in the modes past the cache",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "Bytes by reads, while the guest reads 4 KiB at a time past its own cache.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtMost(5.0),
                why: "the disk is asked for what the guest has asked for, 4 KiB, and no more (1 KiB is left to others on that disk).",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::about(4.0, 0.5)),
                expect("directsync", Bound::about(4.0, 0.5)),
            ],
        },
        Measure {
            name: "cached-size",
            title: "A read of the host\u{2019}s disk, in the modes with the cache",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "The same: it shows that the host would read ahead if it could.",
            rules: &[],
            control: true,
            predictions: &[
                expect("writethrough", Bound::AtLeast(32.0)),
                expect("writeback", Bound::AtLeast(32.0)),
                expect("unsafe", Bound::AtLeast(32.0)),
            ],
        },
        Measure {
            name: "dropped-size",
            title: "A read of the host\u{2019}s disk in dontcache",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "The same. dontcache passes through the cache, so the host may read ahead, and drops what was read.",
            rules: &[],
            control: false,
            predictions: &[expect("dontcache", Bound::AtLeast(8.0))],
        },
        Measure {
            name: "dropped-left",
            title: "In the host\u{2019}s cache afterwards in dontcache",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "cachestat when 512 KiB were read past the guest\u{2019}s cache: what is there was read ahead and not asked for yet.",
            rules: &[],
            control: false,
            predictions: &[expect("dontcache", Bound::Between(4.0, KIB as f64))],
        },
        Measure {
            name: "dropped-again",
            title: "Bytes that the host\u{2019}s disk reads in dontcache, by those the guest asks for",
            unit: "times",
            kind: FigureKind::Share,
            how: "Small reads can drop what was read ahead with them, and it is then read again.",
            rules: &[],
            control: false,
            predictions: &[expect("dontcache", Bound::Between(1.0, 4.0))],
        },
        Measure {
            name: "guest-ahead",
            title: "A read of the host\u{2019}s disk when the guest reads ahead itself",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "The same 512 KiB through the guest\u{2019}s cache.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtLeast(32.0)),
                expect("directsync", Bound::AtLeast(32.0)),
                expect("writeback", Bound::AtLeast(32.0)),
            ],
        },
        Measure {
            name: "gain",
            title: "Speed of small reads, by that of none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "fio, 4 KiB at a time past the guest\u{2019}s cache, by the same on the disk in none.",
            rules: &[Rule {
                claim: 1,
                is_true: Bound::Between(1.0, 1.5),
                why: "\u{201c}marginally better\u{201d} is better, by half at most.",
            }],
            control: false,
            predictions: &[
                expect("writethrough", Bound::AtLeast(1.5)),
                expect("writeback", Bound::AtLeast(1.5)),
                expect("dontcache", Bound::Between(0.5, 2.0)),
                expect("unsafe", Bound::AtLeast(1.5)),
            ],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script for one disk.
pub fn script(mode: &str, device: &str) -> String {
    let one = |way: &str, direct: u8| {
        let name = format!("T7.{mode}.{way}");
        // The pause lets read-ahead finish that is under way when the last read returns.
        format!(
            "forget; ask drop {device}; ask look {name}.before {device}
job {name} {device} --rw=read --bs=4k --direct={direct} --size={KIB}k
sleep 0.2; ask look {name}.after {device}\n"
        )
    };
    // The guest's own read-ahead does not depend on the mode, so three modes are enough to show it.
    let buffered = if BUFFERED_MODES.contains(&mode) { one(BUFFERED, 0) } else { String::new() };
    one(DIRECT, 1) + &buffered
}

/// Returns the bytes that the host's disk has read, divided by those that the guest has read.
fn again(step: &StepRecord, mode: &str) -> Option<f64> {
    let name = format!("T7.{mode}.{DIRECT}");
    let read =
        step.grown(&format!("{name}.before.disk-read-bytes"), &format!("{name}.after.disk-read-bytes"))?;
    Some(read / (KIB * 1024) as f64)
}

/// Returns the mean size in KiB of the reads of the host's disk.
fn size(step: &StepRecord, mode: &str, way: &str) -> Option<f64> {
    let grown = |what: &str| {
        let name = format!("T7.{mode}.{way}");
        step.grown(&format!("{name}.before.{what}"), &format!("{name}.after.{what}"))
    };
    let reads = grown("disk-reads").filter(|reads| *reads > 0.0)?;
    Some(grown("disk-read-bytes")? / reads / 1024.0)
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    let speed = |mode: &str| step.get(&format!("T7.{mode}.{DIRECT}.iops"));
    for mode in MODES {
        let cached = step.get(&format!("T7.{mode}.{DIRECT}.after.cached"));
        found.extend(value("ahead", mode, cached.map(|bytes| (bytes / 1024.0 - KIB as f64).max(0.0))));
        // This also yields cases that a measure has no prediction for. They are ignored.
        for measure in ["size", "cached-size", "dropped-size"] {
            found.extend(value(measure, mode, size(step, mode, DIRECT)));
        }
        found.extend(value("dropped-left", mode, cached.map(|bytes| bytes / 1024.0)));
        found.extend(value("dropped-again", mode, again(step, mode)));
        found.extend(value("guest-ahead", mode, size(step, mode, BUFFERED)));
        found.extend(value("gain", mode, speed(mode).zip(speed("none")).map(|(own, none)| own / none)));
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let bars = |way: &'static str| {
        MODES.iter().enumerate().filter_map(move |(at, mode)| Some((at as f64, size(step, mode, way)?)))
    };
    vec![
        Plot::bars("Size of a read of the host\u{2019}s disk", "KiB", MODES)
            .with("guest reads past its cache", bars(DIRECT))
            .with("guest reads through it", bars(BUFFERED))
            .note("The guest asks for 4 KiB at a time. Whoever has a page cache in the way reads ahead."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_by_reads() {
        let mut step = StepRecord::new("reads", 1);
        for (name, figure) in [
            ("T7.none.direct.before.disk-reads", 10.0),
            ("T7.none.direct.after.disk-reads", 266.0),
            ("T7.none.direct.before.disk-read-bytes", 0.0),
            ("T7.none.direct.after.disk-read-bytes", 1024.0 * 1024.0),
            ("T7.none.direct.after.cached", 0.0),
            ("T7.unsafe.direct.after.cached", 768.0 * 1024.0),
        ] {
            step.put(name, figure);
        }
        assert_eq!(size(&step, "none", DIRECT), Some(4.0));
        let ahead: Vec<_> = measured(&step).into_iter().filter(|found| found.measure == "ahead").collect();
        assert_eq!(ahead.iter().map(|found| found.value).collect::<Vec<_>>(), [0.0, 256.0]);
    }
}
