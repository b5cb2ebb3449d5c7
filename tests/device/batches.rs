//! One publish a batch, and at most one notification for it, exactly when virtio 2.7.7.2 wants one;
//! and our ring beside virtio-queue's, which is the oracle, over any sequence of batches.

use minivmm::mem::{self, Ram};
use minivmm::virtio::queue::{QueueConfig, QueueConfigError, Ring, RingError};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::TestImage;
use minivmm_testkit::turns::{Driver, Turns};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

const NO_INTERRUPT: u16 = 1;
const SIZE: u16 = 16;

fn word(ram: &Ram, addr: u64) -> u16 {
    let mut bytes = [0; 2];
    mem::read_bytes(ram, addr, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

fn set_word(ram: &Ram, addr: u64, value: u16) {
    mem::write_bytes(ram, addr, &value.to_le_bytes()).unwrap();
}

fn config(size: u16) -> QueueConfig {
    QueueConfig { size: u32::from(size), descriptors: DESC, available: AVAIL, used: USED }
}

/// A ring of ours, taken to where both its indices are `at`.
fn ring_at(ram: &Ram, at: u16, features: u64) -> Ring {
    for addr in [DESC, AVAIL, USED] {
        mem::write_bytes(ram, addr, &[0; 0x1000]).unwrap();
    }
    mem::write_bytes(ram, DESC, &one_descriptor()).unwrap();
    let mut ring = Ring::new(ram, &config(SIZE), SIZE, features).unwrap();
    for idx in 1..=at {
        set_word(ram, AVAIL + 2, idx);
        assert!(ring.pop().unwrap().is_some());
        ring.push_used(0, 0).unwrap();
        let _ = ring.publish();
    }
    ring
}

/// A writable byte.
fn one_descriptor() -> [u8; 16] {
    desc::bytes((DATA, 1, WRITE, 0))
}

/// Shows Q9.
#[test]
fn nothing_is_seen_before_it_is_published_and_then_all_of_it_by_one_store() {
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    for start in [0, 5, 0xfff8, 0xffff] {
        for batch in 1..=SIZE {
            let mut ring = ring_at(&ram, start, 0);
            for entry in 0..batch {
                ring.push_used(entry, 100 + u32::from(entry)).unwrap();
                assert_eq!(word(&ram, USED + 2), start, "entry {entry} of {batch} is not seen yet");
            }
            assert!(ring.publish());
            assert_eq!(word(&ram, USED + 2), start.wrapping_add(batch));
            for entry in 0..batch {
                let at = USED + 4 + 8 * u64::from(start.wrapping_add(entry) % SIZE);
                let expected = (entry, 0, 100 + entry, 0);
                assert_eq!(
                    (word(&ram, at), word(&ram, at + 2), word(&ram, at + 4), word(&ram, at + 6)),
                    expected
                );
            }
            // There is nothing more to tell.
            set_word(&ram, USED + 2, 0x1234);
            assert!(!ring.publish());
            assert_eq!(word(&ram, USED + 2), 0x1234, "nothing is stored for no entries");
        }
    }
}

#[test]
fn more_than_a_ring_of_entries_are_published_before_they_are_overwritten() {
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    let mut ring = ring_at(&ram, 0, F_EVENT_IDX);
    for _ in 0..SIZE {
        ring.push_used(1, 1).unwrap();
    }
    assert_eq!(word(&ram, USED + 2), 0);
    ring.push_used(2, 2).unwrap();
    assert_eq!(word(&ram, USED + 2), SIZE);
    // used_event is 0, which the first entry passed: it counts although it was published before.
    assert!(ring.publish());
    assert_eq!(word(&ram, USED + 2), SIZE + 1);
    assert_eq!(ring.push_used(SIZE, 0), Err(RingError::Index { index: 16, size: 16 }));
}

/// Shows Q8.
#[test]
fn with_event_idx_a_batch_is_told_when_the_event_is_in_it_wherever_the_index_wraps() {
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    for start in [0u16, 1, 0x7ff8, 0xfff0, 0xfff8, 0xffff] {
        for batch in [1u16, 2, 8, 15, 16] {
            let mut ring = ring_at(&ram, start, F_EVENT_IDX);
            // From well before the batch to well behind it, and the far side of the circle.
            for from_start in (-20..=40i16).chain([0x4000, -0x8000, 0x7fff]) {
                // Whatever was published by the round before is the start of this one.
                let now = word(&ram, USED + 2);
                let event = now.wrapping_add_signed(from_start);
                set_word(&ram, AVAIL + 4 + 2 * u64::from(SIZE), event);
                // The flags mean nothing here (virtio 2.7.7.2).
                set_word(&ram, AVAIL, if from_start % 2 == 0 { NO_INTERRUPT } else { 0 });
                for _ in 0..batch {
                    ring.push_used(0, 0).unwrap();
                }
                let told = ring.publish();
                let is_in_it = (0..i32::from(batch)).contains(&i32::from(from_start));
                assert_eq!(told, is_in_it, "{batch} entries from {now:#x}, used_event {event:#x}");
            }
        }
    }
}

/// Shows Q8.
#[test]
fn without_event_idx_the_flag_alone_decides() {
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    let mut ring = ring_at(&ram, 0, 0);
    for round in 0..1000u16 {
        let flags = round % 4;
        set_word(&ram, AVAIL, flags);
        set_word(&ram, AVAIL + 4 + 2 * u64::from(SIZE), word(&ram, USED + 2).wrapping_add(round % 3));
        for _ in 0..=round % SIZE {
            ring.push_used(0, 0).unwrap();
        }
        assert_eq!(ring.publish(), flags & NO_INTERRUPT == 0, "flags {flags}");
    }
}

#[test]
fn the_doorbell_is_off_while_the_ring_is_drained_and_on_exactly_behind_it() {
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    for (features, start) in [(0, 0u16), (0, 0xfffe), (F_EVENT_IDX, 0), (F_EVENT_IDX, 0xfffe)] {
        let mut ring = ring_at(&ram, start, features);
        assert!(!ring.enable_doorbell());
        assert_eq!(word(&ram, USED), 0);
        set_word(&ram, AVAIL + 2, start.wrapping_add(3));
        ring.disable_doorbell();
        // With EVENT_IDX used.flags stays 0 (virtio 2.7.10.2), and avail_event behind.
        let (flags, event) = if features == 0 { (1, 0) } else { (0, start) };
        for left in [2u16, 1, 0] {
            assert!(ring.pop().unwrap().is_some(), "{left} left");
            assert_eq!((word(&ram, USED), word(&ram, avail_event)), (flags, event));
        }
        assert_eq!(ring.pop(), Ok(None));
        // One comes between the last look and the wish for a doorbell: it is not lost.
        set_word(&ram, AVAIL + 2, start.wrapping_add(4));
        assert!(ring.enable_doorbell());
        assert!(ring.pop().unwrap().is_some());
        assert_eq!(ring.pop(), Ok(None));
        assert!(!ring.enable_doorbell());
        let event = if features == 0 { 0 } else { start.wrapping_add(4) };
        assert_eq!((word(&ram, USED), word(&ram, avail_event)), (0, event));
    }
}

/// Shows Q1.
#[test]
fn a_ring_may_end_where_ram_ends_and_may_not_touch_a_hole() {
    const MIB: u64 = 1 << 20;
    let ram = mem::map_ram(&[(0, MIB), (2 * MIB, MIB)]).unwrap();
    let (desc_bytes, avail_bytes, used_bytes) = (16 * 16, 6 + 2 * 16, 6 + 8 * 16);
    for end in [MIB, 3 * MIB] {
        // Each part as far up as its alignment lets it be.
        let used = (end - used_bytes) & !3;
        let available = (end - avail_bytes) & !1;
        for config in [
            QueueConfig { size: 16, descriptors: end - desc_bytes, available: 0x1000, used: 0x2000 },
            QueueConfig { size: 16, descriptors: 0, available, used: 0x2000 },
            QueueConfig { size: 16, descriptors: 0, available: 0x1000, used },
        ] {
            let mut ring = Ring::new(&ram, &config, 16, F_EVENT_IDX).unwrap();
            mem::write_bytes(&ram, config.descriptors + 15 * 16, &one_descriptor()).unwrap();
            set_word(&ram, config.available + 2, 0);
            for idx in 1..=40u16 {
                let event = config.available + 4 + 2 * 16;
                set_word(&ram, event, idx.wrapping_sub(1));
                set_word(&ram, config.available + 4 + 2 * u64::from((idx - 1) % 16), 15);
                set_word(&ram, config.available + 2, idx);
                assert_eq!(ring.pop().unwrap().unwrap().head, 15);
                ring.push_used(15, 7).unwrap();
                assert!(ring.publish());
                assert!(!ring.enable_doorbell());
                assert_eq!(word(&ram, config.used + 2), idx);
                assert_eq!(word(&ram, config.used + 4 + 8 * 16), idx, "avail_event");
            }
        }
        for (what, over) in [("descriptor table", 16), ("available ring", 2), ("used ring", 4)] {
            let place = |part: &str, top: u64| if part == what { top + over } else { 0x4000 };
            let config = QueueConfig {
                size: 16,
                descriptors: place("descriptor table", end - desc_bytes),
                available: place("available ring", available),
                used: place("used ring", used),
            };
            refused(&ram, config, what);
        }
    }
    for (what, addr) in [
        ("descriptor table", MIB),
        ("available ring", MIB + 4096),
        ("used ring", 2 * MIB - 4),
        ("used ring", 3 * MIB),
        ("descriptor table", u64::MAX - 15),
        ("available ring", u64::MAX - 1),
        ("used ring", u64::MAX - 3),
    ] {
        let place = |part: &str| if part == what { addr } else { 0x4000 };
        let (descriptors, available) = (place("descriptor table"), place("available ring"));
        refused(&ram, QueueConfig { size: 16, descriptors, available, used: place("used ring") }, what);
    }
}

fn refused(ram: &Ram, config: QueueConfig, what: &str) {
    match Ring::new(ram, &config, 16, 0).err() {
        Some(QueueConfigError::OutsideRam { part, .. }) => assert_eq!(part, what, "{config:?}"),
        other => panic!("{config:?}: {other:?}"),
    }
}

/// A batch for both rings: what the driver has done, and how many chains are returned together.
#[derive(Debug, Clone)]
struct Batch {
    heads: Vec<u16>,
    /// used_event, counted from used.idx before the batch.
    event: i16,
    flags: u16,
    enable: bool,
}

fn batch() -> impl Strategy<Value = Batch> {
    let heads = proptest::collection::vec(0..SIZE, 0..=usize::from(SIZE));
    let event = prop_oneof![3 => -2..20i16, 1 => any::<i16>()];
    (heads, event, 0..4u16, any::<bool>()).prop_map(|(heads, event, flags, enable)| Batch {
        heads,
        event,
        flags,
        enable,
    })
}

/// Both sides of the comparison, each over its own memory.
struct Pair {
    ours: Ram,
    theirs: Ram,
    ring: Ring,
    queue: Queue,
}

impl Pair {
    fn new(at: u16, features: u64) -> Self {
        let (ours, theirs) =
            (mem::map_ram(&[(0, RAM_BYTES)]).unwrap(), mem::map_ram(&[(0, RAM_BYTES)]).unwrap());
        let ring = ring_at(&ours, at, features);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(DESC as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.set_next_avail(at);
        queue.set_next_used(at);
        // Where ours has come to is where theirs begins.
        for addr in [DESC, AVAIL, USED] {
            let mut page = [0; 0x1000];
            mem::read_bytes(&ours, addr, &mut page).unwrap();
            mem::write_bytes(&theirs, addr, &page).unwrap();
        }
        Self { ours, theirs, ring, queue }
    }

    fn set_both(&self, addr: u64, value: u16) {
        set_word(&self.ours, addr, value);
        set_word(&self.theirs, addr, value);
    }
}

fn same_for_a_batch(
    pair: &mut Pair,
    avail: &mut u16,
    batch: &Batch,
    event_idx: bool,
) -> Result<(), TestCaseError> {
    let used = word(&pair.ours, USED + 2);
    pair.set_both(AVAIL, batch.flags);
    pair.set_both(AVAIL + 4 + 2 * u64::from(SIZE), used.wrapping_add_signed(batch.event));
    for &head in &batch.heads {
        pair.set_both(AVAIL + 4 + 2 * u64::from(*avail % SIZE), head);
        *avail = avail.wrapping_add(1);
    }
    pair.set_both(AVAIL + 2, *avail);
    for (written, &head) in (0u32..).zip(&batch.heads) {
        let theirs = pair.queue.pop_descriptor_chain(&pair.theirs).unwrap();
        let ours = pair.ring.pop().unwrap().unwrap();
        prop_assert_eq!((ours.head, theirs.head_index()), (head, head));
        pair.ring.push_used(head, written).unwrap();
        pair.queue.add_used(&pair.theirs, head, written).unwrap();
    }
    prop_assert_eq!(pair.ring.pop(), Ok(None));
    prop_assert!(pair.queue.pop_descriptor_chain(&pair.theirs).is_none());
    // Their answer without EVENT_IDX does not know the flag, and neither knows an empty batch.
    let theirs = pair.queue.needs_notification(&pair.theirs).unwrap();
    let wanted = theirs && !batch.heads.is_empty() && (event_idx || batch.flags & NO_INTERRUPT == 0);
    prop_assert_eq!(pair.ring.publish(), wanted, "{:?} at used.idx {:#x}", batch, used);
    if batch.enable {
        let theirs = pair.queue.enable_notification(&pair.theirs).unwrap();
        prop_assert_eq!(pair.ring.enable_doorbell(), theirs);
    } else {
        pair.ring.disable_doorbell();
        pair.queue.disable_notification(&pair.theirs).unwrap();
    }
    for addr in [AVAIL, USED] {
        let (mut ours, mut theirs) = ([0; 0x100], [0; 0x100]);
        mem::read_bytes(&pair.ours, addr, &mut ours).unwrap();
        mem::read_bytes(&pair.theirs, addr, &mut theirs).unwrap();
        prop_assert_eq!(ours, theirs, "the ring at {:#x}", addr);
    }
    Ok(())
}

#[test]
fn our_ring_and_virtio_queues_do_the_same_over_any_batches_and_wherever_the_indices_wrap() {
    let starts = prop_oneof![Just(0u16), 0xffc0..=0xffffu16, 0x7ff0..0x8010u16];
    let runs = (starts, any::<bool>(), proptest::collection::vec(batch(), 1..12));
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    let tested = TestRunner::new(config).run(&runs, |(start, event_idx, batches)| {
        let mut pair = Pair::new(start, if event_idx { F_EVENT_IDX } else { 0 });
        let mut avail = start;
        for batch in &batches {
            same_for_a_batch(&mut pair, &mut avail, batch, event_idx)?;
        }
        Ok(())
    });
    tested.unwrap();
}

#[test]
fn virtio_queue_refuses_no_configuration_that_we_accept_and_the_other_way_round() {
    let ram = mem::map_ram(&[(0, 1 << 20), (2 << 20, 1 << 20)]).unwrap();
    let addr = || prop_oneof![0..4u64 << 20, Just((1 << 20) - 256), Just((3 << 20) - 136), any::<u64>()];
    let aligned = |align: u64| {
        (addr(), any::<bool>()).prop_map(move |(at, is)| if is { at & !(align - 1) } else { at })
    };
    let runs = (0..1u32 << 6, aligned(16), aligned(2), aligned(4));
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let tested = TestRunner::new(config).run(&runs, |(size, descriptors, available, used)| {
        let ours = Ring::new(&ram, &QueueConfig { size, descriptors, available, used }, 32, 0);
        let mut queue = Queue::new(32).unwrap();
        let theirs = queue.try_set_size(size as u16).is_ok()
            && queue.try_set_desc_table_address(GuestAddress(descriptors)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(available)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(used)).is_ok();
        queue.set_ready(true);
        let theirs = theirs && queue.is_valid(&ram);
        let ours = ours.err();
        prop_assert_eq!(ours.is_none(), theirs, "{:?}", ours);
        prop_assert!(ours != Some(QueueConfigError::Refused), "found by us, with its reason");
        Ok(())
    });
    tested.unwrap();
}

/// Reads, one descriptor table slot each.
fn put_reads(driver: &Driver<'_>, count: u16, kind: u32) {
    for slot in 0..count {
        let header = driver.put_header(slot, kind, 8 * u64::from(slot));
        let data = DATA + 4096 * u64::from(slot);
        let len = if kind == GET_ID { 20 } else { 4096 };
        let first = 3 * slot;
        driver.put_desc(DESC, first, (header, 16, NEXT, first + 1));
        driver.put_desc(DESC, first + 1, (data, len, NEXT | WRITE, first + 2));
        driver.put_desc(DESC, first + 2, (STATUS_BYTE + u64::from(slot), 1, WRITE, 0));
    }
}

#[test]
fn a_batch_of_requests_is_one_publish_and_at_most_one_notification() {
    let image = TestImage::new(1 << 20);
    for kind in [IN, GET_ID] {
        for (features, event, flags, told) in [
            (0, 0, 0, 1),
            (0, 0, NO_INTERRUPT, 0),
            (F_EVENT_IDX, 0, 0, 1),
            (F_EVENT_IDX, 31, 0, 1),
            (F_EVENT_IDX, 32, 0, 0),
            (F_EVENT_IDX, 0xffff, 0, 0),
        ] {
            let mut turns = Turns::new(image.open("writeback"), 128, features);
            turns.run(|worker, driver| {
                put_reads(driver, 32, kind);
                driver.poke(AVAIL, &u16::to_le_bytes(flags));
                driver.set_used_event(event);
                driver.submit((0..32).map(|slot| 3 * slot));
                worker.turn().unwrap();
                assert_eq!(driver.used_idx(), 32, "all of it is there after one turn");
                assert_eq!(
                    driver.told(),
                    told,
                    "type {kind}, {features:#x}, used_event {event}, flags {flags}"
                );
            });
        }
    }
}

#[test]
fn what_was_answered_before_the_ring_broke_is_published_by_the_drain() {
    let image = TestImage::new(1 << 20);
    let mut turns = Turns::new(image.open("writeback"), 128, F_EVENT_IDX);
    turns.run(|worker, driver| {
        put_reads(driver, 4, GET_ID);
        driver.put_desc(DESC, 12, (DATA, 16, NEXT, 12));
        driver.submit([0, 3, 6, 9, 12]);
        assert!(worker.turn().is_err(), "a descriptor that is its own next");
        worker.drain().unwrap();
        assert_eq!((driver.used_idx(), driver.told()), (4, 1));
    });
}
