//! What a descriptor chain asks of a block device (virtio 5.2.6).
//!
//! Owns framing and parsing, whatever the descriptor layout (virtio 2.7.4.1): the first 16 readable bytes are
//! the header, the last writable byte is the status. Pure: the input was copied out of guest memory once, and
//! the parsed request is private from then on.

use crate::disk::geometry::{Geometry, SECTOR, SectorRange};
use crate::disk::op::ZeroedRange;
use crate::mem::Segment;
use crate::virtio::queue::Chain;

use super::config::{self, ERASE_SECTORS_MAX, ERASE_SEGMENTS_MAX};

/// Bytes of struct virtio_blk_req before its data.
pub const HEADER_BYTES: usize = 16;
/// Bytes of struct virtio_blk_discard_write_zeroes.
const ERASE_SEGMENT_BYTES: usize = 16;
/// Bytes of the data that GET_ID returns.
pub const ID_BYTES: u32 = 20;

/// Request types.
#[allow(missing_docs, reason = "named as in virtio 5.2.6")]
pub mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Flag of a discard or write-zeroes segment.
pub const UNMAP: u32 = 1;

/// The status byte of a completed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The request was carried out completely.
    Ok = 0,
    /// The request failed, or its outcome is unknown.
    IoErr = 1,
    /// The device does not support the request.
    Unsupp = 2,
}

/// A chain taken apart into the parts of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// `true` if the first [`HEADER_BYTES`] readable bytes, which are the header, are present.
    pub has_header: bool,
    /// The readable bytes after the header.
    pub data_out: Vec<Segment>,
    /// The writable bytes before the status.
    pub data_in: Vec<Segment>,
    /// Guest address of the status byte.
    pub status_addr: u64,
}

impl Frame {
    /// Takes a chain apart. Returns `None` if it has no writable byte for a status.
    pub fn new(chain: &Chain) -> Option<Self> {
        let mut frame = Self::default();
        frame.take_apart(chain).then_some(frame)
    }

    /// Takes a chain apart and replaces the present parts, whose memory is reused. Returns `true` if the chain
    /// has a writable byte for a status.
    pub fn take_apart(&mut self, chain: &Chain) -> bool {
        self.has_header = skip(&chain.readable, HEADER_BYTES as u64, &mut self.data_out);
        match without_last(&chain.writable, &mut self.data_in) {
            Some(status_addr) => self.status_addr = status_addr,
            None => return false,
        }
        true
    }

    /// Returns the number of bytes that the device may fill.
    pub fn data_in_bytes(&self) -> u64 {
        total(&self.data_in)
    }
}

/// Returns the total length of `segments` in bytes.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Returns the length for the used ring (virtio 2.7.8.2): how many bytes from the first writable one on are
/// really written, if the status is written and `data` bytes of the `room` before it.
pub fn written(data: u32, room: u64) -> u32 {
    match room {
        all if all == u64::from(data) => data.saturating_add(1),
        // There is a gap between what was written and the status, which then does not count.
        _ => data,
    }
}

/// Returns the address of the last byte of `segments`, and puts what comes before it into `before`.
fn without_last(segments: &[Segment], before: &mut Vec<Segment>) -> Option<u64> {
    before.clear();
    let last = segments.iter().rposition(|segment| segment.len > 0)?;
    let (first, ending) = (segments.get(..last)?, segments.get(last)?);
    before.extend(first.iter().filter(|segment| segment.len > 0));
    let len = ending.len - 1;
    if len > 0 {
        before.push(Segment { addr: ending.addr, len });
    }
    // An address beyond 2^64 is in no RAM: writing the status there fails, and the failure is reported.
    Some(ending.addr.saturating_add(u64::from(len)))
}

/// Puts what follows the first `count` bytes into `rest`. Returns `true` if there are that many.
fn skip(segments: &[Segment], count: u64, rest: &mut Vec<Segment>) -> bool {
    rest.clear();
    let mut left = count;
    for &Segment { addr, len } in segments {
        let skipped = u64::from(len).min(left);
        left -= skipped;
        // At most the segment's own length.
        let len = len - u32::try_from(skipped).unwrap_or(len);
        if len > 0 {
            // An address beyond 2^64 is outside RAM, and is rejected later like any other such address.
            rest.push(Segment { addr: addr.saturating_add(skipped), len });
        }
    }
    left == 0
}

/// The header as a private copy (virtio 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type of the request.
    pub kind: u32,
    /// First sector.
    pub sector: u64,
}

impl Header {
    /// Decodes the header; the reserved word is ignored.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = *bytes;
        Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        }
    }

    /// Returns how many bytes of `data_out` must be copied to parse the request: the segments of an erase.
    /// `None` if such a request may not have that many bytes.
    pub fn payload_bytes(&self, data_out: u64) -> Option<usize> {
        match self.kind {
            kind::DISCARD | kind::WRITE_ZEROES => {
                let segment = ERASE_SEGMENT_BYTES as u64;
                let most = u64::from(ERASE_SEGMENTS_MAX) * segment;
                let fits = data_out > 0 && data_out.is_multiple_of(segment) && data_out <= most;
                usize::try_from(data_out).ok().filter(|_| fits)
            }
            _ => Some(0),
        }
    }
}

/// A request that was checked against the disk as far as is possible without moving a byte.
#[derive(Debug, Clone)]
pub enum Request {
    /// Read this range into the writable data.
    In(SectorRange),
    /// Write the readable data to this range.
    Out(SectorRange),
    /// Make stable what was acknowledged before.
    Flush,
    /// Return the serial.
    GetId,
    /// Discard the content of these ranges.
    Discard(Vec<SectorRange>),
    /// Zero these ranges.
    WriteZeroes(Vec<ZeroedRange>),
}

/// What parsing needs to know of the disk.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Capacity and block sizes.
    pub geometry: &'a Geometry,
    /// The negotiated feature bits.
    pub features: u64,
    /// `true` if the disk is read-only: every write completes with IOERR, whatever was negotiated (B9).
    pub readonly: bool,
}

/// Parses a request whose frame is sound; `payload` is the data of an erase. The error is the status that the
/// request completes with.
pub fn parse(header: Header, frame: &Frame, payload: &[u8], limits: &Limits<'_>) -> Result<Request, Status> {
    let range = |bytes| limits.geometry.check(header.sector, bytes).ok_or(Status::IoErr);
    let writable = |request| if limits.readonly { Err(Status::IoErr) } else { request };
    match header.kind {
        // Data of the wrong direction is not moved, and OK would claim that it was (R9).
        kind::IN if !frame.data_out.is_empty() => Err(Status::IoErr),
        kind::OUT if !frame.data_in.is_empty() => Err(Status::IoErr),
        kind::IN => range(total(&frame.data_in)).map(Request::In),
        kind::OUT => writable(range(total(&frame.data_out)).map(Request::Out)),
        // A FLUSH has no sector and no data; a driver that sets them gets its FLUSH nonetheless (B10).
        kind::FLUSH => Ok(Request::Flush),
        kind::GET_ID if frame.data_in_bytes() < u64::from(ID_BYTES) => Err(Status::IoErr),
        kind::GET_ID => Ok(Request::GetId),
        kind::DISCARD if limits.features & config::DISCARD != 0 => {
            writable(discard(payload, limits).map(Request::Discard))
        }
        kind::WRITE_ZEROES if limits.features & config::WRITE_ZEROES != 0 => {
            writable(write_zeroes(payload, limits).map(Request::WriteZeroes))
        }
        // On a read-only disk these two were never offered, but they are writes and fail like any other write.
        kind::DISCARD | kind::WRITE_ZEROES if limits.readonly => Err(Status::IoErr),
        _ => Err(Status::Unsupp),
    }
}

fn discard(payload: &[u8], limits: &Limits<'_>) -> Result<Vec<SectorRange>, Status> {
    let segments = erase_segments(payload)?;
    // Unknown flags complete with UNSUPP, and so does unmap in a DISCARD (virtio 5.2.6.2). This is checked
    // before any range.
    if segments.iter().any(|segment| segment.flags != 0) {
        return Err(Status::Unsupp);
    }
    segments.iter().map(|segment| segment.range(limits)).collect()
}

fn write_zeroes(payload: &[u8], limits: &Limits<'_>) -> Result<Vec<ZeroedRange>, Status> {
    let segments = erase_segments(payload)?;
    if segments.iter().any(|segment| segment.flags & !UNMAP != 0) {
        return Err(Status::Unsupp);
    }
    // Without `discard=on` write_zeroes_may_unmap is 0, and the unmap flag is ignored.
    let may_unmap = limits.features & config::DISCARD != 0;
    let ranges = segments.iter().map(|segment| {
        let unmap = may_unmap && segment.flags & UNMAP != 0;
        segment.range(limits).map(|range| ZeroedRange { range, unmap })
    });
    ranges.collect()
}

/// struct virtio_blk_discard_write_zeroes.
struct EraseSegment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl EraseSegment {
    fn range(&self, limits: &Limits<'_>) -> Result<SectorRange, Status> {
        if self.sectors > ERASE_SECTORS_MAX {
            return Err(Status::IoErr);
        }
        let bytes = u64::from(self.sectors) * SECTOR;
        limits.geometry.check(self.sector, bytes).ok_or(Status::IoErr)
    }
}

fn erase_segments(payload: &[u8]) -> Result<Vec<EraseSegment>, Status> {
    let (segments, rest) = payload.as_chunks::<ERASE_SEGMENT_BYTES>();
    if segments.is_empty() || !rest.is_empty() {
        return Err(Status::IoErr);
    }
    let parse = |&[s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3]: &[u8; 16]| EraseSegment {
        sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        sectors: u32::from_le_bytes([n0, n1, n2, n3]),
        flags: u32::from_le_bytes([f0, f1, f2, f3]),
    };
    Ok(segments.iter().map(parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(addr: u64, len: u32) -> Segment {
        Segment { addr, len }
    }

    fn chain(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Chain {
        let segments = |parts: &[(u64, u32)]| parts.iter().map(|&(addr, len)| segment(addr, len)).collect();
        Chain { head: 0, readable: segments(readable), writable: segments(writable), fault: None }
    }

    #[test]
    fn any_layout_of_descriptors_gives_the_same_parts() {
        let classic = chain(&[(0, 16), (16, 512)], &[(0x1000, 512), (0x1200, 1)]);
        let others = [
            chain(&[(0, 528)], &[(0x1000, 513)]),
            chain(&[(0, 7), (7, 1), (8, 520)], &[(0x1000, 1), (0x1001, 512)]),
            chain(&[(0, 0), (0, 16), (16, 0), (16, 512)], &[(0x1000, 513), (0x9999, 0)]),
        ];
        let expected = Frame::new(&classic).unwrap();
        assert_eq!(expected.status_addr, 0x1200);
        for other in &others {
            let frame = Frame::new(other).unwrap();
            assert_eq!(frame.status_addr, expected.status_addr);
            assert!(frame.has_header);
            assert_eq!(total(&frame.data_out), 512);
            assert_eq!(total(&frame.data_in), 512);
            assert_eq!(frame.data_in[0].addr, 0x1000);
            assert_eq!(frame.data_out[0].addr, 16);
        }
    }

    #[test]
    fn nothing_of_an_earlier_chain_is_left_in_a_frame() {
        let mut frame = Frame::new(&chain(&[(0, 528)], &[(0x1000, 513)])).unwrap();
        for next in [
            chain(&[(0, 16)], &[(0x2000, 1)]),
            chain(&[(0, 3)], &[(0x3000, 5)]),
            chain(&[], &[(0x4000, 1)]),
            chain(&[(0, 17)], &[(0x1000, 3), (0x5000, 1)]),
        ] {
            assert!(frame.take_apart(&next));
            assert_eq!(Some(frame.clone()), Frame::new(&next), "{next:?}");
        }
    }

    #[test]
    fn a_chain_without_a_writable_byte_is_no_frame() {
        assert_eq!(Frame::new(&chain(&[(0, 16)], &[])), None);
        assert_eq!(Frame::new(&chain(&[(0, 16)], &[(0x1000, 0)])), None);
    }

    #[test]
    fn a_short_header_is_seen() {
        assert!(!Frame::new(&chain(&[(0, 15)], &[(0x1000, 1)])).unwrap().has_header);
    }

    #[test]
    fn addresses_at_the_end_of_the_world_do_not_wrap() {
        let frame = Frame::new(&chain(&[(u64::MAX - 3, 64)], &[(u64::MAX, 9)])).unwrap();
        assert_eq!(frame.status_addr, u64::MAX);
        assert_eq!(frame.data_out[0].addr, u64::MAX);
    }

    #[test]
    fn used_length_counts_the_status_only_behind_whole_data() {
        let frame = Frame::new(&chain(&[(0, 16)], &[(0x1000, 513)])).unwrap();
        for (data, written) in [(512, 513), (0, 0), (20, 20)] {
            assert_eq!(super::written(data, frame.data_in_bytes()), written);
        }
        let status_alone = Frame::new(&chain(&[(0, 16)], &[(0x1000, 1)])).unwrap();
        assert_eq!(written(0, status_alone.data_in_bytes()), 1);
    }
}
