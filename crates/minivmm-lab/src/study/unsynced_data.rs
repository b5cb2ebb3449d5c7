//! T3: what a benchmark in a guest writes stays in the host's memory.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of writes
//! measures it, also for T11.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value, values};
use super::plot::Plot;

/// The case without any sync.
pub const NO_SYNC: &str = "no sync";
/// The case with one sync at the end.
pub const END: &str = "sync at the end";
/// The case with a sync after each write.
pub const EACH: &str = "sync after each";
const SYNCS: [&str; 3] = [NO_SYNC, END, EACH];

/// The size of the jobs of the step of writes.
#[derive(Debug, Clone, Copy)]
pub struct JobSize {
    /// Number of times that a step repeats each job.
    pub times: u32,
    /// Number of blocks of 4 KiB that a job writes or reads.
    pub blocks: u64,
    /// The same for a job that syncs after each block.
    pub synced_blocks: u64,
}

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T3",
    title: "Benchmarks in the guest measure the host\u{2019}s memory",
    claims: &[Quote::of_2008(
        "Daniel P. Berrange",
        "It makes benchmarking more or less impossible / worthless because what the benchmark things are disk writes just sit around \
         in memory so guest disk performance appears to exceed host diskperformance.",
    )],
    what: "fio in the guest writes blocks of 4 KiB at random places, one at a time, past the guest\u{2019}s cache (direct=1): without any sync, \
           with one at the end (end_fsync=1), and with one after each write (fdatasync=1). The host does the same with O_DIRECT on the same \
           kind of image. How much of it had reached the host\u{2019}s disk when fio ended is counted there.",
    confounds: "fio\u{2019}s direct=1 alone sends no sync: the host\u{2019}s figure without sync is the fair one beside it. Runs shorter than the host\u{2019}s \
                dirty_expire never hit the disk in the cached modes; that is the point here, but longer runs differ. Where the host is \
                emulated, a guest\u{2019}s exits are dear, so guest by host says nothing there.",
    steps: &["writes"],
    measures: &[
        Measure {
            name: "on-disk",
            title: "Of what fio wrote without a sync, on the host\u{2019}s disk when it ended",
            unit: "share",
            kind: FigureKind::Share,
            how: "Bytes that the host\u{2019}s disk was given meanwhile, by the bytes of fio\u{2019}s writes.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtMost(0.5),
                why: "most of what the benchmark takes for disk writes sits in memory.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::AtLeast(0.98)),
                expect("directsync", Bound::AtLeast(0.98)),
                expect("writethrough", Bound::AtLeast(0.98)),
                expect("writeback", Bound::AtMost(0.1)),
                expect("dontcache", Bound::AtLeast(0.8)),
                expect("unsafe", Bound::AtMost(0.1)),
            ],
        },
        Measure {
            name: "on-disk-synced",
            title: "The same with a sync at the end",
            unit: "share",
            kind: FigureKind::Share,
            how: "The benchmark that asks for it gets it, except in unsafe.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtLeast(0.98)),
                expect("directsync", Bound::AtLeast(0.98)),
                expect("writethrough", Bound::AtLeast(0.98)),
                expect("writeback", Bound::AtLeast(0.98)),
                expect("dontcache", Bound::AtLeast(0.98)),
                expect("unsafe", Bound::AtMost(0.1)),
            ],
        },
        Measure {
            name: "speed",
            title: "Writes a second without a sync, guest by host",
            unit: "times",
            kind: FigureKind::Speed,
            how: "fio\u{2019}s in the guest by the host\u{2019}s own with O_DIRECT and no sync.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(1.1)),
                expect("directsync", Bound::AtMost(1.1)),
                expect("writethrough", Bound::AtMost(1.1)),
                expect("writeback", Bound::AtLeast(1.0)),
                expect("dontcache", Bound::AtMost(2.0)),
                expect("unsafe", Bound::AtLeast(1.0)),
            ],
        },
        Measure {
            name: "speed-each",
            title: "Writes a second with a sync after each, guest by host",
            unit: "times",
            kind: FigureKind::Speed,
            how: "fio with fdatasync=1 by the host\u{2019}s own with O_DIRECT and fdatasync after each.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(1.1)),
                expect("directsync", Bound::AtMost(1.1)),
                expect("writethrough", Bound::AtMost(1.1)),
                expect("writeback", Bound::AtMost(1.1)),
                expect("dontcache", Bound::AtMost(1.1)),
                expect("unsafe", Bound::AtLeast(1.0)),
            ],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script for one disk.
pub fn script(mode: &str, device: &str, size: JobSize) -> String {
    let mut script = String::new();
    for (sync, option, blocks) in [
        (NO_SYNC, "", size.blocks),
        (END, "--end_fsync=1", size.blocks),
        (EACH, "--fdatasync=1", size.synced_blocks),
    ] {
        let name = format!("T3.{mode}.{}", slug(sync));
        // The cache is dropped first, so that dirty pages of the previous job do not count for this one.
        let one = format!(
            "ask drop {device}; ask look {name}.before {device}
job {name} {device} --rw=randwrite --bs=4k --direct=1 --size=48m --io_size={}k {option}
ask look {name}.after {device}; ask sync {name} {device}\n",
            blocks * 4
        );
        script.extend(std::iter::repeat_n(one, size.times as usize));
    }
    script
}

/// Replaces blanks in a name.
pub fn slug(name: &str) -> String {
    name.replace(' ', "-")
}

/// Returns the bytes that the host's disk has written divided by the bytes that fio wrote, for each repetition.
fn on_disk(step: &StepRecord, mode: &str, sync: &str) -> Vec<f64> {
    let name = format!("T3.{mode}.{}", slug(sync));
    let all = |what: &str| step.all(&format!("{name}.{what}")).to_vec();
    let grown = all("before.disk-written-bytes").into_iter().zip(all("after.disk-written-bytes"));
    grown.zip(all("bytes")).map(|((before, after), bytes)| (after - before) / bytes).collect()
}

fn by_host(step: &StepRecord, mode: &str, sync: &str) -> Vec<f64> {
    step.ratios(&format!("T3.{mode}.{}.iops", slug(sync)), &format!("T3.host.{sync}.iops"))
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    for mode in MODES {
        for (measure, sync) in [("on-disk", NO_SYNC), ("on-disk-synced", END)] {
            found.extend(
                on_disk(step, mode, sync).into_iter().filter_map(|share| value(measure, mode, Some(share))),
            );
        }
        for (measure, sync) in [("speed", NO_SYNC), ("speed-each", EACH)] {
            found.extend(values(measure, mode, &by_host(step, mode, sync)));
        }
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let bars = |sync: &'static str| {
        MODES.iter().enumerate().filter_map(move |(at, mode)| {
            let name = format!("T3.{mode}.{}.iops", slug(sync));
            let all = step.all(&name);
            (!all.is_empty()).then(|| (at as f64, all.iter().sum::<f64>() / all.len() as f64))
        })
    };
    let mut plot = Plot::bars("Writes a second as the guest\u{2019}s fio tells them", "writes/s", MODES);
    for sync in SYNCS {
        plot = plot.with(sync, bars(sync));
    }
    let host: Vec<String> = SYNCS
        .iter()
        .filter_map(|sync| Some(format!("{sync} {:.0}", step.get(&format!("T3.host.{sync}.iops"))?)))
        .collect();
    vec![
        plot.note(&format!("Means of the first repetition. The host itself, O_DIRECT: {}.", host.join(", "))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_disk_was_given_is_told_by_repetition() {
        let mut step = StepRecord::new("writes", 1);
        for (before, after) in [(0.0, 4096.0), (9000.0, 9000.0)] {
            step.put("T3.writeback.no-sync.before.disk-written-bytes", before);
            step.put("T3.writeback.no-sync.after.disk-written-bytes", after);
            step.put("T3.writeback.no-sync.bytes", 4096.0);
            step.put("T3.writeback.no-sync.iops", 300.0);
            step.put("T3.host.no sync.iops", 100.0);
        }
        assert_eq!(on_disk(&step, "writeback", NO_SYNC), [1.0, 0.0]);
        assert_eq!(by_host(&step, "writeback", NO_SYNC), [3.0, 3.0]);
        let script = script("none", "vda", JobSize { times: 2, blocks: 8, synced_blocks: 4 });
        assert_eq!(script.matches("--io_size=32k").count(), 4, "{script}");
        assert_eq!(script.matches("--fdatasync=1").count(), 2, "{script}");
    }
}
