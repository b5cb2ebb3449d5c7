//! Statistics as a driver's requests make them: counts by kind and queue, latencies by phase, and the
//! documented list of fields held against the JSON.

use std::collections::BTreeSet;
use std::sync::Arc;

use minivmm::disk::config::EngineChoice;
use minivmm::disk::{DiskConfig, Image};
use minivmm::stats::{ExitStats, Stats};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, modes};
use minivmm_testkit::turns::Turns;
use serde_json::Value;

const ALL: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;
const KINDS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];
const PHASES: [&str; 4] =
    ["doorbell_to_popped", "popped_to_submitted", "submitted_to_host_done", "host_done_to_interrupt"];

fn json(image: &Image) -> Value {
    let mut json = Vec::new();
    Stats::of([image].into_iter(), ExitStats::default()).write_json(&mut json).unwrap();
    serde_json::from_slice(&json).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A live disk whose latencies are measured.
fn timed(test: &TestImage, mode: &str, engine: EngineChoice, fault: Option<&str>) -> Rig {
    let fault = fault.map(|text| text.parse().unwrap());
    let options = DiskConfig { timed: true, engine, fault, ..test.options(mode) };
    let mut rig = Rig::new(Arc::new(Image::open(&options).unwrap()));
    rig.start(ALL);
    rig
}

/// Some of everything; one read fails.
fn ask(rig: &mut Rig) {
    for at in 0..5 {
        assert_eq!(rig.write_sectors(8 * at, &[7; 4096]), OK);
    }
    for at in 0..3 {
        assert_eq!(rig.read_sectors(8 * at, 4096).0, OK);
    }
    assert_eq!(rig.erase(DISCARD, &[(64, 16, 0)]), OK);
    assert_eq!(rig.erase(WRITE_ZEROES, &[(80, 8, 0)]), OK);
    for _ in 0..2 {
        assert_eq!(rig.flush(), OK);
    }
}

/// The worker counts an answer after the driver can see it: waits until it has.
fn when_all_are_recorded(rig: &Rig) -> Value {
    loop {
        let found = json(&rig.image)["disks"][0].clone();
        let all = KINDS.iter().all(|kind| {
            number(&found["requests"][kind])
                == found["latency_ns"][kind]["total"]["count"].as_u64().unwrap_or(0)
        });
        if all {
            return found;
        }
        std::thread::yield_now();
    }
}

#[test]
fn every_request_has_its_latency_and_the_phases_are_the_whole_in_every_mode() {
    for mode in modes() {
        for engine in [EngineChoice::Blocking, EngineChoice::Auto] {
            let test = TestImage::new(1 << 20);
            let mut rig = timed(&test, mode, engine, None);
            ask(&mut rig);
            let what = format!("{mode}, {}", rig.image.stats.engine());
            let found = when_all_are_recorded(&rig);
            for (kind, count, bytes) in [
                ("read", 3, Some(3 * 4096)),
                ("write", 5, Some(5 * 4096)),
                ("flush", 2, None),
                ("discard", 1, Some(8192)),
                ("write_zeroes", 1, Some(4096)),
            ] {
                assert_eq!(number(&found["requests"][kind]), count, "{what}: {kind}");
                assert_eq!(found["bytes"][kind].as_u64(), bytes, "{what}: {kind}");
                let latency = &found["latency_ns"][kind];
                let needs_host = kind != "flush" || mode != "unsafe";
                let mut sum = 0;
                for phase in PHASES {
                    if phase == "submitted_to_host_done" && !needs_host {
                        assert!(latency[phase].is_null(), "{what}: {kind} needs no host");
                        continue;
                    }
                    let times = &latency[phase];
                    assert_eq!(number(&times["count"]), count, "{what}: {kind} {phase}");
                    let order = ["min", "p10", "p25", "p50", "p75", "p90", "p99", "p99_9", "max"]
                        .map(|name| number(&times[name]));
                    assert!(order.is_sorted(), "{what}: {kind} {phase} {order:?}");
                    sum += number(&times["mean"]);
                }
                // Each mean is rounded down to a nanosecond.
                let total = number(&latency["total"]["mean"]);
                assert!(sum <= total && total <= sum + 4, "{what}: {kind}: {sum} of {total}");
            }
            assert_eq!(found["in_flight"]["now"], 0, "{what}");
            assert_eq!(found["in_flight"]["max"], 1, "{what}: one after another");
            the_queues_add_up(&found, &what);
        }
    }
}

/// What the queues have counted is what the disk has.
fn the_queues_add_up(disk: &Value, what: &str) {
    let queues = disk["per_queue"].as_array().unwrap();
    let sum = |path: &[&str]| -> u64 {
        queues.iter().map(|queue| number(path.iter().fold(queue, |value, name| &value[*name]))).sum()
    };
    for kind in KINDS {
        assert_eq!(sum(&["requests", kind]), number(&disk["requests"][kind]), "{what}: {kind}");
    }
    for name in ["preadv", "pwritev", "pwritev_dsync", "fallocate"] {
        assert_eq!(sum(&["host_operations", name]), number(&disk["host_calls"][name]), "{what}: {name}");
    }
    // The one of the start is not a queue's.
    let first = u64::from(disk["durability"]["honours_flush"] == true);
    assert_eq!(
        sum(&["host_operations", "fdatasync"]) + first,
        number(&disk["host_calls"]["fdatasync"]),
        "{what}"
    );
    assert_eq!(sum(&["shared_syncs"]), number(&disk["shared_syncs"]), "{what}");
    assert_eq!(sum(&["transfers", "bounced"]), number(&disk["transfers"]["bounced"]), "{what}");
}

#[test]
fn a_delay_of_the_host_shows_in_the_hosts_phase_and_nowhere_else() {
    // Longer than a busy host's disk takes for a sync or an erase.
    const DELAY_NS: u64 = 500_000_000;
    for engine in [EngineChoice::Blocking, EngineChoice::Auto] {
        for (mode, kind, fault) in [
            ("none", "read", "delay=500ms:read"),
            ("writeback", "write", "delay=500ms:write"),
            ("none", "flush", "delay=500ms:flush"),
        ] {
            let test = TestImage::new(1 << 20);
            let mut rig = timed(&test, mode, engine, Some(fault));
            ask(&mut rig);
            let found = when_all_are_recorded(&rig);
            let what = format!("{mode}, {}, {fault}: {:#}", rig.image.stats.engine(), found["latency_ns"]);
            for (other, phase) in KINDS.iter().flat_map(|kind| PHASES.map(|phase| (*kind, phase))) {
                let times = &found["latency_ns"][other][phase];
                if (other, phase) == (kind, "submitted_to_host_done") {
                    assert!(number(&times["min"]) >= DELAY_NS, "{what}");
                } else {
                    assert!(number(&times["p50"]) < DELAY_NS, "{other} {phase}: {what}");
                }
            }
            assert!(number(&found["latency_ns"][kind]["total"]["min"]) >= DELAY_NS, "{what}");
        }
    }
}

#[test]
fn nothing_is_timed_where_nobody_wants_to_know() {
    let test = TestImage::new(1 << 20);
    let mut rig = Rig::live(test.open("none"), ALL);
    ask(&mut rig);
    let found = json(&rig.image);
    let disk = &found["disks"][0];
    assert!(disk["latency_ns"].is_null() && disk["per_queue"][0]["latency_ns"].is_null());
    assert_eq!(number(&disk["requests"]["write"]), 5);
    let text = Stats::of([&*rig.image].into_iter(), ExitStats::default()).to_string();
    assert!(!text.contains("latency"), "{text}");
}

#[test]
fn requests_that_are_in_flight_together_are_counted_so() {
    let test = TestImage::new(1 << 20);
    let mut queue = Turns::new(test.open("none"), 16, 0);
    queue.run(|worker, driver| {
        for slot in 0..5u16 {
            let header = driver.put_header(slot, IN, 8 * u64::from(slot));
            driver.put_desc(DESC, 3 * slot, (header, 16, NEXT, 3 * slot + 1));
            driver.put_desc(DESC, 3 * slot + 1, (DATA, 4096, NEXT | WRITE, 3 * slot + 2));
            driver.put_desc(DESC, 3 * slot + 2, (STATUS_BYTE, 1, WRITE, 0));
        }
        driver.submit((0..5).map(|slot| 3 * slot));
        worker.turn().unwrap();
        assert_eq!(driver.used_idx(), 5);
    });
    let stats = queue.disk.stats();
    assert_eq!((stats.in_flight(), stats.in_flight_max()), (0, 5));
}

#[test]
fn the_text_has_a_row_for_each_kind_and_phase() {
    let test = TestImage::new(1 << 20);
    let mut rig = timed(&test, "none", EngineChoice::Auto, None);
    ask(&mut rig);
    when_all_are_recorded(&rig);
    let text = Stats::of([&*rig.image].into_iter(), ExitStats::default()).to_string();
    let words: Vec<&str> = text.lines().map(str::trim_start).collect();
    for (name, count) in [("read", 3), ("write", 5), ("FLUSH", 2), ("discard", 1), ("write-zeroes", 1)] {
        let at = words.iter().position(|line| line.starts_with(&format!("{name}  "))).unwrap();
        let phases = ["", "until popped", "until submitted", "by the host", "until told"];
        for (line, phase) in words[at..].iter().zip(phases) {
            assert!(line.starts_with(phase) && line.contains(&format!(" {count} ")), "{text}");
        }
    }
}

/// Every leaf with the path to it, as in `disks[].name`.
fn leaves(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            let dot = if path.is_empty() { "" } else { "." };
            fields.iter().for_each(|(name, value)| leaves(value, &format!("{path}{dot}{name}"), found));
        }
        Value::Array(items) => items.iter().for_each(|item| leaves(item, &format!("{path}[]"), found)),
        _ => _ = found.insert(path.to_owned()),
    }
}

/// The path as the guide has it: kinds and phases by one name each, and what a queue has as its disk.
fn as_in_the_guide(path: &str) -> String {
    let mut path = path.to_owned();
    for kind in KINDS {
        path = path.replace(&format!("latency_ns.{kind}."), "latency_ns.KIND.");
    }
    for phase in PHASES.iter().chain(&["total"]) {
        path = path.replace(&format!(".KIND.{phase}."), ".KIND.PHASE.");
    }
    match path.strip_prefix("disks[].per_queue[].") {
        Some(own) if own == "index" || own.starts_with("host_operations") => path,
        Some(shared) => format!("disks[].{shared}"),
        None => path,
    }
}

/// The fields that a row names: `a.{b,c}` are `a.b` and `a.c`.
fn each_of(row: &str) -> Vec<String> {
    match row.split_once('{') {
        None => vec![row.to_owned()],
        Some((before, list)) => {
            list.trim_end_matches('}').split(',').map(|name| format!("{before}{name}")).collect()
        }
    }
}

#[test]
fn the_guide_lists_every_field_of_the_json_and_no_other() {
    let test = TestImage::new(1 << 20);
    let log_writes = Some(test.path.with_extension("log"));
    let options = DiskConfig { timed: true, log_writes, ..test.options("none") };
    let mut rig = Rig::new(Arc::new(Image::open(&options).unwrap()));
    rig.start(ALL);
    ask(&mut rig);
    when_all_are_recorded(&rig);
    let found = json(&rig.image);
    assert_eq!((&found["schema"], &found["version"]), (&"minivmm-statistics".into(), &1.into()));
    let mut written = BTreeSet::new();
    leaves(&found, "", &mut written);
    let written: BTreeSet<String> = written.iter().map(|path| as_in_the_guide(path)).collect();

    let guide = include_str!("../../docs/reference/statistics-json.md");
    let rows = guide.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    // Objects that may be null have a row of their own.
    let objects = ["disks[].write_log", "disks[].latency_ns", "disks[].per_queue"];
    let listed: BTreeSet<String> =
        rows.flat_map(|(path, _)| each_of(path)).filter(|path| !objects.contains(&path.as_str())).collect();
    let missing: Vec<_> = written.difference(&listed).collect();
    let invented: Vec<_> = listed.difference(&written).collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "not in the guide: {missing:#?}; not written: {invented:#?}"
    );
}
