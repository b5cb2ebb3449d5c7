//! The durability monitor against an exact model, and through the device in all modes.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minivmm::disk::Image;
use minivmm::disk::cache::{Negotiated, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, Op, RequestId, StableBy};
use minivmm::disk::engine::{HostOp, Wake};
use minivmm::disk::monitor::{Monitor, Snapshot, SyncEnd};
use minivmm::disk::op::ZeroedRange;
use minivmm::mem::{AlignedBuffer, Iov};
use minivmm::stats::{ExitStats, Stats};
use minivmm_testkit::driver::*;
use minivmm_testkit::engines::{Fate, Kind, Script, Scripted};
use minivmm_testkit::hands::{Hands, HeldOp};
use minivmm_testkit::images::{TestImage, policies};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;

const BOTH: u64 = F_FLUSH | F_CONFIG_WCE;
const ALL: u64 = BOTH | F_DISCARD | F_WRITE_ZEROES;
const SECTOR: u64 = 512;

/// What one driver or the host does next.
#[derive(Debug, Clone)]
enum Step {
    /// A queue gets a write, zeroes or a discard of some sectors.
    Write {
        queue: usize,
        kind: u8,
        sector: u64,
        sectors: u64,
    },
    Flush {
        queue: usize,
    },
    Writeback(bool),
    /// One of the operations that the host has ends.
    End {
        queue: usize,
        which: usize,
        fate: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..2usize;
    prop_oneof![
        4 => (queue.clone(), 0..5u8, 0..16u64, 1..5u64)
            .prop_map(|(queue, kind, sector, sectors)| Step::Write { queue, kind, sector, sectors }),
        2 => queue.clone().prop_map(|queue| Step::Flush { queue }),
        1 => any::<bool>().prop_map(Step::Writeback),
        6 => (queue, 0..4usize, any::<u8>()).prop_map(|(queue, which, fate)| Step::End { queue, which, fate }),
    ]
}

fn tick(clock: &AtomicU64) -> u64 {
    clock.fetch_add(1, Ordering::SeqCst) + 1
}

/// Two queues of one disk, and the truth sector by sector.
struct Model {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    /// Each with the hands on its engine, in which every operation has the moment when it was handed over.
    queues: Vec<(DiskQueue, Hands)>,
    clock: Arc<AtomicU64>,
    next_id: u64,
    /// Requests that change sectors: first and number.
    requests: HashMap<u64, (u64, u64)>,
    /// When the newest acknowledged change of each sector had ended in the host, if it was not
    /// stable then and is not yet.
    at_risk: BTreeMap<u64, u64>,
    /// The same, with the moment when the state machine had heard of it: a sync that was handed over
    /// between the two covers it, and nobody but the host knows.
    seen_at_risk: BTreeMap<u64, u64>,
    acknowledged: u64,
    failed: bool,
    /// A success was held until other syncs are judged: from then on requests complete later than
    /// the operations that this model goes by.
    held: bool,
}

impl Model {
    fn new(image: Arc<Image>, stable_by: StableBy, room: usize) -> Self {
        let cache = Arc::new(WriteCache::new(image.config().cache));
        cache.negotiate(Negotiated { flush: true, config_wce: true });
        let clock = Arc::<AtomicU64>::default();
        let queue = || {
            let hands = Hands::with_clock(room, Arc::clone(&clock));
            (DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), hands.engine(), stable_by), hands)
        };
        let queues = vec![queue(), queue()];
        Self {
            image,
            cache,
            queues,
            clock,
            next_id: 0,
            requests: HashMap::new(),
            at_risk: BTreeMap::new(),
            seen_at_risk: BTreeMap::new(),
            acknowledged: 0,
            failed: false,
            held: false,
        }
    }

    fn play(&mut self, step: &Step, overwrites: bool) {
        self.next_id += 1;
        let id = self.next_id;
        match *step {
            Step::Write { queue, kind, sector, sectors } => {
                // Room for every request of its own, or all on the same few sectors.
                let sector = if overwrites { sector } else { 4 * id };
                let range = self.image.geometry().check(sector, sectors * SECTOR).unwrap();
                self.requests.insert(id, (sector, sectors));
                let op = match kind {
                    0 => Op::Discard(vec![range]),
                    1 => Op::WriteZeroes(vec![ZeroedRange { range, unmap: true }]),
                    _ => Op::Write(range, memory(range.bytes() as usize)),
                };
                self.queues[queue].0.submit(RequestId(id), op);
            }
            Step::Flush { queue } => self.queues[queue].0.submit(RequestId(id), Op::Flush),
            Step::Writeback(on) => {
                self.cache.guest_sets_writeback(on);
                self.queues[0].0.sync_if_switched_off();
            }
            Step::End { queue, which, fate } => self.end(queue, which, fate),
        }
    }

    fn end(&mut self, queue: usize, which: usize, fate: u8) {
        let (disk, hands) = &mut self.queues[queue];
        let (kind, given, fails) = {
            let held = hands.held();
            if held.operations.is_empty() {
                return;
            }
            let which = which % held.operations.len();
            let HeldOp { op, given, .. } = &held.operations[which];
            let (kind, given) = (Kind::of(op), *given);
            let bytes = match op {
                HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => iov.bytes() as usize,
                _ => 0,
            };
            drop(held);
            let errno = match fate {
                0..16 => Some(libc::EINTR),
                16..20 => Some(libc::EIO),
                _ => None,
            };
            let result = errno.map_or(Ok(bytes), |errno| Err(io::Error::from_raw_os_error(errno)));
            hands.end(which, result);
            (kind, given, errno)
        };
        let ended = tick(&self.clock);
        if fails == Some(libc::EIO) && matches!(kind, Kind::Fdatasync | Kind::WriteDsync) {
            self.failed = true;
        }
        // A sync of the host covers what had ended before it was handed over.
        if kind == Kind::Fdatasync && fails.is_none() {
            self.at_risk.retain(|_, &mut ended| ended > given);
            self.seen_at_risk.retain(|_, &mut seen| seen > given);
        }
        disk.wait(Wake::Now).unwrap();
        let is_sync = matches!(kind, Kind::Fdatasync | Kind::WriteDsync);
        if is_sync && fails.is_none() && self.image.latch.open_now().is_some() {
            self.held = true;
            return;
        }
        let seen = tick(&self.clock);
        for done in disk.take_completions().filter(|done| done.result.is_ok()) {
            let Some(&(sector, sectors)) = self.requests.get(&done.id.0) else { continue };
            let is_stable = matches!(kind, Kind::Fdatasync | Kind::WriteDsync);
            for sector in sector..sector + sectors {
                for (at_risk, since) in [(&mut self.at_risk, ended), (&mut self.seen_at_risk, seen)] {
                    if is_stable {
                        at_risk.remove(&sector)
                    } else {
                        at_risk.insert(sector, since)
                    };
                }
            }
            self.acknowledged += if is_stable { 0 } else { sectors * SECTOR };
        }
        // What had waited for room in the engine goes in.
        disk.wait(Wake::Now).unwrap();
    }
}

fn memory(bytes: usize) -> Iov {
    Iov::from_buffer(&Arc::new(AlignedBuffer::new(bytes, 4096).unwrap()), bytes)
}

#[test]
fn the_count_is_never_below_the_truth_and_equal_to_it_without_overwrites_and_failures() {
    let image = TestImage::new(1 << 20);
    let policies = policies();
    let strategy = (
        0..policies.len(),
        any::<bool>(),
        1..5usize,
        any::<bool>(),
        proptest::collection::vec(step(), 1..120),
    );
    // (of all moments: at risk more than nothing, exactly the truth, above it)
    let seen = std::cell::Cell::new((0, 0, 0));
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    let result = runner.run(&strategy, |(mode, dsync, room, overwrites, steps)| {
        let stable_by = if dsync { StableBy::Dsync } else { StableBy::Fdatasync };
        let mut model = Model::new(image.open(policies[mode].name), stable_by, room);
        for step in &steps {
            model.play(step, overwrites);
            if model.held {
                break;
            }
            let found = model.image.monitor.snapshot();
            let truth = model.at_risk.len() as u64 * SECTOR;
            prop_assert!(found.at_risk_bytes >= truth, "{} below the truth of {truth}", found.at_risk_bytes);
            if !overwrites && !model.failed {
                prop_assert_eq!(found.at_risk_bytes, model.seen_at_risk.len() as u64 * SECTOR);
            }
            prop_assert_eq!(found.acknowledged_bytes, model.acknowledged);
            prop_assert!(found.at_risk_bytes <= found.at_risk_bytes_max);
            prop_assert_eq!(found.oldest.is_some(), found.at_risk_bytes > 0);
            let (some, equal, above) = seen.get();
            let is = |what: bool| usize::from(what);
            let at_risk = found.at_risk_bytes;
            seen.set((some + is(truth > 0), equal + is(at_risk == truth), above + is(at_risk > truth)));
        }
        Ok(())
    });
    result.unwrap();
    let (some, equal, above) = seen.get();
    assert!(some > 1000 && equal > 1000 && above > 100, "{some} {equal} {above}: too tame");
}

#[test]
fn threads_that_report_at_once_lose_nothing() {
    let monitor = Monitor::default();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..20_000 {
                    monitor.acknowledges(SECTOR);
                    if round % 50 == 0 {
                        let start = monitor.sync_starts();
                        monitor.acknowledges(SECTOR);
                        monitor.sync_ends(start, SyncEnd::Stable);
                    }
                }
            });
        }
    });
    let found = monitor.snapshot();
    assert_eq!(found.acknowledged_bytes, 4 * (20_000 + 400) * SECTOR);
    assert_eq!(found.syncs.unwrap().count, 1600);
    let start = monitor.sync_starts();
    monitor.sync_ends(start, SyncEnd::Stable);
    assert_eq!(monitor.snapshot().at_risk_bytes, 0);
}

fn rig(mode: &str, features: u64, stable_by: StableBy, script: Script) -> (TestImage, Rig) {
    let image = TestImage::new(1 << 20);
    let opened = image.open(mode);
    let (engine, _log) = Scripted::with_log(&opened, script);
    let mut rig = Rig::with_engine(opened, engine, stable_by);
    rig.start(features);
    (image, rig)
}

fn real() -> Script {
    Box::new(|_, _| Fate::Real)
}

fn found(rig: &Rig) -> Snapshot {
    rig.image.monitor.snapshot()
}

#[test]
fn each_mode_puts_at_risk_what_it_says() {
    for policy in policies() {
        for stable_by in [StableBy::Dsync, StableBy::Fdatasync] {
            let (_image, mut rig) = rig(policy.name, ALL, stable_by, real());
            let volatile = policy.write_cache || !policy.honour_flush;
            let mut sum = 0;
            for round in 0..3 {
                assert_eq!(rig.write_sectors(8, &[1; 8192]), OK);
                assert_eq!(rig.read_sectors(8, 8192).0, OK);
                assert_eq!(rig.erase(WRITE_ZEROES, &[(64, 8, 0), (80, 8, 1)]), OK);
                assert_eq!(rig.erase(DISCARD, &[(96, 8, 0)]), OK);
                sum += if volatile { 8192 + 3 * 4096 } else { 0 };
                let what = format!("{} by {stable_by:?}, round {round}", policy.name);
                assert_eq!(found(&rig).at_risk_bytes, sum, "{what}");
                assert_eq!(rig.flush(), OK);
                sum = if policy.honour_flush { 0 } else { sum };
                assert_eq!(found(&rig).at_risk_bytes, sum, "after a FLUSH in {what}");
            }
            let image = Arc::clone(&rig.image);
            drop(rig);
            image.close().unwrap();
            let at_end = image.monitor.snapshot();
            assert_eq!((at_end.at_risk_bytes, at_end.at_risk_bytes_at_end), (sum, Some(sum)));
            let most = if volatile { sum.max(8192 + 3 * 4096) } else { 0 };
            assert_eq!(at_end.at_risk_bytes_max, most, "{}", policy.name);
            let text = Stats::of([&*image].into_iter(), ExitStats::default()).to_string();
            assert_eq!(
                text.contains("this only grows (3 FLUSHes were ignored)"),
                !policy.honour_flush,
                "{text}"
            );
        }
    }
}

#[test]
fn the_last_sync_saves_what_was_never_flushed() {
    for mode in ["none", "writeback"] {
        let (_image, mut rig) = rig(mode, BOTH, StableBy::Dsync, real());
        assert_eq!(rig.write_sectors(8, &[1; 4096]), OK);
        let image = Arc::clone(&rig.image);
        drop(rig);
        assert_eq!(image.monitor.snapshot().at_risk_bytes, 4096, "{mode}: a drain is no sync");
        image.close().unwrap();
        let found = image.monitor.snapshot();
        assert_eq!((found.at_risk_bytes, found.at_risk_bytes_at_end), (0, Some(4096)), "{mode}");
    }
}

#[test]
fn a_write_that_fails_or_was_not_begun_is_not_at_risk() {
    let script = |kind, nth| match (kind, nth) {
        (Kind::Write, 0) => Fate::Fails(libc::ENOSPC),
        (Kind::Write, 1) => Fate::Short(512),
        (Kind::Write, 2) => Fate::Fails(libc::EIO),
        _ => Fate::Real,
    };
    let (_image, mut rig) = rig("writeback", BOTH, StableBy::Dsync, Box::new(script));
    assert_eq!(rig.write_sectors(8, &[1; 4096]), IOERR);
    assert_eq!(rig.write_sectors(8, &[1; 4096]), IOERR, "after its first sector");
    assert_eq!(rig.write_sectors(1 << 20, &[1; 512]), IOERR, "behind the end");
    assert_eq!(found(&rig).acknowledged_bytes, 0);
}

#[test]
fn turning_the_write_cache_off_saves_what_was_written_with_it() {
    for mode in ["none", "writeback"] {
        let (_image, mut rig) = rig(mode, BOTH, StableBy::Dsync, real());
        assert_eq!(rig.write_sectors(8, &[1; 4096]), OK);
        assert_eq!(found(&rig).at_risk_bytes, 4096);
        rig.set_writeback(0);
        // The sync of the change may go on for a while after this.
        assert_eq!(rig.write_sectors(16, &[2; 4096]), OK);
        for _ in 0..1000 {
            if found(&rig).at_risk_bytes == 0 {
                break;
            }
            assert_eq!(rig.read_sectors(16, 512).0, OK);
        }
        assert_eq!(found(&rig).at_risk_bytes, 0, "{mode}");
        rig.set_writeback(1);
        assert_eq!(rig.write_sectors(8, &[3; 4096]), OK);
        assert_eq!(found(&rig).at_risk_bytes, 4096, "{mode}");
    }
}

#[test]
fn a_driver_that_cannot_flush_puts_nothing_at_risk() {
    for policy in policies().into_iter().filter(|policy| policy.honour_flush) {
        let (_image, mut rig) = rig(policy.name, 0, StableBy::Dsync, real());
        assert_eq!(rig.write_sectors(8, &[1; 4096]), OK);
        assert_eq!(found(&rig).acknowledged_bytes, 0, "{}", policy.name);
    }
}

#[test]
fn after_a_failed_sync_what_is_at_risk_stays_and_is_said_to_be_lost_perhaps() {
    for mode in ["none", "writeback"] {
        let script = |kind, nth| match (kind, nth) {
            (Kind::Fdatasync, 1) => Fate::Fails(libc::EIO),
            _ => Fate::Real,
        };
        let (_image, mut rig) = rig(mode, BOTH, StableBy::Dsync, Box::new(script));
        assert_eq!(rig.write_sectors(0, &[1; 4096]), OK);
        assert_eq!(rig.flush(), OK);
        assert_eq!(rig.write_sectors(8, &[1; 4096]), OK);
        assert_eq!(rig.flush(), IOERR);
        assert_eq!(rig.write_sectors(16, &[1; 4096]), OK, "promises nothing");
        assert_eq!(rig.flush(), IOERR);
        let image = Arc::clone(&rig.image);
        drop(rig);
        image.close().unwrap_err();
        let found = image.monitor.snapshot();
        assert_eq!((found.at_risk_bytes, found.sync_failed), (8192, true), "{mode}");
        assert!(found.oldest.is_some());
        let text = Stats::of([&*image].into_iter(), ExitStats::default()).to_string();
        assert!(text.contains("the 8 KiB may be lost"), "{text}");
    }
}

#[test]
fn the_json_tells_what_was_at_risk() {
    let (_test, mut rig) = rig("none", ALL, StableBy::Dsync, real());
    assert_eq!(rig.write_sectors(8, &[1; 4096]), OK);
    assert_eq!(rig.flush(), OK);
    let mut json = Vec::new();
    Stats::of([&*rig.image].into_iter(), ExitStats::default()).write_json(&mut json).unwrap();
    let found: Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(found["schema"], "minivmm-statistics");
    assert_eq!(found["version"], 1);
    let durability = &found["disks"][0]["durability"];
    assert_eq!(durability["volatile_bytes_acknowledged"], 4096);
    assert_eq!(durability["bytes_at_risk"], 0);
    assert_eq!(durability["bytes_at_risk_max"], 4096);
    assert_eq!(durability["fdatasync_ns"]["count"], 1);
    assert_eq!(found["disks"][0]["host_calls"]["fdatasync"], 2, "the one at the start too");
}
