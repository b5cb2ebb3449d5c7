//! Instructions and allocations of our own code for one request, the first counted by callgrind: the
//! figures of performance that a busy machine cannot change, and so the only ones that a test compares.
//!
//! Owns the load (the worker's turns over an engine that does nothing) and the comparison with
//! `benches/instructions.json`. The kernel's share is not in it; `cargo bench` has that.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

#[path = "../benches/common/random.rs"]
mod random;
#[path = "../benches/device/rings.rs"]
#[allow(dead_code, reason = "the benchmark's driver needs more of it")]
mod rings;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minivmm::blk::worker::{Job, QueueWorker};
use minivmm::disk::cache::{Negotiated, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, StableBy};
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::disk::geometry::{Alignment, Geometry};
use minivmm::disk::{DiskConfig, Image};
use minivmm::ratelimit::RateLimit;
use minivmm::virtio::Interrupt;
use minivmm::virtio::queue::Ring;
use minivmm_testkit::skips::skip;
use random::Random;
use rings::{FEATURES, Kind, QUEUE_SIZE, Rings};
use vmm_sys_util::eventfd::EventFd;

/// What is measured: its name in the file, the direction, requests a turn, whether latencies are measured
/// as with `--stats`.
const LOADS: [(&str, Kind, u16, bool); 8] = [
    ("read-4k-d1", Kind::Read, 1, false),
    ("read-4k-d32", Kind::Read, 32, false),
    ("write-4k-d1", Kind::Write, 1, false),
    ("write-4k-d32", Kind::Write, 32, false),
    ("read-4k-d1-stats", Kind::Read, 1, true),
    ("read-4k-d32-stats", Kind::Read, 32, true),
    ("write-4k-d1-stats", Kind::Write, 1, true),
    ("write-4k-d32-stats", Kind::Write, 32, true),
];
const BLOCK_BYTES: u32 = 4096;
const IMAGE_BLOCKS: u64 = 1 << 18;
/// Enough that the maps' growth is over and a rare long path weighs little.
const REQUESTS: u32 = 6400;
/// More than this over the kept figure fails; as much below asks for a new figure.
const BOUND: f64 = 1.25;
const LOAD_VARIABLE: &str = "MINIVMM_INSTRUCTIONS_OF";
const UPDATE_VARIABLE: &str = "MINIVMM_UPDATE_INSTRUCTIONS";
const ALLOCATED: &str = "allocations: ";
const HOW_TO_UPDATE: &str = "MINIVMM_UPDATE_INSTRUCTIONS=1 cargo test --release --locked --test instructions";

/// Counts what is allocated on any thread; the load's process has only one that does.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// An engine whose operations end at once and whole.
#[derive(Default)]
struct Null {
    queued: Vec<(OpToken, usize)>,
}

impl Engine for Null {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let bytes = match &op {
            HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => iov.bytes() as usize,
            _ => 0,
        };
        self.queued.push((token, bytes));
        Ok(())
    }

    fn wait(&mut self, _wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        ended.extend(self.queued.drain(..).map(|(token, bytes)| Ended { token, result: Ok(bytes) }));
        Ok(())
    }
}

struct Silent;

impl Interrupt for Silent {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {
        panic!("the device asks for a reset");
    }
}

/// The only function whose instructions are counted, with all that it calls.
#[inline(never)]
#[unsafe(no_mangle)]
fn minivmm_counted_turn(worker: &mut QueueWorker<'_>) {
    worker.turn().unwrap();
}

/// Runs a load; the allocations within the counted turns, those of the first eighth left out.
fn run_load(kind: Kind, depth: u16, timed: bool) -> u64 {
    let options = DiskConfig { timed, ..DiskConfig::new("simulated") };
    let alignment = Alignment { memory: 512, offset: 512, found_by: "the test" };
    let geometry =
        Geometry { capacity_sectors: IMAGE_BLOCKS * 8, logical_block: 512, physical_block: 4096, alignment };
    let image = Arc::new(Image::simulated(&options, geometry).unwrap());
    let cache = Arc::new(WriteCache::new(image.config().cache));
    cache.negotiate(Negotiated { flush: true, config_wce: true });
    let mut disk = DiskQueue::new(image, cache, Box::new(Null::default()), StableBy::Dsync);
    let mut rings = Rings::new(depth, BLOCK_BYTES, BLOCK_BYTES).unwrap();
    let ring = Ring::new(rings.ram(), &rings.config(), QUEUE_SIZE, FEATURES).unwrap();
    let doorbell = Arc::new(EventFd::new(0).unwrap());
    let ram = rings.ram().clone();
    let job =
        Job { ram, features: FEATURES, index: 0, ring, doorbell, kick: None, interrupt: Arc::new(Silent) };
    let mut errors = RateLimit::for_guest_errors("blk");
    let mut worker = QueueWorker::new(job, &mut disk, &mut errors);
    let mut random = Random::new(1);
    let turns = REQUESTS / u32::from(depth);
    let mut allocations = 0;
    for turn in 0..turns {
        for slot in 0..depth {
            rings.submit(slot, kind, random.below(IMAGE_BLOCKS) * u64::from(BLOCK_BYTES));
        }
        rings.ask_for_interrupt();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        minivmm_counted_turn(&mut worker);
        if turn >= turns / 8 {
            allocations += ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
        for _ in 0..depth {
            rings.reap().unwrap().unwrap();
        }
        assert!(!rings.has_used());
    }
    allocations
}

/// What valgrind runs; nothing without its variable.
#[test]
fn a_load_for_callgrind() {
    let Ok(name) = std::env::var(LOAD_VARIABLE) else { return };
    let &(_, kind, depth, timed) = LOADS.iter().find(|load| load.0 == name).unwrap();
    println!("{ALLOCATED}{}", run_load(kind, depth, timed));
}

/// What a request of one load takes.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
struct Cost {
    instructions: u64,
    /// To two digits.
    allocations: f64,
}

/// Runs a load under callgrind.
fn measure(name: &str, out: &Path) -> Cost {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=minivmm_counted_turn"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_load_for_callgrind", "--test-threads=1", "--nocapture"])
        .env(LOAD_VARIABLE, name)
        .output()
        .unwrap_or_else(|error| {
            panic!("valgrind cannot be started ({error}): `make test-deps` installs it (Debian's package valgrind)")
        });
    let words =
        [output.stderr, output.stdout].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{words}");
    let after = |label: &str| -> f64 {
        let found = words.lines().find_map(|line| line.split_once(label)).map(|(_, number)| number);
        found.unwrap_or_else(|| panic!("no '{label}' in: {words}")).trim().parse().unwrap()
    };
    let instructions = after("Collected : ");
    assert!(instructions > 0.0, "callgrind has not found minivmm_counted_turn: {words}");
    let requests = f64::from(REQUESTS);
    let allocations = (after(ALLOCATED) / (requests * 7.0 / 8.0) * 100.0).round() / 100.0;
    Cost { instructions: (instructions / requests).round() as u64, allocations }
}

fn kept_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.json")
}

#[test]
fn a_request_takes_no_more_instructions_than_it_did() {
    if cfg!(debug_assertions) {
        skip("release", "a debug build's instructions say nothing; `make test` builds with --release");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let now: BTreeMap<String, Cost> =
        LOADS.iter().map(|(name, ..)| ((*name).to_owned(), measure(name, &dir.path().join(name)))).collect();
    println!("a request takes: {now:#?}");
    if std::env::var_os(UPDATE_VARIABLE).is_some() {
        std::fs::write(kept_file(), serde_json::to_string_pretty(&now).unwrap() + "\n").unwrap();
        return;
    }
    let kept: BTreeMap<String, Cost> =
        serde_json::from_str(&std::fs::read_to_string(kept_file()).unwrap()).unwrap();
    let wrong: Vec<String> =
        now.iter().filter_map(|(name, cost)| complaint(name, *cost, kept.get(name))).collect();
    assert!(
        wrong.is_empty(),
        "{}\nIf the change is meant, keep the new figures in benches/instructions.json:\n  {HOW_TO_UPDATE}",
        wrong.join("\n")
    );
}

/// What is wrong with a cost, compared with the one that is kept.
fn complaint(name: &str, now: Cost, kept: Option<&Cost>) -> Option<String> {
    let Some(kept) = kept else { return Some(format!("{name}: nothing is kept of it")) };
    let ratio = now.instructions as f64 / kept.instructions as f64;
    let (n, was) = (now.instructions, kept.instructions);
    if now.allocations > kept.allocations + 0.05 {
        Some(format!("{name}: {} allocations a request, {} are kept", now.allocations, kept.allocations))
    } else if ratio > BOUND {
        Some(format!("{name}: {n} instructions a request, {ratio:.2} times the {was} that are kept"))
    } else if ratio < 1.0 / BOUND {
        Some(format!(
            "{name}: {n} instructions a request instead of {was}: so much better that it must be kept"
        ))
    } else {
        None
    }
}

#[test]
fn more_instructions_or_allocations_are_noticed_and_noise_is_not() {
    let kept = Cost { instructions: 1000, allocations: 0.5 };
    for (instructions, allocations, complains) in [
        (1000, 0.5, false),
        (1240, 0.5, false),
        (810, 0.0, false),
        (1260, 0.5, true),
        (790, 0.5, true),
        (1000, 1.0, true),
    ] {
        let now = Cost { instructions, allocations };
        assert_eq!(complaint("load", now, Some(&kept)).is_some(), complains, "{now:?}");
    }
    assert!(complaint("load", kept, None).is_some());
}
