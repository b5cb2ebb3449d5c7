//! Pieces of memory: parts and copies of them against a model, copies over changing and overlapping
//! bytes, and buffers that never show an earlier request's bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use minivmm::mem::{self, AlignedBuffer, BufferPool, Iov, Ram, Segment};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn ram() -> Ram {
    mem::map_ram(&[(0, MIB), (2 * MIB, MIB)]).unwrap()
}

fn bytes(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem::read_bytes(ram, addr, &mut bytes).unwrap();
    bytes
}

fn content(iov: &Iov) -> Vec<u8> {
    let target = ram();
    let all = Segment { addr: 0, len: iov.bytes() as u32 };
    assert_eq!(iov.copy_to(&Iov::new(&target, &[all]).unwrap()), iov.bytes());
    bytes(&target, 0, iov.bytes() as usize)
}

/// Every byte says where it is.
fn numbered(ram: &Ram) {
    let all: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8 ^ (at >> 8) as u8).collect();
    mem::write_bytes(ram, 0, &all).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_part_is_what_a_slice_of_all_the_bytes_is(
        pieces in proptest::collection::vec((0..4000u64, 0..300u32), 0..12),
        skip in 0..2000u64,
        len in prop_oneof![0..2000u64, Just(0x7fff_f000u64)],
        pieces_max in prop_oneof![0..14usize, Just(usize::MAX)],
    ) {
        let ram = ram();
        numbered(&ram);
        let segments: Vec<_> = pieces.iter().map(|&(addr, len)| Segment { addr, len }).collect();
        let iov = Iov::new(&ram, &segments).unwrap();
        let all: Vec<u8> = segments.iter().flat_map(|s| bytes(&ram, s.addr, s.len as usize)).collect();
        prop_assert_eq!(iov.bytes(), all.len() as u64);
        prop_assert_eq!(&content(&iov), &all);

        let part = iov.part(skip, len, pieces_max);
        prop_assert!(part.as_iovecs().len() <= pieces_max.min(segments.len()));
        let total: usize = part.as_iovecs().iter().map(|piece| piece.iov_len).sum();
        prop_assert_eq!(part.bytes(), total as u64);
        let from = (skip as usize).min(all.len());
        let expected = &all[from..(from + part.bytes() as usize)];
        prop_assert_eq!(&content(&part)[..], expected);
        if pieces_max == usize::MAX {
            prop_assert_eq!(part.bytes(), len.min((all.len() - from) as u64));
        }
        // A clone outlives what it was made of.
        let clone = part.clone();
        drop((iov, part));
        prop_assert_eq!(&content(&clone)[..], expected);
    }

    #[test]
    fn a_copy_is_a_memmove_however_the_ranges_overlap(
        from in 0..600u64, to in 0..600u64, len in 0..700u32,
    ) {
        let ram = ram();
        numbered(&ram);
        let mut model = bytes(&ram, 0, 2000);
        model.copy_within(from as usize..from as usize + len as usize, to as usize);
        let iov = |addr| Iov::new(&ram, &[Segment { addr, len }]).unwrap();
        prop_assert_eq!(iov(from).copy_to(&iov(to)), u64::from(len));
        prop_assert_eq!(bytes(&ram, 0, 2000), model);
    }
}

/// Shows R3 and R4.
#[test]
fn what_is_not_wholly_in_ram_is_no_piece() {
    let ram = ram();
    for (addr, len, inside) in [
        (0, 1, true),
        (MIB - 1, 1, true),
        (MIB - 1, 2, false),
        (MIB, 1, false),
        (2 * MIB - 1, 2, false),
        (2 * MIB, MIB as u32, true),
        (2 * MIB, MIB as u32 + 1, false),
        (MIB - 512, MIB as u32 + 1024, false),
        (u64::MAX, 1, false),
        (u64::MAX - 3, 8, false),
        // Nothing is nowhere (R4).
        (u64::MAX, 0, true),
    ] {
        let made = Iov::new(&ram, &[Segment { addr: 0, len: 16 }, Segment { addr, len }]);
        assert_eq!(made.is_ok(), inside, "{addr:#x} + {len:#x}");
        if len > 8 {
            let mut all = vec![0; len as usize];
            assert_eq!(mem::read_bytes(&ram, addr, &mut all).is_ok(), inside, "{addr:#x} + {len:#x}");
            assert_eq!(mem::write_bytes(&ram, addr, &all).is_ok(), inside, "{addr:#x} + {len:#x}");
        }
    }
}

#[test]
fn an_array_stays_where_it_is_when_its_iov_moves_and_is_used_again_only_when_nobody_has_it() {
    let ram = ram();
    let iov = |addr| {
        let pieces = [Segment { addr, len: 512 }, Segment { addr: addr + 1024, len: 512 }];
        Iov::new(&ram, &pieces).unwrap()
    };
    let first = iov(0);
    let place = first.as_iovecs().as_ptr();
    let moved = Box::new(first);
    let clone = moved.clone();
    assert_eq!((moved.as_iovecs().as_ptr(), clone.as_iovecs().as_ptr()), (place, place));
    assert_eq!(clone.part(0, u64::MAX, 1024).as_iovecs().as_ptr(), place, "all of it is shared");
    drop(moved);
    let other = iov(4096);
    assert_ne!(other.as_iovecs().as_ptr(), place, "the clone still has it");
    let base = clone.as_iovecs()[0].iov_base;
    drop(clone);
    let third = iov(8192);
    assert_eq!(third.as_iovecs().as_ptr(), place, "now nobody has it");
    assert_ne!(third.as_iovecs()[0].iov_base, base);
    assert_eq!(third.as_iovecs().len(), 2);
}

#[test]
fn ram_lives_as_long_as_a_piece_of_it() {
    let ram = ram();
    mem::write_bytes(&ram, 100, &[7; 100]).unwrap();
    let iov = Iov::new(&ram, &[Segment { addr: 100, len: 100 }]).unwrap();
    drop(ram);
    // From another thread, too, where it is dropped.
    std::thread::spawn(move || assert_eq!(content(&iov), [7; 100])).join().unwrap();
}

/// Shows R20.
#[test]
fn a_pool_never_hands_out_what_somebody_still_has_or_what_somebody_left() {
    for align in [512, 4096] {
        let mut pool = BufferPool::new(8192, align, 3);
        assert!(pool.is_empty());
        let dirt = Arc::new(AlignedBuffer::new(16384, align).unwrap());
        let ram = ram();
        numbered(&ram);
        let guest = |len| Iov::new(&ram, &[Segment { addr: 1, len }]).unwrap();
        guest(16384).copy_to(&Iov::from_buffer(&dirt, 16384));
        for round in 0..50usize {
            // More than the pool keeps, of every length.
            let lens = [1, 512, 4096, 8192, 8193, 16384];
            let held: Vec<_> = lens.iter().map(|&len| pool.take_zeroed(len).unwrap()).collect();
            let mut places: Vec<_> = held.iter().map(|iov| iov.as_iovecs()[0].iov_base as usize).collect();
            for (iov, len) in held.iter().zip(lens) {
                assert_eq!(content(iov), vec![0; len], "round {round}, {len} bytes");
                assert!(iov.is_aligned(align as u32, 1));
                Iov::from_buffer(&dirt, len).copy_to(iov);
            }
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), lens.len(), "nobody shares");
            assert!(pool.len() <= 3);
            // A clone alone keeps a buffer from being used again.
            let clone = held[1].clone();
            drop(held);
            let before = content(&clone);
            let copies: Vec<_> = (0..6u32).map(|at| pool.take_copy(&guest(1000 + at)).unwrap()).collect();
            for (at, copy) in copies.iter().enumerate() {
                assert_eq!(content(copy), bytes(&ram, 1, 1000 + at), "exactly what was to be copied");
            }
            assert_eq!(content(&clone), before, "a buffer in use was written");
        }
    }
}

/// Shows R12.
#[test]
fn copies_race_with_their_source_and_bring_each_byte_old_or_new() {
    let ram = ram();
    let stop = AtomicBool::new(false);
    let all = Iov::new(&ram, &[Segment { addr: 3, len: 65536 }]).unwrap();
    let sources: Vec<_> = [0x11, 0x22]
        .map(|byte| {
            let buffer = Arc::new(AlignedBuffer::new(65536, 4096).unwrap());
            let filler = self::ram();
            mem::write_bytes(&filler, 0, &[byte; 65536]).unwrap();
            let iov = Iov::from_buffer(&buffer, 65536);
            Iov::new(&filler, &[Segment { addr: 0, len: 65536 }]).unwrap().copy_to(&iov);
            iov
        })
        .into();
    sources[0].copy_to(&all);
    std::thread::scope(|scope| {
        let (target, stop) = (all.clone(), &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for source in &sources {
                    source.copy_to(&target);
                }
            }
        });
        for _ in 0..50 {
            assert!(content(&all).iter().all(|byte| [0x11, 0x22].contains(byte)));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// No assertion about time; `--nocapture` shows it.
#[test]
fn a_copy_beside_memmove() {
    for len in [16usize, 512, 4096, 256 << 10] {
        let buffers = [0, 1].map(|_| Arc::new(AlignedBuffer::new(len, 4096).unwrap()));
        let [from, to] = buffers.each_ref().map(|buffer| Iov::from_buffer(buffer, len));
        let (mut source, mut target) = (vec![1u8; len], vec![2u8; len]);
        let ours = fastest(|| {
            std::hint::black_box(from.copy_to(&to));
        });
        let memmove = fastest(|| {
            target.copy_from_slice(std::hint::black_box(&source));
            std::hint::black_box(&mut source);
        });
        println!("{len:7} bytes: ours {ours:?}, memmove {memmove:?}");
    }
}

fn fastest(mut what: impl FnMut()) -> Duration {
    let round = |_| {
        let started = Instant::now();
        (0..200).for_each(|_| what());
        started.elapsed() / 200
    };
    (0..20).map(round).min().unwrap()
}
