//! Copies between the host's memory and a list of guest segments, for small data: headers, messages,
//! identifiers. The data of a request goes through [`super::Iov`] instead, without a copy.

use super::{HEADER_BYTES, OutsideRam, Ram, Segment, read_bytes, read_header, write_bytes};

/// Fills `header` like [`gather`], and faster if it lies in one segment, as it nearly always does.
#[inline]
pub fn gather_header(
    ram: &Ram,
    segments: &[Segment],
    header: &mut [u8; HEADER_BYTES],
) -> Result<usize, OutsideRam> {
    match segments {
        [first, ..] if first.len as usize >= HEADER_BYTES => {
            *header = read_header(ram, first.addr)?;
            Ok(HEADER_BYTES)
        }
        _ => gather(ram, segments, header),
    }
}

/// Fills `bytes` from the segments in order. Returns how many bytes the segments had for it.
pub fn gather(ram: &Ram, segments: &[Segment], bytes: &mut [u8]) -> Result<usize, OutsideRam> {
    let all = bytes.len();
    let mut rest = bytes;
    for segment in segments {
        let take = rest.len().min(segment.len as usize);
        let (now, later) = rest.split_at_mut(take);
        if !now.is_empty() {
            read_bytes(ram, segment.addr, now)?;
        }
        rest = later;
    }
    Ok(all - rest.len())
}

/// Copies `bytes` into the segments in order. Returns how many bytes the segments had room for.
pub fn scatter(ram: &Ram, segments: &[Segment], bytes: &[u8]) -> Result<usize, OutsideRam> {
    let mut rest = bytes;
    for segment in segments {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        if !now.is_empty() {
            write_bytes(ram, segment.addr, now)?;
        }
        rest = later;
    }
    Ok(bytes.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::map_ram;

    fn segments(of: &[(u64, u32)]) -> Vec<Segment> {
        of.iter().map(|&(addr, len)| Segment { addr, len }).collect()
    }

    #[test]
    fn bytes_go_out_and_come_back_over_segments_of_any_length() {
        let ram = map_ram(&[(0, 1 << 16)]).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        for lengths in [[100, 0, 0], [1, 98, 1], [0, 50, 50], [33, 33, 40]] {
            let list = segments(&[(0x100, lengths[0]), (0x1000, lengths[1]), (0x2000, lengths[2])]);
            assert_eq!(scatter(&ram, &list, &bytes).unwrap(), 100);
            let mut back = vec![0xff; 100];
            assert_eq!(gather(&ram, &list, &mut back).unwrap(), 100);
            assert_eq!(back, bytes, "{lengths:?}");
        }
    }

    #[test]
    fn segments_that_are_too_short_give_and_take_what_they_have() {
        let ram = map_ram(&[(0, 1 << 16)]).unwrap();
        let list = segments(&[(0x100, 3), (0x1000, 4)]);
        assert_eq!(scatter(&ram, &list, &[7; 100]).unwrap(), 7);
        let mut back = [0; 10];
        assert_eq!(gather(&ram, &list, &mut back).unwrap(), 7);
        assert_eq!(back, [7, 7, 7, 7, 7, 7, 7, 0, 0, 0]);
    }

    #[test]
    fn a_segment_outside_ram_is_an_error_only_if_it_is_reached() {
        let ram = map_ram(&[(0, 1 << 16)]).unwrap();
        let list = segments(&[(0x100, 4), (1 << 20, 4)]);
        assert_eq!(scatter(&ram, &list, &[1; 4]).unwrap(), 4);
        assert!(scatter(&ram, &list, &[1; 5]).is_err());
        assert!(gather(&ram, &list, &mut [0; 5]).is_err());
    }
}
