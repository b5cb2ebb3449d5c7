//! The address map of the machine, in address order, checked by the compiler.
//!
//! Owns every guest physical address, port and interrupt line that we chose. `docs/reference/address-map.md`
//! shows them as a table.

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

// Guest physical addresses below 1 MiB: what a loader prepares for the kernel.

/// The boot GDT and IDT.
pub const GDT: u64 = 0x500;
/// struct hvm_start_info, its module list and memory map (PVH).
pub const PVH_START_INFO: u64 = 0x6000;
/// struct boot_params, "the zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// The top of the boot stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit entry: one PML4, one PDPT, four page directories (4 GiB).
pub const PAGE_TABLES: u64 = 0x9000;
/// The end of the page tables.
pub const PAGE_TABLES_END: u64 = PAGE_TABLES + 6 * 0x1000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x20000;
/// The longest command line in bytes, including its terminating NUL (COMMAND_LINE_SIZE of x86).
pub const CMDLINE_MAX: u64 = 2048;
/// The end of the memory that the kernel may use below the BIOS area.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in the part of the BIOS area where a kernel scans for the RSDP.
pub const ACPI: u64 = 0xe_0000;
/// The end of the ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// The MP table, in the part of the BIOS area where a kernel scans for it.
pub const MP_TABLE: u64 = 0xf_0000;
/// Where a processor starts in the BIOS after a reset (F000:FFF0). A kernel that resets the machine through the
/// BIOS jumps here.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where the kernel is loaded, and where RAM continues.
pub const HIGH_RAM: u64 = MIB;

// The hole below 4 GiB.

/// The highest end of RAM below 4 GiB. Any further RAM continues at 4 GiB.
pub const RAM_HOLE: u64 = 3 * GIB;
/// virtio-mmio devices, one page each.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The distance between two virtio-mmio devices, in bytes.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// The most virtio-mmio devices: one for each interrupt line that is left for them.
pub const VIRTIO_MMIO_COUNT: u64 = VIRTIO_IRQS.len() as u64;
/// Registers of PCI functions, one area per device number.
pub const PCI_MEMORY: u64 = 0xd100_0000;
/// The size of each area, in bytes.
pub const PCI_MEMORY_STRIDE: u64 = 0x8000;
/// The end of the memory that the host bridge forwards.
pub const PCI_MEMORY_END: u64 = PCI_MEMORY + PCI_DEVICES * PCI_MEMORY_STRIDE;
/// The number of devices on the only bus.
pub const PCI_DEVICES: u64 = 32;
/// The configuration space of the PCI bus, mapped as memory.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// The end of the configuration space: 4 KiB for each of eight functions of each device.
pub const PCI_ECAM_END: u64 = PCI_ECAM + PCI_DEVICES * 8 * 0x1000;
/// The IOAPIC, inside KVM.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC, inside KVM.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs for itself on Intel (KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// RAM above 4 GiB.
pub const RAM_ABOVE_HOLE: u64 = 4 * GIB;

const _: () = assert!(ACPI_END <= MP_TABLE);
const _: () = {
    let ordered = [
        GDT,
        PVH_START_INFO,
        ZERO_PAGE,
        BOOT_STACK,
        PAGE_TABLES,
        PAGE_TABLES_END,
        CMDLINE,
        CMDLINE + CMDLINE_MAX,
        LOW_RAM_END,
        ACPI,
        MP_TABLE,
        RESET_VECTOR,
        HIGH_RAM,
        RAM_HOLE,
        VIRTIO_MMIO,
        VIRTIO_MMIO + VIRTIO_MMIO_COUNT * VIRTIO_MMIO_STRIDE,
        PCI_MEMORY,
        PCI_MEMORY_END,
        PCI_ECAM,
        PCI_ECAM_END,
        IOAPIC,
        LAPIC,
        KVM_TSS,
        RAM_ABOVE_HOLE,
    ];
    let mut i = 1;
    while i < ordered.len() {
        assert!(ordered[i - 1] < ordered[i], "the address map overlaps");
        i += 1;
    }
};

// Ports.

/// The i8042 data port; at +4 its command port (0xfe there resets).
pub const PORT_I8042: u64 = 0x60;
/// CMOS RTC: index, data.
pub const PORT_RTC: u64 = 0x70;
/// The exit port of bare guests, like QEMU's isa-debug-exit.
pub const PORT_EXIT: u64 = 0xf4;
/// COM1.
pub const PORT_SERIAL: u64 = 0x3f8;
/// pvpanic.
pub const PORT_PVPANIC: u64 = 0x505;
/// ACPI's sleep control register.
pub const PORT_ACPI_SLEEP_CONTROL: u64 = 0x600;
/// ACPI's sleep status register.
pub const PORT_ACPI_SLEEP_STATUS: u64 = 0x601;
/// ACPI's reset register.
pub const PORT_ACPI_RESET: u64 = 0x602;
/// PCI configuration: the address (32 bits at once), and at +4 the data. At +1 is the reset control register.
pub const PORT_PCI: u64 = 0xcf8;

const _: () = assert!(
    PORT_I8042 + 5 <= PORT_RTC
        && PORT_RTC + 2 <= PORT_EXIT
        && PORT_EXIT < PORT_SERIAL
        && PORT_SERIAL + 8 <= PORT_PVPANIC
        && PORT_PVPANIC < PORT_ACPI_SLEEP_CONTROL
        && PORT_ACPI_RESET < PORT_PCI
);

// Values that the ACPI tables promise for devices' registers.

/// The value to write to the reset register.
pub const ACPI_RESET_VALUE: u8 = 0x01;
/// `_S5`: the sleep type that powers off.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;
/// The CMOS byte that holds the century.
pub const CMOS_CENTURY: u8 = 0x32;

// Interrupt lines (GSI = IOAPIC pin).

/// COM1.
pub const IRQ_SERIAL: u32 = 4;
/// ACPI's SCI, unused by hardware-reduced ACPI but reserved.
pub const IRQ_SCI: u32 = 9;
/// The interrupt lines of the virtio-mmio devices, in order.
pub const VIRTIO_IRQS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

const _: () = {
    let mut i = 0;
    while i < VIRTIO_IRQS.len() {
        assert!(VIRTIO_IRQS[i] != IRQ_SERIAL && VIRTIO_IRQS[i] != IRQ_SCI && VIRTIO_IRQS[i] < 24);
        assert!(VIRTIO_IRQS[i] != 0 && VIRTIO_IRQS[i] != 2 && VIRTIO_IRQS[i] != 8 && VIRTIO_IRQS[i] != 13);
        i += 1;
    }
};

/// Returns RAM of `bytes` as regions of (guest address, bytes), split around the hole below 4 GiB.
pub fn ram_regions(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(RAM_HOLE);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((RAM_ABOVE_HOLE, bytes - low));
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_three_gib_continues_at_four() {
        assert_eq!(ram_regions(512 * MIB), [(0, 512 * MIB)]);
        assert_eq!(ram_regions(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ram_regions(4 * GIB), [(0, 3 * GIB), (4 * GIB, GIB)]);
    }
}
