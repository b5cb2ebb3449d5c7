//! A descriptor as it lies in a table (virtio 2.7.5).

/// Address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

/// A descriptor of a chain that lies in order: address, length, flags without NEXT.
pub type Part = (u64, u32, u16);

/// Returns the bytes of a table with one chain: each descriptor from index 0 has the one behind it as its next.
pub fn chain(parts: &[Part]) -> Vec<u8> {
    let descriptor = |(index, &(addr, len, flags)): (usize, &Part)| {
        let is_last = index + 1 == parts.len();
        let next = if is_last { 0 } else { u16::try_from(index + 1).unwrap() };
        bytes((addr, len, if is_last { flags } else { flags | 1 }, next))
    };
    parts.iter().enumerate().flat_map(descriptor).collect()
}

/// Its sixteen bytes.
pub fn bytes((addr, len, flags, next): Desc) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
