//! The memory map that the guest gets.
//!
//! Owns which parts of RAM are usable, by `layout`'s addresses. The zero page and PVH's start info use the
//! same numbers for the types.

use crate::layout;

/// The type of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Reserved: the guest must not use it as RAM.
    Reserved = 2,
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first guest physical address.
    pub base: u64,
    /// The length in bytes.
    pub len: u64,
    /// The type.
    pub kind: RangeKind,
}

/// Returns the map of RAM in `regions` (guest address, bytes). All of it is usable except the BIOS area,
/// which holds the ACPI tables. With `pci` the bus's configuration space is reserved, because Linux uses it
/// only then.
pub fn map(regions: &[(u64, u64)], pci: bool) -> Vec<Range> {
    let mut ranges = Vec::new();
    for &(base, len) in regions {
        let end = base + len;
        let pieces = [
            (0, layout::LOW_RAM_END, RangeKind::Ram),
            (layout::LOW_RAM_END, layout::HIGH_RAM, RangeKind::Reserved),
            (layout::HIGH_RAM, u64::MAX, RangeKind::Ram),
        ];
        for (piece_base, piece_end, kind) in pieces {
            let (from, to) = (base.max(piece_base), end.min(piece_end));
            if from < to {
                ranges.push(Range { base: from, len: to - from, kind });
            }
        }
    }
    if pci {
        let len = layout::PCI_ECAM_END - layout::PCI_ECAM;
        ranges.push(Range { base: layout::PCI_ECAM, len, kind: RangeKind::Reserved });
        ranges.sort_by_key(|range| range.base);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GIB, MIB, ram_regions};

    #[test]
    fn the_bios_area_is_reserved_and_the_hole_is_left_out() {
        let low = [
            Range { base: 0, len: 0x9_fc00, kind: RangeKind::Ram },
            Range { base: 0x9_fc00, len: MIB - 0x9_fc00, kind: RangeKind::Reserved },
        ];
        let ram = |base, len| Range { base, len, kind: RangeKind::Ram };
        assert_eq!(map(&ram_regions(512 * MIB), false), [low[0], low[1], ram(MIB, 511 * MIB)]);
        let split = [low[0], low[1], ram(MIB, 3 * GIB - MIB), ram(4 * GIB, GIB)];
        assert_eq!(map(&ram_regions(4 * GIB), false), split);
        let ecam = Range { base: layout::PCI_ECAM, len: MIB, kind: RangeKind::Reserved };
        assert_eq!(map(&ram_regions(4 * GIB), true), [split[0], split[1], split[2], ecam, split[3]]);
    }
}
