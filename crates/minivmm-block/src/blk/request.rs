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

/// A chain taken apart into the parts of a request, which lie in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frame<'a> {
    /// `true` if the first [`HEADER_BYTES`] readable bytes, which are the header, are present.
    pub has_header: bool,
    /// The readable bytes after the header.
    pub data_out: Data<'a>,
    /// The writable bytes before the status.
    pub data_in: Data<'a>,
    /// Guest address of the status byte.
    pub status_addr: u64,
}

impl<'a> Frame<'a> {
    /// Takes a chain apart: cuts the header and the status off it, so read the header before
    /// ([`crate::mem::gather`]). Returns `None` if the chain has no writable byte for a status.
    #[inline(always)]
    pub fn take_apart(chain: &'a mut Chain) -> Option<Self> {
        let status_addr = cut_last(&mut chain.writable)?;
        let data_out = without_first(&mut chain.readable, HEADER_BYTES as u64);
        Some(Self {
            has_header: data_out.is_some(),
            data_out: Data::new(data_out.unwrap_or_default()),
            data_in: Data::new(&chain.writable),
            status_addr,
        })
    }
}

/// The data of a request in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Data<'a> {
    /// Where the data lies, in order. Some of the segments may be empty.
    pub segments: &'a [Segment],
    /// The length of all segments together, in bytes.
    pub bytes: u64,
}

impl<'a> Data<'a> {
    /// Adds up the length of `segments`.
    pub fn new(segments: &'a [Segment]) -> Self {
        Self { segments, bytes: total(segments) }
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

/// Cuts the last byte off `segments`, and returns its address. Returns `None` if there is no byte.
#[inline(always)]
fn cut_last(segments: &mut Vec<Segment>) -> Option<u64> {
    loop {
        let last = segments.last_mut()?;
        if last.len == 0 {
            segments.pop();
            continue;
        }
        last.len -= 1;
        // An address beyond 2^64 is in no RAM: writing the status there fails, and the failure is reported.
        let addr = last.addr.saturating_add(u64::from(last.len));
        if last.len == 0 {
            segments.pop();
        }
        return Some(addr);
    }
}

/// Returns what follows the first `count` bytes of `segments`, `None` if there are not that many.
#[inline(always)]
fn without_first(segments: &mut [Segment], count: u64) -> Option<&[Segment]> {
    // Nearly always: a header in a segment of its own.
    if let [first, ..] = segments
        && u64::from(first.len) == count
    {
        return segments.get(1..);
    }
    let mut left = count;
    let mut whole = 0;
    for segment in segments.iter_mut() {
        let skipped = u64::from(segment.len).min(left);
        left -= skipped;
        if left == 0 && skipped < u64::from(segment.len) {
            // An address beyond 2^64 is outside RAM, and is rejected later like any other such address.
            segment.addr = segment.addr.saturating_add(skipped);
            // At most the segment's own length.
            segment.len -= u32::try_from(skipped).unwrap_or(segment.len);
            break;
        }
        whole += 1;
        if left == 0 {
            break;
        }
    }
    if left == 0 { segments.get(whole..) } else { None }
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
#[inline(always)]
pub fn parse(
    header: Header,
    frame: &Frame<'_>,
    payload: &[u8],
    limits: &Limits<'_>,
) -> Result<Request, Status> {
    let range = |bytes| limits.geometry.check(header.sector, bytes).ok_or(Status::IoErr);
    let writable = |request| if limits.readonly { Err(Status::IoErr) } else { request };
    match header.kind {
        // Data of the wrong direction is not moved, and OK would claim that it was (R9).
        kind::IN if frame.data_out.bytes > 0 => Err(Status::IoErr),
        kind::OUT if frame.data_in.bytes > 0 => Err(Status::IoErr),
        kind::IN => range(frame.data_in.bytes).map(Request::In),
        kind::OUT => writable(range(frame.data_out.bytes).map(Request::Out)),
        // A FLUSH has no sector and no data; a driver that sets them gets its FLUSH nonetheless (B10).
        kind::FLUSH => Ok(Request::Flush),
        kind::GET_ID if frame.data_in.bytes < u64::from(ID_BYTES) => Err(Status::IoErr),
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

#[cold]
fn discard(payload: &[u8], limits: &Limits<'_>) -> Result<Vec<SectorRange>, Status> {
    let segments = erase_segments(payload)?;
    // Unknown flags complete with UNSUPP, and so does unmap in a DISCARD (virtio 5.2.6.2). This is checked
    // before any range.
    if segments.iter().any(|segment| segment.flags != 0) {
        return Err(Status::Unsupp);
    }
    segments.iter().map(|segment| segment.range(limits)).collect()
}

#[cold]
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

    /// The bytes of a request's parts, one by one: what an address list means, however it is cut into segments.
    fn bytes_of(data: Data<'_>) -> Vec<u64> {
        let each =
            data.segments.iter().flat_map(|segment| segment.addr..segment.addr + u64::from(segment.len));
        let bytes: Vec<u64> = each.collect();
        assert_eq!(bytes.len() as u64, data.bytes);
        bytes
    }

    #[test]
    fn any_layout_of_descriptors_gives_the_same_parts() {
        let mut layouts = [
            chain(&[(0, 16), (16, 512)], &[(0x1000, 512), (0x1200, 1)]),
            chain(&[(0, 528)], &[(0x1000, 513)]),
            chain(&[(0, 7), (7, 1), (8, 520)], &[(0x1000, 1), (0x1001, 512)]),
            chain(&[(0, 0), (0, 16), (16, 0), (16, 512)], &[(0x1000, 513), (0x9999, 0)]),
            chain(
                &[(0, 0), (0, 16), (16, 0), (16, 12), (28, 500)],
                &[(0x1000, 512), (0x1200, 1), (0x9999, 0)],
            ),
        ];
        for layout in &mut layouts {
            let frame = Frame::take_apart(layout).unwrap();
            assert_eq!(frame.status_addr, 0x1200);
            assert!(frame.has_header);
            assert_eq!(bytes_of(frame.data_out), (16..528).collect::<Vec<_>>());
            assert_eq!(bytes_of(frame.data_in), (0x1000..0x1200).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_chain_without_a_writable_byte_is_no_frame() {
        assert_eq!(Frame::take_apart(&mut chain(&[(0, 16)], &[])), None);
        assert_eq!(Frame::take_apart(&mut chain(&[(0, 16)], &[(0x1000, 0)])), None);
    }

    #[test]
    fn a_short_header_is_seen() {
        for readable in [&[(0, 15)][..], &[(0, 7), (7, 8), (15, 0)], &[], &[(0, 0)]] {
            let mut chain = chain(readable, &[(0x1000, 1)]);
            let frame = Frame::take_apart(&mut chain).unwrap();
            assert!(!frame.has_header);
            assert_eq!((frame.data_out, frame.data_in.bytes), (Data::default(), 0));
        }
    }

    #[test]
    fn addresses_at_the_end_of_the_world_do_not_wrap() {
        let mut chain = chain(&[(u64::MAX - 3, 64)], &[(u64::MAX, 9)]);
        let frame = Frame::take_apart(&mut chain).unwrap();
        assert_eq!(frame.status_addr, u64::MAX);
        assert_eq!(frame.data_out.segments, [segment(u64::MAX, 48)]);
    }

    #[test]
    fn used_length_counts_the_status_only_behind_whole_data() {
        for (data, room, expected) in [(512, 512, 513), (0, 512, 0), (20, 512, 20), (0, 0, 1)] {
            assert_eq!(written(data, room), expected);
        }
    }
}
