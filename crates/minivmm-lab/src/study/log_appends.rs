//! A1: directsync compared with none, for appends to a log.
//!
//! Owns the claim, the prediction, the guest's script and the meaning of the figures, and the distributions of
//! latency by mode. The step of stable writes measures it.

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote, Rule, expect};
use super::figures::{MeasuredValue, StepRecord, values};
use super::plot::{Form, Plot};

/// The modes that are compared.
pub const MODES: [&str; 2] = ["none", "directsync"];
const CASE: &str = "directsync / none";

/// The experiment.
pub static EXPERIMENT: Experiment = Experiment {
    id: "A1",
    title: "directsync against none: a log\u{2019}s appends",
    claims: &[Quote {
        text: "show a consistent ~43-48% throughput improvement when switching from `cache=none` to `cache=directsync`",
        author: "michalskrivanek",
        source: "kubevirt/kubevirt, pull request 17718, 6 May 2026, of a database\u{2019}s load; here tried on what a database\u{2019}s log does",
    }],
    what: "fio in the guest appends blocks of 4 KiB, each with O_DSYNC (sync=dsync), one at a time and past the guest\u{2019}s cache: what a \
           database\u{2019}s log does. virtio-blk has no FUA: behind a write cache (none) the guest sends a write and then a FLUSH of the whole \
           disk; without one (directsync) it sends the write alone, and the host makes it stable.",
    confounds: "Of the claim\u{2019}s load only the log is here, of QEMU nothing. Where the host is emulated a request more is dear, which favours \
                directsync; on a disk with FUA directsync saves the FLUSH as well.",
    steps: &["stable"],
    measures: &[
        Measure {
            name: "gain",
            title: "Appends a second, directsync by none",
            unit: "times",
            kind: FigureKind::SpeedRatio,
            how: "fio\u{2019}s figures, of the same guest and repetition.",
            rules: &[Rule {
                claim: 0,
                is_true: Bound::AtLeast(1.2),
                why: "an improvement of which a fifth at least is seen where a log is all there is.",
            }],
            control: false,
            predictions: &[expect(CASE, Bound::AtLeast(1.2))],
        },
        Measure {
            name: "requests",
            title: "Requests of the guest for each append",
            unit: "",
            kind: FigureKind::Count,
            how: "Writes and FLUSHes that the device was asked for, by appends.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::about(2.0, 0.1)),
                expect("directsync", Bound::about(1.0, 0.05)),
            ],
        },
        Measure {
            name: "calls",
            title: "Host operations for each append",
            unit: "",
            kind: FigureKind::Count,
            how: "Writes and fdatasyncs of minivmm, by appends.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::about(2.0, 0.1)),
                expect("directsync", Bound::about(1.0, 0.05)),
            ],
        },
        Measure {
            name: "flushes",
            title: "FLUSHes of the host\u{2019}s disk for each append",
            unit: "",
            kind: FigureKind::Count,
            how: "Of its stat. On a disk with FUA directsync needs none.",
            rules: &[],
            control: false,
            predictions: &[
                expect("none", Bound::Between(0.9, 2.5)),
                expect("directsync", Bound::AtMost(2.5)),
            ],
        },
    ],
    measured,
    plots,
};

/// Returns the guest's script: a job of `appends` writes, run `times` times.
pub fn script(mode: &str, device: &str, appends: u64, times: usize) -> String {
    let one = format!(
        "ask stats A1.{mode}.before {device}; ask look A1.{mode}.before {device}
job A1.{mode} {device} --rw=write --bs=4k --direct=1 --sync=dsync --size=16m --io_size={}k
ask look A1.{mode}.after {device}; ask stats A1.{mode}.after {device}; put A1.{mode}.appends {appends}\n",
        appends * 4
    );
    one.repeat(times)
}

/// Returns the guest's script for the distributions of latency. A sync follows every fourth write.
pub fn latency_script(mode: &str, device: &str, blocks: u64) -> String {
    format!(
        "job L.{mode}.job {device} --rw=randwrite --bs=4k --direct=1 --fdatasync=4 --size=16m --io_size={}k\n",
        blocks * 4
    )
}

/// Returns the growth of these counters per append, for each repetition.
fn for_each(step: &StepRecord, mode: &str, what: &[&str]) -> Vec<f64> {
    let name = format!("A1.{mode}");
    step.growths_for_each(&name, what, step.all(&format!("{name}.appends")))
}

fn measured(step: &StepRecord) -> Vec<MeasuredValue> {
    let mut found: Vec<_> =
        values("gain", CASE, &step.ratios("A1.directsync.iops", "A1.none.iops")).collect();
    for mode in MODES {
        for (measure, what) in [
            ("requests", &["writes", "flushes"][..]),
            ("calls", &["plain-writes", "dsync-writes", "fdatasyncs"][..]),
            ("flushes", &["disk-flushes"][..]),
        ] {
            found.extend(values(measure, mode, &for_each(step, mode, what)));
        }
    }
    found
}

fn plots(steps: &[StepRecord]) -> Vec<Plot> {
    let Some(step) = steps.iter().find(|step| step.error.is_none()) else { return Vec::new() };
    let bars = (0u8..).zip(MODES);
    let bars = bars.filter_map(|(at, mode)| Some((at.into(), step.mean(&format!("A1.{mode}.iops"))?)));
    let latency = |title: &str, kind: &str, modes: &[&str], note: &str| {
        let mut plot = Plot::lines(title, "\u{b5}s", "part of them");
        plot = Plot { log_x: true, ..plot }.form(Form::Distribution).note(note);
        for mode in modes {
            plot =
                plot.with(*mode, step.curves.get(&format!("L.{mode}.{kind}")).cloned().unwrap_or_default());
        }
        plot
    };
    vec![
        Plot::bars("Appends a second", "appends/s", MODES)
            .with("appends", bars)
            .note("4 KiB with O_DSYNC, one at a time."),
        latency(
            "Latency of writes by mode",
            "write",
            &super::experiment::MODES,
            "From the device\u{2019}s doorbell to the interrupt (--stats): blocks of 4 KiB at random places, one at a time.",
        ),
        latency(
            "Latency of FLUSHes by mode",
            "flush",
            &super::experiment::MODES,
            "A FLUSH after every fourth write. Guests of directsync and writethrough see no write cache and send none.",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_append_costs_is_told_by_repetition() {
        let mut step = StepRecord::new("stable", 1);
        for (before, after) in [(0.0, 10.0), (10.0, 20.0)] {
            step.put("A1.none.appends", 10.0);
            for what in ["writes", "flushes"] {
                step.put(&format!("A1.none.before.{what}"), before);
                step.put(&format!("A1.none.after.{what}"), after);
            }
        }
        assert_eq!(for_each(&step, "none", &["writes", "flushes"]), [2.0, 2.0]);
        assert!(for_each(&step, "none", &["fdatasyncs"]).is_empty());
    }
}
