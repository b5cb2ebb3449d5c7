//! What a driver puts into its rings: requests of many shapes, most of them sound, and single fields of
//! anything.

use minivmm::virtio::queue::QueueConfig;

use super::super::input::Input;
use super::super::memory::REGIONS;
use super::super::walk::{INDIRECT, NEXT, WRITE};
use super::{DATA, HEADERS, Machine, STATUSES, TABLES};

impl Machine {
    /// A request, in one of many shapes, of which most are sound.
    pub(super) fn submit(&mut self, input: &mut Input<'_>, queue: u16) {
        let Some(config) = self.config(queue) else { return };
        let size = u16::try_from(config.size).unwrap_or(1);
        let slot = u64::from(input.u8() & 15);
        let kind = input.pick(&[0_u32, 0, 0, 1, 1, 1, 4, 4, 8, 11, 13, 13, 5, u32::MAX]);
        let block = u64::from(self.image.geometry().logical_block) / 512;
        let sector = match input.below(8) {
            0 => input.edgy(),
            1 => 64 - block,
            _ => input.below(64) as u64 / block * block,
        };
        let sectors = input.pick(&[block, block, 2 * block, 8, 1, 0, 64]);
        let mut bytes = match kind {
            0 | 1 => u32::try_from(512 * sectors).unwrap(),
            8 => 20,
            11 | 13 => 16 * input.pick(&[1, 1, 2, 33, 0]),
            _ => 0,
        };
        let shape = input.u8();
        if shape & 0x0f == 0x0f {
            bytes = bytes.wrapping_add(input.pick(&[1, u32::MAX, 512, 17, 1 << 31]));
        }
        let header = HEADERS + 32 * slot;
        self.memory.put(header, &[kind.to_le_bytes(), [0; 4]].concat());
        self.memory.put(header + 8, &sector.to_le_bytes());
        // Aligned, and misaligned so that it is bounced, and as far as the end of RAM.
        let data = match shape >> 4 & 7 {
            0 => REGIONS[1].0,
            1 => REGIONS[1].0 + REGIONS[1].1 - u64::from(bytes).min(0x8000),
            2 => DATA + 0x1000 * slot + 4,
            3 => DATA + 0x1000 * slot + 1,
            4 if input.once_in(4) => input.edgy(),
            _ => DATA + 0x1000 * (slot & 7),
        };
        if matches!(kind, 11 | 13) {
            for range in 0..u64::from(bytes / 16).min(4) {
                let sectors = input.pick(&[8_u32, 1, 64, 0, 1 << 22, u32::MAX]);
                let flags = input.pick(&[0_u32, 0, 1, 2]);
                let at = data.wrapping_add(16 * range);
                self.memory.put(at, &sector.wrapping_add(8 * range).to_le_bytes());
                self.memory.put(at.wrapping_add(8), &sectors.to_le_bytes());
                self.memory.put(at.wrapping_add(12), &flags.to_le_bytes());
            }
        }
        let write = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        let mut parts = vec![(header, 16, 0)];
        let cut = if shape & 0x80 == 0 { 0 } else { u32::from(input.u8()) };
        if cut > 0 && cut < bytes {
            parts.push((data, cut, write));
            parts.push((data.wrapping_add(cut.into()), bytes - cut, write));
        } else if bytes > 0 {
            parts.push((data, bytes, write));
        }
        let status = if input.once_in(16) { input.edgy() } else { STATUSES + slot };
        parts.push((status, 1, WRITE));
        if input.once_in(16) {
            let (one, two) = (input.below(parts.len()), input.below(parts.len()));
            parts.swap(one, two);
        }
        let head = u16::from(input.u8()) % size;
        if input.once_in(3) {
            let table = TABLES + 0x100 * slot;
            for (index, part) in (0..).zip(&parts) {
                self.put_descriptor(table, index, *part, usize::from(index) + 1 < parts.len(), index + 1);
            }
            let bytes = 16 * u32::try_from(parts.len()).unwrap();
            self.put_descriptor(config.descriptors, head, (table, bytes, INDIRECT), false, 0);
        } else {
            for (index, part) in (0..).zip(&parts) {
                let (at, next) = ((head + index) % size, (head + index + 1) % size);
                self.put_descriptor(
                    config.descriptors,
                    at,
                    *part,
                    usize::from(index) + 1 < parts.len(),
                    next,
                );
            }
        }
        self.put_available(config, queue, head);
    }

    pub(super) fn put_descriptor(
        &mut self,
        table: u64,
        index: u16,
        part: (u64, u32, u16),
        goes_on: bool,
        next: u16,
    ) {
        let (addr, len, flags) = part;
        let flags = flags | if goes_on { NEXT } else { 0 };
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.put(table.wrapping_add(16 * u64::from(index)), &bytes);
    }

    pub(super) fn put_available(&mut self, config: QueueConfig, queue: u16, head: u16) {
        let avail = &mut self.avail[usize::from(queue)];
        let at = 4 + 2 * u64::from(*avail) % (2 * u64::from(config.size).max(1));
        *avail = avail.wrapping_add(1);
        let idx = *avail;
        self.memory.put(config.available.wrapping_add(at), &head.to_le_bytes());
        self.memory.put(config.available.wrapping_add(2), &idx.to_le_bytes());
    }

    pub(super) fn config(&self, queue: u16) -> Option<QueueConfig> {
        self.lanes[usize::from(queue)].as_ref().map(|lane| lane.config)
    }

    pub(super) fn write_descriptor(&mut self, input: &mut Input<'_>, queue: u16) {
        let Some(config) = self.config(queue) else { return };
        let table = if input.once_in(3) { TABLES } else { config.descriptors };
        let part = (
            if input.once_in(4) { input.edgy() } else { u64::from(input.u16()) },
            input.pick(&[0, 1, 16, 17, 512, 4096, u32::MAX]),
            input.u16() & 7,
        );
        let (index, next) = (input.u16() & 63, input.u16() & 127);
        self.put_descriptor(table, index, part, input.flag(), next);
    }

    pub(super) fn make_available(&mut self, input: &mut Input<'_>, queue: u16) {
        let Some(config) = self.config(queue) else { return };
        match input.below(8) {
            0 => {
                let idx = input.u16();
                self.avail[usize::from(queue)] = idx;
                self.memory.put(config.available + 2, &idx.to_le_bytes());
            }
            1 => {
                let flags = input.u16() & 3;
                self.memory.put(config.available, &flags.to_le_bytes());
            }
            2 => {
                let event = if input.flag() { input.u16() } else { self.avail[usize::from(queue)] };
                self.memory.put(config.available + 4 + 2 * u64::from(config.size), &event.to_le_bytes());
            }
            _ => {
                let head = if input.once_in(8) { input.u16() } else { input.u16() % config.size as u16 };
                self.put_available(config, queue, head);
            }
        }
    }
}
