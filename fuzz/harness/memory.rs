//! Guest RAM with a shadow: what it held when the device was last left alone.
//!
//! Owns the comparison of the two. Two regions with a hole between them, so that ranges can lie across.

use std::ops::Range;

use minivmm::mem::{self, Ram};

/// Base and bytes of the regions.
pub const REGIONS: [(u64, u64); 2] = [(0, 0x2_0000), (0x3_0000, 0x8000)];

thread_local! {
    static RAM: Ram = mem::map_ram(&REGIONS).expect("RAM");
}

/// RAM and shadow.
pub struct Memory {
    pub ram: Ram,
    shadow: [Vec<u8>; 2],
    now: Vec<u8>,
    /// What the driver has written since it was last asked.
    touched: Vec<Range<u64>>,
}

impl Memory {
    /// All zero.
    pub fn new() -> Self {
        let ram = RAM.with(Ram::clone);
        let shadow = REGIONS.map(|(_, bytes)| vec![0; usize::try_from(bytes).unwrap()]);
        for ((base, _), zeroes) in REGIONS.iter().zip(&shadow) {
            mem::write_bytes(&ram, *base, zeroes).unwrap();
        }
        Self { ram, shadow, now: Vec::new(), touched: Vec::new() }
    }

    /// Host addresses of the regions.
    pub fn host(&self) -> Vec<Range<usize>> {
        let host = |(_, host, bytes): (u64, u64, u64)| {
            let host = usize::try_from(host).unwrap();
            host..host + usize::try_from(bytes).unwrap()
        };
        self.ram.regions().into_iter().map(host).collect()
    }

    /// The bytes of a range that is wholly in one region, as they were when the device was last left.
    pub fn get(&self, addr: u64, len: u64) -> Option<&[u8]> {
        let (region, at) = find(addr, len)?;
        self.shadow[region].get(at..at + usize::try_from(len).ok()?)
    }

    pub fn u16(&self, addr: u64) -> Option<u16> {
        Some(u16::from_le_bytes(self.get(addr, 2)?.try_into().ok()?))
    }

    /// The driver writes: as much as is in RAM.
    pub fn put(&mut self, addr: u64, bytes: &[u8]) {
        if let Some((region, at)) = find(addr, bytes.len() as u64) {
            self.shadow[region][at..at + bytes.len()].copy_from_slice(bytes);
            mem::write_bytes(&self.ram, addr, bytes).unwrap();
            self.touched.push(addr..addr + bytes.len() as u64);
        }
    }

    /// Where the driver has written since this was last asked.
    pub fn take_touched(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.touched)
    }

    /// Takes over what the device has written, and tells of each run of changed bytes.
    pub fn take_changes(&mut self, mut changed: impl FnMut(Range<u64>)) {
        const STEP: usize = 256;
        for (region, (base, bytes)) in REGIONS.into_iter().enumerate() {
            self.now.resize(usize::try_from(bytes).unwrap(), 0);
            mem::read_bytes(&self.ram, base, &mut self.now).unwrap();
            let shadow = &mut self.shadow[region];
            if self.now == *shadow {
                continue;
            }
            for (block, (new, old)) in self.now.chunks(STEP).zip(shadow.chunks_mut(STEP)).enumerate() {
                if new == old {
                    continue;
                }
                let at = base + (block * STEP) as u64;
                let mut from = None;
                for index in 0..=new.len() {
                    let differs = index < new.len() && new[index] != old[index];
                    match (differs, from) {
                        (true, None) => from = Some(index),
                        (false, Some(begin)) => {
                            changed(at + begin as u64..at + index as u64);
                            from = None;
                        }
                        _ => {}
                    }
                }
                old.copy_from_slice(new);
            }
        }
    }
}

/// Region and offset in it.
fn find(addr: u64, len: u64) -> Option<(usize, usize)> {
    let end = addr.checked_add(len)?;
    let region = REGIONS.iter().position(|&(base, bytes)| base <= addr && end <= base + bytes)?;
    Some((region, usize::try_from(addr - REGIONS[region].0).ok()?))
}

/// Whether a range is wholly in one region.
pub fn is_ram(addr: u64, len: u64) -> bool {
    find(addr, len).is_some()
}
