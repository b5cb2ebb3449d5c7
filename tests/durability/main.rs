//! The proof that an acknowledged FLUSH means what it says: the real worker and state machine over
//! simulated storage, driven by generated drivers, with the two floors compared at every step.
//!
//! `cargo test --features mutants --test durability`. A failing seed prints the shortest run that
//! still fails, in words, and belongs into `KEPT`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

#[path = "../common/desc.rs"]
mod desc;
mod images;
mod plan;
mod promise;
mod storage;
mod world;

use std::sync::atomic::Ordering;
use std::time::Instant;

use minivmm::disk::cache::POLICIES;
use minivmm::mem::Ram;
use minivmm::mutants::{self, Mutant};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use plan::{Plan, plans};

/// The modes that promise something, by their place in `POLICIES`; and unsafe.
const DURABLE: &[usize] = &[0, 1, 2, 3];
const UNSAFE: &[usize] = &[4];

/// Seeds in which something was once wrong.
///
/// 1768, and 2667 since drivers are generated with four ways to stable writes: a FLUSH of one queue was
/// acknowledged while another queue had not yet looked at the failure of its own fdatasync, to which
/// the kernel had told the error.
const KEPT: &[u64] = &[1768, 2667];

/// Seeds of the run that must find nothing, unless MINIVMM_SEEDS says otherwise (`make torture`).
const SEEDS: u64 = 100_000;

fn seeds() -> u64 {
    std::env::var("MINIVMM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS)
}

/// Seeds within which each mutant must be found.
const MUTANT_SEEDS: u64 = 3_000;

fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// A seed's plan run once: what it violates, if anything, and how many requests were OK.
fn try_seed(seed: u64, modes: &'static [usize], ram: &Ram) -> Result<u64, String> {
    let mut tree = plans(modes).new_tree(&mut runner(seed)).unwrap();
    match world::run(&tree.current(), ram, false) {
        Ok(completed) => Ok(completed),
        Err(_) => {
            let shortest = shrink(&mut tree, ram);
            let (violation, trace) = world::run(&shortest, ram, true).unwrap_err();
            Err(format!("seed {seed}: {violation}\n{}", trace.join("\n")))
        }
    }
}

/// The shortest plan that still fails.
fn shrink(tree: &mut impl ValueTree<Value = Plan>, ram: &Ram) -> Plan {
    let mut shortest = tree.current();
    for _ in 0..3000 {
        if !tree.simplify() {
            break;
        }
        loop {
            let plan = tree.current();
            if world::run(&plan, ram, false).is_err() {
                shortest = plan;
                break;
            }
            if !tree.complicate() {
                return shortest;
            }
        }
    }
    shortest
}

/// The first of some seeds that violates something.
fn first_violation(seeds: std::ops::Range<u64>, modes: &'static [usize], ram: &Ram) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| {
        let plan = plans(modes).new_tree(&mut runner(seed)).unwrap().current();
        world::run(&plan, ram, false).err().map(|(violation, _)| (seed, violation))
    })
}

#[test]
fn no_seed_violates_an_invariant_in_a_durable_mode() {
    let (begin, seeds) = (Instant::now(), seeds());
    let half = |seeds: std::ops::Range<u64>| {
        std::thread::spawn(move || {
            let ram = world::ram();
            let mut completed = 0;
            for seed in seeds {
                completed += try_seed(seed, DURABLE, &ram).unwrap_or_else(|story| panic!("{story}"));
            }
            completed
        })
    };
    let halves = [half(0..seeds / 2), half(seeds / 2..seeds)];
    let completed: u64 = halves.into_iter().map(|half| half.join().unwrap()).sum();
    println!("{seeds} seeds, {completed} requests OK, {:.1} s", begin.elapsed().as_secs_f64());
    let [all, some, judged] =
        [&images::ENUMERATED, &images::SAMPLED, &images::JUDGED].map(|count| count.load(Ordering::Relaxed));
    println!("{judged} whole images: every one at {all} moments, samples at {some}");
    assert!(all > seeds / 2 && some > seeds / 10, "too few moments: {all}, {some}");
    assert!(completed > seeds * 4, "the plans must do something: {completed}");
}

#[test]
fn kept_seeds_stay_good() {
    let ram = world::ram();
    for &seed in KEPT {
        try_seed(seed, DURABLE, &ram).unwrap_or_else(|story| panic!("{story}"));
    }
}

/// The control: where FLUSH is ignored the harness must see it, or it is blind.
#[test]
fn unsafe_is_seen_to_break_its_promise() {
    let ram = world::ram();
    assert_eq!(POLICIES[4].name, "unsafe");
    for invariant in ["I1", "I3"] {
        let found = (0..200).any(|seed| {
            first_violation(seed..seed + 1, UNSAFE, &ram)
                .is_some_and(|(_, story)| story.starts_with(invariant))
        });
        assert!(found, "{invariant} is never violated in unsafe");
    }
}

/// The second opinion is none if it cannot say no.
#[test]
fn whole_images_alone_show_broken_promises_too() {
    let ram = world::ram();
    images::judge_alone(true);
    let first = |modes| {
        (0..MUTANT_SEEDS).find_map(|seed| {
            first_violation(seed..seed + 1, modes, &ram).filter(|(_, story)| story.contains("a whole image"))
        })
    };
    assert!(first(UNSAFE).is_some(), "unsafe is not seen by whole images");
    for mutant in [
        Mutant::SyncBeforeWrite,
        Mutant::GenerationSkip,
        Mutant::ToggleIgnored,
        Mutant::NoFlushIsWriteback,
        Mutant::ZeroesUnsynced,
        Mutant::DirectsyncWithoutSync,
        Mutant::ShortWriteOk,
    ] {
        mutants::turn_on(Some(mutant));
        let found = first(DURABLE);
        mutants::turn_on(None);
        let (seed, story) = found.unwrap_or_else(|| panic!("{mutant:?} is not seen by whole images"));
        println!("{mutant:?} at seed {seed}: {story}");
    }
    images::judge_alone(false);
}

#[test]
fn every_mutant_dies() {
    let ram = world::ram();
    let mut survivors = Vec::new();
    for mutant in Mutant::ALL {
        mutants::turn_on(Some(mutant));
        match first_violation(0..MUTANT_SEEDS, DURABLE, &ram) {
            Some((seed, violation)) => println!("{mutant:?} dies at seed {seed}: {violation}"),
            None => survivors.push(mutant),
        }
        mutants::turn_on(None);
    }
    assert!(survivors.is_empty(), "mutants that {MUTANT_SEEDS} seeds do not find: {survivors:?}");
}
