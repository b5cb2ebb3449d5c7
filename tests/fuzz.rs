//! The harnesses of the fuzz targets (`docs/fuzzing.md`): every input that was kept is replayed, and as
//! many are made by chance as some seconds allow, always the same ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may")]
#![allow(clippy::cast_possible_truncation, reason = "tests may")]

#[path = "../fuzz/harness/mod.rs"]
mod harness;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// What is logged is counted, so one input runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn run(name: &str, what: &str, data: &[u8]) {
    let (_, target) = harness::TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    if catch_unwind(AssertUnwindSafe(|| target(data))).is_err() {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        std::fs::write(&kept, data).unwrap();
        panic!("target {name}: a property does not hold for {what}, which is in {}", kept.display());
    }
}

fn replay(name: &str) -> usize {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in &paths {
        run(name, &path.display().to_string(), &std::fs::read(path).unwrap());
    }
    paths.len()
}

/// xorshift64*: the same bytes in every run.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Short ones more often than long ones; and of some most bytes are small, which are the choices
    /// that lead somewhere.
    fn input(&mut self) -> Vec<u8> {
        let len = usize::try_from(self.next() % (1 << (4 + self.next() % 8))).unwrap();
        (0..len).map(|_| self.next().to_le_bytes()[7]).collect()
    }
}

/// MINIVMM_FUZZ_RUNS multiplies the runs of each target.
fn by_chance(name: &str, runs: u64) {
    let times = std::env::var("MINIVMM_FUZZ_RUNS").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    for seed in 1..=runs * times {
        let data = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).input();
        run(name, &format!("what seed {seed} makes"), &data);
    }
}

fn check(name: &str, runs: u64) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = replay(name);
    by_chance(name, runs);
    println!("{name}: {kept} inputs that were kept, {runs} by chance");
}

/// Shows Q4 and R9.
#[test]
fn a_disk_over_mmio_keeps_its_promises_whatever_a_guest_does() {
    check("mmio", 400);
}

/// Shows Q4 and R9.
#[test]
fn a_disk_over_pci_keeps_its_promises_whatever_a_guest_does() {
    check("pci", 400);
}

#[test]
fn two_walks_over_any_chain_find_the_same() {
    check("chain", 4000);
}

#[test]
fn a_console_keeps_its_promises_whatever_a_guest_does() {
    check("console", 400);
}

#[test]
fn a_kernel_is_loaded_where_it_may_lie_or_refused() {
    check("kernel", 400);
}

#[test]
fn a_disks_options_keep_to_their_limits_or_are_refused() {
    check("options", 4000);
}

#[test]
fn a_front_ends_messages_are_handled_or_end_its_connection() {
    check("messages", 1000);
}

#[test]
fn a_write_log_is_read_or_refused() {
    check("writelog", 2000);
}

#[test]
fn every_target_has_a_file_and_a_corpus() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for (name, _) in harness::TARGETS {
        let target = std::fs::read_to_string(root.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(target.contains(&format!("harness::run(\"{name}\"")), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        assert!(root.join("corpus").join(name).is_dir(), "{name}");
    }
}
