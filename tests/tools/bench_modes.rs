//! `minivmm bench` with Linux guests: what was measured is what the devices did, figures that are a cache's are
//! said to be, and no image is changed that was not given for it.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm_testkit::host::{Host, Outcome, Place};
use serde_json::Value;

const FAILURE: i32 = 125;
const MIB: u64 = 1 << 20;

fn report(place: &Place, outcome: &Outcome) -> Value {
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    serde_json::from_str(&place.sh("cat report.json").stdout).unwrap()
}

/// The competitor of this name at the first job.
fn competitor<'a>(report: &'a Value, name: &str) -> &'a Value {
    let all = report["jobs"][0]["competitors"].as_array().unwrap();
    all.iter().find(|who| who["name"] == name).unwrap_or_else(|| panic!("no {name}: {report:#}"))
}

/// (code, who) of the warnings that are about somebody.
fn warned(report: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let warnings = report["warnings"].as_array().unwrap().iter();
    warnings.filter_map(|it| Some((text(&it["code"])?, text(&it["who"])?))).collect()
}

fn has(report: &Value, code: &str, who: &str) -> bool {
    warned(report).contains(&(code.to_owned(), who.to_owned()))
}

/// What fio has counted in the guest is what the device was asked for.
fn counts_are_the_devices(run: &Value) {
    let (fio, device) = (&run["fio"], &run["device"]);
    // A partition table is looked for, in one or two reads.
    let look = device["requests"]["read"].as_u64().unwrap() - fio["read"]["ios"].as_u64().unwrap_or_default();
    assert!((1..=4).contains(&look), "{run:#}");
    assert_eq!(device["requests"]["write"].as_u64(), fio["write"]["ios"].as_u64().or(Some(0)), "{run:#}");
    assert_eq!(device["bytes"]["write"].as_u64(), fio["write"]["bytes"].as_u64().or(Some(0)), "{run:#}");
    assert_eq!(device["requests"]["errors"], 0, "{run:#}");
}

#[test]
fn reads_that_the_hosts_cache_served_are_not_passed_off_as_the_disks() {
    let place = Host::get().place();
    place.put("jobs.fio", b"[warm]\nrw=randread\nbs=64k\niodepth=4\nioengine=libaio\ndirect=1\n");
    let outcome = place.sh(
        "minivmm bench --disk a.img --size 16M --modes none,writeback --host-cache warm --jobs jobs.fio --rounds 1 \
         --seconds 1 --json report.json",
    );
    let report = report(&place, &outcome);
    for (mode, share, cached) in [("none", 0.0, 0), ("writeback", 1.0, 16 * MIB)] {
        let run = &competitor(&report, mode)["rounds"][0];
        counts_are_the_devices(run);
        let observed = &run["observed"];
        assert_eq!(observed["host_hit_share"], share, "{run:#}");
        assert_eq!(observed["host_cached_bytes_before"].as_f64(), Some(16.0 * MIB as f64), "warm: {run:#}");
        if mode == "writeback" {
            assert_eq!(observed["host_cached_bytes_after"].as_f64(), Some(cached as f64), "{run:#}");
        }
        assert_eq!((&run["device"]["readonly"], &run["device"]["cache"]), (&true.into(), &mode.into()));
        assert_eq!(has(&report, "host-cache", mode), mode == "writeback", "{report:#}");
        assert!(competitor(&report, mode)["over_host"]["median"].as_f64().unwrap() > 0.0);
    }
    // The host's own fio ran the same job, on the same image, with O_DIRECT and through its cache.
    for who in ["host", "host direct=0"] {
        let run = &competitor(&report, who)["rounds"][0];
        assert!(run["fio"]["read"]["ios"].as_u64().unwrap() > 0 && run["device"].is_null(), "{run:#}");
        // Its figures are looked at with the same eyes.
        assert_eq!(has(&report, "host-cache", who), who != "host", "{run:#}");
    }
    for words in ["writeback", "host direct=0", "memory's speed, not the disk's", "fewer than 3 rounds"] {
        let told = outcome.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(told.contains(words), "{words}: {}", outcome.stdout);
    }
    // A machine that is emulated, or virtual, knows it.
    let meaning = if matches!(Host::get(), Host::Emulated(_)) { "counts" } else { "" };
    assert!(report["meaning"].as_str().unwrap().contains(meaning), "{report:#}");

    // The image is as large as it was, and nobody has written to it: reading jobs get a disk that cannot be written.
    let sizes = place.sh("stat -c %s a.img; sha256sum <a.img >after; stat -c %s after");
    assert!(sizes.stdout.starts_with("16777216\n"), "{sizes:#?}");
    // It is there now, so that writing to it wants a word.
    let refused = place.sh("minivmm bench --disk a.img --only randwrite --rounds 1 --seconds 1");
    assert_eq!(refused.status, FAILURE, "{refused:#?}");
    assert!(refused.stderr.contains("--destroy") && refused.stdout.is_empty(), "{refused:#?}");
    assert_eq!(place.sh("sha256sum <a.img | cmp - after").status, 0, "the image has changed");
}

#[test]
fn writes_that_only_the_hosts_memory_has_are_told_and_an_image_with_holes_is_refused() {
    let place = Host::get().place();
    place.put("jobs.fio", b"[lost]\nrw=randwrite\nbs=64k\niodepth=4\nioengine=libaio\ndirect=1\n");
    let bench =
        "minivmm bench --disk a.img --modes unsafe --jobs jobs.fio --rounds 1 --seconds 1 --json report.json";
    let refused = place.sh(&format!("truncate -s 16M a.img; {bench} --destroy; echo $?; du -k a.img"));
    assert!(refused.stdout.starts_with(&format!("{FAILURE}\n0\t")), "{refused:#?}");
    assert!(
        refused.stderr.contains("16777216 of the 16777216 bytes") && refused.stderr.contains("--fill"),
        "{refused:#?}"
    );

    let outcome = place.sh(&format!("{bench} --destroy --fill"));
    let report = report(&place, &outcome);
    let run = &competitor(&report, "unsafe")["rounds"][0];
    counts_are_the_devices(run);
    let observed = &run["observed"];
    // The last sync is asked for, acknowledged, and nothing.
    assert_eq!((&observed["flushes"], &observed["flushes_ignored"]), (&1.into(), &1.into()), "{run:#}");
    assert!(observed["host_dirty_bytes_after"].as_f64().unwrap() > 0.0, "{run:#}");
    for code in ["dirty", "ignored", "short"] {
        assert!(has(&report, code, "unsafe"), "{code}: {report:#}");
    }
    assert!(!has(&report, "host-cache", "unsafe") && !has(&report, "dirty", "host"), "{report:#}");
    let size = place.sh("stat -c %s a.img").stdout;
    assert_eq!(size, "16777216\n");
}
