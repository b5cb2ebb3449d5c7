//! The MP table: CPUs and interrupt lines, for kernels without ACPI.
//!
//! Owns Intel's MultiProcessor Specification 1.4, chapter 4, as far as Linux reads it. Without this table
//! such a kernel has one CPU and no timer. A kernel that has read the ACPI tables does not read it.

use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const POINTER_BYTES: usize = 16;
const HEADER_BYTES: u16 = 44;
/// The number of IOAPIC lines.
const LINES: u8 = 24;

/// Entry types.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Processor flags.
const ENABLED: u8 = 1;
const BOOT: u8 = 2;

/// Interrupt types.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// The destination that stands for all local APICs.
const ALL: u8 = 0xff;

/// Writes the table for `cpus` CPUs, whose APIC ids are their numbers.
pub fn write(ram: &Ram, cpus: u8) -> Result<(), OutsideRam> {
    let table = table(cpus);
    let mut bytes = pointer().to_vec();
    bytes.extend(table);
    mem::write_bytes(ram, layout::MP_TABLE, &bytes)
}

/// Returns the structure for which a kernel scans the BIOS area; the table follows it.
fn pointer() -> [u8; POINTER_BYTES] {
    let mut bytes = [0; POINTER_BYTES];
    let [a, b, c, d] = low32(layout::MP_TABLE + POINTER_BYTES as u64).to_le_bytes();
    bytes[..10].copy_from_slice(&[b'_', b'M', b'P', b'_', a, b, c, d, 1, SPECIFICATION]);
    bytes[10] = missing(&bytes);
    bytes
}

fn table(cpus: u8) -> Vec<u8> {
    // The IOAPIC's id must differ from every CPU's. With 254 CPUs this is the last free id.
    let ioapic = cpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = if cpu == 0 { ENABLED | BOOT } else { ENABLED };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, flags]);
        push(&entry);
    }
    push(b"\x01\x00ISA   ");
    let [a, b, c, d] = low32(layout::IOAPIC).to_le_bytes();
    push(&[IOAPIC, ioapic, 0x11, ENABLED, a, b, c, d]);
    // Edge-triggered and active-high, as is usual on ISA (flags 0). Lines are connected to pins one to one.
    for line in 0..LINES {
        push(&[IO_INTERRUPT, VECTORED, 0, 0, 0, line, ioapic, line]);
    }
    push(&[LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    push(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL, 1]);
    with_header(&entries, count)
}

fn with_header(entries: &[u8], count: u16) -> Vec<u8> {
    let len = HEADER_BYTES.saturating_add(u16::try_from(entries.len()).unwrap_or(u16::MAX));
    let mut table = b"PCMP".to_vec();
    table.extend(len.to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"MINIVMM virtual     ");
    // There is no OEM table.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(low32(layout::LAPIC).to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    let checksum = missing(&table);
    if let Some(byte) = table.get_mut(7) {
        *byte = checksum;
    }
    table
}

/// Returns the byte that makes the sum of all bytes zero.
fn missing(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The ISA bus's entry begins with its type.
const _: () = assert!(BUS == b"\x01"[0]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_count_their_entries() {
        assert_eq!(missing(&pointer()), 0);
        for cpus in [1, 2, 254] {
            let table = table(cpus);
            assert_eq!(missing(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), u16::from(cpus) + 1 + 1 + 24 + 2);
            assert_eq!(table.len(), 44 + usize::from(cpus) * 20 + 28 * 8);
            let end = layout::MP_TABLE + (POINTER_BYTES + table.len()) as u64;
            assert!(end <= layout::RESET_VECTOR);
        }
    }
}
