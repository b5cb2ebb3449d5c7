//! Every malformed chain and every broken ring (the rules R of `docs/requirements.md`), through a driver of our
//! own against the live device: each gets its answer, and the device goes on.

use std::sync::{Arc, OnceLock};

use minivmm::disk::disk_queue::StableBy;
use minivmm::mem::{self, Ram};
use minivmm_testkit::driver::*;
use minivmm_testkit::engines::{Fate, Scripted};
use minivmm_testkit::images::{TestImage, pattern};

/// A descriptor without its next: address, length, flags.
type Part = (u64, u32, u16);

const IMAGE_BYTES: u64 = 1 << 20;
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT;

fn rig(mode: &str, features: u64) -> (TestImage, Rig) {
    let image = TestImage::new(IMAGE_BYTES);
    let rig = Rig::live(image.open(mode), features);
    (image, rig)
}

/// A request that must work after every attack: reads sector 3.
fn assert_alive(rig: &mut Rig, context: &str) {
    let (status, data) = rig.read_sectors(3, 512);
    assert_eq!((status, data), (OK, vec![pattern(3); 512]), "after {context}");
}

/// Chains that can be followed but are no request: IOERR, or whatever the table says, and alive.
/// Shows Q3, Q5, R3, R5, R9 and R10.
#[test]
fn malformed_requests_get_an_error_and_the_device_goes_on() {
    let (image, mut rig) = rig("none", FEATURES);
    let before = image.content();
    let far = RAM_BYTES + 4096;
    let cases: [(&str, u32, Vec<Part>); 15] = [
        ("a header of 15 bytes", IN, vec![(HEADER, 15, 0), (STATUS_BYTE, 1, WRITE)]),
        ("no header", IN, vec![(STATUS_BYTE, 1, WRITE)]),
        ("a header outside RAM", IN, vec![(far, 16, 0), (STATUS_BYTE, 1, WRITE)]),
        ("a header at the end of the world", IN, vec![(u64::MAX - 7, 16, 0), (STATUS_BYTE, 1, WRITE)]),
        ("data outside RAM", IN, vec![(HEADER, 16, 0), (far, 512, WRITE), (STATUS_BYTE, 1, WRITE)]),
        (
            "data across the end of RAM",
            IN,
            vec![(HEADER, 16, 0), (RAM_BYTES - 256, 512, WRITE), (STATUS_BYTE, 1, WRITE)],
        ),
        ("data that wraps", OUT, vec![(HEADER, 16, 0), (u64::MAX - 255, 512, 0), (STATUS_BYTE, 1, WRITE)]),
        ("a write from outside RAM", OUT, vec![(HEADER, 16, 0), (far, 512, 0), (STATUS_BYTE, 1, WRITE)]),
        ("a huge segment", OUT, vec![(HEADER, 16, 0), (DATA, u32::MAX, 0), (STATUS_BYTE, 1, WRITE)]),
        (
            "more than 4 GiB",
            OUT,
            vec![(HEADER, 16, 0), (DATA, u32::MAX, 0), (DATA, u32::MAX, 0), (STATUS_BYTE, 1, WRITE)],
        ),
        ("writable before readable", OUT, vec![(HEADER, 16, 0), (STATUS_BYTE, 1, WRITE), (DATA, 512, 0)]),
        (
            "writable before the header",
            IN,
            vec![(DATA, 512, WRITE), (HEADER, 16, 0), (STATUS_BYTE, 1, WRITE)],
        ),
        ("a read whose data is readable", IN, vec![(HEADER, 16, 0), (DATA, 100, 0), (STATUS_BYTE, 2, WRITE)]),
        (
            "an erase with data outside RAM",
            DISCARD,
            vec![(HEADER, 16, 0), (far, 16, 0), (STATUS_BYTE, 1, WRITE)],
        ),
        ("a serial outside RAM", GET_ID, vec![(HEADER, 16, 0), (far, 20, WRITE), (STATUS_BYTE, 1, WRITE)]),
    ];
    for (what, kind, parts) in cases {
        rig.put_header(kind, 3);
        rig.put_chain(DESC, &parts);
        rig.fill(STATUS_BYTE, UNTOUCHED, 2);
        rig.make_available(&[0]);
        rig.ring_doorbell();
        let (head, _) = rig.wait_used();
        assert_eq!(head, 0, "{what}");
        let bytes = rig.peek(STATUS_BYTE, 2);
        assert!(bytes.contains(&IOERR) && !bytes.contains(&OK), "{what}: {bytes:?}");
        assert!(!rig.needs_reset(), "{what}");
        assert_alive(&mut rig, what);
    }
    assert_eq!(image.content(), before);
}

/// What makes the ring impossible to follow: NEEDS_RESET, told by a configuration interrupt, and a
/// reset makes the device whole again.
/// Shows S2, Q5, Q7, R1, R2, R3, R4, R6, R7 and R9.
#[test]
fn a_broken_ring_asks_for_a_reset_and_survives_it() {
    type Breaks = fn(&mut Rig);
    let cases: [(&str, Breaks); 20] = [
        ("avail.idx jumps", |rig| {
            rig.set_avail_idx(17);
        }),
        ("avail.idx jumps backwards", |rig| rig.set_avail_idx(u16::MAX)),
        ("a head beyond the table", |rig| rig.make_available(&[16])),
        ("a head far beyond the table", |rig| rig.make_available(&[u16::MAX])),
        ("next beyond the table", |rig| {
            rig.put_desc(DESC, 0, (HEADER, 16, NEXT, 16));
            rig.make_available(&[0]);
        }),
        ("a descriptor that is its own next", |rig| {
            rig.put_desc(DESC, 0, (HEADER, 16, NEXT, 0));
            rig.make_available(&[0]);
        }),
        ("a loop of two", |rig| {
            rig.put_desc(DESC, 0, (HEADER, 16, NEXT, 1));
            rig.put_desc(DESC, 1, (DATA, 512, NEXT | WRITE, 0));
            rig.make_available(&[0]);
        }),
        ("no writable byte", |rig| {
            rig.put_chain(DESC, &[(HEADER, 16, 0)]);
            rig.make_available(&[0]);
        }),
        ("only empty descriptors", |rig| {
            rig.put_chain(DESC, &[(HEADER, 0, 0), (STATUS_BYTE, 0, WRITE)]);
            rig.make_available(&[0]);
        }),
        ("a status outside RAM", |rig| {
            rig.put_chain(DESC, &[(HEADER, 16, 0), (RAM_BYTES, 1, WRITE)]);
            rig.make_available(&[0]);
        }),
        ("a nested indirect table", |rig| {
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 16, INDIRECT)]);
            rig.put_chain(INDIRECT_TABLE, &[(INDIRECT_TABLE, 16, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("an indirect descriptor with a next", |rig| {
            rig.put_desc(DESC, 0, (INDIRECT_TABLE, 48, INDIRECT | NEXT, 1));
            rig.make_available(&[0]);
        }),
        ("an indirect table of 24 bytes", |rig| {
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 24, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("an empty indirect table", |rig| {
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 0, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("a chain in an indirect table that is longer than the queue", |rig| {
            let mut parts = vec![(HEADER, 16, 0)];
            parts.extend([(DATA, 32, WRITE); 15]);
            parts.push((STATUS_BYTE, 1, WRITE));
            rig.put_chain(INDIRECT_TABLE, &parts);
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 16 * 17, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("a chain of one descriptor and sixteen in a table", |rig| {
            let mut parts = vec![(DATA, 32, WRITE); 15];
            parts.push((STATUS_BYTE, 1, WRITE));
            rig.put_chain(INDIRECT_TABLE, &parts);
            rig.put_chain(DESC, &[(HEADER, 16, 0), (INDIRECT_TABLE, 16 * 64, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("a loop in an indirect table longer than the queue", |rig| {
            rig.put_desc(INDIRECT_TABLE, 0, (HEADER, 16, NEXT, 300));
            rig.put_desc(INDIRECT_TABLE, 300, (DATA, 512, NEXT | WRITE, 0));
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 16 * 301, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("a next beyond an indirect table longer than the queue", |rig| {
            rig.put_desc(INDIRECT_TABLE, 0, (HEADER, 16, NEXT, 301));
            rig.put_desc(INDIRECT_TABLE, 301, (STATUS_BYTE, 1, WRITE, 0));
            rig.put_chain(DESC, &[(INDIRECT_TABLE, 16 * 301, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("an indirect table of 4 GiB less a descriptor", |rig| {
            rig.put_chain(DESC, &[(INDIRECT_TABLE, u32::MAX - 15, INDIRECT)]);
            rig.make_available(&[0]);
        }),
        ("an indirect table outside RAM", |rig| {
            rig.put_chain(DESC, &[(RAM_BYTES - 16, 32, INDIRECT)]);
            rig.make_available(&[0]);
        }),
    ];
    let (image, mut rig) = rig("none", FEATURES);
    let before = image.content();
    for (what, break_it) in cases {
        rig.start(FEATURES);
        rig.put_header(IN, 3);
        break_it(&mut rig);
        rig.ring_doorbell();
        assert_eq!(rig.wait_interrupt() & 2, 2, "{what}: a configuration interrupt");
        assert!(rig.needs_reset(), "{what}");
        rig.start(FEATURES);
        assert_alive(&mut rig, what);
    }
    assert_eq!(image.content(), before);
}

/// Shows Q7 and R6.
#[test]
fn an_indirect_table_that_was_not_negotiated_breaks_the_ring() {
    let (_image, mut rig) = rig("none", F_FLUSH);
    rig.put_header(IN, 3);
    rig.put_chain(DESC, &[(INDIRECT_TABLE, 48, INDIRECT)]);
    rig.put_chain(INDIRECT_TABLE, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
    rig.make_available(&[0]);
    rig.ring_doorbell();
    assert_eq!(rig.wait_interrupt() & 2, 2);
    assert!(rig.needs_reset());
}

/// Shows R8.
#[test]
fn the_same_head_many_times_in_flight_is_completed_as_often() {
    let (_image, mut rig) = rig("none", FEATURES);
    rig.put_header(IN, 3);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
    for _ in 0..20 {
        rig.make_available(&[0; 16]);
        rig.ring_doorbell();
        for _ in 0..16 {
            assert_eq!(rig.wait_used(), (0, 513));
        }
    }
    assert_alive(&mut rig, "the same head in flight");
}

/// Shows R9 and R12.
#[test]
fn buffers_may_overlap_each_other_the_header_and_the_rings() {
    let (_image, mut rig) = rig("none", FEATURES);
    for (what, data, status) in [
        ("the status inside the data", DATA, DATA + 17),
        ("the data over the header", HEADER - 256, STATUS_BYTE),
        ("the status over the header", DATA, HEADER),
        ("the data over the descriptors", DESC + 64, STATUS_BYTE),
    ] {
        rig.put_header(IN, 3);
        rig.put_chain(DESC, &[(HEADER, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
        rig.make_available(&[0]);
        rig.ring_doorbell();
        assert_eq!(rig.wait_used(), (0, 513), "{what}");
        assert_alive(&mut rig, what);
    }
    // Sixteen zero bytes of the used ring are a legal, if strange, place for a header; whatever the
    // device makes of data over its used ring, a reset mends it.
    rig.put_header(IN, 3);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (USED, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
    rig.make_available(&[0]);
    rig.ring_doorbell();
    rig.wait_interrupt();
    rig.start(FEATURES);
    assert_alive(&mut rig, "data over the used ring");
}

/// All that describes a request is overwritten when the host begins with it. Shows R13.
#[test]
fn a_request_is_what_it_was_when_it_was_taken_whatever_the_guest_makes_of_it_later() {
    const SECTOR: u64 = 40;
    for (kind, direction, written, expected) in
        [(IN, WRITE, 513, pattern(SECTOR)), (OUT, 0, 1, 0x5a), (WRITE_ZEROES, 0, 1, 0)]
    {
        let image = TestImage::new(IMAGE_BYTES);
        let opened = image.open("none");
        let shared = Arc::new(OnceLock::<Ram>::new());
        let ram = Arc::clone(&shared);
        let script = move |_, _| {
            for (addr, bytes) in [(HEADER, 16), (DESC, 16 * 16), (AVAIL + 4, 2 * 16)] {
                mem::write_bytes(ram.get().unwrap(), addr, &vec![0xee; bytes]).unwrap();
            }
            Fate::Real
        };
        let (engine, log) = Scripted::with_log(&opened, Box::new(script));
        let mut rig = Rig::with_engine(opened, engine, StableBy::Dsync);
        assert!(shared.set(rig.ram.clone()).is_ok());
        rig.start(FEATURES);
        rig.fill(DATA, 0x5a, 512);
        if kind == WRITE_ZEROES {
            rig.poke(DATA, &[SECTOR.to_le_bytes(), 1u64.to_le_bytes()].concat());
        }
        let bytes = if kind == WRITE_ZEROES { 16 } else { 512 };
        rig.put_header(kind, SECTOR);
        rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, bytes, direction), (STATUS_BYTE, 1, WRITE)]);
        rig.fill(STATUS_BYTE, UNTOUCHED, 1);
        rig.make_available(&[0]);
        rig.ring_doorbell();
        assert_eq!(rig.wait_used(), (0, written), "type {kind}");
        assert_eq!(rig.peek(STATUS_BYTE, 1), [OK], "type {kind}");
        assert_eq!(log.lock().unwrap().len(), 1, "type {kind}: one operation of the host");
        let mut content = vec![pattern(SECTOR - 1); 512];
        content.extend([[expected; 512], [pattern(SECTOR + 1); 512]].concat());
        assert_eq!(image.content()[39 * 512..42 * 512], content, "type {kind}");
        if kind == IN {
            assert_eq!(rig.peek(DATA, 512), [expected; 512]);
        }
        rig.start(FEATURES);
        assert_alive(&mut rig, "a request that changed");
    }
}

#[test]
fn a_full_ring_of_requests_is_answered_completely() {
    let (_image, mut rig) = rig("none", FEATURES);
    // Five requests of three descriptors fit into sixteen.
    for index in 0..5u16 {
        let base = 3 * index;
        let header = HEADER + 64 * u64::from(index);
        rig.poke(header, &IN.to_le_bytes());
        rig.poke(header + 8, &u64::from(index).to_le_bytes());
        rig.put_desc(DESC, base, (header, 16, NEXT, base + 1));
        rig.put_desc(DESC, base + 1, (DATA + 512 * u64::from(index), 512, NEXT | WRITE, base + 2));
        rig.put_desc(DESC, base + 2, (STATUS_BYTE + u64::from(index), 1, WRITE, 0));
    }
    for _ in 0..100 {
        rig.fill(STATUS_BYTE, UNTOUCHED, 5);
        rig.make_available(&[0, 3, 6, 9, 12]);
        rig.ring_doorbell();
        let mut heads: Vec<_> = (0..5).map(|_| rig.wait_used().0).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 3, 6, 9, 12]);
        assert_eq!(rig.peek(STATUS_BYTE, 5), [OK; 5]);
    }
    for index in 0..5 {
        assert_eq!(rig.peek(DATA + 512 * index, 512), [pattern(index); 512]);
    }
}

/// Puts a GET_ID at descriptor 3, answered without the disk: as fast as anything can be.
fn put_get_id(rig: &Rig) {
    rig.poke(HEADER + 64, &GET_ID.to_le_bytes());
    rig.poke(HEADER + 72, &0u64.to_le_bytes());
    rig.put_desc(DESC, 3, (HEADER + 64, 16, NEXT, 4));
    rig.put_desc(DESC, 4, (DATA + 4096, 20, NEXT | WRITE, 5));
    rig.put_desc(DESC, 5, (STATUS_BYTE + 1, 1, WRITE, 0));
}

/// Shows R17.
#[test]
fn a_queue_that_is_never_empty_keeps_no_request_from_its_answer() {
    let (_image, mut rig) = rig("none", FEATURES);
    put_get_id(&rig);
    for round in 0..50 {
        rig.put_header(IN, 3);
        rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
        rig.fill(STATUS_BYTE, UNTOUCHED, 1);
        rig.make_available(&[0]);
        rig.make_available(&[3; 15]);
        rig.ring_doorbell();
        let (mut others, mut answered) = (0u32, false);
        // For each answer that is none to the read there is another GET_ID: the ring stays full.
        while !answered {
            match rig.wait_used().0 {
                0 => answered = true,
                _ => {
                    others += 1;
                    rig.make_available(&[3]);
                    rig.ring_doorbell();
                }
            }
            assert!(others < 100_000, "round {round}: the read waits for an empty queue");
        }
        assert_eq!(rig.peek(STATUS_BYTE, 1), [OK]);
        for _ in 0..15 {
            rig.wait_used();
        }
    }
    assert_alive(&mut rig, "a queue that is never empty");
}

/// Shows R17.
#[test]
fn a_storm_on_one_disk_leaves_another_answering() {
    use std::sync::atomic::{AtomicU64, Ordering};
    const STORM: u64 = 2000;
    let errors = AtomicU64::new(0);
    let (_quiet_image, mut quiet) = rig("none", FEATURES);
    let mut took = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (_image, mut rig) = rig("none", FEATURES);
            // A header of 15 bytes: an error, a line of the log held back, and the next.
            rig.put_chain(DESC, &[(HEADER, 15, 0), (STATUS_BYTE, 1, WRITE)]);
            while errors.load(Ordering::Relaxed) < STORM {
                rig.make_available(&[0; 16]);
                (0..100).for_each(|_| rig.ring_doorbell());
                (0..16).for_each(|_| assert_eq!(rig.wait_used().0, 0));
                errors.fetch_add(16, Ordering::Relaxed);
            }
            assert_alive(&mut rig, "its own storm");
        });
        while errors.load(Ordering::Relaxed) < STORM {
            let asked = std::time::Instant::now();
            assert_alive(&mut quiet, "another disk's storm");
            took.push(asked.elapsed());
        }
    });
    took.sort();
    let median = took[took.len() / 2];
    assert!(
        median < std::time::Duration::from_millis(100),
        "half of {} took {median:?} and more",
        took.len()
    );
}
