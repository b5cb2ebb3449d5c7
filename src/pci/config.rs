//! A function's configuration space: the header of type 0, base address registers, capabilities.
//!
//! Owns which bits there are, and which of them a guest may change (PCI Local Bus 3.0, chapter 6). What a
//! change means is up to the function.

use std::ops::Range;

/// Size in bytes of the configuration space of a function without PCI Express.
pub const CONFIG_BYTES: usize = 256;

/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Command register: the function answers at its memory addresses.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Command register: the function may write to memory.
const COMMAND_MASTER: u8 = 1 << 2;
const STATUS: usize = 0x06;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The first byte after the header.
const HEADER_END: usize = 0x40;
/// A base address register for memory, 64 bits wide, not prefetchable.
const BAR_MEMORY_64: u8 = 0b100;
/// Bits 0 to 31.
const LOW_HALF: u64 = 0xffff_ffff;

/// Returns `true` if an access of `len` bytes at `at` touches a byte of `register`.
pub fn touches(register: &Range<usize>, at: usize, len: usize) -> bool {
    at < register.end && register.start < at.saturating_add(len)
}

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub base: u64,
    /// Number of addresses, at least 1.
    pub len: u64,
}

/// What a function's configuration says about its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// The function has no memory, or the command register switches it off.
    Off,
    /// The guest asks for the size: the base address register holds ones and no address.
    Sizing,
    /// The memory is at these addresses.
    At(Span),
}

/// The identification of a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, highest byte first.
    pub class: [u8; 3],
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: [u16; 2],
}

/// The configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits that the guest may change.
    writable: [u8; CONFIG_BYTES],
    /// Where the offset of the next capability is to be written.
    link: usize,
    /// The first byte after all capabilities.
    free: usize,
    /// Bytes of memory behind base address registers 0 and 1; 0 if there is none.
    memory_bytes: u64,
}

impl ConfigSpace {
    /// Creates a header without base address registers and capabilities. Interrupt pin is 0: no INTx.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            link: CAPABILITIES,
            free: HEADER_END,
            memory_bytes: 0,
        };
        let [base, sub, interface] = identity.class;
        let [subsystem_vendor, subsystem] = identity.subsystem;
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, interface, sub, base]);
        space.put(0x2c, &subsystem_vendor.to_le_bytes());
        space.put(0x2e, &subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER;
        // INTx disable: there is no INTx, but a driver that uses messages sets the bit.
        space.writable[COMMAND + 1] = 1 << 2;
        // Scratch bytes for software: cache line size and interrupt line.
        space.writable[0x0c] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Places `len` bytes of memory at `address`, through base address registers 0 and 1 as one of 64 bits.
    ///
    /// `len` is a power of two, and `address` a multiple of it. A guest that writes all ones reads the size
    /// back.
    pub fn place(&mut self, address: u64, len: u64) {
        debug_assert!(len.is_power_of_two() && address.is_multiple_of(len) && len >= 16);
        self.memory_bytes = len;
        self.put(BAR0, &address.to_le_bytes());
        self.bytes[BAR0] |= BAR_MEMORY_64;
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(len - 1)).to_le_bytes());
        self.bytes[COMMAND] |= COMMAND_MEMORY;
    }

    /// Adds a capability and returns its offset.
    ///
    /// The capability is its ID, a link, then `body`. The guest may change the bits of `body` that are set in
    /// `writable`, which begins at the first byte of `body`.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.free;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        for (bits, wanted) in self.writable.iter_mut().skip(at + 2).zip(writable) {
            *bits = *wanted;
        }
        let offset = u8::try_from(at).unwrap_or(0);
        self.put(self.link, &[offset]);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Sets bytes that the guest reads. Bytes beyond the end are dropped.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    /// Returns the bytes from `at` on; bytes beyond the end are 0.
    pub fn get(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *to = *from;
        }
    }

    /// Writes for the guest, which changes only the bits that it may change.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for ((byte, bits), new) in self.bytes.iter_mut().zip(&self.writable).skip(at).zip(data) {
            *byte = *byte & !bits | new & bits;
        }
    }

    /// Returns what the command register and base address registers 0 and 1 say about the function's memory.
    pub fn memory(&self) -> Memory {
        if self.memory_bytes == 0 || self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Memory::Off;
        }
        let address = self.address();
        // If all writable bits of one half are ones, the guest asks for the size; the value is no address.
        let low = !(self.memory_bytes - 1) & LOW_HALF;
        if address & LOW_HALF == low || address >> 32 == LOW_HALF {
            return Memory::Sizing;
        }
        Memory::At(Span { base: address, len: self.memory_bytes })
    }

    /// Returns the address in base address registers 0 and 1.
    fn address(&self) -> u64 {
        let mut bytes = [0; 8];
        self.get(BAR0, &mut bytes);
        u64::from_le_bytes(bytes) & !0xf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: u64 = 0xd100_8000;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem: [0x1af4, 0x1100],
        });
        space.place(PLACE, 0x8000);
        space
    }

    fn read32(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.get(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x1042_1af4);
        assert_eq!(read32(&space, 8), 0x0180_0001);
        assert_eq!(read32(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read32(&space, 0x3c), 0, "no interrupt pin");
        assert_eq!(read32(&space, 0xfe), 0);
    }

    #[test]
    fn a_base_address_register_tells_its_size_and_where_the_memory_is() {
        let mut space = space();
        let at = |base| Memory::At(Span { base, len: 0x8000 });
        assert_eq!(space.memory(), at(PLACE));
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(space.memory(), Memory::Sizing);
        space.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!((read32(&space, 0x10), read32(&space, 0x14)), (!0x7fff | 4, u32::MAX));
        assert_eq!(space.memory(), Memory::Sizing);
        space.write(0x10, &0xd102_8000_u32.to_le_bytes());
        assert_eq!(space.memory(), Memory::Sizing, "the other half is still a question");
        space.write(0x14, &0_u32.to_le_bytes());
        assert_eq!((read32(&space, 0x10), read32(&space, 0x14)), (0xd102_8004, 0));
        assert_eq!(space.memory(), at(0xd102_8000));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.memory(), Memory::Off);
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(read32(&space, 4) & 0xffff, 0x0406, "memory, master, INTx disable and no more");
        assert_eq!(space.memory(), at(0xd102_8000));
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = space();
        for at in (0..CONFIG_BYTES).step_by(4) {
            if !matches!(at, 0x04 | 0x0c | 0x10 | 0x14 | 0x3c) {
                let before = read32(&space, at);
                space.write(at, &(!before).to_le_bytes());
                assert_eq!(read32(&space, at), before, "at {at:#x}");
            }
        }
        space.write(0xfe, &[1; 8]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        assert_eq!(read32(&space, 4) >> 16 & 0x10, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[7, 0, 0, 0], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read32(&space, 4) >> 16 & 0x10, 0x10);
        assert_eq!(read32(&space, 0x34), 0x40);
        assert_eq!(read32(&space, 0x40), 0x0201_4809);
        space.write(0x48, &[0xff; 6]);
        assert_eq!(read32(&space, 0x48), 0xc007_0011);
    }
}
