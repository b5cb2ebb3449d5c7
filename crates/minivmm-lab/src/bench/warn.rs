//! Finds figures that cannot be those of a disk. It judges the figures themselves and not what was asked for.
//!
//! Owns the threshold of each warning.

use super::prepare::Prepared;
use super::report::{BenchEnd, BenchReport, CompetitorFigures, JobFigures, Observed};
use super::warning::{ABOUT, Warning};
use super::{BenchOptions, figures};
use crate::measuring::host::MeaningfulFigures;
use minivmm::disk::cache::CachePolicy;

/// A smaller share is not mentioned.
const SHARE_MIN: f64 = 0.01;
/// Largest acceptable distance between the rounds: the range of their values divided by the median.
const RANGE_MAX: f64 = 0.25;
/// A smaller advantage of a guest over its host may be chance.
const FASTER_MIN: f64 = 1.1;
/// With fewer rounds, the distance between the rounds is unknown.
const ROUNDS_MIN: usize = 3;
/// Load per CPU from which other work disturbs the figures.
const LOAD_MAX: f64 = 0.5;

/// Returns all warnings, in the order of [`ABOUT`].
pub fn all(options: &BenchOptions, prepared: &Prepared, report: &BenchReport) -> Vec<Warning> {
    let mut found = general(options, prepared, report);
    for job in &report.jobs {
        for who in &job.competitors {
            found.extend(of(job, who, prepared.host.dirty_expire_s));
        }
    }
    let place = |warning: &Warning| ABOUT.iter().position(|about| about.0 == warning.code);
    found.sort_by_key(place);
    found
}

fn whole(code: &'static str, text: impl Into<String>) -> Warning {
    Warning { code, job: None, who: None, value: None, text: text.into() }
}

fn general(options: &BenchOptions, prepared: &Prepared, report: &BenchReport) -> Vec<Warning> {
    let mut found = Vec::new();
    match report.ended {
        BenchEnd::Whole => {}
        BenchEnd::Interrupted => found.push(whole("stopped", "it was stopped")),
        BenchEnd::Failed => found.push(whole("stopped", report.error.clone().unwrap_or_default())),
    }
    if let Some(caveat) = report.meaning.caveat() {
        let code = if report.meaning == MeaningfulFigures::Counts { "emulated" } else { "virtual" };
        found.push(whole(code, caveat));
    }
    if options.rounds < ROUNDS_MIN {
        let words = format!("fewer than {ROUNDS_MIN} rounds say nothing of how far rounds lie apart");
        found.push(Warning { value: Some(options.rounds as f64), ..whole("rounds", words) });
    }
    let host = &prepared.host;
    if let Some(load) = host.load.filter(|&load| load > LOAD_MAX * host.cpus as f64) {
        let words = format!(
            "the host was busy when it began (load {load:.1} on {} CPUs): other work is in these figures",
            host.cpus
        );
        found.push(Warning { value: Some(load), ..whole("busy", words) });
    }
    let layout = &prepared.layout;
    if layout.shared_bytes > 0 && report.jobs.iter().any(|job| job.writes) {
        let words = format!(
            "{} of the image are shared with another file: the first write to each place copies it",
            figures::bytes(layout.shared_bytes as f64)
        );
        found.push(Warning { value: Some(layout.shared_bytes as f64), ..whole("shared", words) });
    }
    if layout.encoded_bytes > 0 {
        let words = format!(
            "{} of the image are compressed or encrypted by its file system: the disk is read and written otherwise than fio does",
            figures::bytes(layout.encoded_bytes as f64)
        );
        found.push(Warning { value: Some(layout.encoded_bytes as f64), ..whole("disk", words) });
    }
    for explained in &prepared.explained {
        let honours = CachePolicy::by_name(explained.cache).is_some_and(|mode| mode.honour_flush);
        let mut add = |code, text: String| {
            if honours && !found.iter().any(|known| known.text == text) {
                found.push(whole(code, text));
            }
        };
        let reach = &explained.flush_reaches_disk;
        if ["no", "unknown"].contains(&reach.answer) && report.jobs.iter().any(|job| job.writes) {
            let answer = if reach.answer == "no" { "it does not" } else { "nobody here knows" };
            add("flush", format!("{answer}: {}", reach.because));
        }
        for warning in &explained.warnings {
            add("disk", warning.clone());
        }
    }
    found
}

fn of(job: &JobFigures, who: &CompetitorFigures, dirty_expire_s: Option<f64>) -> Vec<Warning> {
    let Some(figures) = &who.figures else { return Vec::new() };
    let mut found = Vec::new();
    let mut add = |code, value: f64, words: String| {
        found.push(Warning {
            code,
            job: Some(job.name.clone()),
            who: Some(who.name.clone()),
            value: Some(value),
            text: words,
        });
    };
    let share = |figure: fn(&Observed) -> Option<f64>| {
        who.observed(figure).map(|distribution| distribution.median).filter(|&share| share >= SHARE_MIN)
    };
    // A job that only writes reads no more than a partition table.
    let reads = who.rounds.iter().any(|run| run.fio.read.is_some());
    if let Some(share) = share(|observed| observed.host_hit_share).filter(|_| reads) {
        add("host-cache", share, format!("{} of the bytes read", figures::percent(share)));
    }
    if let Some(share) = share(|observed| observed.guest_hit_share) {
        add("guest-cache", share, format!("{} of the bytes read", figures::percent(share)));
    }
    if let Some(share) = share(|observed| observed.guest_absorbed_share) {
        add("guest-cache", share, format!("{} of the bytes written", figures::percent(share)));
    }
    if let Some(over) = who.over_host.filter(|over| over.median >= FASTER_MIN && over.low > 1.0) {
        add("faster", over.median, format!("{:.2} times", over.median));
    }
    if let Some(dirty) = who.observed(|observed| observed.host_dirty_bytes_after) {
        let most = who.rounds.iter().filter_map(|run| run.fio.write.as_ref()).map(|side| side.bytes as f64);
        let written = most.fold(0.0, f64::max);
        if written > 0.0 && dirty.median / written >= SHARE_MIN / 10.0 {
            add(
                "dirty",
                dirty.median,
                format!("{} of {} written", figures::bytes(dirty.median), figures::bytes(written)),
            );
        }
    }
    if let Some(ignored) = who.observed(|observed| observed.flushes_ignored.map(|count| count as f64))
        && ignored.median > 0.0
    {
        add("ignored", ignored.median, format!("{:.0}", ignored.median));
    }
    let longest = who.rounds.iter().map(|run| run.fio.seconds).fold(0.0, f64::max);
    if let Some(expire) = dirty_expire_s.filter(|&expire| longest < expire)
        && job.writes
        && !job.syncs
        && who.waits_in_host
    {
        add("short", longest, format!("{longest:.1} s of {expire:.0} s"));
    }
    if let Some(range) = figures.iops.relative_range().filter(|&range| range > RANGE_MAX) {
        add("spread", range, figures::percent(range));
    }
    found
}
