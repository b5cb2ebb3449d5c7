//! A descriptor as it lies in a table (virtio 2.7.5).

/// Address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

/// Its sixteen bytes.
pub fn bytes((addr, len, flags, next): Desc) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
