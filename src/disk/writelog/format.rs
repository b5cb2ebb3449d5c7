//! The format of dm-log-writes (the kernel's Documentation/admin-guide/device-mapper/log-writes.rst),
//! which QEMU's blklogwrites writes too.
//!
//! Owns the bytes of the superblock and of an entry. The log is a row of sectors, of the size that the
//! superblock names: the superblock, then for each entry one sector, which for a mark holds its text
//! too, and behind it the entry's data, if it has any. All numbers are little-endian, and places and
//! lengths count such sectors.

/// The format's own mark.
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The only version there is.
const VERSION: u64 = 1;
/// The header of an entry, in bytes.
pub const HEADER_BYTES: usize = 32;
/// The superblock, in bytes.
pub const SUPERBLOCK_BYTES: usize = 28;

/// The entry speaks for all before it: they were stable when it ended.
pub const FLUSH: u64 = 1 << 0;
/// What this entry writes was stable when it ended.
pub const FUA: u64 = 1 << 1;
/// Without data: the content is not wanted any more.
pub const DISCARD: u64 = 1 << 2;
/// A text that somebody has put here.
pub const MARK: u64 = 1 << 3;
/// The file system called it metadata (the kernel's logs only).
pub const METADATA: u64 = 1 << 4;

/// What the log says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Entries.
    pub entries: u64,
    /// The log's sector in bytes.
    pub sector_bytes: u32,
}

/// The head of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Where on the disk, in the log's sectors.
    pub sector: u64,
    /// How much, in the log's sectors.
    pub sectors: u64,
    /// [`FLUSH`] and the others.
    pub flags: u64,
    /// Bytes of a mark's text.
    pub text_bytes: u64,
}

impl Superblock {
    /// The first bytes of a log.
    pub fn encode(self) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        for (to, from) in bytes.chunks_mut(8).zip([MAGIC, VERSION, self.entries]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes[24..].copy_from_slice(&self.sector_bytes.to_le_bytes());
        bytes
    }

    /// `None` where they are not those of a log.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let sector_bytes = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        let is_log = number(bytes, 0) == MAGIC && number(bytes, 8) == VERSION;
        is_log.then(|| Self { entries: number(bytes, 16), sector_bytes })
    }
}

impl Header {
    /// The first bytes of an entry's sector.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.sector, self.sectors, self.flags, self.text_bytes];
        for (to, from) in bytes.chunks_mut(8).zip(fields) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes
    }

    /// Whatever they say.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            sector: number(bytes, 0),
            sectors: number(bytes, 8),
            flags: number(bytes, 16),
            text_bytes: number(bytes, 24),
        }
    }

    /// Whether its data follows it.
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
