//! Killed hosts: guests, one per mode, write records on an emulated host that is killed at a random
//! moment. Its page cache is gone, its disk stays; what the guests were promised must be there. With the
//! power the disk's own cache is lost as well: the host's disk is then the worst that its log allows.
//!
//! Every combination of {the guest flushes, never} x {overwrites, holes}; the VMM alone killed; and three
//! controls without which nothing is proven: unsafe, and a writeback that is never flushed, must be seen to
//! lose, and without power also O_DIRECT that is never flushed. One trial a combination here,
//! `MINIVMM_TRIALS` of them in `make torture` (docs/durability.md); `MINIVMM_BESIDE_QEMU=1` does the same with QEMU.

mod disk;
mod host;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::{EmulatedHost, Vmm};
use minivmm_testkit::records::{Claim, Found};
use minivmm_testkit::skips::skip;

/// The modes that every host has.
const MODES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];
/// One that only the kernel of EMUHOST_KERNEL=backports has. Its guest is alone: in a trial beside it, the control that
/// must lose something (writeback, never flushed) lost nothing.
const DONTCACHE: &str = "dontcache";
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
    /// The host; its disk keeps what it was given.
    Host,
    /// The host and its disk, whose cache is lost.
    Power,
    /// The VMM; the host goes on.
    Vmm,
}

/// One kind of trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    vmm: Vmm,
    victim: Victim,
    load: Load,
    /// Only this guest; the others' syncs flush the disk that all share.
    alone: Option<&'static str>,
}

impl Kind {
    fn new(vmm: Vmm, victim: Victim, (flushes, holes): (bool, bool)) -> Self {
        Self { vmm, victim, load: Load { flushes, holes }, alone: None }
    }

    fn modes(&self) -> Vec<&'static str> {
        self.alone.map_or(MODES.to_vec(), |mode| vec![mode])
    }
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

/// Runs the guests, kills, and looks; the claims and what was found, by mode.
fn trial(kind: Kind, wait: Duration) -> Vec<(&'static str, Claim, Found)> {
    let modes = kind.modes();
    let mut emulated = EmulatedHost::start(kind.vmm, kind.victim == Victim::Power);
    emulated.make_images(&modes, kind.load.holes);
    let flush_every = if kind.load.flushes { FLUSH_EVERY } else { 0 };
    let logs: Vec<_> = modes.iter().map(|mode| emulated.guest(mode, flush_every)).collect();
    for (mode, log) in modes.iter().zip(&logs) {
        log.wait_for_record(mode, kind.load.flushes);
    }
    std::thread::sleep(wait);
    if kind.victim == Victim::Vmm {
        emulated.kill_vmms();
        emulated.power_off();
    } else {
        emulated.kill();
    }
    let claims = logs.into_iter().map(host::GuestLog::claim);
    if kind.victim == Victim::Power {
        disk::after_power_loss(&emulated.log(), &emulated.disk());
    }
    let images = disk::images_of(&emulated.disk(), &modes);
    let found = images.into_iter().map(|image| Found::in_image(&image));
    modes.into_iter().zip(claims).zip(found).map(|((mode, claim), found)| (mode, claim, found)).collect()
}

/// A number that differs from run to run; it is printed with the result.
fn moment(trial: u32) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    Duration::from_millis(u64::from((nanos / 1000).wrapping_mul(trial + 1) % 4000))
}

type Tallies = BTreeMap<(Kind, &'static str), Tally>;

fn try_all(kinds: &[Kind]) -> Tallies {
    let mut tallies = Tallies::new();
    for number in 0..trials() {
        for &kind in kinds {
            let wait = moment(number);
            for (mode, claim, found) in trial(kind, wait) {
                let tally = tallies.entry((kind, mode)).or_default();
                tally.add(&claim, &found);
                println!("{kind:?} killed after {wait:?}: {mode}: {claim:?} -> {tally:?}");
            }
        }
    }
    println!(
        "\n| VMM | what ended | guest | onto | mode | trials | acknowledged | promised | lost of the promised | lost of the merely acknowledged |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for ((Kind { vmm, victim, load, alone }, mode), tally) in &tallies {
        let guest = if load.flushes { "flushes" } else { "never flushes" };
        let onto = if load.holes { "holes" } else { "written blocks" };
        let alone = if alone.is_some() { ", alone" } else { "" };
        let Tally { trials, acknowledged, promised, lost_promised, lost_acknowledged } = tally;
        println!(
            "| {vmm:?} | {victim:?} | {guest}{alone} | {onto} | {mode} | {trials} | {acknowledged} | {promised} | {lost_promised} | {lost_acknowledged} |"
        );
    }
    tallies
}

/// What no trial of ours may show, and what one must. Of others the figures are told and not judged.
fn judge(tallies: &Tallies) {
    for ((kind, mode), tally) in tallies.iter().filter(|((kind, _), _)| kind.vmm == Vmm::Minivmm) {
        let what = format!("{kind:?} {mode}: {tally:?}");
        assert!(tally.acknowledged > 0, "{what}: the guest wrote nothing");
        if kind.victim == Victim::Vmm {
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
                let on_the_disk = kind.victim == Victim::Host && !kind.load.holes;
                assert!(!on_the_disk || tally.lost_acknowledged == 0, "{what}");
                // And there it may be lost with the power.
                assert!(kind.alone.is_none() || tally.lost_acknowledged > 0, "{what}: the harness is blind");
            }
            "writeback" => {
                assert_eq!(tally.lost_promised, 0, "{what}");
                assert!(kind.load.flushes || tally.lost_acknowledged > 0, "{what}: the harness is blind");
            }
            DONTCACHE => {
                assert_eq!(tally.lost_promised, 0, "{what}");
                // The host begins to write at once, so blocks that exist may have been written by then. Holes need the
                // file system's journal too, which nobody has asked for.
                let may_keep_all = kind.load.flushes || !kind.load.holes;
                assert!(may_keep_all || tally.lost_acknowledged > 0, "{what}: the harness is blind");
            }
            _ if kind.load.flushes => assert!(tally.lost_promised > 0, "{what}: the harness is blind"),
            _ => assert!(tally.lost_acknowledged > 0, "{what}: the harness is blind"),
        }
    }
}

/// Flushes and holes, in the order in which they tell most.
const LOADS: [(bool, bool); 4] = [(true, false), (false, true), (true, true), (false, false)];

#[test]
fn what_was_promised_survives_the_hosts_end_in_every_mode_but_unsafe() {
    let Some(()) = host::is_possible() else { return };
    // Without being asked for more, the two that differ in everything.
    let count = if trials() > 1 { LOADS.len() } else { 2 };
    let kinds = LOADS[..count].iter().map(|load| Kind::new(Vmm::Minivmm, Victim::Host, *load));
    judge(&try_all(&kinds.collect::<Vec<_>>()));
}

#[test]
fn what_was_promised_survives_the_hosts_end_in_dontcache() {
    let Some(()) = host::is_possible() else { return };
    if std::env::var_os("EMUHOST_KERNEL").is_none_or(|kernel| kernel != "backports") {
        skip("dontcache", "the emulated host has RWF_DONTCACHE with EMUHOST_KERNEL=backports alone");
        return;
    }
    let kinds =
        LOADS.map(|load| Kind { alone: Some(DONTCACHE), ..Kind::new(Vmm::Minivmm, Victim::Host, load) });
    let count = if trials() > 1 { LOADS.len() } else { 2 };
    judge(&try_all(&kinds[..count]));
}

#[test]
fn what_was_promised_survives_the_loss_of_power_too() {
    let Some(()) = host::is_possible() else { return };
    let count = if trials() > 1 { LOADS.len() } else { 1 };
    let kinds = LOADS[..count].iter().map(|load| Kind::new(Vmm::Minivmm, Victim::Power, *load));
    let volatile = Kind { alone: Some("none"), ..Kind::new(Vmm::Minivmm, Victim::Power, (false, false)) };
    judge(&try_all(&kinds.chain([volatile]).collect::<Vec<_>>()));
}

#[test]
fn a_killed_vmm_loses_nothing_in_any_mode() {
    let Some(()) = host::is_possible() else { return };
    judge(&try_all(&[Kind::new(Vmm::Minivmm, Victim::Vmm, (false, true))]));
}

/// Not judged: a table to be put beside ours.
#[test]
fn qemu_under_the_same_harness() {
    if std::env::var_os("MINIVMM_BESIDE_QEMU").is_none() {
        skip("torture", "MINIVMM_BESIDE_QEMU=1 runs the guests in QEMU as well (make torture)");
        return;
    }
    let Some(()) = host::is_possible() else { return };
    let of = |victim| LOADS[..2].iter().map(move |load| Kind::new(Vmm::Qemu, victim, *load));
    let kinds: Vec<_> = of(Victim::Host).chain(of(Victim::Power)).collect();
    for ((kind, mode), tally) in &try_all(&kinds) {
        assert!(tally.acknowledged > 0, "{kind:?} {mode}: the guest wrote nothing");
    }
}
