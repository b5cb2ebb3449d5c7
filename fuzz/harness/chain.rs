//! The walk over chains, their frames and the requests in them, against a second walk and against
//! what the parts must add up to. No thread, no disk.

use minivmm::blk::config::{DISCARD, ERASE_SECTORS_MAX, WRITE_ZEROES};
use minivmm::blk::request::{self, Frame, Header, Limits, Request};
use minivmm::disk::geometry::{BUFFERED, Geometry};
use minivmm::mem::{Iov, Segment};
use minivmm::virtio::queue::{Chain, QueueConfig, Ring};

use super::input::Input;
use super::memory::{Memory, REGIONS, is_ram};
use super::walk::{self, F_EVENT_IDX, F_INDIRECT, Walked};

const CAPACITY_SECTORS: u64 = 64;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const ROUNDS_MAX: usize = 64;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut memory = Memory::new();
    configurations(&memory, &mut input);
    let config =
        QueueConfig { size: 1 << input.below(7), descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
    let features = if input.flag() { F_INDIRECT } else { 0 } | if input.flag() { F_EVENT_IDX } else { 0 };
    let limits = Limits {
        geometry: &Geometry {
            capacity_sectors: CAPACITY_SECTORS,
            logical_block: 512,
            physical_block: 512,
            alignment: BUFFERED,
        },
        features: features | input.pick(&[0, DISCARD, WRITE_ZEROES, DISCARD | WRITE_ZEROES]),
        readonly: input.once_in(4),
    };
    let size = u16::try_from(config.size).unwrap();
    let mut ring = Ring::new(&memory.ram, &config, 64, features).expect("a sound configuration");
    let mut next: u16 = 0;
    for _ in 0..ROUNDS_MAX {
        if input.is_empty() {
            return;
        }
        for _ in 0..input.below(12) {
            write_something(&mut memory, &mut input, size);
        }
        let ahead = if input.once_in(8) { input.u16() } else { u16::try_from(input.below(3)).unwrap() };
        let idx = next.wrapping_add(ahead);
        for position in 0..ahead.min(size) {
            let head = if input.once_in(16) { input.u16() } else { u16::from(input.u8()) % size };
            let at = AVAILABLE + 4 + 2 * u64::from(next.wrapping_add(position) % size);
            memory.put(at, &head.to_le_bytes());
        }
        memory.put(AVAILABLE + 2, &idx.to_le_bytes());
        let mut popped = 0;
        loop {
            let expected = expect(&memory, &config, features, next, idx, ahead);
            match (ring.pop(), expected) {
                (Ok(None), Expected::Nothing) => break,
                (Err(_), Expected::Broken) => return,
                (Ok(Some(chain)), Expected::Chain(walked)) => {
                    check_same(&chain, &walked);
                    check_request(&memory, &chain, &limits);
                    ring.push_used(chain.head, 1).expect("a head that was popped");
                }
                (found, _) => panic!("the walk: {found:?}, against the other walk at {next}"),
            }
            next = next.wrapping_add(1);
            popped += 1;
            assert!(popped <= size, "R7: more chains than the ring has entries");
        }
        let _ = ring.publish();
        ring.enable_doorbell();
        memory.take_changes(|range| {
            let used = USED..USED + 6 + 8 * u64::from(size);
            assert!(used.start <= range.start && range.end <= used.end, "{range:#x?} was written");
        });
    }
}

enum Expected {
    Nothing,
    Broken,
    Chain(walk::Chain),
}

fn expect(memory: &Memory, config: &QueueConfig, features: u64, next: u16, idx: u16, ahead: u16) -> Expected {
    let size = u16::try_from(config.size).unwrap();
    if ahead > size {
        return Expected::Broken;
    }
    if next == idx {
        return Expected::Nothing;
    }
    let head = memory.u16(config.available + 4 + 2 * u64::from(next % size)).unwrap();
    match walk::walk(memory, config, features, head) {
        Walked::Broken => Expected::Broken,
        Walked::Chain(chain) => Expected::Chain(chain),
    }
}

/// Whatever a driver says of a queue: it is taken if the specification allows it, and all in RAM.
fn configurations(memory: &Memory, input: &mut Input<'_>) {
    for _ in 0..input.below(4) {
        let size = input.pick(&[0, 1, 2, 3, 4, 16, 64, 65, 128, 0x8000, 0x1_0000, 0x1_0001, u32::MAX]);
        let mut place = |align: u64| match input.below(6) {
            0 => input.edgy(),
            1 => (REGIONS[0].1 - input.below(0x400) as u64) / align * align,
            2 => (REGIONS[1].0 + REGIONS[1].1 - input.below(0x400) as u64) / align * align,
            _ => u64::from(input.u16()) / align * align,
        };
        let config = QueueConfig { size, descriptors: place(16), available: place(2), used: place(4) };
        let is_sound = size.is_power_of_two()
            && size <= 64
            && [
                (config.descriptors, 16, 16 * u64::from(size)),
                (config.available, 2, 6 + 2 * u64::from(size)),
                (config.used, 4, 6 + 8 * u64::from(size)),
            ]
            .into_iter()
            .all(|(addr, align, bytes)| addr % align == 0 && is_ram(addr, bytes));
        let found = Ring::new(&memory.ram, &config, 64, 0);
        assert_eq!(found.is_ok(), is_sound, "R14: {config:x?}: {:?}", found.err());
    }
}

fn write_something(memory: &mut Memory, input: &mut Input<'_>, size: u16) {
    match input.below(9) {
        8 => write_request(memory, input, size),
        0 => {
            let at = u64::from(input.u16());
            let bytes = input.bytes(32).to_vec();
            memory.put(at, &bytes);
        }
        1 => {
            let at = u64::from(input.u16() & 0xf0);
            let kind = input.pick(&[0_u32, 1, 4, 8, 11, 13, 5, u32::MAX]);
            let sector = if input.flag() { input.edgy() } else { input.below(70) as u64 };
            memory.put(at, &[kind.to_le_bytes(), [0; 4]].concat());
            memory.put(at + 8, &sector.to_le_bytes());
        }
        2 => {
            // The ranges of an erase, in place of a header's data.
            let at = u64::from(input.u16() & 0xf0);
            let sector = if input.once_in(4) { input.edgy() } else { input.below(70) as u64 };
            let sectors = input.pick(&[0, 1, 8, 64, 65, ERASE_SECTORS_MAX, ERASE_SECTORS_MAX + 1, u32::MAX]);
            memory.put(at, &sector.to_le_bytes());
            memory.put(at + 8, &sectors.to_le_bytes());
            memory.put(at + 12, &input.pick(&[0_u32, 1, 2, u32::MAX]).to_le_bytes());
        }
        _ => {
            let (table, index) = match input.below(3) {
                0 => (TABLE + input.below(4) as u64, input.below(8)),
                _ => (DESCRIPTORS, input.below(usize::from(size))),
            };
            let flags = input.pick(&[0_u16, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 0xffff]);
            let (addr, len) = match flags & 4 {
                0 => (
                    if input.once_in(8) { input.edgy() } else { u64::from(input.u16() & 0xf0) },
                    input.pick(&[
                        0_u32,
                        1,
                        4,
                        15,
                        16,
                        17,
                        20,
                        32,
                        512,
                        513,
                        4096,
                        1 << 20,
                        1 << 31,
                        u32::MAX,
                    ]),
                ),
                _ => (
                    if input.once_in(8) { input.edgy() } else { TABLE + input.below(4) as u64 },
                    input.pick(&[0_u32, 8, 15, 16, 32, 48, 64, 128, 1024, 1040, u32::MAX]),
                ),
            };
            let next = if input.once_in(16) { input.u16() } else { u16::try_from(index).unwrap() + 1 };
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            memory.put(table + 16 * index as u64, &bytes);
        }
    }
}

/// A whole request at the first descriptors, as drivers make them.
fn write_request(memory: &mut Memory, input: &mut Input<'_>, size: u16) {
    let (kind, bytes) =
        input.pick(&[(0_u32, 512_u32), (1, 512), (1, 1024), (4, 0), (8, 20), (11, 16), (13, 32)]);
    let sector = if input.once_in(4) { input.edgy() } else { input.below(70) as u64 };
    memory.put(0x100, &[kind.to_le_bytes(), [0; 4]].concat());
    memory.put(0x108, &sector.to_le_bytes());
    memory.put(0x208, &[8, 0, 0, 0, 0, 0, 0, 0]);
    let flags = if matches!(kind, 0 | 8) { 3 } else { 1 };
    let parts = [(0x100_u64, 16_u32, 1_u16), (0x200, bytes, flags), (0x300, 1, 2)];
    for (index, (addr, len, flags)) in (0_u16..size).zip(parts) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend((index + 1).to_le_bytes());
        memory.put(DESCRIPTORS + 16 * u64::from(index), &bytes);
    }
}

fn check_same(chain: &Chain, walked: &walk::Chain) {
    let segments = |segments: &[Segment]| segments.iter().map(|s| (s.addr, s.len)).collect::<Vec<_>>();
    let found = (chain.head, segments(&chain.readable), segments(&chain.writable), chain.fault.is_some());
    let expected = (walked.head, walked.readable.clone(), walked.writable.clone(), walked.is_faulty);
    assert_eq!(found, expected);
}

/// Whatever becomes of a chain: its parts add up, no piece is outside RAM, no range beyond the disk.
fn check_request(memory: &Memory, chain: &Chain, limits: &Limits<'_>) {
    let readable = request::total(&chain.readable);
    let writable = request::total(&chain.writable);
    let mut cut = chain.clone();
    let Some(frame) = Frame::take_apart(&mut cut) else {
        assert_eq!(writable, 0, "a chain with writable bytes has a status");
        return;
    };
    assert_eq!(frame.has_header, readable >= 16);
    let room = frame.data_in.bytes;
    assert_eq!(room + 1, writable);
    assert_eq!(frame.data_out.bytes, readable.saturating_sub(16));
    for written in [0, 1, 20, u32::try_from(room).unwrap_or(u32::MAX - 1)] {
        if u64::from(written) <= room {
            assert!(u64::from(request::written(written, room)) <= writable, "R20");
        }
    }
    for data in [&frame.data_in, &frame.data_out] {
        assert_eq!(data.bytes, request::total(data.segments));
        check_pieces(memory, data.segments);
    }
    if !frame.has_header || chain.fault.is_some() {
        return;
    }
    let whole = walk::Chain {
        readable: chain.readable.iter().map(|segment| (segment.addr, segment.len)).collect(),
        ..walk::Chain::default()
    };
    let Some(bytes) = whole.first(memory, 16) else { return };
    let header = Header::parse(&bytes.try_into().unwrap());
    let wanted = header.payload_bytes(frame.data_out.bytes).unwrap_or(0);
    let Some(payload) = whole.first(memory, 16 + wanted) else { return };
    let is_inside = |offset: u64, bytes: u64| {
        let end = offset.checked_add(bytes);
        end.is_some_and(|end| end <= CAPACITY_SECTORS * 512) && bytes.is_multiple_of(512)
    };
    match request::parse(header, &frame, &payload[16..], limits) {
        Err(_) | Ok(Request::Flush) => {}
        Ok(Request::GetId) => assert!(room >= 20, "B14"),
        Ok(Request::In(range)) => {
            assert_eq!((header.kind, range.bytes()), (0, room));
            assert!(is_inside(range.offset(), range.bytes()), "R11");
        }
        Ok(Request::Out(range)) => {
            assert!(!limits.readonly, "B9");
            assert_eq!((header.kind, range.bytes()), (1, readable - 16));
            assert!(is_inside(range.offset(), range.bytes()), "R11");
        }
        Ok(Request::Discard(ranges)) => {
            assert!(!limits.readonly && limits.features & DISCARD != 0 && header.kind == 11);
            assert!(ranges.iter().all(|range| is_inside(range.offset(), range.bytes())), "R11");
        }
        Ok(Request::WriteZeroes(ranges)) => {
            assert!(!limits.readonly && limits.features & WRITE_ZEROES != 0 && header.kind == 13);
            assert!(ranges.iter().all(|zero| is_inside(zero.range.offset(), zero.range.bytes())), "R11");
        }
    }
}

/// Guest ranges become pieces of RAM, all of them or none.
fn check_pieces(memory: &Memory, segments: &[Segment]) {
    let all_in_ram =
        segments.iter().all(|segment| segment.len == 0 || is_ram(segment.addr, segment.len.into()));
    match Iov::new(&memory.ram, segments) {
        Err(_) => assert!(!all_in_ram, "R3: refused, and all in RAM"),
        Ok(iov) => {
            assert!(all_in_ram, "R3: taken, and not all in RAM");
            let host = memory.host();
            let mut bytes = 0;
            for piece in iov.as_iovecs() {
                let (from, to) = (piece.iov_base as usize, piece.iov_base as usize + piece.iov_len);
                assert!(host.iter().any(|region| region.start <= from && to <= region.end), "R3");
                bytes += piece.iov_len as u64;
            }
            assert_eq!((iov.bytes(), bytes), (request::total(segments), bytes));
            for (skip, len) in [(1, 3), (bytes / 2, bytes), (bytes, 1), (0, bytes)] {
                let part = iov.part(skip, len, 4);
                assert!(part.bytes() <= len && part.as_iovecs().len() <= 4);
                let sum: u64 = part.as_iovecs().iter().map(|piece| piece.iov_len as u64).sum();
                assert_eq!(sum, part.bytes());
            }
        }
    }
}
