//! A soak: four disks of different modes under fio's verification, with faults on purpose, a VMM that is
//! stopped and continued, little memory on the host, and SIGTERM in the middle; then the images are read
//! from outside. Nothing that was written is lost, and the program grows neither in memory nor in descriptors.
//!
//! Owns the cycles and what is asserted of them; `host.sh` and `guest.sh` are the two sides of a cycle. About
//! a minute here; `MINIVMM_SOAK_SECONDS` makes it longer (`make torture`). Runs on this machine's KVM where it can run
//! Linux, in the emulated host elsewhere.

#[path = "../../../benches/common/random.rs"]
mod random;

use std::fmt::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minivmm_testkit::host::{Host, Outcome, Place};
use minivmm_testkit::records::{self, Claim, Found};
use random::Random;
use serde_json::Value;

/// Each image: fio's part, as much for records, and a part whose reads fail.
const PART_MIB: u64 = 32;
const BAD_MIB: u64 = 1;
const GUEST_MIB: u64 = 256;
/// Less than the guest's memory and the images take together.
const LIMIT_MIB: u64 = 352;
/// The records come so long before the end.
const RECORDS_SECONDS: u64 = 25;
/// What the program may have more in the second half of a cycle than in the first, in KiB: pages of its own
/// file that it needs for the first time.
const GROWTH_KIB_MAX: u64 = 256;

/// Mode and faults of each disk. What is late, short or failed on purpose must come right, or be told.
const DISKS: [(&str, &str); 4] = [
    ("none", "delay=3ms:write:chance=5%+short:read:chance=10%"),
    ("writeback", "short:write:chance=10%+delay=20ms:flush:every=7"),
    ("writethrough", "delay=2ms:read:chance=5%+short:write:chance=5%"),
    ("directsync", "short:write:chance=5%+short:read:chance=5%"),
];

fn disk_args(seed: u64) -> String {
    let first = 2 * PART_MIB * 2048;
    let bad = format!("fail:read:sectors={first}-{}", first + BAD_MIB * 2048 - 1);
    let mut lines = String::new();
    for (mode, faults) in DISKS {
        writeln!(lines, "{mode}.img,cache={mode},fault={bad}+{faults}+seed={seed}").unwrap();
    }
    lines
}

/// How long minivmm runs and is then stopped, again and again, in seconds.
fn interruptions(seconds: u64, random: &mut Random) -> String {
    let (mut left, mut lines) = (seconds as f64, String::new());
    while left > 0.0 {
        let run = 0.5 + random.below(2500) as f64 / 1000.0;
        let stop = 0.05 + random.below(400) as f64 / 1000.0;
        writeln!(lines, "{run:.2} {stop:.2}").unwrap();
        left -= run + stop;
    }
    lines
}

fn sure(place: &Place, script: &str) -> Outcome {
    let outcome = place.sh(script);
    assert_eq!(outcome.status, 0, "{script}: {outcome:#?}");
    outcome
}

fn read(place: &Place, file: &str) -> String {
    sure(place, &format!("cat {file}")).stdout
}

/// Images that are written all over, and the files of both sides.
fn prepare(place: &Place) {
    let image_mib = 2 * PART_MIB + BAD_MIB;
    for (mode, _) in DISKS {
        sure(place, &format!("dd if=/dev/zero of={mode}.img bs=1M count={image_mib} 2>/dev/null"));
    }
    place.push(&records::program(), "records");
    place.put("host.sh", include_bytes!("host.sh"));
    sure(place, "chmod +x records; sync");
}

/// Whether a memory limit is permitted there; in the emulated host cgroup v2 is mounted for it.
fn permitted_limit(place: &Place) -> Option<u64> {
    place.sh("grep -q ' /sys/fs/cgroup ' /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup");
    let tried = place.sh(&format!(
        "minivmm --host-memory-limit {LIMIT_MIB}M --kernel /dev/null --initrd none 2>&1 | grep -q cgroup"
    ));
    (tried.status != 0).then_some(LIMIT_MIB)
}

/// One guest, from its start to SIGTERM.
fn cycle(place: &Place, seconds: u64, limit: Option<u64>, random: &mut Random) {
    let seed = random.below(1 << 30);
    let records_after = seconds.saturating_sub(RECORDS_SECONDS);
    let guest = include_str!("guest.sh")
        .replace("@PART_MIB@", &PART_MIB.to_string())
        .replace("@RECORDS_AFTER@", &records_after.to_string())
        .replace("@BAD_BLOCK@", &(2 * PART_MIB * 256).to_string());
    place.put("guest.sh", guest.as_bytes());
    place.put("disks", disk_args(seed).as_bytes());
    place.put("interruptions", interruptions(seconds, random).as_bytes());
    let limit = limit.map(|mib| mib.to_string()).unwrap_or_default();
    sure(
        place,
        &format!(
            "rm -f said seen ended stats.json; setsid sh host.sh {GUEST_MIB} '{limit}' <interruptions >/dev/null 2>host-errors &"
        ),
    );
    let patience = Duration::from_secs(2 * seconds + 240);
    let begun = Instant::now();
    while place.sh("test -e ended").status != 0 {
        assert!(begun.elapsed() < patience, "the cycle does not end:\n{}", read(place, "said complaints"));
        std::thread::sleep(Duration::from_secs(2));
    }
    judge(place, seed);
}

fn judge(place: &Place, seed: u64) {
    let (said, seen) = (read(place, "said"), read(place, "seen"));
    let all = format!("seed {seed}\n{seen}\n{}\n{said}", read(place, "complaints host-errors"));
    assert!(seen.contains("status 143"), "SIGTERM ends it in order: {all}");
    assert!(!said.contains("failed"), "{all}");
    let stats: Value = serde_json::from_str(&read(place, "stats.json")).unwrap();
    for ((mode, _), (number, name)) in DISKS.iter().zip(["vda", "vdb", "vdc", "vdd"].iter().enumerate()) {
        let disk = &stats["disks"][number];
        let what = format!("{mode}: {disk:#}\n{all}");
        let count = |pointer: &str| disk.pointer(pointer).and_then(Value::as_u64).unwrap();
        // The load was one, and the faults were met. How much of it comes to pass in a cycle is the host's affair.
        assert!(count("/requests/read") > 20 && count("/requests/write") > 20, "{what}");
        assert!(count("/faults/failed") > 0 && count("/requests/errors") > 0, "{what}");
        assert!(count("/faults/shortened") > 0 && count("/transfers/continued") > 0, "{what}");
        assert!(said.contains(&format!("refused {name}")), "{what}");
        assert_eq!(disk.pointer("/durability/sync_error"), Some(&Value::Null), "{what}");
        let mut claim = Claim::default();
        let own = said.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        own.for_each(|line| claim.hear(line));
        assert!(claim.promised() > 0, "no record was promised: {what}");
        let found = Found::in_image(&part_with_records(place, mode));
        let lost: Vec<u64> = (1..=claim.written.max(claim.promised())).filter(|n| !found.has(*n)).collect();
        assert!(lost.is_empty(), "{claim:?} lost {lost:?}: {what}");
        println!(
            "{mode}: {claim:?}, none lost; {} reads, {} writes",
            count("/requests/read"),
            count("/requests/write")
        );
    }
    nothing_grows(&seen);
}

fn part_with_records(place: &Place, mode: &str) -> Vec<u8> {
    let size = sure(place, &format!("stat -c %s {mode}.img")).stdout;
    assert_eq!(size.trim(), ((2 * PART_MIB + BAD_MIB) << 20).to_string(), "the image keeps its size");
    sure(
        place,
        &format!("dd if={mode}.img of=part bs=1M skip={PART_MIB} count={} 2>/dev/null", PART_MIB + BAD_MIB),
    );
    let local = tempfile::NamedTempFile::new().unwrap();
    place.pull("part", local.path());
    std::fs::read(local.path()).unwrap()
}

/// Memory of the program's own, and descriptors, in the second half against the first.
fn nothing_grows(seen: &str) {
    let looks: Vec<(u64, u64)> = seen
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let ["own", own, "open", open] = words[..] else { return None };
            Some((own.parse().unwrap(), open.parse().unwrap()))
        })
        .collect();
    assert!(looks.len() >= 6, "{seen}");
    let (first, second) = looks.split_at(looks.len() / 2);
    let most = |looks: &[(u64, u64)]| {
        looks.iter().fold((0, 0), |most, look| (most.0.max(look.0), most.1.max(look.1)))
    };
    let (before, after) = (most(first), most(second));
    println!(
        "memory of its own {} then {} KiB, descriptors {} then {}",
        before.0, after.0, before.1, after.1
    );
    assert!(after.0 <= before.0 + GROWTH_KIB_MAX, "memory grows: {seen}");
    assert!(after.1 <= before.1, "descriptors grow: {seen}");
}

#[test]
fn a_long_run_with_faults_stops_and_little_memory_loses_nothing_and_does_not_grow() {
    let total = std::env::var("MINIVMM_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let seed = u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos());
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let place = Host::get().place();
    prepare(&place);
    let limit = permitted_limit(&place);
    match limit {
        Some(mib) => println!("the host gives {mib} MiB to a guest of {GUEST_MIB} and its images"),
        None => {
            println!("no memory limit is permitted here (docs/observing.md): the host's memory is not short")
        }
    }
    // A long one, in which growth would show, and shorter ones for more ends.
    let mut left: u64 = total;
    while left > 0 {
        let seconds = if left <= 90 { left } else { left / 2 };
        cycle(&place, seconds, limit, &mut random);
        left -= seconds;
    }
}
