//! The register and status machine and its mmio map, as tables over the rules S and M of
//! `docs/requirements.md` (virtio 2.1 to 2.5, 3.1, 4.2.2). Rings are in `rings.rs`, drains in `reset.rs`.

use std::sync::Arc;

use minivmm::bus::BusDevice;
use minivmm::disk::{DiskConfig, Image};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, pattern};

const IMAGE_BYTES: u64 = 1 << 20;
const ALIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const FAILED: u32 = 128;
/// What a writable disk offers.
const OFFERED: u64 = F_VERSION_1
    | F_EVENT_IDX
    | F_INDIRECT
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_TOPOLOGY
    | F_FLUSH
    | F_CONFIG_WCE
    | F_DISCARD
    | F_WRITE_ZEROES;
const CONFIG_BYTES: u64 = 60;
const WRITEBACK: u64 = 32;

fn rig_with(options: impl FnOnce(DiskConfig) -> DiskConfig) -> (TestImage, Rig) {
    let test = TestImage::new(IMAGE_BYTES);
    let image = Image::open(&options(test.options("none"))).unwrap();
    (test, Rig::new(Arc::new(image)))
}

fn rig() -> (TestImage, Rig) {
    rig_with(|options| options)
}

/// A device from the first moment to its end, by name.
fn states() -> Vec<(&'static str, TestImage, Rig)> {
    let (fresh_image, fresh) = rig();
    let (negotiated_image, mut negotiated) = rig();
    assert!(negotiated.negotiate(OFFERED));
    let (live_image, mut live) = rig();
    live.start(OFFERED);
    let (broken_image, mut broken) = rig();
    broken.start(OFFERED);
    break_the_ring(&mut broken);
    [
        ("fresh", fresh_image, fresh),
        ("negotiated", negotiated_image, negotiated),
        ("live", live_image, live),
        ("broken", broken_image, broken),
    ]
    .into()
}

/// Announces more chains than the ring has entries, and waits for DEVICE_NEEDS_RESET.
fn break_the_ring(rig: &mut Rig) {
    rig.set_avail_idx(rig.size + 1);
    rig.ring_doorbell();
    assert_eq!(rig.wait_interrupt(), 2, "a configuration change");
    assert!(rig.needs_reset());
}

/// All that can be read, but for interrupts, which come when they come.
fn registers(rig: &mut Rig) -> Vec<u32> {
    (0..0x200).step_by(4).filter(|&at| at != reg::INTERRUPT_STATUS).map(|at| rig.read(at)).collect()
}

/// With EVENT_IDX a driver hears of the next answer only if it says so.
fn listen(rig: &Rig) {
    rig.poke(AVAIL + 4 + 2 * u64::from(rig.size), &rig.used_idx().to_le_bytes());
}

/// A request that shows that the device is alive.
fn works(rig: &mut Rig) {
    rig.start(OFFERED);
    let (status, data) = rig.read_sectors(8, 4096);
    assert_eq!((status, data[0], data[4095]), (OK, pattern(8), pattern(15)));
}

/// Shows M7 and R16.
#[test]
fn an_access_of_any_width_anywhere_is_answered_and_only_aligned_words_reach_registers() {
    for (state, _image, mut rig) in states() {
        for offset in (0..0x220).chain([0x1000, u64::MAX - 7, u64::MAX]) {
            for width in (0..=9).chain([16, 64]) {
                let mut data = vec![0xee; width];
                rig.mmio.read(offset, &mut data);
                let control = width.min(reg::CONFIG.saturating_sub(offset) as usize);
                if control != 4 || offset % 4 != 0 {
                    assert_eq!(data[..control], vec![0; control], "{state} {offset:#x} {width}");
                }
            }
        }
        let before = registers(&mut rig);
        for offset in 0..reg::CONFIG {
            let words = |width: usize| width.min((reg::CONFIG - offset) as usize) == 4 && offset % 4 == 0;
            for width in (0..=9).chain([16, 64]).filter(|&width| !words(width)) {
                for byte in [0, 0xff] {
                    rig.mmio.write(offset, &vec![byte; width]);
                }
            }
        }
        assert_eq!(registers(&mut rig), before, "{state}");
    }
}

/// Shows M1, M8 and M9.
#[test]
fn it_says_what_it_is_and_cannot_be_told_otherwise() {
    for (state, _image, mut rig) in states() {
        for _ in 0..2 {
            assert_eq!(rig.read(reg::MAGIC), 0x7472_6976, "{state}");
            assert_eq!(rig.read(reg::VERSION), 2, "{state}");
            assert_eq!(rig.read(reg::DEVICE_ID), 2, "{state}");
            for at in [reg::MAGIC, reg::VERSION, reg::DEVICE_ID, 0x00c, reg::DEVICE_FEATURES] {
                rig.write(at, 0xffff_ffff);
            }
        }
        for (at, what) in [(0xb0, "length"), (0xb4, "length"), (0xb8, "base"), (0xbc, "base")] {
            assert_eq!(rig.read(at), u32::MAX, "{state}: {what} of a shared memory region that is not there");
        }
        assert_eq!(rig.read(0x0c0), 0, "{state}: QueueReset without RING_RESET");
    }
}

/// Shows S5, S11, Q12 and B1.
#[test]
fn each_kind_of_disk_offers_its_features_and_no_others() {
    for (readonly, discard, expected) in [
        (false, true, OFFERED),
        (false, false, OFFERED & !F_DISCARD),
        (true, false, OFFERED & !F_DISCARD & !F_WRITE_ZEROES | F_RO),
        (true, true, OFFERED & !F_DISCARD & !F_WRITE_ZEROES | F_RO),
    ] {
        let (_image, mut rig) = rig_with(|options| DiskConfig { readonly, discard, ..options });
        assert_eq!(rig.offered(), expected, "readonly {readonly}, discard {discard}");
    }
}

/// Shows M6.
#[test]
fn feature_pages_from_2_on_read_0_and_take_nothing() {
    let (_image, mut rig) = rig();
    assert!(rig.negotiate(OFFERED));
    rig.write(reg::STATUS, 0);
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    for (sel, half) in [(0, OFFERED & 0xffff_ffff), (1, OFFERED >> 32)] {
        rig.write(reg::DRIVER_FEATURES_SEL, sel);
        rig.write(reg::DRIVER_FEATURES, half as u32);
    }
    for sel in [2, 3, 32, 33, 0x8000_0000, 0xffff_fffe, u32::MAX] {
        rig.write(reg::DEVICE_FEATURES_SEL, sel);
        assert_eq!(rig.read(reg::DEVICE_FEATURES), 0, "page {sel}");
        rig.write(reg::DRIVER_FEATURES_SEL, sel);
        rig.write(reg::DRIVER_FEATURES, u32::MAX);
    }
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(rig.read(reg::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

/// Shows S4, S6 and B2.
#[test]
fn every_subset_of_the_offer_is_accepted_if_version_1_is_in_it() {
    let (_image, mut rig) = rig();
    let bits: Vec<u64> = (0..64).map(|bit| 1 << bit).filter(|bit| rig.offered() & bit != 0).collect();
    assert_eq!(bits.len(), 10);
    for chosen in 0..1u32 << bits.len() {
        let taken = |&(at, _): &(usize, &u64)| chosen >> at & 1 == 1;
        let features = bits.iter().enumerate().filter(taken).map(|(_, bit)| bit).sum::<u64>();
        assert_eq!(rig.negotiate(features), features & F_VERSION_1 != 0, "{features:#x}");
        // CONFIG_WCE without FLUSH begins as writethrough and stays so (virtio 5.2.5.2).
        if features & F_VERSION_1 != 0 {
            let forced = features & F_CONFIG_WCE != 0 && features & F_FLUSH == 0;
            assert_eq!(rig.config(WRITEBACK, 1), u64::from(!forced), "{features:#x}");
            rig.set_writeback(1);
            assert_eq!(rig.config(WRITEBACK, 1), u64::from(!forced), "{features:#x}");
        }
    }
}

/// Shows S4.
#[test]
fn a_feature_that_was_not_offered_is_refused_whatever_comes_with_it() {
    let (_image, mut rig) = rig();
    for bit in (0..64).map(|bit| 1u64 << bit).filter(|bit| OFFERED & bit == 0) {
        for rest in [F_VERSION_1, OFFERED] {
            assert!(!rig.negotiate(rest | bit), "{bit:#x}");
            assert_eq!(rig.read(reg::STATUS), ACKNOWLEDGE | DRIVER);
            rig.write(reg::STATUS, ALIVE);
            assert_eq!(rig.read(reg::STATUS), ACKNOWLEDGE | DRIVER, "no DRIVER_OK either");
        }
    }
    // The driver may think again without a reset, and a set that worked once works again.
    rig.write(reg::DRIVER_FEATURES_SEL, 0);
    rig.write(reg::DRIVER_FEATURES, 0);
    rig.write(reg::DRIVER_FEATURES_SEL, 1);
    rig.write(reg::DRIVER_FEATURES, 1);
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(rig.read(reg::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert!(rig.negotiate(OFFERED) && rig.negotiate(OFFERED));
}

/// Shows S7.
#[test]
fn features_do_not_change_after_features_ok() {
    let (_image, mut rig) = rig();
    assert!(rig.negotiate(F_VERSION_1));
    for sel in [0, 1] {
        rig.write(reg::DRIVER_FEATURES_SEL, sel);
        rig.write(reg::DRIVER_FEATURES, (OFFERED >> (32 * sel) & 0xffff_ffff) as u32);
    }
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    rig.set_writeback(0);
    assert_eq!(rig.config(WRITEBACK, 1), 1, "CONFIG_WCE was not negotiated");
    rig.set_up_queue();
    rig.write(reg::STATUS, ALIVE);
    rig.put_header(GET_ID, 0);
    rig.put_chain(INDIRECT_TABLE, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS_BYTE, 1, WRITE)]);
    rig.put_desc(DESC, 0, (INDIRECT_TABLE, 48, INDIRECT, 0));
    rig.make_available(&[0]);
    rig.ring_doorbell();
    rig.wait_interrupt();
    assert!(rig.needs_reset(), "INDIRECT_DESC was not negotiated");
}

/// Shows S3.
#[test]
fn the_status_register_takes_each_step_and_gives_none_back() {
    let ready = ACKNOWLEDGE | DRIVER;
    let features_ok = ready | FEATURES_OK;
    // What is written one after another, and what can be read in the end.
    let cases: [(&[u32], u32); 15] = [
        (&[], 0),
        (&[ACKNOWLEDGE], ACKNOWLEDGE),
        (&[ACKNOWLEDGE, ready], ready),
        (&[ready, ACKNOWLEDGE], ready),
        (&[ready, DRIVER], ready),
        (&[features_ok], features_ok),
        (&[features_ok, ready], features_ok),
        (&[features_ok, ALIVE, features_ok], ALIVE),
        (&[features_ok, ALIVE, FAILED], ALIVE),
        (&[features_ok, ALIVE, ALIVE | FAILED], ALIVE | FAILED),
        (&[ALIVE], ALIVE),
        (&[ready | DRIVER_OK], ready),
        (&[ready, ready | NEEDS_RESET], ready),
        (&[ALIVE, 0], 0),
        (&[ready, 0xffff_ff00], ready),
    ];
    let (_image, mut rig) = rig();
    for (writes, expected) in cases {
        rig.write(reg::STATUS, 0);
        for sel in [0, 1] {
            rig.write(reg::DRIVER_FEATURES_SEL, sel);
            rig.write(reg::DRIVER_FEATURES, sel);
        }
        rig.set_up_queue();
        for &value in writes {
            rig.write(reg::STATUS, value);
        }
        assert_eq!(rig.read(reg::STATUS), expected, "{writes:x?}");
    }
    works(&mut rig);
}

/// Shows S7 and S8.
#[test]
fn configuration_space_is_readable_always_and_writable_after_features_ok() {
    let (_image, mut rig) = rig();
    assert_eq!(rig.config(0, 8), IMAGE_BYTES / 512, "capacity before anything is negotiated");
    assert_eq!(rig.config(WRITEBACK, 1), 1);
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    rig.set_writeback(0);
    assert_eq!(rig.config(WRITEBACK, 1), 1, "ignored before FEATURES_OK");
    assert!(rig.negotiate(OFFERED));
    rig.set_writeback(0);
    assert_eq!(rig.config(WRITEBACK, 1), 0);
    // A wide write that covers the byte sets it; one that does not, and every other byte, nothing.
    let before: Vec<u64> = (0..CONFIG_BYTES).map(|at| rig.config(at, 1)).collect();
    for (offset, width, sets) in
        [(33, 4, false), (28, 4, false), (32, 0, false), (29, 4, true), (28, 8, true)]
    {
        rig.mmio.write(reg::CONFIG + offset, &vec![0xff; width]);
        assert_eq!(rig.config(WRITEBACK, 1), u64::from(sets), "{width} bytes at {offset}");
        rig.set_writeback(0);
    }
    for offset in (0..0x100).filter(|&at| at != WRITEBACK).chain([u64::MAX - reg::CONFIG]) {
        rig.mmio.write(reg::CONFIG + offset, &[0xff]);
    }
    let after: Vec<u64> = (0..CONFIG_BYTES).map(|at| rig.config(at, 1)).collect();
    assert_eq!(after, before);
}

/// Shows S9 and R16.
#[test]
fn configuration_space_reads_alike_at_every_offset_and_width_and_0_past_its_end() {
    for (state, _image, mut rig) in states() {
        let bytes: Vec<u8> = (0..0x100).map(|at| rig.config(at, 1) as u8).collect();
        assert!(bytes[CONFIG_BYTES as usize..].iter().all(|&byte| byte == 0), "{state}");
        for offset in 0..0xf0 {
            for width in 0..=8 {
                let mut data = vec![0xee; width];
                rig.mmio.read(reg::CONFIG + offset as u64, &mut data);
                assert_eq!(data, bytes[offset..offset + width], "{state}: {width} bytes at {offset}");
            }
        }
    }
}

/// Shows M6 and R14.
#[test]
fn queues_that_are_not_there_read_0_and_take_nothing() {
    let (_image, mut rig) = rig();
    assert!(rig.negotiate(OFFERED));
    rig.set_up_queue();
    for sel in [1, 2, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
        rig.write(reg::QUEUE_SEL, sel);
        assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 0, "queue {sel}");
        assert_eq!(rig.read(reg::QUEUE_READY), 0, "queue {sel}");
        rig.write(reg::QUEUE_SIZE, 8);
        rig.write64(reg::QUEUE_DESC, 0xdead_0000);
        rig.write(reg::QUEUE_READY, 1);
        assert_eq!(rig.read(reg::QUEUE_READY), 0, "queue {sel}");
        rig.write(reg::QUEUE_READY, 0);
    }
    rig.write(reg::QUEUE_SEL, 0);
    assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 256);
    assert_eq!(rig.read(reg::QUEUE_READY), 1, "queue 0 is as it was");
    rig.write(reg::STATUS, ALIVE);
    assert_eq!(rig.read_sectors(8, 512).0, OK);
}

/// Shows Q1 and R14.
#[test]
fn a_queue_that_cannot_be_is_not_enabled() {
    let good = (16, DESC, AVAIL, USED);
    let cases = [
        ("size 0", (0, DESC, AVAIL, USED)),
        ("no power of two", (15, DESC, AVAIL, USED)),
        ("larger than offered", (512, DESC, AVAIL, USED)),
        ("a size of 16 in its low half", (0x1_0010, DESC, AVAIL, USED)),
        ("the largest number", (u32::MAX, DESC, AVAIL, USED)),
        ("descriptors on 8 bytes", (16, DESC + 8, AVAIL, USED)),
        ("available ring on an odd byte", (16, DESC, AVAIL + 1, USED)),
        ("used ring on 2 bytes", (16, DESC, AVAIL, USED + 2)),
        ("descriptors outside RAM", (16, RAM_BYTES, AVAIL, USED)),
        ("available ring outside RAM", (16, DESC, RAM_BYTES + 64, USED)),
        ("used ring outside RAM", (16, DESC, AVAIL, 1 << 40)),
        ("descriptors across the end of RAM", (16, RAM_BYTES - 240, AVAIL, USED)),
        ("available ring across the end of RAM", (16, DESC, RAM_BYTES - 36, USED)),
        ("used ring across the end of RAM", (16, DESC, AVAIL, RAM_BYTES - 132)),
        ("descriptors that wrap", (16, u64::MAX - 15, AVAIL, USED)),
        ("available ring that wraps", (16, DESC, u64::MAX - 1, USED)),
        ("used ring that wraps", (16, DESC, AVAIL, u64::MAX - 3)),
    ];
    let (_image, mut rig) = rig();
    let set = |rig: &mut Rig, (size, desc, avail, used): (u32, u64, u64, u64)| {
        rig.write(reg::QUEUE_SEL, 0);
        rig.write(reg::QUEUE_SIZE, size);
        rig.write64(reg::QUEUE_DESC, desc);
        rig.write64(reg::QUEUE_DRIVER, avail);
        rig.write64(reg::QUEUE_DEVICE, used);
        rig.write(reg::QUEUE_READY, 1);
        rig.read(reg::QUEUE_READY)
    };
    for (what, config) in cases {
        assert!(rig.negotiate(OFFERED));
        assert_eq!(set(&mut rig, config), 0, "{what}");
        // A driver that goes on all the same has a device without a queue, and nothing happens.
        rig.write(reg::STATUS, ALIVE);
        rig.ring_doorbell();
        assert_eq!(rig.read(reg::STATUS), ALIVE, "{what}");
    }
    for exact in [
        (16, RAM_BYTES - 256, AVAIL, USED),
        (16, DESC, RAM_BYTES - 38, USED),
        (16, DESC, AVAIL, RAM_BYTES - 136),
        (1, DESC, AVAIL, USED),
        (256, DESC, AVAIL, USED),
        good,
    ] {
        assert!(rig.negotiate(OFFERED));
        assert_eq!(set(&mut rig, exact), 1, "{exact:x?} fits exactly");
        rig.write(reg::QUEUE_READY, 0);
        assert_eq!(rig.read(reg::QUEUE_READY), 0);
    }
    works(&mut rig);
}

/// Shows M5 and R14.
#[test]
fn a_live_queue_does_not_change() {
    let (_image, mut rig) = rig();
    rig.start(OFFERED);
    rig.write(reg::QUEUE_SEL, 0);
    rig.write(reg::QUEUE_SIZE, 0);
    for part in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        rig.write64(part, 0xdead_beef_0000);
    }
    for ready in [1, 1, 2, u32::MAX] {
        rig.write(reg::QUEUE_READY, ready);
        assert_eq!(rig.read(reg::QUEUE_READY), 1, "after {ready}");
    }
    for sector in 0..40 {
        listen(&rig);
        assert_eq!(rig.read_sectors(sector, 512), (OK, vec![pattern(sector); 512]));
    }
}

/// Shows S11 and M5.
#[test]
fn a_stopped_queue_reads_not_ready_and_starts_again_only_after_reset() {
    let (_image, mut rig) = rig();
    rig.start(OFFERED);
    assert_eq!(rig.read_sectors(8, 512).0, OK);
    rig.write(reg::QUEUE_READY, 0);
    assert_eq!(rig.read(reg::QUEUE_READY), 0);
    rig.make_available(&[0]);
    rig.ring_doorbell();
    rig.write(reg::QUEUE_READY, 1);
    assert_eq!(rig.read(reg::QUEUE_READY), 0);
    assert_eq!(rig.read(reg::STATUS), ALIVE);
    assert_eq!(rig.used_idx(), 1, "what was made available after it stays");
    works(&mut rig);
}

/// Shows M3.
#[test]
fn reset_forgets_everything_the_driver_said() {
    for (state, _image, mut rig) in states() {
        let (_other, mut new) = self::rig();
        if state == "live" {
            rig.put_chain(DESC, &[(HEADER, 16, 0), (STATUS_BYTE, 1, WRITE)]);
            rig.make_available(&[0]);
            rig.ring_doorbell();
            assert!(rig.has_interrupt(10_000));
            assert_eq!(rig.read(reg::INTERRUPT_STATUS), 1, "not acknowledged");
        }
        rig.set_writeback(0);
        rig.write(reg::DEVICE_FEATURES_SEL, 1);
        rig.write(reg::DRIVER_FEATURES_SEL, 1);
        rig.write(reg::QUEUE_SEL, 7);
        let generation = rig.read(reg::CONFIG_GENERATION);
        rig.write(reg::STATUS, 0);
        assert_eq!(rig.read(reg::INTERRUPT_STATUS), 0, "{state}");
        assert_ne!(rig.read(reg::CONFIG_GENERATION), generation, "{state}");
        let differ = |at: &u64| *at != reg::CONFIG_GENERATION && rig.read(*at) != new.read(*at);
        let differing: Vec<u64> = (0..0x200).step_by(4).filter(differ).collect();
        assert!(differing.is_empty(), "{state}: {differing:x?}");
        // Nothing of the old negotiation is left either.
        rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(rig.read(reg::STATUS), ACKNOWLEDGE | DRIVER, "{state}: VERSION_1 was forgotten");
        works(&mut rig);
    }
}

/// Shows M4.
#[test]
fn the_configuration_generation_changes_when_the_device_changes_a_field() {
    let (_image, mut rig) = rig();
    let mut last = rig.read(reg::CONFIG_GENERATION);
    let mut changed = |rig: &mut Rig| {
        let now = rig.read(reg::CONFIG_GENERATION);
        std::mem::replace(&mut last, now) != now
    };
    assert!(rig.negotiate(OFFERED));
    changed(&mut rig);
    rig.set_writeback(0);
    assert!(!changed(&mut rig), "the driver's own write");
    rig.write(reg::STATUS, 0);
    assert!(changed(&mut rig), "reset restores writeback");
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    for (sel, value) in [(0, F_CONFIG_WCE as u32), (1, 1)] {
        rig.write(reg::DRIVER_FEATURES_SEL, sel);
        rig.write(reg::DRIVER_FEATURES, value);
    }
    changed(&mut rig);
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(rig.config(WRITEBACK, 1), 0);
    assert!(changed(&mut rig), "CONFIG_WCE without FLUSH turns writeback off");
}

/// Shows M2.
#[test]
fn interrupt_status_stays_until_it_is_acknowledged_bit_by_bit() {
    let (_image, mut rig) = rig();
    rig.start(OFFERED);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 0);
    rig.put_header(GET_ID, 0);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS_BYTE, 1, WRITE)]);
    rig.make_available(&[0]);
    rig.ring_doorbell();
    assert!(rig.has_interrupt(10_000));
    for ack in [0, 2, 0xffff_fffe] {
        rig.write(reg::INTERRUPT_ACK, ack);
        assert_eq!(rig.read(reg::INTERRUPT_STATUS), 1, "acknowledged {ack:#x}");
    }
    rig.set_avail_idx(1 + rig.size + 1);
    rig.ring_doorbell();
    assert!(rig.has_interrupt(10_000));
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 3);
    rig.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 2);
    rig.write(reg::INTERRUPT_ACK, 2);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 0);
}

/// Shows S2.
#[test]
fn a_broken_ring_sets_needs_reset_for_good_and_tells_the_driver() {
    let (_image, mut rig) = rig();
    rig.start(OFFERED);
    break_the_ring(&mut rig);
    assert_eq!(rig.read(reg::STATUS), ALIVE | NEEDS_RESET);
    rig.write(reg::STATUS, ALIVE);
    rig.write(reg::STATUS, ALIVE | FAILED);
    assert_eq!(rig.read(reg::STATUS), ALIVE | FAILED | NEEDS_RESET, "only reset clears it");
    rig.ring_doorbell();
    works(&mut rig);
}

#[test]
fn answers_given_before_the_ring_broke_are_told_too() {
    let (_image, mut rig) = rig();
    rig.start(F_VERSION_1);
    rig.put_header(GET_ID, 0);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS_BYTE, 1, WRITE)]);
    // Head 99 is beyond the table.
    rig.make_available(&[0, 0, 99]);
    rig.ring_doorbell();
    let mut told = 0;
    while told != 3 {
        told |= rig.wait_interrupt();
    }
    assert_eq!(rig.used_idx(), 2);
    assert!(rig.needs_reset());
}

/// Shows Q10 and R14.
#[test]
fn notifications_without_a_reason_do_no_harm() {
    let (_image, mut rig) = rig();
    let storm = |rig: &mut Rig| {
        for value in [0, 0, 1, 0xffff, 0x1_0000, u32::MAX] {
            rig.write(reg::QUEUE_NOTIFY, value);
        }
    };
    storm(&mut rig);
    assert!(rig.negotiate(OFFERED));
    storm(&mut rig);
    rig.set_up_queue();
    storm(&mut rig);
    rig.write(reg::STATUS, ALIVE);
    for sector in 0..100 {
        storm(&mut rig);
        listen(&rig);
        assert_eq!(rig.read_sectors(sector, 512), (OK, vec![pattern(sector); 512]));
        storm(&mut rig);
    }
    assert_eq!(rig.read(reg::STATUS), ALIVE);
}

/// Shows S1.
#[test]
fn no_buffer_is_consumed_before_driver_ok_and_all_are_after() {
    let (_image, mut rig) = rig();
    assert!(rig.negotiate(OFFERED));
    rig.set_up_queue();
    rig.put_header(GET_ID, 0);
    rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS_BYTE, 1, WRITE)]);
    rig.fill(STATUS_BYTE, UNTOUCHED, 1);
    rig.make_available(&[0, 0, 0]);
    rig.ring_doorbell();
    assert!(!rig.has_interrupt(0));
    assert_eq!((rig.used_idx(), rig.peek(STATUS_BYTE, 1)[0]), (0, UNTOUCHED));
    rig.write(reg::STATUS, ALIVE);
    for _ in 0..3 {
        assert_eq!(rig.wait_used(), (0, 21), "without another notification");
    }
}
