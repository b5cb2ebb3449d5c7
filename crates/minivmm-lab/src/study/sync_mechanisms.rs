//! T10: O_DIRECT, O_SYNC and fsync are different mechanisms.
//!
//! Owns the claim, the prediction and the meaning of the figures. `steps::host::mechanisms` measures the
//! mechanisms on the host. The step of writes measures what the modes make of them.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// Size of the file.
pub const BYTES: u64 = 4 << 20;
/// Number of writes, each of one page.
pub const WRITES: u64 = 16;
/// Distance between two writes, so large that they are not merged.
pub const STRIDE: u64 = 256 << 10;
/// Number of repetitions in one step.
pub const REPETITIONS: u32 = 3;

/// A way to write to a file.
#[derive(Debug)]
pub struct Mechanism {
    /// Name on the page and in the record.
    pub name: &'static str,
    /// Flags of open(2).
    pub flags: i32,
    /// True if an fsync follows the writes.
    pub then_fsync: bool,
}

const PLAIN: &str = "plain write";
const DIRECT: &str = "O_DIRECT";
const SYNC: &str = "O_SYNC";
const DIRECT_SYNC: &str = "O_DIRECT and O_SYNC";
const FSYNC: &str = "fsync";

/// All mechanisms.
pub const MECHANISMS: [Mechanism; 5] = [
    Mechanism { name: PLAIN, flags: 0, then_fsync: false },
    Mechanism { name: DIRECT, flags: libc::O_DIRECT, then_fsync: false },
    Mechanism { name: SYNC, flags: libc::O_SYNC, then_fsync: false },
    Mechanism { name: DIRECT_SYNC, flags: libc::O_DIRECT | libc::O_SYNC, then_fsync: false },
    Mechanism { name: FSYNC, flags: 0, then_fsync: true },
];

/// The pairs that are compared, with the name of the case.
const PAIRS: [(&str, &str, &str); 3] = [
    ("O_DIRECT / O_SYNC", DIRECT, SYNC),
    ("O_DIRECT / fsync", DIRECT, FSYNC),
    ("O_SYNC / fsync", SYNC, FSYNC),
];

const WRITTEN: f64 = WRITES as f64;

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T10",
    title: "O_DIRECT, O_SYNC and fsync are different mechanisms",
    claims: &[Quote::of_2008("Anthony Liguori", "O_DIRECT, O_SYNC, and fsync are not the same mechanism.")],
    what: "On the host sixteen pages of a file are written, 256 KiB apart, once with each mechanism. Three questions are asked of each: \
           is the data in the page cache, is it still to be written when the call has returned, how many FLUSHes has the disk had. \
           Then the guest writes sixteen blocks to a disk in each mode.",
    confounds: "A disk\u{2019}s counters count for everybody who uses it. A disk without a volatile write cache is sent no FLUSH; one with \
                FUA may get a FUA write in the place of a write and a FLUSH: there the third question does not tell the mechanisms \
                apart, the first two still do. A file system may commit its journal meanwhile.",
    steps: &["mechanisms", "writes"],
    measures: &[
        Measure {
            name: "differences",
            title: "Questions to which two mechanisms have different answers",
            unit: "of 2",
            kind: FigureKind::Count,
            how: "In the cache afterwards, yes or no; still to be written afterwards, yes or no; before any fsync. (FLUSHes are left \
                  out, since not every disk is sent them.)",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(1.0),
                why: "two that answer one question differently are not the same.",
            }],
            control: false,
            predictions: &[
                expect("O_DIRECT / O_SYNC", Bound::about(1.0, 0.0)),
                expect("O_DIRECT / fsync", Bound::about(2.0, 0.0)),
                expect("O_SYNC / fsync", Bound::about(1.0, 0.0)),
            ],
        },
        Measure {
            name: "resident",
            title: "Pages in the host\u{2019}s cache after sixteen writes",
            unit: "pages",
            kind: FigureKind::Count,
            how: "cachestat, the cache dropped before.",
            rules: &[],
            control: false,
            predictions: &[
                expect(PLAIN, Bound::about(WRITTEN, 0.0)),
                expect(DIRECT, Bound::about(0.0, 0.0)),
                expect(SYNC, Bound::about(WRITTEN, 0.0)),
                expect(DIRECT_SYNC, Bound::about(0.0, 0.0)),
                expect(FSYNC, Bound::about(WRITTEN, 0.0)),
            ],
        },
        Measure {
            name: "dirty",
            title: "Pages still to be written when the last write has returned",
            unit: "pages",
            kind: FigureKind::Count,
            how: "cachestat: dirty and being written; of fsync before it is called.",
            rules: &[],
            control: false,
            predictions: &[
                expect(PLAIN, Bound::about(WRITTEN, 0.0)),
                expect(DIRECT, Bound::about(0.0, 0.0)),
                expect(SYNC, Bound::about(0.0, 0.0)),
                expect(DIRECT_SYNC, Bound::about(0.0, 0.0)),
                expect(FSYNC, Bound::about(WRITTEN, 0.0)),
            ],
        },
        Measure {
            name: "flushes",
            title: "FLUSHes of the host\u{2019}s disk for sixteen writes",
            unit: "",
            kind: FigureKind::Count,
            how: "Field 16 of the disk\u{2019}s stat. The tolerance is a journal\u{2019}s; O_DIRECT with O_SYNC is left out, since a disk with \
                  FUA needs none for it.",
            rules: &[],
            control: false,
            predictions: &[
                expect(PLAIN, Bound::AtMost(2.0)),
                expect(DIRECT, Bound::AtMost(2.0)),
                expect(SYNC, Bound::Between(WRITTEN, WRITTEN * 2.5)),
                expect(FSYNC, Bound::Between(1.0, 4.0)),
            ],
        },
        Measure {
            name: "mode-resident",
            title: "The guest writes sixteen blocks: bytes of the image in the host\u{2019}s cache",
            unit: "KiB",
            kind: FigureKind::Bytes,
            how: "dd, 4 KiB each, oflag=direct, no sync; cachestat afterwards, the cache dropped before. What dontcache leaves of \
                  blocks that are written over depends on the file system (docs/reference/dontcache.md).",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::about(0.0, 0.0)),
                expect("directsync", Bound::about(0.0, 0.0)),
                expect("writethrough", Bound::about(4.0 * WRITTEN, 0.0)),
                expect("writeback", Bound::about(4.0 * WRITTEN, 0.0)),
                expect("dontcache", Bound::AtMost(4.0 * WRITTEN)),
                expect("unsafe", Bound::about(4.0 * WRITTEN, 0.0)),
            ],
        },
        Measure {
            name: "mode-stable",
            title: "The same: writes that were stable when the guest was told that they are done",
            unit: "of 16",
            kind: FigureKind::Count,
            how: "minivmm\u{2019}s counter of writes with RWF_DSYNC, or its fdatasyncs where it shares those.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::about(0.0, 0.0)),
                expect("directsync", Bound::about(WRITTEN, 0.0)),
                expect("writethrough", Bound::about(WRITTEN, 0.0)),
                expect("writeback", Bound::about(0.0, 0.0)),
                expect("dontcache", Bound::about(0.0, 0.0)),
                expect("unsafe", Bound::about(0.0, 0.0)),
            ],
        },
        Measure {
            name: "mode-flushes",
            title: "The guest writes sixteen blocks, a sync after each: fdatasyncs of minivmm",
            unit: "",
            kind: FigureKind::Count,
            how: "fio with fdatasync=1 (which syncs after all but the last). A guest that sees no write cache sends no FLUSH; in unsafe they are \
                  counted and not done.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::Between(WRITTEN - 1.0, WRITTEN + 1.0)),
                expect("directsync", Bound::about(0.0, 0.0)),
                expect("writethrough", Bound::about(0.0, 0.0)),
                expect("writeback", Bound::Between(WRITTEN - 1.0, WRITTEN + 1.0)),
                expect("dontcache", Bound::Between(WRITTEN - 1.0, WRITTEN + 1.0)),
                expect("unsafe", Bound::about(0.0, 0.0)),
            ],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script for one disk.
pub fn script(mode: &str, device: &str) -> String {
    let around = |name: &str, work: &str| {
        format!(
            "ask drop {device}; ask stats T10.{mode}.{name}.before {device}
{work}
ask stats T10.{mode}.{name}.after {device}; ask look T10.{mode}.{name}.after {device}\n"
        )
    };
    let plain =
        format!("dd if=/dev/zero of=/dev/{device} bs=4k count={WRITES} oflag=direct 2>/dev/null || exit 97");
    let synced =
        format!("job T10.{mode}.synced {device} --rw=write --bs=4k --direct=1 --size=64k --fdatasync=1");
    around("plain", &plain) + &around("synced", &synced)
}

fn of_mode(step: &StepRecord, mode: &str) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    let grown = |job: &str, what: &str| {
        let name = format!("T10.{mode}.{job}");
        step.grown(&format!("{name}.before.{what}"), &format!("{name}.after.{what}"))
    };
    let resident = step.get(&format!("T10.{mode}.plain.after.cached"));
    found.extend(value("mode-resident", mode, resident.map(|bytes| bytes / 1024.0)));
    let stable =
        grown("plain", "dsync-writes").zip(grown("plain", "fdatasyncs")).map(|(dsync, syncs)| dsync + syncs);
    found.extend(value("mode-stable", mode, stable));
    found.extend(value("mode-flushes", mode, grown("synced", "fdatasyncs")));
    found
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let all = |mechanism: &str, what: &str| step.all(&format!("T10.{mechanism}.{what}")).to_vec();
    let mut found: Vec<MeasuredValue> = MODES.into_iter().flat_map(|mode| of_mode(step, mode)).collect();
    for mechanism in &MECHANISMS {
        for (measure, what) in [("resident", "resident"), ("dirty", "dirty"), ("flushes", "all.disk-flushes")]
        {
            let values = all(mechanism.name, what);
            found.extend(values.iter().filter_map(|&pages| value(measure, mechanism.name, Some(pages))));
        }
    }
    for (pair, one, other) in PAIRS {
        // Whether pages are in the cache, and whether pages are still to be written, for each repetition.
        let answers = |name: &str| {
            let both = all(name, "resident").into_iter().zip(all(name, "dirty"));
            both.map(|(resident, dirty)| [resident > 0.0, dirty > 0.0]).collect::<Vec<_>>()
        };
        for (one, other) in answers(one).iter().zip(answers(other)) {
            let differ = one.iter().zip(other).filter(|(one, other)| **one != *other).count();
            found.extend(value("differences", pair, Some(differ as f64)));
        }
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none() && step.step == "mechanisms") else {
        return Vec::new();
    };
    let curve = |what: &'static str| {
        MECHANISMS.iter().enumerate().filter_map(move |(at, mechanism)| {
            step.get(&format!("T10.{}.{what}", mechanism.name)).map(|found| (at as f64, found))
        })
    };
    let names = ["plain", "O_DIRECT", "O_SYNC", "both", "fsync"];
    vec![
        Plot::bars("Sixteen writes by each mechanism", "pages, FLUSHes", names)
            .with("in the cache", curve("resident"))
            .with("still to be written", curve("dirty"))
            .with("FLUSHes of the disk", curve("all.disk-flushes"))
            .note("\u{201c}Still to be written\u{201d} is before the fsync of the last group; its FLUSHes are with it."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_differ_by_their_answers() {
        let mut step = StepRecord::new("mechanisms", 1);
        for (name, resident, dirty) in [(DIRECT, 0.0, 0.0), (SYNC, 16.0, 0.0), (FSYNC, 16.0, 16.0)] {
            step.put(&format!("T10.{name}.resident"), resident);
            step.put(&format!("T10.{name}.dirty"), dirty);
        }
        let found = measured(&step);
        let of = |case: &str| {
            let differ = found.iter().find(|found| found.measure == "differences" && found.case == case);
            differ.map(|found| found.value)
        };
        assert_eq!(
            [of("O_DIRECT / O_SYNC"), of("O_DIRECT / fsync"), of("O_SYNC / fsync")],
            [Some(1.0), Some(2.0), Some(1.0)]
        );
    }
}
