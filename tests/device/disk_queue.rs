//! The disk's state machine with the engine in the test's own hands: operations end when and how the
//! test says, in any order, on one queue or two. What is promised may rest on nothing else.

use std::io;
use std::sync::{Arc, Mutex};

use minivmm::disk::Image;
use minivmm::disk::cache::{Negotiated, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, Op, RequestId, StableBy};
use minivmm::disk::engine::{Ended, HostOp, OpToken, Wake};
use minivmm::disk::geometry::SectorRange;
use minivmm::disk::op::ZeroedRange;
use minivmm::mem::{AlignedBuffer, Iov};
use minivmm_testkit::engines::Kind;
use minivmm_testkit::hands::Hands;
use minivmm_testkit::images::{TestImage, policies};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BLOCK: u32 = 4096;

/// One queue: its state machine and the hands on its engine.
struct Queue {
    disk: DiskQueue,
    hands: Hands,
}

impl Queue {
    fn new(image: &Arc<Image>, cache: &Arc<WriteCache>, stable_by: StableBy) -> Self {
        let hands = Hands::new(64);
        let engine = hands.engine();
        Self { disk: DiskQueue::new(Arc::clone(image), Arc::clone(cache), engine, stable_by), hands }
    }

    fn range(&self, sector: u64, bytes: u64) -> SectorRange {
        self.disk.image().geometry().check(sector, bytes).unwrap()
    }

    fn write(&mut self, id: u64, bytes: u32) {
        let op = Op::Write(self.range(8, u64::from(bytes)), memory(bytes));
        self.disk.submit(RequestId(id), op);
    }

    fn read(&mut self, id: u64, bytes: u32) {
        let op = Op::Read(self.range(8, u64::from(bytes)), memory(bytes));
        self.disk.submit(RequestId(id), op);
    }

    fn zero(&mut self, id: u64) {
        let zeroed = ZeroedRange { range: self.range(8, u64::from(BLOCK)), unmap: false };
        self.disk.submit(RequestId(id), Op::WriteZeroes(vec![zeroed]));
    }

    /// What the engine has, once the batch is known.
    fn kinds(&mut self) -> Vec<Kind> {
        self.disk.wait(Wake::Now).unwrap();
        self.hands.held().operations.iter().map(|held| Kind::of(&held.op)).collect()
    }

    /// Offset and length of the oldest transfer.
    fn transfer(&self) -> (u64, u64) {
        match &self.hands.held().operations[0].op {
            HostOp::Readv { iov, offset } | HostOp::Writev { iov, offset, .. } => (*offset, iov.bytes()),
            other => panic!("{other:?} is no transfer"),
        }
    }

    /// The oldest operation ends so.
    fn end(&mut self, result: io::Result<usize>) {
        self.disk.wait(Wake::Now).unwrap();
        self.hands.end(0, result);
        self.disk.wait(Wake::Now).unwrap();
    }

    /// What has completed since: identity, and whether it is OK.
    fn completed(&mut self) -> Vec<(u64, bool)> {
        self.disk.take_completions().map(|done| (done.id.0, done.result.is_ok())).collect()
    }
}

fn memory(bytes: u32) -> Iov {
    let buffer = AlignedBuffer::new(bytes as usize, 4096).unwrap();
    Iov::from_buffer(&Arc::new(buffer), bytes as usize)
}

fn error(errno: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(errno))
}

/// An image and its write cache with FLUSH and CONFIG_WCE negotiated.
fn disk(mode: &str) -> (TestImage, Arc<Image>, Arc<WriteCache>) {
    let test = TestImage::new(1 << 20);
    let image = test.open(mode);
    let cache = Arc::new(WriteCache::new(image.config().cache));
    cache.negotiate(Negotiated { flush: true, config_wce: true });
    (test, image, cache)
}

/// Shows B6.
#[test]
fn a_write_across_a_change_of_writeback_gets_the_stricter_side() {
    for policy in policies() {
        for (before, after) in [(true, true), (true, false), (false, true), (false, false)] {
            for zeroes in [false, true] {
                let (_test, image, cache) = disk(policy.name);
                let mut queue = Queue::new(&image, &cache, StableBy::Fdatasync);
                cache.guest_sets_writeback(before);
                if zeroes {
                    queue.zero(1)
                } else {
                    queue.write(1, BLOCK)
                }
                cache.guest_sets_writeback(after);
                queue.end(Ok(BLOCK as usize));
                let what = format!("{} {before} to {after}, zeroes {zeroes}", policy.name);
                if policy.honour_flush && !(before && after) {
                    assert_eq!(queue.completed(), [], "{what}");
                    assert_eq!(queue.kinds(), [Kind::Fdatasync], "{what}");
                    queue.end(Ok(0));
                }
                assert_eq!(queue.completed(), [(1, true)], "{what}");
                assert!(queue.disk.is_idle());
            }
        }
    }
}

/// Shows E7.
#[test]
fn when_a_sync_fails_on_one_queue_no_promise_of_another_is_kept() {
    type Start = fn(&mut Queue);
    // What is in flight on the other queue, how it is made stable, and how many ends it takes.
    let others: [(&str, Start, StableBy, usize); 5] = [
        ("a FLUSH", |queue| queue.disk.submit(RequestId(1), Op::Flush), StableBy::Dsync, 1),
        ("a DSYNC write", |queue| queue.write(1, BLOCK), StableBy::Dsync, 1),
        ("a write to be synced", |queue| queue.write(1, BLOCK), StableBy::Fdatasync, 1),
        ("zeroes", |queue| queue.zero(1), StableBy::Dsync, 1),
        (
            "a write's own sync",
            |queue| {
                queue.write(1, BLOCK);
                queue.end(Ok(BLOCK as usize));
            },
            StableBy::Fdatasync,
            1,
        ),
    ];
    for policy in policies().into_iter().filter(|policy| policy.honour_flush) {
        for (what, start, stable_by, ends) in others {
            let (_test, image, cache) = disk(policy.name);
            cache.guest_sets_writeback(false);
            let mut failing = Queue::new(&image, &cache, stable_by);
            let mut other = Queue::new(&image, &cache, stable_by);
            start(&mut other);
            other.kinds();
            failing.disk.submit(RequestId(9), Op::Flush);
            failing.end(error(libc::EIO));
            assert_eq!(failing.completed(), [(9, false)]);
            for _ in 0..ends {
                let is_sync = other.kinds() == [Kind::Fdatasync];
                other.end(Ok(if is_sync { 0 } else { BLOCK as usize }));
            }
            assert_eq!(other.completed(), [(1, false)], "{what} in {}", policy.name);
            assert_eq!(other.kinds(), [], "{what}: nothing is tried again");
        }
    }
}

/// Shows E2.
#[test]
fn after_a_failed_sync_nothing_that_must_be_stable_is_even_begun() {
    let (_test, image, cache) = disk("none");
    cache.guest_sets_writeback(false);
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    queue.disk.submit(RequestId(0), Op::Flush);
    queue.end(error(libc::ENOSPC));
    queue.write(1, BLOCK);
    queue.zero(2);
    let range = queue.range(8, u64::from(BLOCK));
    queue.disk.submit(RequestId(3), Op::Discard(vec![range]));
    queue.disk.submit(RequestId(4), Op::Flush);
    assert_eq!(queue.completed(), [(0, false), (1, false), (2, false), (3, false), (4, false)]);
    assert_eq!(queue.kinds(), []);
    // What promises nothing still goes on, and so do reads.
    cache.guest_sets_writeback(true);
    queue.write(5, BLOCK);
    queue.read(6, BLOCK);
    queue.end(Ok(BLOCK as usize));
    queue.end(Ok(BLOCK as usize));
    assert_eq!(queue.completed(), [(5, true), (6, true)]);
}

#[test]
fn a_short_transfer_goes_on_from_the_last_whole_block() {
    for write in [false, true] {
        let (_test, image, cache) = disk("none");
        let step = u64::from(image.geometry().alignment.offset);
        let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
        if write {
            queue.write(1, 4 * BLOCK)
        } else {
            queue.read(1, 4 * BLOCK)
        }
        let all = u64::from(4 * BLOCK);
        assert_eq!(queue.transfer(), (4096, all));
        // (what the host says was moved, how far it is then)
        for (moved, done) in [(step + 188, step), (step, 2 * step), (2 * step - 1, 3 * step)] {
            queue.end(Ok(moved as usize));
            assert_eq!(queue.transfer(), (4096 + done, all - done), "write {write}, {moved} bytes");
            assert_eq!(queue.completed(), []);
        }
        queue.end(Ok((all - 3 * step) as usize));
        assert_eq!(queue.completed(), [(1, true)], "write {write}");
        for (nothing, id) in [(0, 2), (step - 1, 3), (all + 1, 4)] {
            if write {
                queue.write(id, 4 * BLOCK)
            } else {
                queue.read(id, 4 * BLOCK)
            }
            queue.end(Ok(nothing as usize));
            assert_eq!(queue.completed(), [(id, false)], "write {write}, {nothing} bytes");
        }
    }
}

#[test]
fn an_engine_that_is_full_gets_the_rest_later() {
    for room in [1, 2, 5] {
        let (_test, image, cache) = disk("none");
        let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
        queue.hands.held().room = room;
        for id in 0..20 {
            queue.write(id, BLOCK);
            queue.disk.submit(RequestId(100 + id), Op::Flush);
        }
        let mut completed = Vec::new();
        let mut executed = Vec::new();
        while !queue.disk.is_idle() {
            let kinds = queue.kinds();
            assert!(kinds.len() <= room);
            executed.push(kinds[0]);
            let is_sync = kinds[0] == Kind::Fdatasync;
            queue.end(Ok(if is_sync { 0 } else { BLOCK as usize }));
            // What had to wait goes in at the next wait.
            queue.disk.wait(Wake::Now).unwrap();
            completed.extend(queue.completed());
        }
        let writes = executed.iter().filter(|&&kind| kind == Kind::Write).count();
        let syncs = executed.len() - writes;
        assert_eq!(writes, 20, "room for {room}");
        assert!((1..=20).contains(&syncs), "room for {room}: FLUSHes share {syncs} fdatasyncs");
        // Requests may complete in any order (virtio 5.2.2).
        completed.sort_unstable();
        let mut expected: Vec<_> = (0..20).flat_map(|id| [(id, true), (100 + id, true)]).collect();
        expected.sort_unstable();
        assert_eq!(completed, expected, "room for {room}");
    }
}

#[test]
fn an_engine_that_ends_what_it_was_never_given_is_not_trusted_again() {
    let (_test, image, cache) = disk("none");
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    queue.hands.held().ended.push(Ended { token: OpToken(77), result: Ok(0) });
    queue.disk.wait(Wake::Now).unwrap();
    queue.disk.submit(RequestId(1), Op::Flush);
    assert_eq!(queue.completed(), [(1, false)]);
}

/// Shows B6.
#[test]
fn the_sync_at_a_change_to_writethrough_is_waited_for_and_its_failure_latches() {
    let (_test, image, cache) = disk("none");
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    cache.guest_sets_writeback(false);
    queue.disk.sync_if_switched_off();
    queue.disk.sync_if_switched_off();
    assert_eq!(queue.kinds(), [Kind::Fdatasync], "once");
    assert!(!queue.disk.is_idle(), "a drain waits for it");
    queue.end(error(libc::EIO));
    assert!(queue.disk.is_idle());
    assert_eq!(queue.completed(), [], "nobody asked for it");
    queue.disk.submit(RequestId(1), Op::Flush);
    assert_eq!(queue.completed(), [(1, false)]);
}

#[test]
fn short_zeroes_go_on_from_the_last_whole_block() {
    let (_test, image, cache) = disk("none");
    let step = u64::from(image.geometry().alignment.offset);
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    let range = queue.range(8, u64::from(4 * BLOCK));
    queue.disk.submit(RequestId(1), Op::WriteZeroes(vec![ZeroedRange { range, unmap: true }]));
    for expected in [Kind::Punch, Kind::Zero] {
        assert_eq!(queue.kinds(), [expected]);
        queue.end(error(libc::EOPNOTSUPP));
    }
    queue.end(Ok((step + 188) as usize));
    assert_eq!(queue.transfer(), (4096 + step, u64::from(4 * BLOCK) - step));
    queue.end(Ok((step - 1) as usize));
    assert_eq!(queue.completed(), [(1, false)], "less than a block is no progress");
}

/// Shows H2.
#[test]
fn writes_in_flight_share_one_sync_that_starts_after_all_of_them_ended() {
    for (stable_by, lone) in [(StableBy::Group, Kind::Write), (StableBy::Auto, Kind::WriteDsync)] {
        let (_test, image, cache) = disk("directsync");
        let mut queue = Queue::new(&image, &cache, stable_by);
        cache.guest_sets_writeback(false);
        for id in 0..4 {
            queue.write(id, BLOCK);
        }
        assert_eq!(queue.kinds(), [Kind::Write; 4]);
        for left in (0..4).rev() {
            assert_eq!(queue.completed(), [], "{stable_by:?}");
            queue.end(Ok(BLOCK as usize));
            let expected = if left == 0 { vec![Kind::Fdatasync] } else { vec![Kind::Write; left] };
            assert_eq!(queue.kinds(), expected, "{stable_by:?}");
        }
        queue.write(9, BLOCK);
        queue.disk.submit(RequestId(10), Op::Flush);
        assert_eq!(queue.kinds(), [Kind::Fdatasync, Kind::Write], "one sync at a time");
        queue.end(Ok(0));
        assert_eq!(queue.completed(), (0..4).map(|id| (id, true)).collect::<Vec<_>>());
        // The FLUSH does not wait for the write, nor the write's sync for that of the FLUSH.
        assert_eq!(queue.kinds(), [Kind::Write, Kind::Fdatasync]);
        queue.end(Ok(BLOCK as usize));
        assert_eq!(queue.completed(), [], "the running sync started before the write ended");
        queue.end(Ok(0));
        assert_eq!(queue.completed(), [(10, true)]);
        queue.end(Ok(0));
        assert_eq!(queue.completed(), [(9, true)]);
        queue.write(11, BLOCK);
        assert_eq!(queue.kinds(), [lone], "{stable_by:?}: alone");
    }
}

#[test]
fn a_failed_shared_sync_fails_all_who_share_it() {
    let (_test, image, cache) = disk("directsync");
    let mut queue = Queue::new(&image, &cache, StableBy::Group);
    for id in 0..3 {
        queue.write(id, BLOCK);
    }
    queue.disk.submit(RequestId(3), Op::Flush);
    // The FLUSH goes at once; the writes have the next one.
    assert_eq!(queue.kinds(), [Kind::Write, Kind::Write, Kind::Write, Kind::Fdatasync]);
    for _ in 0..3 {
        queue.end(Ok(BLOCK as usize));
    }
    queue.end(Ok(0));
    assert_eq!(queue.completed(), [(3, true)]);
    queue.end(error(libc::EIO));
    assert_eq!(queue.completed(), [(0, false), (1, false), (2, false)]);
    queue.disk.submit(RequestId(4), Op::Flush);
    queue.write(5, BLOCK);
    assert_eq!(queue.kinds(), [], "nothing is tried again");
    assert_eq!(queue.completed(), [(4, false), (5, false)]);
}

#[test]
fn a_write_that_fails_keeps_the_others_waiting_no_longer() {
    let (_test, image, cache) = disk("directsync");
    let mut queue = Queue::new(&image, &cache, StableBy::Group);
    queue.write(0, BLOCK);
    queue.write(1, BLOCK);
    queue.end(Ok(BLOCK as usize));
    queue.end(error(libc::ENOSPC));
    assert_eq!(queue.completed(), [(1, false)]);
    assert_eq!(queue.kinds(), [Kind::Fdatasync]);
    queue.end(Ok(0));
    assert_eq!(queue.completed(), [(0, true)]);
    assert!(queue.disk.is_idle());
}

#[test]
fn where_the_host_has_no_rwf_dsync_a_lone_write_is_synced_like_the_others() {
    for (stable_by, before) in [(StableBy::Auto, Kind::WriteDsync), (StableBy::Dsync, Kind::WriteDsync)] {
        let (_test, image, cache) = disk("directsync");
        let mut queue = Queue::new(&image, &cache, stable_by);
        queue.write(0, BLOCK);
        assert_eq!(queue.kinds(), [before]);
        queue.end(error(libc::EOPNOTSUPP));
        assert_eq!(queue.kinds(), [Kind::Write]);
        queue.end(Ok(BLOCK as usize));
        assert_eq!(queue.kinds(), [Kind::Fdatasync]);
        queue.end(Ok(0));
        queue.write(1, BLOCK);
        assert_eq!(queue.kinds(), [Kind::Write], "{stable_by:?}: not tried again");
        assert_eq!(queue.completed(), [(0, true)]);
    }
}

#[test]
fn a_flush_in_flight_keeps_neither_reads_nor_plain_writes_waiting() {
    let (_test, image, cache) = disk("none");
    let mut queue = Queue::new(&image, &cache, StableBy::Auto);
    queue.disk.submit(RequestId(0), Op::Flush);
    assert_eq!(queue.kinds(), [Kind::Fdatasync]);
    queue.read(1, BLOCK);
    queue.write(2, BLOCK);
    queue.disk.submit(RequestId(3), Op::Flush);
    assert_eq!(
        queue.kinds(),
        [Kind::Fdatasync, Kind::Read, Kind::Write],
        "the second FLUSH has the next sync"
    );
    queue.hands.end(1, Ok(BLOCK as usize));
    queue.hands.end(1, Ok(BLOCK as usize));
    queue.disk.wait(Wake::Now).unwrap();
    assert_eq!(queue.completed(), [(1, true), (2, true)]);
    queue.end(Ok(0));
    assert_eq!(queue.completed(), [(0, true)], "not the FLUSH that came while the sync was running");
    queue.end(Ok(0));
    assert_eq!(queue.completed(), [(3, true)]);
}

#[test]
fn a_refusal_of_rwf_dsync_after_it_has_worked_is_an_error_that_latches() {
    let (_test, image, cache) = disk("directsync");
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    queue.write(0, BLOCK);
    queue.end(Ok(BLOCK as usize));
    queue.write(1, BLOCK);
    queue.end(error(libc::EOPNOTSUPP));
    queue.disk.submit(RequestId(2), Op::Flush);
    assert_eq!(queue.kinds(), []);
    assert_eq!(queue.completed(), [(0, true), (1, false), (2, false)]);
}

#[test]
fn a_sync_that_nobody_will_judge_counts_as_failed() {
    let (_test, image, cache) = disk("none");
    let (mut gone, mut other) =
        (Queue::new(&image, &cache, StableBy::Dsync), Queue::new(&image, &cache, StableBy::Dsync));
    for queue in [&mut gone, &mut other] {
        queue.disk.submit(RequestId(1), Op::Flush);
        queue.kinds();
    }
    other.end(Ok(0));
    assert_eq!(other.completed(), [], "held by the other's sync");
    drop(gone);
    other.disk.wait(Wake::Now).unwrap();
    assert_eq!(other.completed(), [(1, false)]);
}

/// The errors that Linux has numbers for, and one that it has none for.
fn errnos() -> impl Iterator<Item = i32> {
    (1..=libc::EHWPOISON).chain([4095])
}

#[test]
fn whatever_the_error_of_a_sync_is_it_latches() {
    type Start = fn(&mut Queue);
    let syncs: [(&str, Start, StableBy, Kind); 5] = [
        ("a FLUSH", |queue| queue.disk.submit(RequestId(1), Op::Flush), StableBy::Dsync, Kind::Fdatasync),
        ("a DSYNC write", |queue| queue.write(1, BLOCK), StableBy::Dsync, Kind::WriteDsync),
        ("a lone write", |queue| queue.write(1, BLOCK), StableBy::Auto, Kind::WriteDsync),
        (
            "a write's own sync",
            |queue| {
                queue.write(1, BLOCK);
                queue.end(Ok(BLOCK as usize));
            },
            StableBy::Fdatasync,
            Kind::Fdatasync,
        ),
        (
            "a shared sync",
            |queue| {
                queue.write(1, BLOCK);
                queue.end(Ok(BLOCK as usize));
            },
            StableBy::Group,
            Kind::Fdatasync,
        ),
    ];
    let test = TestImage::new(1 << 20);
    for (what, start, stable_by, kind) in syncs {
        for errno in errnos() {
            // Interrupted is not failed; and before any RWF_DSYNC has worked, the host may not have it.
            if errno == libc::EINTR || kind == Kind::WriteDsync && errno == libc::EOPNOTSUPP {
                continue;
            }
            let image = test.open("directsync");
            let cache = Arc::new(WriteCache::new(image.config().cache));
            cache.negotiate(Negotiated { flush: true, config_wce: false });
            let mut queue = Queue::new(&image, &cache, stable_by);
            start(&mut queue);
            assert_eq!(queue.kinds(), [kind], "{what}");
            queue.end(error(errno));
            assert_eq!(queue.completed(), [(1, false)], "{what}, error {errno}");
            assert_eq!(image.latch.check().unwrap_err().raw_os_error(), Some(errno), "{what}");
            queue.disk.submit(RequestId(2), Op::Flush);
            queue.write(3, BLOCK);
            queue.zero(4);
            assert_eq!(queue.kinds(), [], "{what}, error {errno}: nothing is tried again");
            assert_eq!(queue.completed(), [(2, false), (3, false), (4, false)], "{what}, error {errno}");
        }
    }
}

#[test]
fn a_sync_is_open_before_the_engine_may_begin_it() {
    type Start = fn(&mut Queue);
    let syncs: [(&str, Start); 2] = [
        ("a FLUSH", |queue| queue.disk.submit(RequestId(9), Op::Flush)),
        ("a DSYNC write", |queue| queue.write(9, BLOCK)),
    ];
    for (what, start) in syncs {
        let (_test, image, cache) = disk("directsync");
        cache.guest_sets_writeback(false);
        let mut failing = Queue::new(&image, &cache, StableBy::Dsync);
        let other = Arc::new(Mutex::new(Queue::new(&image, &cache, StableBy::Dsync)));
        other.lock().unwrap().disk.submit(RequestId(1), Op::Flush);
        assert_eq!(other.lock().unwrap().kinds(), [Kind::Fdatasync]);
        // The host is quick: before `submit` has returned it has told the failing queue's sync the error, and
        // the other queue has heard of its own success.
        let meanwhile = Arc::clone(&other);
        failing.hands.held().at_submit = Some(Box::new(move || {
            let mut other = meanwhile.lock().unwrap();
            other.end(Ok(0));
            assert_eq!(other.completed(), [], "{what}: acknowledged beside a sync that has failed");
            assert!(other.disk.holds_success());
        }));
        start(&mut failing);
        failing.end(error(libc::EIO));
        assert_eq!(failing.completed(), [(9, false)]);
        other.lock().unwrap().disk.wait(Wake::Now).unwrap();
        assert_eq!(other.lock().unwrap().completed(), [(1, false)], "{what}");
    }
}

#[test]
fn every_success_that_was_held_completes_and_once() {
    for stable_by in StableBy::ALL {
        for (result, is_ok) in [(Ok(0), true), (error(libc::EIO), false)] {
            let (_test, image, cache) = disk("directsync");
            cache.guest_sets_writeback(false);
            let mut other = Queue::new(&image, &cache, stable_by);
            let mut queue = Queue::new(&image, &cache, stable_by);
            other.disk.submit(RequestId(9), Op::Flush);
            assert_eq!(other.kinds(), [Kind::Fdatasync]);
            // Three writes and their syncs, one after the other; then three more, side by side.
            for id in 0..3 {
                queue.write(id, BLOCK);
                while !queue.kinds().is_empty() {
                    let is_sync = queue.kinds()[0] == Kind::Fdatasync;
                    queue.end(Ok(if is_sync { 0 } else { BLOCK as usize }));
                }
            }
            for id in 3..6 {
                queue.write(id, BLOCK);
            }
            while !queue.kinds().is_empty() {
                let is_sync = queue.kinds()[0] == Kind::Fdatasync;
                queue.end(Ok(if is_sync { 0 } else { BLOCK as usize }));
            }
            assert_eq!(queue.completed(), [], "{stable_by:?}: all are held by the other queue's sync");
            assert!(queue.disk.holds_success() && !queue.disk.is_idle());
            other.end(result);
            assert_eq!(other.completed(), [(9, is_ok)]);
            queue.disk.wait(Wake::Now).unwrap();
            let mut completed = queue.completed();
            completed.sort_unstable();
            assert_eq!(completed, (0..6).map(|id| (id, is_ok)).collect::<Vec<_>>(), "{stable_by:?}");
            assert!(queue.disk.is_idle() && other.disk.is_idle());
        }
    }
}

#[test]
fn a_wait_that_releases_the_last_success_does_not_sleep_behind_it() {
    let (_test, image, cache) = disk("none");
    let mut other = Queue::new(&image, &cache, StableBy::Dsync);
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    other.disk.submit(RequestId(9), Op::Flush);
    assert_eq!(other.kinds(), [Kind::Fdatasync]);
    cache.guest_sets_writeback(false);
    queue.disk.sync_if_switched_off();
    queue.end(Ok(0));
    assert!(queue.disk.holds_success(), "by the other queue's sync");
    // That one is judged before this queue has asked to be rung for, and the sync of our own completes no
    // request: a drain that sleeps now sleeps for ever, and a reset with it.
    other.end(Ok(0));
    let doorbell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    queue.disk.wait(Wake::Doorbell(&doorbell)).unwrap();
    assert!(!queue.hands.held().slept);
    assert!(queue.disk.is_idle() && doorbell.read().is_err());
}

#[test]
fn each_change_to_writethrough_is_synced_and_not_the_first_alone() {
    let (_test, image, cache) = disk("none");
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    for round in 0..3 {
        cache.guest_sets_writeback(true);
        queue.write(round, BLOCK);
        queue.end(Ok(BLOCK as usize));
        assert_eq!(queue.completed(), [(round, true)]);
        assert_eq!(image.monitor.snapshot().at_risk_bytes, u64::from(BLOCK), "round {round}");
        cache.guest_sets_writeback(false);
        queue.disk.sync_if_switched_off();
        assert_eq!(queue.kinds(), [Kind::Fdatasync], "round {round}");
        queue.end(Ok(0));
        assert_eq!(image.monitor.snapshot().at_risk_bytes, 0, "round {round}");
        assert!(queue.disk.is_idle(), "round {round}");
    }
}

#[test]
fn a_change_to_writethrough_while_a_shared_sync_runs_is_synced_after_it() {
    let (_test, image, cache) = disk("none");
    let mut queue = Queue::new(&image, &cache, StableBy::Dsync);
    queue.disk.submit(RequestId(1), Op::Flush);
    assert_eq!(queue.kinds(), [Kind::Fdatasync]);
    cache.guest_sets_writeback(false);
    queue.disk.sync_if_switched_off();
    assert_eq!(queue.kinds(), [Kind::Fdatasync], "one at a time");
    queue.end(Ok(0));
    assert_eq!(queue.completed(), [(1, true)]);
    assert_eq!(queue.kinds(), [Kind::Fdatasync], "the one that ran had started before the change");
    queue.end(Ok(0));
    assert!(queue.disk.is_idle());
}
