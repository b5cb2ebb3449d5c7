//! Descriptor chains, walked a second time: written from the specification (virtio 2.7.5), not from
//! `virtio/queue.rs`, and the oracle for it.

use minivmm::virtio::queue::QueueConfig;

use super::memory::{Memory, is_ram};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Address and length.
pub type Segment = (u64, u32);

/// What a head leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Walked {
    /// Nothing that can be followed to its end: the queue is broken.
    Broken,
    Chain(Chain),
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
    /// Readable behind writable, or more than 4 GiB.
    pub is_faulty: bool,
    /// Indirect tables that were read.
    pub tables: Vec<Segment>,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn descriptor(memory: &Memory, table: u64, index: u16) -> Option<Descriptor> {
    let bytes = memory.get(table.checked_add(16 * u64::from(index))?, 16)?;
    Some(Descriptor {
        addr: u64::from_le_bytes(bytes[..8].try_into().ok()?),
        len: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
        flags: u16::from_le_bytes(bytes[12..14].try_into().ok()?),
        next: u16::from_le_bytes(bytes[14..].try_into().ok()?),
    })
}

/// Follows a head.
pub fn walk(memory: &Memory, config: &QueueConfig, features: u64, head: u16) -> Walked {
    follow(memory, config, features, head).map_or(Walked::Broken, Walked::Chain)
}

fn follow(memory: &Memory, config: &QueueConfig, features: u64, head: u16) -> Option<Chain> {
    let size = u16::try_from(config.size).ok()?;
    let mut chain = Chain { head, ..Chain::default() };
    let mut direct = Vec::new();
    let mut index = head;
    // At most one indirect table, at the end of the direct ones.
    let table = loop {
        if index >= size || direct.len() > usize::from(size) {
            return None;
        }
        let found = descriptor(memory, config.descriptors, index)?;
        if found.flags & INDIRECT != 0 {
            if features & F_INDIRECT == 0 || found.flags & NEXT != 0 {
                return None;
            }
            break Some((found.addr, found.len));
        }
        let (flags, next) = (found.flags, found.next);
        direct.push(found);
        if flags & NEXT == 0 {
            break None;
        }
        index = next;
    };
    if let Some((addr, len)) = table {
        let entries = len / 16;
        if entries == 0 || len % 16 != 0 || !is_ram(addr, len.into()) {
            return None;
        }
        chain.tables.push((addr, len));
        let mut index = 0_u16;
        loop {
            if u32::from(index) >= entries || direct.len() > usize::from(size) {
                return None;
            }
            let found = descriptor(memory, addr, index)?;
            if found.flags & INDIRECT != 0 {
                return None;
            }
            let (flags, next) = (found.flags, found.next);
            direct.push(found);
            if flags & NEXT == 0 {
                break;
            }
            index = next;
        }
    }
    if direct.len() > usize::from(size) {
        return None;
    }
    let mut bytes = 0;
    for Descriptor { addr, len, flags, .. } in direct {
        bytes += u64::from(len);
        if flags & WRITE != 0 {
            chain.writable.push((addr, len));
        } else {
            chain.is_faulty |= !chain.writable.is_empty();
            chain.readable.push((addr, len));
        }
    }
    chain.is_faulty |= bytes > 1 << 32;
    Some(chain)
}

impl Chain {
    pub fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(|&(_, len)| u64::from(len)).sum()
    }

    /// Where the last writable byte is.
    pub fn status(&self) -> Option<u64> {
        let &(addr, len) = self.writable.iter().rfind(|(_, len)| *len > 0)?;
        addr.checked_add(u64::from(len) - 1)
    }

    /// The first `count` readable bytes, where they are in RAM.
    pub fn first(&self, memory: &Memory, count: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for &(addr, len) in self.readable.iter().filter(|(_, len)| *len > 0) {
            let take = (count - bytes.len()).min(len as usize);
            if take > 0 {
                bytes.extend(memory.get(addr, take as u64)?);
            }
        }
        (bytes.len() == count).then_some(bytes)
    }
}
