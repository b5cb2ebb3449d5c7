//! T1: what the guest has read is in memory twice.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures. The step of reads
//! measures it.

use super::experiment::{Bound, Experiment, FigureKind, MODES, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, value};
use super::plot::Plot;

/// Number of pieces in which the disk is read. Both caches are measured after each.
const PIECES: u64 = 8;
const MIB: f64 = (1u64 << 20) as f64;

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "T1",
    title: "What the guest caches, the host caches once more",
    claims: &[Quote::of_2008(
        "Daniel P. Berrange",
        "It is a waste of memory because the guest already caches I/O ops",
    )],
    what: "Both caches are empty. The guest reads its disk through its own cache, in eight pieces. After each it tells how much its \
           cache has grown, and at that moment cachestat(2) counts the image\u{2019}s pages in the host\u{2019}s.",
    confounds: "Neither kernel says which pages it has. Both caches held nothing of this disk before and are not short of memory, so \
                the smaller of the two is what both have. Where the guest\u{2019}s memory is small and the host\u{2019}s is not, a second copy \
                that the guest could not keep is no waste; that is not measured here.",
    steps: &["reads"],
    measures: &[
        Measure {
            name: "duplication",
            title: "Pages in the host\u{2019}s cache for each in the guest\u{2019}s",
            unit: "share",
            kind: FigureKind::Share,
            how: "After the last piece: bytes of the image in the host\u{2019}s cache by bytes by which the guest\u{2019}s has grown.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(0.5),
                why: "half or more of what the guest caches is in memory a second time.",
            }],
            control: false,
            predictions: &[
                expect("none", Bound::AtMost(0.02)),
                expect("directsync", Bound::AtMost(0.02)),
                expect("writethrough", Bound::about(1.0, 0.15)),
                expect("writeback", Bound::about(1.0, 0.15)),
                expect("dontcache", Bound::AtMost(0.05)),
                expect("unsafe", Bound::about(1.0, 0.15)),
            ],
        },
        Measure {
            name: "guest",
            title: "What the guest caches of what it has read",
            unit: "share",
            kind: FigureKind::Share,
            how: "Growth of Cached and Buffers in its /proc/meminfo, by the bytes read: it shows that the guest does cache.",
            rules: &[],
            control: true,
            predictions: &[
                expect("none", Bound::about(1.0, 0.15)),
                expect("directsync", Bound::about(1.0, 0.15)),
                expect("writethrough", Bound::about(1.0, 0.15)),
                expect("writeback", Bound::about(1.0, 0.15)),
                expect("dontcache", Bound::about(1.0, 0.15)),
                expect("unsafe", Bound::about(1.0, 0.15)),
            ],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script for one disk of `mib` MiB, all of which it reads.
pub fn script(mode: &str, device: &str, mib: u64) -> String {
    let piece = mib / PIECES;
    format!(
        "base=$(cached); put T1.{mode}.guest 0; put T1.{mode}.asked 0; ask look T1.{mode}.host {device}
i=0
while [ $i -lt {PIECES} ]; do
    dd if=/dev/{device} of=/dev/null bs=1M skip=$((i * {piece})) count={piece} 2>/dev/null || exit 93
    i=$((i + 1))
    put T1.{mode}.asked $((i * {piece} * 1048576)); put T1.{mode}.guest $(($(cached) - base)); ask look T1.{mode}.host {device}
done\n"
    )
}

fn last(step: &StepRecord, name: &str) -> Option<f64> {
    step.all(name).last().copied()
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found = Vec::new();
    for mode in MODES {
        let of = |what: &str| last(step, &format!("T1.{mode}.{what}"));
        let share =
            |above: Option<f64>, below: Option<f64>| Some(above? / below.filter(|below| *below > 0.0)?);
        found.extend(value("duplication", mode, share(of("host.cached"), of("guest"))));
        found.extend(value("guest", mode, share(of("guest"), of("asked"))));
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let curve = |mode: &str, what: &str| {
        let at = step.all(&format!("T1.{mode}.host.at")).to_vec();
        let begun = at.first().copied().unwrap_or_default();
        let bytes = step.all(&format!("T1.{mode}.{what}")).to_vec();
        at.into_iter().zip(bytes).map(move |(at, bytes)| (at - begun, bytes / MIB))
    };
    let plot = |title: &str, what: &str| {
        MODES.iter().fold(Plot::lines(title, "seconds since the first read", "MiB"), |plot, mode| {
            plot.with(*mode, curve(mode, what))
        })
    };
    vec![
        plot("In the host\u{2019}s cache while the guest reads", "host.cached")
            .note("The disk of each mode in turn. Curves of none and directsync lie on the axis."),
        plot("In the guest\u{2019}s cache meanwhile", "guest")
            .note("The same moments. The guest does not know the mode."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplication_is_of_the_last_look() {
        let mut step = StepRecord::new("reads", 1);
        for (guest, host) in [(0.0, 0.0), (50.0, 10.0), (100.0, 90.0)] {
            step.put("T1.writeback.guest", guest);
            step.put("T1.writeback.asked", guest);
            step.put("T1.writeback.host.cached", host);
        }
        let found = measured(&step);
        assert_eq!(found[0].value, 0.9);
        assert_eq!(found.len(), 2, "other modes were not measured");
    }
}
