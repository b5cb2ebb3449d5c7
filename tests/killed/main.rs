//! Killed hosts: five guests, one per mode, write records on an emulated host that is killed at a random
//! moment. Its page cache is gone, its disk stays; what the guests were promised must be there.
//!
//! Every combination of {the guest flushes, never} x {overwrites, holes}; the VMM alone killed; and two
//! controls without which nothing is proven: unsafe, and a writeback that is never flushed, must be seen to
//! lose. One trial a combination here, `MINIVMM_TRIALS` of them in `make torture` (docs/durability.md).
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

mod disk;
mod host;
mod records;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::EmulatedHost;
use records::{Claim, Found};

const MODES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];
/// Records between two flushes of a guest that flushes.
const FLUSH_EVERY: u32 = 32;

/// What the guests do, and onto what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    flushes: bool,
    holes: bool,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Host,
    Vmm,
}

/// What came of one mode, over all trials of a kind.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    trials: u32,
    acknowledged: u64,
    promised: u64,
    lost_promised: u64,
    lost_acknowledged: u64,
}

impl Tally {
    fn add(&mut self, claim: &Claim, found: &Found) {
        let promised = claim.promised();
        let lost = |upto: u64| (1..=upto).filter(|n| !found.has(*n)).count() as u64;
        let lost_promised = lost(promised);
        self.trials += 1;
        self.acknowledged += claim.written;
        self.promised += promised;
        self.lost_promised += lost_promised;
        self.lost_acknowledged += lost(claim.written.max(promised)) - lost_promised;
    }
}

fn trials() -> u32 {
    std::env::var("MINIVMM_TRIALS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Runs the five guests, kills, and looks; the claims and what was found, by mode.
fn trial(load: Load, victim: Victim, wait: Duration) -> Vec<(&'static str, Claim, Found)> {
    let mut emulated = EmulatedHost::start();
    emulated.make_images(&MODES, load.holes);
    let flush_every = if load.flushes { FLUSH_EVERY } else { 0 };
    let logs: Vec<_> = MODES.iter().map(|mode| emulated.guest(mode, flush_every)).collect();
    for (mode, log) in MODES.iter().zip(&logs) {
        log.wait_for_record(mode);
    }
    std::thread::sleep(wait);
    if victim == Victim::Vmm {
        emulated.kill_vmms();
        emulated.power_off();
    } else {
        emulated.kill();
    }
    let claims = logs.into_iter().map(host::GuestLog::claim);
    let images = disk::images_of(&emulated.disk(), &MODES);
    let found = images.into_iter().map(|image| Found::in_image(&image));
    MODES.into_iter().zip(claims).zip(found).map(|((mode, claim), found)| (mode, claim, found)).collect()
}

/// A number that differs from run to run; it is printed with the result.
fn moment(trial: u32) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    Duration::from_millis(u64::from((nanos / 1000).wrapping_mul(trial + 1) % 4000))
}

fn try_all(loads: &[(Load, Victim)]) -> BTreeMap<(Load, Victim, &'static str), Tally> {
    let mut tallies = BTreeMap::<_, Tally>::new();
    for number in 0..trials() {
        for &(load, victim) in loads {
            let wait = moment(number);
            for (mode, claim, found) in trial(load, victim, wait) {
                let tally = tallies.entry((load, victim, mode)).or_default();
                tally.add(&claim, &found);
                println!("{load:?} {victim:?} killed after {wait:?}: {mode}: {claim:?} -> {tally:?}");
            }
        }
    }
    println!(
        "\n| who was killed | guest | onto | mode | trials | acknowledged | promised | lost of the promised | lost of the merely acknowledged |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for ((load, victim, mode), tally) in &tallies {
        let (guest, onto) = (
            if load.flushes { "flushes" } else { "never flushes" },
            if load.holes { "holes" } else { "written blocks" },
        );
        let Tally { trials, acknowledged, promised, lost_promised, lost_acknowledged } = tally;
        println!(
            "| {victim:?} | {guest} | {onto} | {mode} | {trials} | {acknowledged} | {promised} | {lost_promised} | {lost_acknowledged} |"
        );
    }
    tallies
}

/// What no trial may show, and what one must.
fn judge(tallies: &BTreeMap<(Load, Victim, &'static str), Tally>) {
    for ((load, victim, mode), tally) in tallies {
        let what = format!("{load:?} {victim:?} {mode}: {tally:?}");
        assert!(tally.acknowledged > 0, "{what}: the guest wrote nothing");
        if *victim == Victim::Vmm {
            let lost = tally.lost_promised + tally.lost_acknowledged;
            assert_eq!(lost, 0, "{what}: a killed VMM loses nothing in any mode");
            continue;
        }
        match *mode {
            "writethrough" | "directsync" => {
                assert_eq!(tally.promised, tally.acknowledged, "{what}: each write is promised");
                assert_eq!(tally.lost_promised, 0, "{what}");
            }
            "none" => {
                assert_eq!(tally.lost_promised, 0, "{what}");
                // Overwritten in place and past the page cache: on the disk's own side by then.
                assert!(load.holes || tally.lost_acknowledged == 0, "{what}");
            }
            "writeback" => {
                assert_eq!(tally.lost_promised, 0, "{what}");
                assert!(load.flushes || tally.lost_acknowledged > 0, "{what}: the harness is blind");
            }
            _ if load.flushes => assert!(tally.lost_promised > 0, "{what}: the harness is blind"),
            _ => assert!(tally.lost_acknowledged > 0, "{what}: the harness is blind"),
        }
    }
}

#[test]
fn what_was_promised_survives_the_hosts_end_in_four_modes_and_not_in_unsafe() {
    let Some(()) = host::is_possible() else { return };
    let all = [(true, false), (false, true), (true, true), (false, false)];
    let load = |(flushes, holes): (bool, bool)| (Load { flushes, holes }, Victim::Host);
    // Without being asked for more, the two that differ in everything.
    let count = if trials() > 1 { all.len() } else { 2 };
    judge(&try_all(&all[..count].iter().copied().map(load).collect::<Vec<_>>()));
}

#[test]
fn a_killed_vmm_loses_nothing_in_any_mode() {
    let Some(()) = host::is_possible() else { return };
    judge(&try_all(&[(Load { flushes: false, holes: true }, Victim::Vmm)]));
}
