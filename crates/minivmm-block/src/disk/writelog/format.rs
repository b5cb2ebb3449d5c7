//! The format of dm-log-writes (the kernel's Documentation/admin-guide/device-mapper/log-writes.rst),
//! which QEMU's blklogwrites writes too.
//!
//! Owns the bytes of the superblock and of an entry. The log is a sequence of sectors, of the size that the
//! superblock names. The superblock comes first. Each entry is one sector, which also holds the text of a mark,
//! followed by the entry's data, if it has any. All numbers are little-endian. Positions and lengths count such
//! sectors.

/// The magic number of the format.
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The only version there is.
const VERSION: u64 = 1;
/// The size of an entry's header, in bytes.
pub const HEADER_BYTES: usize = 32;
/// The size of the superblock, in bytes.
pub const SUPERBLOCK_BYTES: usize = 28;

/// Flag: all entries before this one were stable when it completed.
pub const FLUSH: u64 = 1 << 0;
/// Flag: what this entry writes was stable when it completed.
pub const FUA: u64 = 1 << 1;
/// Flag: the entry has no data; the content is no longer wanted.
pub const DISCARD: u64 = 1 << 2;
/// Flag: a text that somebody has put here.
pub const MARK: u64 = 1 << 3;
/// Flag: the file system called it metadata (only in the kernel's logs).
pub const METADATA: u64 = 1 << 4;

/// The superblock of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// The number of entries.
    pub entries: u64,
    /// The log's sector in bytes.
    pub sector_bytes: u32,
}

/// The header of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Position on the disk, in the log's sectors.
    pub sector: u64,
    /// Length, in the log's sectors.
    pub sectors: u64,
    /// [`FLUSH`] and the other flags.
    pub flags: u64,
    /// Length of a mark's text, in bytes.
    pub text_bytes: u64,
}

impl Superblock {
    /// Returns the first bytes of a log.
    pub fn encode(self) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        for (to, from) in bytes.chunks_mut(8).zip([MAGIC, VERSION, self.entries]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes[24..].copy_from_slice(&self.sector_bytes.to_le_bytes());
        bytes
    }

    /// Decodes a superblock; `None` if the bytes are not those of a log.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let sector_bytes = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        let is_log = number(bytes, 0) == MAGIC && number(bytes, 8) == VERSION;
        is_log.then(|| Self { entries: number(bytes, 16), sector_bytes })
    }
}

impl Header {
    /// Returns the first bytes of an entry's sector.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.sector, self.sectors, self.flags, self.text_bytes];
        for (to, from) in bytes.chunks_mut(8).zip(fields) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes
    }

    /// Decodes a header. Any bytes are valid.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            sector: number(bytes, 0),
            sectors: number(bytes, 8),
            flags: number(bytes, 16),
            text_bytes: number(bytes, 24),
        }
    }

    /// Returns `true` if data follows the header.
    pub fn has_data(self) -> bool {
        self.sectors > 0 && self.flags & (DISCARD | MARK) == 0
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    for (to, from) in eight.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_kernel() {
        let superblock = Superblock { entries: 3, sector_bytes: 512 };
        let bytes = superblock.encode();
        assert_eq!(bytes[..8], [0x72, 0x68, 0x73, 0x77, 0x66, 0x73, 0x6a, 0]);
        assert_eq!(Superblock::decode(&bytes), Some(superblock));
        assert_eq!(Superblock::decode(&[0; SUPERBLOCK_BYTES]), None);
        let header = Header { sector: 1, sectors: 0x0203, flags: FLUSH | FUA, text_bytes: 0 };
        let bytes = header.encode();
        assert_eq!(bytes[..16], [1, 0, 0, 0, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..], [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::decode(&bytes), header);
        assert!(header.has_data());
        assert!(!Header { flags: DISCARD, ..header }.has_data());
        assert!(!Header { sectors: 0, ..header }.has_data());
    }
}
