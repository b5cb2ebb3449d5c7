//! What is printed: tables that can be pasted into a document, and what may be read from them.

use crate::fio::{Figures, Latency};
use crate::markdown::{number, table};
use crate::memory::Beyond;
use crate::results::{Boots, Contest, Entry, Loaded, Ratio, boot_ratio, mib};

/// The most that minivmm's boot may take of QEMU microvm's.
const BOOT_RATIO_MAX: f64 = 0.7;

/// What the figures of an emulated host mean.
pub const EMULATED: &str = "In an emulated host, where everything ran, KVM's entries and exits are emulated \
and cost tens of microseconds, and so does every system call and copy in its proportion. No figure says what \
hardware does. The ratio of two VMMs says which takes fewer exits, calls and instructions on the way; exits \
weigh more there than on hardware. What is over host-fio means nothing there: fio on the host has no exits.";

fn rate(contest: &Contest, entry: &Entry) -> Option<String> {
    if contest.large {
        entry.median(|f| Some(f.mib_s)).map(|rate| format!("{rate:.0} MiB/s"))
    } else {
        entry
            .iops()
            .map(|iops| if iops < 10e3 { format!("{iops:.0}") } else { format!("{:.1}k", iops / 1e3) })
    }
}

fn percentiles(entry: &Entry, of: fn(&Figures) -> Option<Latency>) -> String {
    let at = |value: fn(&Latency) -> f64| entry.median(|f| of(f).as_ref().map(value));
    let three = [at(|l| l.p50_us), at(|l| l.p99_us), at(|l| l.p999_us)];
    if three[0].is_none() {
        return String::new();
    }
    three.map(|value| number(value, 0)).join("/")
}

fn spread(ratio: Option<Ratio>) -> String {
    ratio.map_or(String::new(), |r| format!("{:.2} ({:.2}–{:.2})", r.of_medians, r.least, r.most))
}

/// A line for each competitor of each contest.
pub fn contests(contests: &[Contest]) -> String {
    let head = [
        "job",
        "mode, host's page cache",
        "who",
        "rate",
        "over best QEMU (spread)",
        "over host-fio",
        "p50/p99/p99.9 us",
        "sync p50/p99/p99.9 us",
    ];
    let mut rows = Vec::new();
    for contest in contests {
        for (at, entry) in contest.entries.iter().enumerate() {
            let name = |text: &str| if at == 0 { text.to_owned() } else { String::new() };
            let over = |other: Option<&Entry>| other.and_then(|other| Ratio::new(entry, other));
            rows.push(vec![
                name(contest.job),
                name(&contest.state),
                entry.who.to_owned(),
                rate(contest, entry).unwrap_or_else(|| "not measured".into()),
                spread(over(contest.best_qemu())),
                number(over(contest.entry("host-fio")).map(|r| r.of_medians), 2),
                percentiles(entry, Figures::main),
                percentiles(entry, |figures| figures.sync),
            ]);
        }
    }
    table(&head, &rows)
}

/// A line for each contest: minivmm as a user gets it beside the best QEMU.
pub fn summary(contests: &[Contest]) -> String {
    let head =
        ["job", "mode, host's page cache", "host fio", "best QEMU", "minivmm", "minivmm over QEMU (spread)"];
    let line = |contest: &Contest| {
        let told = |entry: Option<&Entry>| {
            entry.and_then(|e| rate(contest, e)).unwrap_or_else(|| "not measured".into())
        };
        let (qemu, ours) = (contest.best_qemu(), contest.entry("minivmm-pci"));
        let ratio = ours.zip(qemu).and_then(|(ours, qemu)| Ratio::new(ours, qemu));
        let qemu_name = qemu.map_or(String::new(), |q| format!(" ({})", q.who.trim_start_matches("qemu-")));
        vec![
            contest.job.to_owned(),
            contest.state.clone(),
            told(contest.entry("host-fio")),
            told(qemu) + &qemu_name,
            told(ours),
            spread(ratio),
        ]
    };
    table(&head, &contests.iter().map(line).collect::<Vec<_>>())
}

/// Boots to init, and memory beyond the guest's then.
pub fn boots(boots: &[Boots]) -> String {
    let head = ["to init", "boots", "ms, median", "least–most", "beyond the guest: PSS MiB", "peak RSS MiB"];
    let line = |boots: &Boots| {
        let ms = |seconds: Option<f64>| number(seconds.map(|s| s * 1e3), 0);
        let least = boots.seconds_to_init.iter().copied().min_by(f64::total_cmp);
        let most = boots.seconds_to_init.iter().copied().max_by(f64::total_cmp);
        let median = boots.median().map_or("not measured".into(), |s| ms(Some(s)));
        let range = if least.is_some() { format!("{}–{}", ms(least), ms(most)) } else { String::new() };
        let count = boots.seconds_to_init.len().to_string();
        [vec![boots.who.to_owned(), count, median, range], memory(&boots.beyond_guest)].concat()
    };
    let mut text = table(&head, &boots.iter().map(line).collect::<Vec<_>>());
    let figure = boot_ratio(boots).map(|(ratio, who)| {
        let verdict = if ratio <= BOOT_RATIO_MAX { "reached" } else { "not reached" };
        format!("{ratio:.2} (over {who}): {verdict}")
    });
    text += &format!(
        "\nexec to init over QEMU microvm, same vmlinux, median <= {BOOT_RATIO_MAX}: {}\n",
        figure.unwrap_or_else(|| "not measured".into())
    );
    text
}

fn memory(beyond: &[Beyond]) -> Vec<String> {
    vec![number(mib(beyond, |b| b.pss_kib), 1), number(mib(beyond, |b| b.peak_rss_kib), 1)]
}

/// Memory beyond the guest's after all jobs.
pub fn loaded(loaded: &[Loaded]) -> String {
    let head = ["after the jobs", "mode", "beyond the guest: PSS MiB", "peak RSS MiB"];
    let line = |l: &Loaded| [vec![l.who.to_owned(), l.mode.to_owned()], memory(&l.beyond_guest)].concat();
    let measured = loaded.iter().filter(|l| !l.beyond_guest.is_empty());
    table(&head, &measured.map(line).collect::<Vec<_>>())
}

/// What did not run, and why, each reason once.
pub fn gaps(contests: &[Contest], boots: &[Boots]) -> String {
    let mut reasons: Vec<String> = Vec::new();
    let jobs = contests.iter().flat_map(|contest| {
        let told = |e: &Entry| {
            let who = format!("{}, {}", e.who, contest.mode);
            e.not_measured.iter().map(move |why| format!("{who}: {why}")).collect::<Vec<_>>()
        };
        contest.entries.iter().flat_map(told).collect::<Vec<_>>()
    });
    let starts = boots.iter().flat_map(|b| b.not_measured.iter().map(|why| format!("{}: {why}", b.who)));
    for reason in jobs.chain(starts) {
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    reasons.into_iter().map(|reason| format!("not measured: {reason}\n")).collect()
}
