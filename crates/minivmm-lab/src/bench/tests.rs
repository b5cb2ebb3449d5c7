//! Ratios, warnings and the table, computed from made-up figures.

use std::path::Path;

use super::jobs::{self, Job};
use super::prepare::Prepared;
use super::report::{BenchEnd, BenchReport, JobFigures, JobRun, Observed};
use super::who::{Competitor, competitors};
use super::{BenchOptions, warn};
use crate::measuring::Host;
use crate::measuring::extents::Layout;
use crate::measuring::fio::{Direction, Latency, Summary};
use minivmm::disk::DiskConfig;
use minivmm::disk::cache::CachePolicy;
use minivmm::observe::control::HostCache;

fn options(rounds: usize, modes: &[&str]) -> BenchOptions {
    BenchOptions {
        disk: DiskConfig::new("a.img"),
        keys: Vec::new(),
        modes: modes.iter().map(|name| CachePolicy::by_name(name).unwrap()).collect(),
        only_modes_here: false,
        jobs: None,
        only: Vec::new(),
        size_bytes: None,
        fill: false,
        destroy: true,
        rounds,
        seconds: Some(10),
        host_cache: HostCache::Drop,
        memory_bytes: 512 << 20,
        cpus: 1,
        json: None,
    }
}

/// Returns a prepared bench on a machine without any caveat.
fn prepared(options: &BenchOptions) -> Prepared {
    let mut host = Host::look(Path::new("/")).unwrap();
    (host.hypervisor, host.emulated, host.load, host.dirty_expire_s) = (None, false, Some(0.0), Some(30.0));
    let layout = Layout { bytes: 1 << 30, extents: Some(1), told_by: "fiemap", ..Layout::default() };
    let jobs = jobs::read(None, &[]).unwrap().iter().map(|job| job.timed(options.seconds)).collect();
    Prepared { jobs, layout, host, modes: options.modes.clone(), explained: Vec::new() }
}

fn fio(job: &Job, iops: f64, seconds: f64) -> Summary {
    let latency =
        Some(Latency { mean_us: 90.0, p50_us: 80.0, p99_us: 200.0, p999_us: 1000.0, max_us: 5000.0 });
    let side = Direction { ios: 1000, bytes: 4_096_000, seconds, iops, mb_s: iops * 4096.0 / 1e6, latency };
    let (read, write) = if job.writes() { (None, Some(side)) } else { (Some(side), None) };
    Summary { name: job.name.clone(), seconds, read, write, syncs: None }
}

fn run(round: usize, fio: Summary, observed: Option<Observed>) -> JobRun {
    JobRun { round, seconds: 12.0, fio, observed, device: None }
}

/// Returns a report with the figures that `figures` gives for each job, competitor and round. `None` stands for
/// no run.
fn report(
    options: &BenchOptions,
    prepared: &Prepared,
    ended: BenchEnd,
    figures: impl Fn(&Job, &Competitor, usize) -> Option<(Summary, Observed)>,
) -> BenchReport {
    let plan: Vec<_> = prepared.jobs.iter().map(|job| (job, competitors(job, &options.modes))).collect();
    let mut report =
        BenchReport::new(options, prepared, plan.iter().map(|(job, who)| JobFigures::new(job, who)));
    for (at, (job, who)) in plan.iter().enumerate() {
        for (place, competitor) in who.iter().enumerate() {
            for round in 0..options.rounds {
                if let Some((fio, observed)) = figures(job, competitor, round) {
                    report.add(at, place, run(round, fio, competitor.mode.map(|_| observed)));
                }
            }
        }
    }
    report.ended = ended;
    report.conclude();
    report.warnings = warn::all(options, prepared, &report);
    report
}

/// Returns (code, job, who) of each warning.
fn codes_and_places(report: &BenchReport) -> Vec<(&'static str, &str, &str)> {
    let warnings = report.warnings.iter();
    warnings
        .map(|it| (it.code, it.job.as_deref().unwrap_or_default(), it.who.as_deref().unwrap_or_default()))
        .collect()
}

#[test]
fn figures_of_a_disk_are_told_without_a_word() {
    let options = options(3, &["none"]);
    let prepared = prepared(&options);
    let report = report(&options, &prepared, BenchEnd::Whole, |job, who, round| {
        let iops = if who.mode.is_some() { 900.0 } else { 1000.0 };
        Some((fio(job, iops + round as f64, 40.0), Observed::default()))
    });
    assert_eq!(codes_and_places(&report), []);
    let text = super::table::text(&report);
    assert!(!text.contains("Notes on these figures") && text.contains("0.90 (0.90-0.90)"), "{text}");
    assert!(text.contains("1 GiB, every byte written, in 1 extent;"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
    // Both ran in the same rounds, so there is one ratio per round.
    let none = &report.jobs[0].competitors[0];
    let over = none.over_host.unwrap();
    assert_eq!((over.count, over.sure), (3, 0.75));
    assert!((over.median - 901.0 / 1001.0).abs() < 1e-12);
    assert_eq!(none.figures.as_ref().unwrap().latencies.len(), 1);
}

#[test]
fn each_way_to_fool_oneself_is_found_in_the_figures() {
    let options = options(3, &["none", "writeback", "unsafe", "dontcache"]);
    let prepared = prepared(&options);
    let report = report(&options, &prepared, BenchEnd::Whole, |job, who, round| {
        let mut observed = Observed::default();
        let mut iops = 1000.0;
        match (job.name.as_str(), who.name.as_str()) {
            ("randread", "writeback") => {
                (iops, observed.host_hit_share) = (50_000.0, Some(0.98));
            }
            // This job reads only a partition table, so its hits are no figure of the job.
            ("randwrite", "writeback") => observed.host_hit_share = Some(1.0),
            ("randwrite", "unsafe") => {
                (observed.host_dirty_bytes_after, observed.flushes_ignored) = (Some(4e6), Some(1));
            }
            ("seqread", "none") => observed.guest_hit_share = Some(0.5),
            ("seqwrite", "none") => {
                observed.guest_absorbed_share = Some(0.25);
                iops = [1000.0, 2000.0, 1100.0][round];
            }
            _ => {}
        }
        Some((fio(job, iops, 10.0), observed))
    });
    let expected = [
        ("host-cache", "randread", "writeback"),
        ("guest-cache", "seqread", "none"),
        ("guest-cache", "seqwrite", "none"),
        ("faster", "randread", "writeback"),
        ("dirty", "randwrite", "unsafe"),
        ("ignored", "randwrite", "unsafe"),
        ("short", "randwrite", "writeback"),
        ("short", "randwrite", "unsafe"),
        ("short", "seqwrite", "writeback"),
        ("short", "seqwrite", "unsafe"),
        ("spread", "seqwrite", "none"),
    ];
    assert_eq!(codes_and_places(&report), expected);
    let text = super::table::text(&report);
    let row = text.lines().find(|line| line.starts_with("  unsafe") && line.contains("dirty")).unwrap();
    assert!(row.ends_with("dirty ignored short"), "{text}");
    assert_eq!(text.matches("\nNotes on these figures:\n").count(), 1, "{text}");
    // Warnings of one kind are told together, with where each was found.
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for phrase in [
        "memory's speed, not the disk's: randread writeback 98 % of the bytes read",
        "randwrite unsafe 3.81 MiB of 3.91 MiB written",
        "seqread none 50 % of the bytes read; seqwrite none 25 % of the bytes written",
        "seqwrite none 91 %",
        "50.00 times",
    ] {
        assert!(words.contains(phrase), "{phrase}: {text}");
    }
}

#[test]
fn what_is_wrong_with_machine_image_or_run_is_said_first() {
    let options = options(1, &["none"]);
    let mut prepared = prepared(&options);
    (prepared.host.hypervisor, prepared.host.emulated) = (Some("TCG".into()), true);
    (prepared.host.load, prepared.host.cpus) = (Some(2.0), 2);
    (prepared.layout.shared_bytes, prepared.layout.encoded_bytes) = (1 << 20, 4096);
    let report = report(&options, &prepared, BenchEnd::Interrupted, |job, who, _| {
        (job.name == "randread" && who.mode.is_some()).then(|| (fio(job, 1000.0, 1.0), Observed::default()))
    });
    let codes: Vec<_> = codes_and_places(&report).iter().map(|it| it.0).collect();
    assert_eq!(codes, ["stopped", "emulated", "disk", "rounds", "busy", "shared"]);
    let text = super::table::text(&report);
    // One round has neither a spread nor an interval, and jobs that did not run have no line.
    assert!(!text.contains("certainty") && !text.contains("from the least"), "{text}");
    assert!(text.contains("randread:") && !text.contains("seqread:"), "{text}");
    assert!(report.jobs[0].competitors[0].over_host.is_none());
    for warning in &report.warnings {
        assert!(super::warning::ABOUT.iter().any(|about| about.0 == warning.code), "{warning:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    assert_eq!(
        (&json["schema"], &json["version"], &json["ended"]),
        (&"minivmm-bench".into(), &1.into(), &"interrupted".into())
    );
    assert_eq!(json["warnings"][0]["code"], "stopped");
}

/// Collects the names of all fields in `value`, except below those that other pages describe.
fn fields(value: &serde_json::Value, names: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields_of) => {
            for (name, value) in fields_of {
                names.push(name.clone());
                if !["options", "device"].contains(&name.as_str()) {
                    fields(value, names);
                }
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| fields(value, names)),
        _ => {}
    }
}

#[test]
fn the_guide_lists_every_field_of_the_json_and_every_warning() {
    let options = options(2, &["none", "writeback"]);
    let prepared = prepared(&options);
    let report = report(&options, &prepared, BenchEnd::Whole, |job, _, _| {
        let mut fio = fio(job, 1000.0, 1.0);
        let latency = fio.write.as_ref().and_then(|side| side.latency);
        fio.syncs = Some(crate::measuring::fio::Syncs { count: 1, latency });
        Some((fio, Observed::default()))
    });
    let mut names = Vec::new();
    fields(&serde_json::to_value(&report).unwrap(), &mut names);
    let guide = concat!(
        include_str!("../../../../docs/benchmarking.md"),
        include_str!("../../../../docs/reference/bench-json.md")
    );
    let codes = super::warning::ABOUT.iter().map(|about| about.0.to_owned());
    for name in names.into_iter().chain(codes) {
        let is_told = ["`", "[]`"].iter().any(|end| guide.contains(&format!("`{name}{end}")));
        assert!(is_told, "docs/benchmarking.md and docs/reference/bench-json.md do not tell of {name}");
    }
}
