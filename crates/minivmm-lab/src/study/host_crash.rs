//! T2: a crash of the host loses what the guest has written, and its file system.
//!
//! Owns the claims, the predictions and the meaning of the figures. `steps::crash` owns the guest's work and
//! the write logs.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// Number of records between two syncs.
pub const GROUP: u64 = 4;

/// One disk of the guest.
#[derive(Debug)]
pub struct Case {
    /// Name of the case on the page; the mode's, where the host may lack the mode.
    pub name: &'static str,
    /// Name of the case in the record.
    pub slug: &'static str,
    /// Its cache mode.
    pub mode: &'static str,
    /// True if the guest is told to send no FLUSH.
    pub no_flush: bool,
    /// True if an ext4 is tested as well.
    pub file_system: bool,
}

const NO_FLUSH: &str = "writeback, guest sends no FLUSH";

/// All cases.
pub const CASES: [Case; 7] = [
    Case { name: "none", slug: "none", mode: "none", no_flush: false, file_system: true },
    Case { name: "directsync", slug: "directsync", mode: "directsync", no_flush: false, file_system: false },
    Case {
        name: "writethrough",
        slug: "writethrough",
        mode: "writethrough",
        no_flush: false,
        file_system: false,
    },
    Case { name: "writeback", slug: "writeback", mode: "writeback", no_flush: false, file_system: true },
    Case { name: "dontcache", slug: "dontcache", mode: "dontcache", no_flush: false, file_system: true },
    Case { name: "unsafe", slug: "unsafe", mode: "unsafe", no_flush: false, file_system: true },
    Case { name: NO_FLUSH, slug: "no-flush", mode: "writeback", no_flush: true, file_system: true },
];

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T2",
    title: "A crash of the host loses what the guest has written, in any order",
    claims: &[
        Quote::of_2008(
            "Daniel P. Berrange",
            "It is unsafe on host OS crash - all unflushed guest I/O will be lost",
        ),
        Quote::of_2008(
            "Daniel P. Berrange",
            "and there's no ordering guarentees, so metadata updates could be flushe to disk, while the journal updates were not. Say \
             goodbye to your filesystem.",
        ),
    ],
    what: "The guest writes 64 records of 4 KiB, with a sync after every fourth, and works on an ext4: files written, synced, renamed, \
           directories made and removed. Each disk has a write log of what minivmm has done and what it has called stable. For every \
           point of the log the rule of \u{201c}minivmm crash\u{201d} says which disks a loss of power could leave: of the records the worst is \
           taken, of the ext4 some are made, recovered by e2fsck -p, and must then be sound.",
    confounds: "The power is not cut here: what could be left is derived from what was really done, assuming that a host\u{2019}s fdatasync that \
                has succeeded is to be believed, and that of all else any part may be gone (docs/crash-testing.md). For the cached modes \
                that is a crash of the host as well; in none and directsync a crash of the host alone loses less. In 2008 no guest could \
                flush with this default: the last case is nearest to that. What no sync was asked for may be lost on any disk, so rule \
                and prediction are about what was synced.",
    steps: &["crash"],
    measures: &[
        Measure {
            name: "synced-lost",
            title: "Records lost though a sync behind them was acknowledged",
            unit: "of 60",
            kind: FigureKind::Count,
            how: "The most, over all points. A sync counts as acknowledged when the record behind it has been written.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(1.0),
                why: "a crash takes what the guest has flushed, and so knows to be safe.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(0.0)),
                expect("directsync", Bound::AtMost(0.0)),
                expect("writethrough", Bound::AtMost(0.0)),
                expect("writeback", Bound::AtMost(0.0)),
                expect("dontcache", Bound::AtMost(0.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
                expect(NO_FLUSH, Bound::AtLeast(1.0)),
            ],
        },
        Measure {
            name: "bad-disks",
            title: "Disks on which the ext4 could not be made sound",
            unit: "",
            kind: FigureKind::Count,
            how: "Of those that were tried: e2fsck -p, then e2fsck -fn must find nothing.",
            rules: &[Rule {
                claim: 1,
                is_true: Bound::AtLeast(1.0),
                why: "there is a crash after which the file system is gone or damaged.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(0.0)),
                expect("writeback", Bound::AtMost(0.0)),
                expect("dontcache", Bound::AtMost(0.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
                expect(NO_FLUSH, Bound::AtLeast(1.0)),
            ],
        },
        Measure {
            name: "open-lost",
            title: "Records lost of which no sync had spoken yet",
            unit: "",
            kind: FigureKind::Count,
            how: "The most, over all points.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtLeast(1.0)),
                expect("directsync", Bound::AtMost(0.0)),
                expect("writethrough", Bound::AtMost(0.0)),
                expect("writeback", Bound::AtLeast(1.0)),
                expect("dontcache", Bound::AtLeast(1.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
                expect(NO_FLUSH, Bound::AtLeast(1.0)),
            ],
        },
        Measure {
            name: "out-of-order",
            title: "Legal disks that have a later record and lack an earlier one",
            unit: "",
            kind: FigureKind::Count,
            how: "Over all points, up to 32 states each. Within a group between two syncs order is promised by nobody.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtLeast(1.0)),
                expect("directsync", Bound::AtMost(0.0)),
                expect("writethrough", Bound::AtMost(0.0)),
                expect("writeback", Bound::AtLeast(1.0)),
                expect("dontcache", Bound::AtLeast(1.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
                expect(NO_FLUSH, Bound::AtLeast(1.0)),
            ],
        },
        Measure {
            name: "control",
            title: "Records lost in unsafe though synced",
            unit: "",
            kind: FigureKind::Count,
            how: "As the first: a way of looking that finds none here would be blind.",
            rules: &[],
            control: true,
            predictions: &[expect("unsafe", Bound::AtLeast(1.0))],
        },
    ],
    measured,
    plots,
};

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    for case in &CASES {
        for measure in ["synced-lost", "open-lost", "out-of-order", "bad-disks"] {
            found.extend(value(measure, case.name, step.get(&format!("T2.{}.{measure}", case.slug))));
        }
        found.extend(value("control", case.name, step.get(&format!("T2.{}.synced-lost", case.slug))));
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let names = ["none", "directsync", "writethr.", "writeback", "dontcache", "unsafe", "no FLUSH"];
    let bars = |what: &'static str| {
        CASES
            .iter()
            .enumerate()
            .filter_map(move |(at, case)| Some((at as f64, step.get(&format!("T2.{}.{what}", case.slug))?)))
    };
    let unsound = CASES.iter().filter(|case| case.file_system).filter_map(|case| {
        let of = |what: &str| step.get(&format!("T2.{}.{what}", case.slug));
        Some(format!("{} {} of {}", case.name, of("bad-disks")?, of("disks")?))
    });
    let unsound: Vec<String> = unsound.collect();
    vec![
        Plot::bars("Records that the worst moment costs", "records", names)
            .with("synced", bars("synced-lost"))
            .with("not synced yet", bars("open-lost"))
            .note(&format!("First repetition. Unsound ext4 disks: {}.", unsound.join("; "))),
    ]
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::steps::crash::judge_records;
    use super::*;
    use crate::crash::log::WriteLog;
    use minivmm::disk::writelog::format::{FLUSH, FUA, Header, Superblock};

    /// Returns a log of 64 records with these flags. A FLUSH follows each record for which `flush` returns
    /// `true`.
    fn log(flags: u64, flush: impl Fn(u64) -> bool) -> WriteLog {
        let mut bytes = Vec::new();
        let mut entries = 0u64;
        let mut entry = |sector: u64, sectors: u64, flags: u64| {
            entries += 1;
            bytes.extend(Header { sector, sectors, flags, text_bytes: 0 }.encode());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            bytes.resize(bytes.len() + usize::try_from(sectors * 512).unwrap(), 7);
        };
        for record in 0..64 {
            entry(record * 8, 8, flags);
            if flush(record) {
                entry(0, 0, FLUSH);
            }
        }
        let mut head = Superblock { entries, sector_bytes: 512 }.encode().to_vec();
        head.resize(512, 0);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&head).unwrap();
        file.write_all(&bytes).unwrap();
        WriteLog::open(file.path()).unwrap()
    }

    fn found(log: &WriteLog) -> [f64; 3] {
        let mut step = StepRecord::new("crash", 1);
        judge_records(&CASES[0], log, &mut step).unwrap();
        ["synced-lost", "open-lost", "out-of-order"].map(|what| step.get(&format!("T2.none.{what}")).unwrap())
    }

    #[test]
    fn a_log_with_flushes_loses_no_synced_record_and_one_without_does() {
        let good = found(&log(0, |record| record % GROUP == GROUP - 1));
        assert_eq!(good[0], 0.0);
        assert_eq!(good[1], GROUP as f64);
        assert!(good[2] > 0.0, "{good:?}");
        let none = found(&log(0, |_| false));
        assert_eq!(none[0], 60.0, "{none:?}");
        // Each sync comes one record too late.
        let late = found(&log(0, |record| record % GROUP == 0 && record > 0));
        assert!(late[0] > 0.0, "{late:?}");
        assert_eq!(found(&log(FUA, |_| false)), [0.0, 0.0, 0.0]);
    }
}
