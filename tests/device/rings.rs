//! The split virtqueue from the driver's side: when it is told (virtio 2.7.7, 2.7.10), what the walk
//! over chains finds (virtio-queue's iterator is the oracle for well-formed ones), and that no
//! sequence of accesses and no ring content brings the device down (the rules R of
//! `docs/requirements.md`).

use std::cell::RefCell;
use std::time::{Duration, Instant};

use minivmm::bus::BusDevice;
use minivmm::mem::{self, Ram, Segment};
use minivmm::virtio::queue::{QueueConfig, Ring};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::TestImage;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

const NO_INTERRUPT: u16 = 1;

fn rig() -> (TestImage, Rig) {
    let test = TestImage::new(1 << 20);
    let rig = Rig::new(test.open("none"));
    (test, rig)
}

/// Waits until the device has written what it will certainly write.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::yield_now();
    }
}

fn set_used_event(rig: &Rig, value: u16) {
    rig.poke(AVAIL + 4 + 2 * u64::from(rig.size), &value.to_le_bytes());
}

/// Puts a GET_ID at descriptor 0: it is answered without the disk, so a batch is answered as one.
fn put_get_id(rig: &Rig) {
    rig.put_header(GET_ID, 0);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS_BYTE, 1, WRITE)]);
}

/// Puts a read at descriptor 0: each is answered by itself.
fn put_read(rig: &Rig) {
    rig.put_header(IN, 0);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
}

/// Submits the chain `count` times at once, waits for the answers, and counts the notifications;
/// the reset that ends it lets none be missed or late.
fn notifications(rig: &mut Rig, count: u16) -> u64 {
    let done = rig.used_idx().wrapping_add(count);
    rig.make_available(&vec![0; usize::from(count)]);
    rig.ring_doorbell();
    until("no answers", || rig.used_idx() == done);
    rig.write(reg::STATUS, 0);
    rig.irq.read().unwrap_or(0)
}

/// Shows Q8.
#[test]
fn without_event_idx_each_batch_is_told_unless_the_driver_says_no() {
    for put in [put_get_id, put_read] {
        for (flags, told) in [(0, true), (NO_INTERRUPT, false)] {
            for count in [1, 2, 16] {
                let (_image, mut rig) = rig();
                rig.start(0);
                put(&rig);
                rig.poke(AVAIL, &flags.to_le_bytes());
                // used_event is where it always is, and means nothing.
                set_used_event(&rig, 7);
                let seen = notifications(&mut rig, count);
                assert_eq!(seen > 0, told, "flags {flags}, {count} requests: {seen}");
                assert!(seen <= u64::from(count));
            }
        }
    }
}

/// Shows Q8.
#[test]
fn with_event_idx_the_driver_is_told_exactly_when_its_event_is_passed() {
    for put in [put_get_id, put_read] {
        for flags in [0, NO_INTERRUPT] {
            for (used_event, count, told) in [
                (0, 1, 1),
                (0, 5, 1),
                (3, 3, 0),
                (3, 4, 1),
                (3, 16, 1),
                (15, 16, 1),
                (16, 16, 0),
                (0xffff, 16, 0),
                (0x8000, 16, 0),
            ] {
                let (_image, mut rig) = rig();
                rig.start(F_EVENT_IDX);
                put(&rig);
                set_used_event(&rig, used_event);
                // Bit 0 of flags means nothing with EVENT_IDX (virtio 2.7.7.2).
                rig.poke(AVAIL, &flags.to_le_bytes());
                let seen = notifications(&mut rig, count);
                assert_eq!(seen, told, "used_event {used_event}, {count} requests, flags {flags}");
            }
        }
    }
}

/// Shows Q8.
#[test]
fn events_are_exact_where_the_indices_wrap() {
    for (used_event, told) in [(0xfff9, 0), (0xfffa, 1), (0xffff, 1), (0, 1), (8, 1), (9, 1), (10, 0)] {
        let (_image, mut rig) = rig();
        rig.start(F_EVENT_IDX);
        put_get_id(&rig);
        let mut idx = 0u16;
        while idx < 0xfffa {
            let batch = (0xfffa - idx).min(16);
            idx += batch;
            rig.make_available(&vec![0; usize::from(batch)]);
            rig.ring_doorbell();
            until("no answers", || rig.used_idx() == idx);
        }
        // Only what follows counts; used_event 0 was passed long ago, once.
        until("the first notification", || rig.irq.read().is_ok());
        set_used_event(&rig, used_event);
        assert_eq!(notifications(&mut rig, 16), told, "used_event {used_event:#x} from 0xfffa");
    }
}

/// Shows Q10.
#[test]
fn the_device_asks_for_the_doorbell_whenever_it_is_idle() {
    for (features, event_idx) in [(0, false), (F_EVENT_IDX, true)] {
        let (_image, mut rig) = rig();
        rig.start(features);
        put_get_id(&rig);
        for round in 0..50u16 {
            let avail_event = USED + 4 + 8 * u64::from(rig.size);
            until("the doorbell is wanted", || {
                if event_idx {
                    assert_eq!(rig.peek16(USED), 0, "used.flags with EVENT_IDX");
                    rig.peek16(avail_event) == round
                } else {
                    assert!(rig.peek16(USED) <= 1);
                    rig.peek16(USED) == 0
                }
            });
            rig.make_available(&[0]);
            rig.ring_doorbell();
            until("no answer", || rig.used_idx() == round + 1);
        }
    }
}

/// A well-formed chain: which descriptors, and how many of them in an indirect table.
#[derive(Debug, Clone)]
struct Shape {
    /// Length of each and whether it is writable, readable ones first.
    parts: Vec<(u32, bool)>,
    /// How many come through an indirect table, at the end.
    indirect: usize,
    /// A permutation of the 16 places in the descriptor table.
    places: Vec<u16>,
    /// Flags that mean nothing on the descriptor of the table.
    write_on_table: bool,
    /// By how many bytes the indirect table misses an alignment that nobody promises.
    table_shift: u64,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let lengths = proptest::collection::vec(prop_oneof![Just(0u32), 1..5000u32, Just(1 << 20)], 1..=15);
    let places = Just((0..16u16).collect::<Vec<_>>()).prop_shuffle();
    let cuts = (any::<prop::sample::Index>(), any::<prop::sample::Index>());
    (lengths, places, cuts, any::<bool>(), prop_oneof![Just(0u64), 0..16u64]).prop_map(
        |(lengths, places, (readable, indirect), write_on_table, table_shift)| {
            let readable = readable.index(lengths.len() + 1);
            let indirect = indirect.index(lengths.len() + 1);
            let parts = lengths.into_iter().enumerate().map(|(at, len)| (len, at >= readable)).collect();
            Shape { parts, indirect, places, write_on_table, table_shift }
        },
    )
}

fn put_shape(rig: &Rig, shape: &Shape) {
    let direct = shape.parts.len() - shape.indirect;
    let part = |at: usize| {
        let (len, writable) = shape.parts[at];
        (DATA + 0x1000 * at as u64, len, if writable { WRITE } else { 0 })
    };
    for at in 0..direct {
        let (addr, len, flags) = part(at);
        let last = at + 1 == shape.parts.len();
        let flags = if last { flags } else { flags | NEXT };
        rig.put_desc(DESC, shape.places[at], (addr, len, flags, shape.places[at + 1]));
    }
    if shape.indirect > 0 {
        let flags = INDIRECT | if shape.write_on_table { WRITE } else { 0 };
        let len = 16 * shape.indirect as u32;
        let table = INDIRECT_TABLE + shape.table_shift;
        rig.put_desc(DESC, shape.places[direct], (table, len, flags, 0x7777));
        rig.put_chain(table, &(direct..shape.parts.len()).map(part).collect::<Vec<_>>());
    }
}

/// What virtio-queue's own iterator finds in the ring.
fn oracle(ram: &Ram) -> (u16, Vec<Segment>, Vec<Segment>) {
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(DESC as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let chain = queue.iter(ram).unwrap().next().unwrap();
    let segment = |desc: virtio_queue::desc::split::Descriptor| {
        let GuestAddress(addr) = desc.addr();
        Segment { addr, len: desc.len() }
    };
    let all: Vec<_> = chain.clone().collect();
    let (writable, readable): (Vec<_>, Vec<_>) = all.into_iter().partition(|desc| desc.is_write_only());
    (
        chain.head_index(),
        readable.into_iter().map(segment).collect(),
        writable.into_iter().map(segment).collect(),
    )
}

/// Shows Q6.
#[test]
fn our_walk_and_virtio_queues_find_the_same_in_every_well_formed_chain() {
    let (_image, rig) = rig();
    let rig = RefCell::new(rig);
    let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
    let tested = TestRunner::new(config).run(&shapes(), |shape| {
        let mut rig = rig.borrow_mut();
        rig.fill(DESC, 0xee, 16 * 16);
        put_shape(&rig, &shape);
        rig.poke(AVAIL + 4, &shape.places[0].to_le_bytes());
        rig.set_avail_idx(1);
        let config = QueueConfig { size: 16, descriptors: DESC, available: AVAIL, used: USED };
        let mut ring = Ring::new(&rig.ram, &config, 16, F_INDIRECT).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        let (head, readable, writable) = oracle(&rig.ram);
        prop_assert_eq!(chain.head, head);
        prop_assert_eq!(chain.readable, readable);
        prop_assert_eq!(chain.writable, writable);
        prop_assert_eq!(chain.fault, None);
        prop_assert_eq!(ring.pop().unwrap(), None);
        Ok(())
    });
    tested.unwrap();
}

/// Something a guest may do.
#[derive(Debug, Clone)]
enum Act {
    Read { offset: u64, width: usize },
    Write { offset: u64, value: u64, width: usize },
    Poke { addr: u64, bytes: Vec<u8> },
    Descriptor { at: u16, desc: Desc },
    Header { kind: u32, sector: u64 },
    Available { idx: u16 },
    Live { features: u64 },
}

fn acts() -> impl Strategy<Value = Act> {
    let offset = || {
        prop_oneof![
            4 => (0..0x40u64).prop_map(|word| word * 4),
            2 => Just(reg::STATUS),
            2 => Just(reg::QUEUE_NOTIFY),
            2 => 0x100..0x150u64,
            1 => 0..0x1000u64,
            1 => any::<u64>(),
        ]
    };
    let width = || prop_oneof![4 => Just(4usize), 1 => 0..10usize];
    let value = || {
        prop_oneof![
            3 => 0..32u64,
            2 => proptest::sample::select(vec![DESC, AVAIL, USED, DATA, 1 << 28, 1 << 29, 0x7fff]),
            1 => any::<u64>(),
        ]
    };
    let addr = || prop_oneof![3 => 0..RAM_BYTES, 1 => Just(DESC), 1 => Just(USED), 1 => any::<u64>()];
    let desc = (addr(), prop_oneof![0..9000u32, Just(16u32), any::<u32>()], 0..8u16, 0..18u16);
    prop_oneof![
        3 => (offset(), width()).prop_map(|(offset, width)| Act::Read { offset, width }),
        6 => (offset(), value(), width())
            .prop_map(|(offset, value, width)| Act::Write { offset, value, width }),
        2 => (0..0x10_0000u64, proptest::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(addr, bytes)| Act::Poke { addr, bytes }),
        4 => (0..16u16, desc).prop_map(|(at, desc)| Act::Descriptor { at, desc }),
        1 => (0..16u32, 0..3000u64).prop_map(|(kind, sector)| Act::Header { kind, sector }),
        3 => prop_oneof![0..40u16, any::<u16>()].prop_map(|idx| Act::Available { idx }),
        2 => any::<u64>().prop_map(|features| Act::Live { features }),
    ]
}

fn act(rig: &mut Rig, what: &Act) {
    match *what {
        Act::Read { offset, width } => rig.mmio.read(offset, &mut vec![0xee; width]),
        Act::Write { offset, value, width } => {
            let mut bytes = value.to_le_bytes().to_vec();
            bytes.resize(width, 0xff);
            rig.mmio.write(offset, &bytes);
        }
        Act::Poke { addr, ref bytes } => rig.poke(addr, bytes),
        Act::Descriptor { at, desc } => rig.put_desc(DESC, at, desc),
        Act::Header { kind, sector } => rig.put_header(kind, sector),
        Act::Available { idx } => {
            rig.set_avail_idx(idx);
            rig.ring_doorbell();
        }
        Act::Live { features } => {
            let features = features & rig.offered();
            rig.start(features);
        }
    }
}

/// Shows R22.
#[test]
fn nothing_a_guest_does_brings_the_device_down() {
    let (test, rig) = rig();
    let rig = RefCell::new(rig);
    let size = test.content().len();
    let config = Config { cases: 400, failure_persistence: None, ..Config::default() };
    let sequences = proptest::collection::vec(acts(), 1..80);
    let tested = TestRunner::new(config).run(&sequences, |sequence| {
        let mut rig = rig.borrow_mut();
        for what in &sequence {
            act(&mut rig, what);
        }
        // Whatever state that was: reset, and the next driver is served.
        rig.write(reg::STATUS, 0);
        prop_assert_eq!(rig.read(reg::STATUS), 0);
        rig.has_interrupt(0);
        rig.start(0);
        prop_assert_eq!(rig.write_sectors(16, &[0x5a; 4096]), OK);
        prop_assert_eq!(rig.read_sectors(16, 4096), (OK, vec![0x5a; 4096]));
        prop_assert_eq!(test.content().len(), size, "the file never grows");
        Ok(())
    });
    tested.unwrap();
}

#[test]
fn a_ring_pops_each_chain_once_and_in_order_for_any_size() {
    let (_image, mut rig) = rig();
    for size in [1u16, 2, 16, 256] {
        rig.size = size;
        for addr in [DESC, AVAIL, USED] {
            rig.fill(addr, 0, 0x1_0000);
        }
        let config = QueueConfig { size: u32::from(size), descriptors: DESC, available: AVAIL, used: USED };
        let mut ring = Ring::new(&rig.ram, &config, 256, 0).unwrap();
        for head in 0..size {
            rig.put_desc(DESC, head, (DATA, 1 + u32::from(head), WRITE, 0));
        }
        let mut idx = 0u16;
        for round in 0..3 * size {
            let head = round.wrapping_mul(7) % size;
            let entry = AVAIL + 4 + 2 * u64::from(idx % size);
            mem::write_bytes(&rig.ram, entry, &head.to_le_bytes()).unwrap();
            idx = idx.wrapping_add(1);
            rig.set_avail_idx(idx);
            let chain = ring.pop().unwrap().unwrap();
            assert_eq!((chain.head, chain.writable[0].len), (head, 1 + u32::from(head)));
            assert_eq!(ring.pop().unwrap(), None);
            ring.push_used(head, 1).unwrap();
            assert_eq!(rig.used_idx(), idx.wrapping_sub(1), "pushed, not yet published");
            assert!(ring.publish());
            assert_eq!(rig.used_idx(), idx);
        }
    }
}
