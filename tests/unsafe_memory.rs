//! The unsafe code over guest memory, in runs that are short enough for Miri (`make miri`): rings shared
//! with a driver in another thread, descriptors at any address, copies, pieces, buffers.
//!
//! Miri looks at each access: inside its allocation, aligned, initialized, no data race, no reference that
//! excludes it. What is asserted besides is little; the other suites know more of the same code.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests may")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "each is an access to RAM of the test's own")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use minivmm::mem::{self, AlignedBuffer, BufferPool, Iov, Ram, Segment};
use minivmm::virtio::feature::{EVENT_IDX, INDIRECT_DESC};
use minivmm::virtio::queue::{QueueConfig, Ring};

const REGION: u64 = 0x2000;
const SECOND: u64 = 0x4000;
const DESCRIPTORS: u64 = 0x100;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
const TABLE: u64 = SECOND + 0x101;
const SIZE: u16 = 4;

fn ram() -> Ram {
    mem::map_ram(&[(0, REGION), (SECOND, REGION)]).unwrap()
}

fn ring(ram: &Ram, features: u64) -> Ring {
    let config =
        QueueConfig { size: SIZE.into(), descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
    Ring::new(ram, &config, SIZE, features).unwrap()
}

fn descriptor(ram: &Ram, table: u64, index: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    mem::write_bytes(ram, table + 16 * index, &bytes).unwrap();
}

/// A field that driver and device share, as a driver accesses it.
fn field(ram: &Ram, addr: u64) -> &AtomicU16 {
    unsafe { AtomicU16::from_ptr(ram.host(addr, 2).unwrap().cast()) }
}

#[test]
fn a_driver_in_another_thread_shares_the_rings_without_a_race() {
    const ROUNDS: u16 = 24;
    for features in [0, EVENT_IDX] {
        let ram = ram();
        let mut ring = ring(&ram, features);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let slot = u64::from(round % SIZE);
                    // The slot's former descriptor came back: nobody else reads it.
                    descriptor(&ram, DESCRIPTORS, slot, (0x1000 + slot, 16 + u32::from(round), 2, 0));
                    field(&ram, AVAILABLE + 4 + 2 * slot).store(slot as u16, Ordering::Relaxed);
                    field(&ram, AVAILABLE + 2).store(round + 1, Ordering::Release);
                    while field(&ram, USED + 2).load(Ordering::Acquire) != round + 1 {
                        std::hint::spin_loop();
                    }
                    let entry = USED + 4 + 8 * slot;
                    assert_eq!(field(&ram, entry).load(Ordering::Relaxed), slot as u16);
                    assert_eq!(field(&ram, entry + 4).load(Ordering::Relaxed), round);
                }
            });
            let mut done = 0;
            while done < ROUNDS {
                let Some(chain) = ring.pop().unwrap() else {
                    std::hint::spin_loop();
                    continue;
                };
                assert_eq!(chain.writable[0].len, 16 + u32::from(done));
                ring.push_used(chain.head, done.into()).unwrap();
                let _ = ring.publish();
                ring.enable_doorbell();
                ring.disable_doorbell();
                done += 1;
            }
        });
    }
}

#[test]
fn descriptors_are_read_at_any_address_and_none_outside() {
    let ram = ram();
    let mut ring = ring(&ram, INDIRECT_DESC);
    for index in 0..3 {
        let flags = if index == 2 { 2 } else { 1 };
        descriptor(&ram, TABLE, index, (0x1000, 16, flags, index as u16 + 1));
    }
    let last_table = SECOND + REGION - 48;
    for (table, bytes, is_whole) in
        [(TABLE, 48, true), (last_table, 48, false), (last_table + 1, 48, false), (u64::MAX - 8, 16, false)]
    {
        descriptor(&ram, DESCRIPTORS, 0, (table, bytes, 4, 0));
        let idx = field(&ram, AVAILABLE + 2).load(Ordering::Relaxed);
        field(&ram, AVAILABLE + 2).store(idx + 1, Ordering::Release);
        let popped = ring.pop();
        let segments =
            popped.map(|chain| chain.map_or(0, |chain| chain.readable.len() + chain.writable.len()));
        // A table of zeroes is one chain of one empty descriptor.
        let expected = if is_whole { Some(3) } else { (table == last_table).then_some(1) };
        assert_eq!(segments.ok(), expected, "{table:#x}");
    }
}

#[test]
fn pieces_are_copied_in_parts_and_over_each_other() {
    let ram = ram();
    let all: Vec<u8> = (0..REGION).map(|at| at as u8).collect();
    mem::write_bytes(&ram, 0, &all).unwrap();
    let segment = |addr, len| Segment { addr, len };
    let whole =
        Iov::new(&ram, &[segment(3, 40), segment(5, 0), segment(100, 1), segment(SECOND + 7, 60)]).unwrap();
    for (skip, len, pieces_max) in [(0, 101, 9), (1, 39, 9), (40, 2, 1), (39, 61, 2), (101, 5, 9)] {
        let part = whole.part(skip, len, pieces_max);
        let buffer = Arc::new(AlignedBuffer::new(128, 64).unwrap());
        assert_eq!(part.copy_to(&Iov::from_buffer(&buffer, 128)), part.bytes());
    }
    for (from, to) in [(10, 12), (12, 10), (10, 10), (10, 300)] {
        mem::write_bytes(&ram, 0, &all).unwrap();
        let (source, target) = (segment(from, 64), segment(to, 64));
        let source = Iov::new(&ram, &[source]).unwrap();
        source.copy_to(&Iov::new(&ram, &[target]).unwrap());
        let mut found = [0; 64];
        mem::read_bytes(&ram, to, &mut found).unwrap();
        assert_eq!(&found[..], &all[from as usize..from as usize + 64], "{from} to {to}");
    }
    assert!(Iov::new(&ram, &[segment(REGION - 1, 2)]).is_err());
    assert!(Iov::new(&ram, &[segment(u64::MAX, 1)]).is_err());
    drop(ram);
    // The pieces keep what they point to.
    assert_eq!(whole.part(2, 50, 9).copy_to(&whole), 50);
}

#[test]
fn buffers_are_used_again_and_freed_with_their_last_user() {
    let ram = ram();
    mem::write_bytes(&ram, 0, &[7; 64]).unwrap();
    let source = Iov::new(&ram, &[Segment { addr: 0, len: 64 }]).unwrap();
    let mut pool = BufferPool::new(64, 16, 2);
    for _ in 0..3 {
        let copies: Vec<Iov> = (0..3).map(|_| pool.take_copy(&source).unwrap()).collect();
        assert_eq!(copies[2].copy_to(&source), 64);
        drop(copies);
        let zeroes = pool.take_zeroed(48).unwrap();
        zeroes.copy_to(&Iov::new(&ram, &[Segment { addr: 128, len: 48 }]).unwrap());
        let mut found = [1; 48];
        mem::read_bytes(&ram, 128, &mut found).unwrap();
        assert_eq!(found, [0; 48]);
        assert!(pool.take_zeroed(1000).unwrap().bytes() == 1000);
    }
    let last = pool.take_zeroed(64).unwrap();
    drop(pool);
    std::thread::spawn(move || assert_eq!(last.copy_to(&source), 64)).join().unwrap();
}
