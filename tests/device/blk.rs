//! Every request type, through a driver of our own against the live device (registers, rings, worker
//! thread, real file). Chains that are wrong are the business of `malformed.rs`.

use std::sync::Arc;

use minivmm::disk::{DiskConfig, Image};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, modes, pattern};

/// A descriptor without its next: address, length, flags.
type Part = (u64, u32, u16);

const IMAGE_BYTES: u64 = 1 << 20;
const CAPACITY: u64 = IMAGE_BYTES / 512;
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT;

fn rig(mode: &str, features: u64) -> (TestImage, Rig) {
    let image = TestImage::new(IMAGE_BYTES);
    let rig = Rig::live(image.open(mode), features);
    (image, rig)
}

fn rig_with(features: u64, change: impl FnOnce(&mut DiskConfig)) -> (TestImage, Rig) {
    let image = TestImage::new(IMAGE_BYTES);
    let mut options = image.options("none");
    change(&mut options);
    let rig = Rig::live(Arc::new(Image::open(&options).unwrap()), features);
    (image, rig)
}

/// A request that must work after every attack: reads sector 3.
fn assert_alive(rig: &mut Rig, context: &str) {
    let (status, data) = rig.read_sectors(3, 512);
    assert_eq!((status, data), (OK, vec![pattern(3); 512]), "after {context}");
}

#[test]
fn what_is_written_is_read_back_and_on_the_image_in_every_mode() {
    for mode in modes() {
        let (image, mut rig) = rig(mode, FEATURES);
        let data: Vec<u8> = (0..8192u32).map(|i| (i * 7 % 256) as u8).collect();
        assert_eq!(rig.write_sectors(16, &data), OK, "{mode}");
        assert_eq!(rig.read_sectors(16, 8192), (OK, data.clone()), "{mode}");
        assert_eq!(rig.flush(), OK, "{mode}");
        let content = image.content();
        assert_eq!(content.len() as u64, IMAGE_BYTES);
        assert_eq!(content[16 * 512..32 * 512], data, "{mode}");
        for sector in (0..16).chain(32..CAPACITY) {
            let at = usize::try_from(sector * 512).unwrap();
            assert_eq!(content[at..at + 512], [pattern(sector); 512], "{mode}: sector {sector} changed");
        }
    }
}

/// Shows Q9 and R20.
#[test]
fn used_length_is_data_and_status_for_reads_and_one_for_the_rest() {
    let (_image, mut rig) = rig("none", FEATURES);
    assert_eq!(rig.request(IN, 0, Some((1024, WRITE))), (OK, 1025));
    assert_eq!(rig.request(OUT, 0, Some((1024, 0))), (OK, 1));
    assert_eq!(rig.request(FLUSH, 0, None), (OK, 1));
    assert_eq!(rig.request(GET_ID, 0, Some((20, WRITE))), (OK, 21));
    assert_eq!(rig.request(IN, CAPACITY, Some((512, WRITE))), (IOERR, 0));
    assert_eq!(rig.request(99, 0, Some((512, WRITE))), (UNSUPP, 0));
    assert_eq!(rig.request(99, 0, None), (UNSUPP, 1));
}

/// Shows B14.
#[test]
fn get_id_is_padded_with_nul_and_has_no_terminator_when_full() {
    for (serial, expected) in [
        ("disk-1", *b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("12345678901234567890", *b"12345678901234567890"),
    ] {
        let (_image, mut rig) = rig_with(0, |options| options.serial = Some(serial.into()));
        rig.fill(DATA, 0xee, 32);
        assert_eq!(rig.request(GET_ID, 0, Some((20, WRITE))), (OK, 21));
        assert_eq!(rig.peek(DATA, 21), [&expected[..], &[0xee]].concat());
    }
}

/// Shows B14.
#[test]
fn get_id_into_too_little_space_is_an_error_and_more_space_is_left_alone() {
    let (_image, mut rig) = rig_with(0, |options| options.serial = Some("x".into()));
    assert_eq!(rig.request(GET_ID, 0, Some((19, WRITE))).0, IOERR);
    rig.fill(DATA, 0xee, 32);
    assert_eq!(rig.request(GET_ID, 0, Some((32, WRITE))), (OK, 20));
    assert_eq!(rig.peek(DATA + 20, 12), [0xee; 12]);
}

/// Shows B10.
#[test]
fn a_flush_with_a_sector_or_with_data_is_a_flush() {
    let (_image, mut rig) = rig("none", FEATURES);
    for data in [None, Some((512, 0)), Some((512, WRITE))] {
        assert_eq!(rig.request(FLUSH, 77, data).0, OK, "{data:?}");
    }
}

/// Shows B3, B11 and B18.
#[test]
fn everything_unknown_is_unsupported_and_completed() {
    let (_image, mut rig) = rig("none", FEATURES);
    // SCSI, legacy FLUSH_OUT, GET_LIFETIME, zone requests, SECURE_ERASE, BARRIER, anything.
    for kind in [2, 3, 5, 6, 7, 9, 10, 14, 15, 16, 17, 18, 20, 22, 24, 1 << 31, u32::MAX] {
        assert_eq!(rig.request(kind, 0, Some((512, WRITE))).0, UNSUPP, "type {kind:#x}");
        assert_eq!(rig.request(kind, 0, None).0, UNSUPP, "type {kind:#x}");
    }
    assert_alive(&mut rig, "unknown requests");
}

/// Shows B10, R11 and R22.
#[test]
fn reads_and_writes_beyond_the_capacity_fail_and_the_image_does_not_grow() {
    for mode in modes() {
        let (image, mut rig) = rig(mode, FEATURES);
        let before = image.content();
        let beyond = [CAPACITY, CAPACITY - 1, u64::MAX, u64::MAX / 512, 1 << 55, (1 << 55) + 1, u64::MAX - 1];
        for sector in beyond {
            let sectors = if sector == CAPACITY - 1 { 2 } else { 1 };
            rig.fill(DATA, 0x55, 1024);
            assert_eq!(
                rig.request(OUT, sector, Some((512 * sectors, 0))).0,
                IOERR,
                "{mode} write {sector:#x}"
            );
            assert_eq!(
                rig.request(IN, sector, Some((512 * sectors, WRITE))),
                (IOERR, 0),
                "{mode} {sector:#x}"
            );
            assert_eq!(rig.peek(DATA, 1024), [0x55; 1024], "{mode}: data of a failed read");
        }
        assert_eq!(image.content(), before, "{mode}");
        assert_alive(&mut rig, "out of range requests");
    }
}

/// Shows B10.
#[test]
fn data_that_is_no_whole_number_of_sectors_is_refused() {
    let (image, mut rig) = rig("writeback", FEATURES);
    let before = image.content();
    for len in [1, 511, 513, 1023] {
        assert_eq!(rig.request(OUT, 0, Some((len, 0))).0, IOERR, "write {len}");
        assert_eq!(rig.request(IN, 0, Some((len, WRITE))).0, IOERR, "read {len}");
    }
    assert_eq!(image.content(), before);
}

#[test]
fn a_request_without_data_moves_nothing_and_is_ok() {
    let (image, mut rig) = rig("directsync", FEATURES);
    let before = image.content();
    for kind in [IN, OUT] {
        assert_eq!(rig.request(kind, 5, None), (OK, 1), "type {kind}");
    }
    assert_eq!(image.content(), before);
}

/// Shows Q2 and R10.
#[test]
fn any_legal_cut_into_descriptors_is_accepted() {
    // (readable pieces, writable pieces) of a 1024-byte read and of a 1024-byte write.
    let read_layouts: [&[Part]; 6] = [
        &[(HEADER, 16, 0), (DATA, 1024, WRITE), (STATUS_BYTE, 1, WRITE)],
        &[(HEADER, 16, 0), (DATA, 1025, WRITE)],
        &[(HEADER, 1, 0), (HEADER + 1, 15, 0), (DATA, 1, WRITE), (DATA + 1, 1024, WRITE)],
        &[
            (HEADER, 8, 0),
            (HEADER + 8, 0, 0),
            (HEADER + 8, 8, 0),
            (DATA, 512, WRITE),
            (DATA + 512, 513, WRITE),
        ],
        &[(HEADER, 16, 0), (DATA, 100, WRITE), (DATA + 100, 412, WRITE), (DATA + 512, 513, WRITE)],
        &[(HEADER, 16, 0), (DATA, 3, WRITE), (DATA + 3, 1021, WRITE), (DATA + 1024, 1, WRITE)],
    ];
    for mode in modes() {
        let (_image, mut rig) = rig(mode, FEATURES);
        for layout in read_layouts {
            rig.put_header(IN, 7);
            rig.put_chain(DESC, layout);
            rig.fill(DATA, 0xee, 2048);
            rig.make_available(&[0]);
            rig.ring_doorbell();
            assert_eq!(rig.wait_used(), (0, 1025), "{mode} {layout:?}");
            let expected = [[pattern(7); 512], [pattern(8); 512]].concat();
            assert_eq!(rig.peek(DATA, 1024), expected, "{mode} {layout:?}");
            let (status_addr, len, _) = layout[layout.len() - 1];
            assert_eq!(rig.peek(status_addr + u64::from(len) - 1, 1), [OK], "{mode} {layout:?}");
        }
        let write_layouts: [&[Part]; 4] = [
            &[(HEADER, 16 + 1024, 0), (STATUS_BYTE, 1, WRITE)],
            &[(HEADER, 7, 0), (HEADER + 7, 9 + 500, 0), (HEADER + 516, 524, 0), (STATUS_BYTE, 1, WRITE)],
            &[(HEADER, 16, 0), (HEADER + 16, 512, 0), (HEADER + 528, 512, 0), (STATUS_BYTE, 1, WRITE)],
            &[(HEADER, 16, 0), (HEADER + 16, 1, 0), (HEADER + 17, 1023, 0), (STATUS_BYTE, 1, WRITE)],
        ];
        for (round, layout) in (1u8..).zip(write_layouts) {
            rig.put_header(OUT, 40);
            rig.fill(HEADER + 16, round, 1024);
            rig.put_chain(DESC, layout);
            assert_eq!(rig.submit_chain(), (OK, 1), "{mode} {layout:?}");
            assert_eq!(rig.read_sectors(40, 1024), (OK, vec![round; 1024]), "{mode} {layout:?}");
        }
    }
}

/// Shows Q6.
#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let (_image, mut rig) = rig("none", FEATURES);
    rig.put_header(IN, 9);
    for (direct, indirect) in [
        (&[][..], &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)][..]),
        (&[(HEADER, 16, 0)][..], &[(DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)][..]),
        (&[(HEADER, 16, 0), (DATA, 512, WRITE)][..], &[(STATUS_BYTE, 1, WRITE)][..]),
    ] {
        // F_WRITE on the descriptor of the table is ignored (virtio 2.7.5.3.2).
        for table_flags in [INDIRECT, INDIRECT | WRITE] {
            let table_bytes = u32::try_from(16 * indirect.len()).unwrap();
            let mut parts = direct.to_vec();
            parts.push((INDIRECT_TABLE, table_bytes, table_flags));
            rig.put_chain(DESC, &parts);
            rig.put_chain(INDIRECT_TABLE, indirect);
            rig.fill(DATA, 0xee, 512);
            assert_eq!(rig.submit_chain(), (OK, 513), "{parts:?}");
            assert_eq!(rig.peek(DATA, 512), [pattern(9); 512]);
        }
    }
}

/// virtio 1.2, 2.7.5.3.1 bounds the chain by the queue's size, and the table by nothing.
/// Shows Q7.
#[test]
fn an_indirect_table_may_be_longer_than_the_queue_if_its_chain_is_not() {
    let (_image, mut rig) = rig("none", FEATURES);
    rig.put_header(IN, 9);
    // To the end of RAM, beyond what an index can reach.
    let far = u32::try_from((RAM_BYTES - INDIRECT_TABLE) / 16).unwrap();
    for entries in [1, 15, 16, 17, 18, 256, 4096, far] {
        let mut last = u16::try_from(entries - 1).unwrap_or(u16::MAX);
        let data = RAM_BYTES - 4096;
        // A table of one has the status alone; in all others the chain jumps to the last entry.
        let mut parts = vec![(HEADER, 16, 0), (data, 512, WRITE)];
        if entries > 2 {
            rig.put_desc(INDIRECT_TABLE, 0, (HEADER, 16, NEXT, 1));
            rig.put_desc(INDIRECT_TABLE, 1, (data, 512, NEXT | WRITE, last));
            parts.clear();
        } else {
            last = 0;
        }
        rig.put_desc(INDIRECT_TABLE, last, (STATUS_BYTE, 1, WRITE, 0));
        parts.push((INDIRECT_TABLE, 16 * entries, INDIRECT));
        rig.put_chain(DESC, &parts);
        assert_eq!(rig.submit_chain(), (OK, 513), "{entries} entries");
        assert_eq!(rig.peek(data, 512), [pattern(9); 512]);
        rig.fill(data, 0, 512);
    }
}

/// Shows B12 and B13.
#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_their_neighbours_stay() {
    for mode in modes() {
        for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
            let (image, mut rig) = rig(mode, FEATURES);
            assert_eq!(
                rig.erase(kind, &[(8, 16, flags), (64, 0, flags), (100, 1, flags)]),
                OK,
                "{mode} {kind}"
            );
            let content = image.content();
            assert_eq!(content.len() as u64, IMAGE_BYTES);
            for sector in 0..CAPACITY {
                let erased = (8..24).contains(&sector) || sector == 100;
                let expected = if erased { 0 } else { pattern(sector) };
                let at = usize::try_from(sector * 512).unwrap();
                assert_eq!(content[at..at + 512], [expected; 512], "{mode} {kind} {flags} sector {sector}");
                if erased {
                    assert_eq!(rig.read_sectors(sector, 512), (OK, vec![0; 512]));
                }
            }
        }
    }
}

/// Shows B12 and R19.
#[test]
fn bad_erases_are_refused_with_the_right_status_and_erase_nothing() {
    let (image, mut rig) = rig("none", FEATURES);
    let before = image.content();
    let too_many = u32::try_from(CAPACITY).unwrap() + 1;
    for (kind, segments, expected) in [
        (DISCARD, vec![(0, 8, 1)], UNSUPP),
        (DISCARD, vec![(0, 8, 2)], UNSUPP),
        (DISCARD, vec![(0, 8, 0), (8, 8, 1 << 31)], UNSUPP),
        (WRITE_ZEROES, vec![(0, 8, 2)], UNSUPP),
        (WRITE_ZEROES, vec![(0, 8, 3)], UNSUPP),
        (DISCARD, vec![(0, too_many, 0)], IOERR),
        (WRITE_ZEROES, vec![(0, too_many, 0)], IOERR),
        (WRITE_ZEROES, vec![(CAPACITY, 1, 0)], IOERR),
        (WRITE_ZEROES, vec![(u64::MAX, 1, 0)], IOERR),
        (WRITE_ZEROES, vec![(u64::MAX / 512, u32::MAX, 0)], IOERR),
        (DISCARD, vec![(0, 8, 0), (CAPACITY, 8, 0)], IOERR),
        (DISCARD, vec![(0, 1, 0); 33], IOERR),
        (WRITE_ZEROES, vec![], IOERR),
    ] {
        assert_eq!(rig.erase(kind, &segments), expected, "{kind} {segments:?}");
    }
    for len in [1, 15, 17, 31] {
        assert_eq!(rig.request(DISCARD, 0, Some((len, 0))).0, IOERR, "payload of {len} bytes");
    }
    assert_eq!(image.content(), before);
    assert_alive(&mut rig, "bad erases");
}

/// Shows B12.
#[test]
fn erases_that_were_not_negotiated_are_unsupported() {
    let (image, mut rig) = rig("none", F_FLUSH);
    let before = image.content();
    assert_eq!(rig.erase(DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(image.content(), before);
}

#[test]
fn discard_off_offers_no_discard_and_unmaps_nothing() {
    let (image, mut rig) = rig_with(F_WRITE_ZEROES, |options| options.discard = false);
    assert_eq!(rig.offered() & F_DISCARD, 0);
    assert_eq!(rig.config(56, 1), 0, "write_zeroes_may_unmap");
    assert_eq!(rig.erase(DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 1)]), OK);
    assert_eq!(rig.read_sectors(0, 4096), (OK, vec![0; 4096]));
    drop(image);
}

/// Shows B9.
#[test]
fn a_readonly_disk_answers_every_write_with_ioerr_and_every_flush_with_ok() {
    for features in [F_RO | F_FLUSH, F_FLUSH, 0] {
        let (image, mut rig) = rig_with(features, |options| options.readonly = true);
        let before = image.content();
        assert_eq!(rig.offered() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        assert_eq!(rig.write_sectors(0, &[9; 512]), IOERR);
        assert_eq!(rig.erase(DISCARD, &[(0, 8, 0)]), IOERR);
        assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
        assert_eq!(rig.flush(), OK);
        assert_eq!(rig.request(GET_ID, 0, Some((20, WRITE))).0, OK);
        assert_alive(&mut rig, "writes to a readonly disk");
        assert_eq!(image.content(), before);
    }
}

/// Shows D2.
#[test]
fn memory_that_o_direct_cannot_use_is_bounced_and_right() {
    for mode in ["none", "directsync"] {
        let (image, mut rig) = rig(mode, FEATURES);
        for shift in [1u64, 4, 100, 511] {
            let data: Vec<u8> = (0..4096u32).map(|i| (i * 13 % 255) as u8).collect();
            rig.poke(DATA + shift, &data);
            rig.put_header(OUT, 80);
            rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA + shift, 4096, 0), (STATUS_BYTE, 1, WRITE)]);
            assert_eq!(rig.submit_chain(), (OK, 1), "{mode} +{shift}");
            assert_eq!(image.content()[80 * 512..88 * 512], data, "{mode} +{shift}");
            rig.put_header(IN, 80);
            rig.fill(DATA, 0, 8192);
            rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA + shift, 4096, WRITE), (STATUS_BYTE, 1, WRITE)]);
            assert_eq!(rig.submit_chain(), (OK, 4097), "{mode} +{shift}");
            assert_eq!(rig.peek(DATA + shift, 4096), data, "{mode} +{shift}");
            assert_eq!(rig.peek(DATA, 1)[0], 0, "the byte before");
            assert_eq!(rig.peek(DATA + shift + 4096, 1)[0], 0, "the byte behind");
        }
    }
}

/// Shows D2.
#[test]
fn bounce_always_copies_aligned_transfers_too_and_long_ones_in_turns() {
    let (image, mut rig) = rig_with(0, |options| options.bounce_always = true);
    let data: Vec<u8> = (0..768u32 << 10).map(|i| (i * 31 % 253) as u8).collect();
    assert_eq!(rig.write_sectors(8, &data), OK);
    assert_eq!(rig.read_sectors(8, 768 << 10), (OK, data.clone()));
    assert_eq!(image.content()[4096..4096 + data.len()], data);
    let bounces = rig.image.stats.counters().bounces.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(bounces, 6, "three turns of 256 KiB each way");
}

/// Shows D3.
#[test]
fn with_blocks_of_4096_smaller_requests_of_a_direct_mode_are_refused_not_rewritten() {
    let image = TestImage::new(IMAGE_BYTES);
    let mut options = image.options("none");
    options.block_size = Some(4096);
    let opened = Image::open(&options).unwrap();
    let needs = opened.geometry().alignment.offset;
    let mut rig = Rig::live(Arc::new(opened), 0);
    assert_eq!(rig.config(20, 4), 4096, "blk_size");
    let (status, _) = rig.read_sectors(1, 512);
    // blk_size is advice: where the host can do 512, a request of 512 is served.
    assert_eq!(status, if needs <= 512 { OK } else { IOERR });
}

/// Shows S9, B3 and B15.
#[test]
fn configuration_space_says_what_the_disk_is() {
    let (_image, mut rig) = rig_with(0, |options| options.queue_size = 64);
    assert_eq!(rig.config(0, 8), CAPACITY);
    assert_eq!(rig.config(0, 4), CAPACITY, "the lower half");
    assert_eq!(rig.config(4, 4), 0, "the upper half");
    assert_eq!(rig.config(8, 4), 0, "size_max is not offered");
    assert_eq!(rig.config(12, 4), 62, "seg_max");
    let logical = rig.config(20, 4);
    assert!(logical == 512 || logical == 4096);
    assert_eq!(logical << rig.config(24, 1), 4096, "physical block");
    assert_eq!(rig.config(26, 2), 1, "min_io_size in logical blocks");
    assert_eq!(rig.config(32, 1), 1, "writeback");
    assert_eq!(rig.config(33, 1), 0, "unused0");
    assert_eq!(rig.config(34, 2), 0, "num_queues is not offered");
    assert_eq!((rig.config(36, 4), rig.config(40, 4)), (1 << 22, 32), "discard limits");
    assert_eq!(rig.config(44, 4), logical / 512, "discard alignment");
    assert_eq!((rig.config(48, 4), rig.config(52, 4)), (1 << 22, 32), "write zeroes limits");
    assert_eq!(rig.config(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(rig.config(57, 3), 0, "unused1");
    for offset in [60, 64, 255, 1000, 3000] {
        assert_eq!(rig.config(offset, 8), 0, "beyond the end, at {offset}");
    }
}

/// Shows S5 and B1.
#[test]
fn a_disk_offers_these_features_and_no_others() {
    let (_image, mut rig) = rig("none", 0);
    let always =
        F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_FLUSH | F_CONFIG_WCE | F_BLK_SIZE | F_TOPOLOGY | F_SEG_MAX;
    assert_eq!(rig.offered(), always | F_DISCARD | F_WRITE_ZEROES);
    let (_image, mut rig) = rig_with(0, |options| options.readonly = true);
    assert_eq!(rig.offered(), always | F_RO);
}
