//! The boot parameters for the kernel: the zero page, or PVH's start info.
//!
//! Owns both structures' contents (Documentation/arch/x86/zero-page.rst; Xen's hvm_start_info). The
//! definitions are linux-loader's.

use std::mem::size_of;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::e820::Range;
use super::initrd::Initrd;
use super::kernel_file::Kernel;
use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

/// The boot loader type "undefined".
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Writes the zero page, for the 64-bit entry.
pub fn write_zero_page(
    ram: &Ram,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    cmdline_bytes: usize,
    map: &[Range],
) -> Result<(), OutsideRam> {
    let mut page = boot_params { hdr: kernel.header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    // An ELF image has no header to copy, but Linux reads the same fields.
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low32(layout::CMDLINE);
    page.hdr.cmdline_size = low32(cmdline_bytes as u64);
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = low32(initrd.base);
        page.hdr.ramdisk_size = low32(initrd.len);
    }
    for (entry, range) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.base, size: range.len, r#type: range.kind as u32 };
        page.e820_entries += 1;
    }
    mem::write_bytes(ram, layout::ZERO_PAGE, page.as_slice())
}

/// Writes hvm_start_info, its module list and its memory map, for PVH's entry.
pub fn write_start_info(ram: &Ram, initrd: Option<Initrd>, map: &[Range]) -> Result<(), OutsideRam> {
    let modules_at = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let map_at = modules_at + size_of::<hvm_modlist_entry>() as u64;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.map_or(0, |_| 1),
        modlist_paddr: initrd.map_or(0, |_| modules_at),
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: map_at,
        memmap_entries: low32(map.len() as u64),
        ..Default::default()
    };
    let module = initrd.map_or_else(hvm_modlist_entry::default, |initrd| hvm_modlist_entry {
        paddr: initrd.base,
        size: initrd.len,
        ..Default::default()
    });
    let mut bytes = info.as_slice().to_vec();
    bytes.extend(module.as_slice());
    for range in map {
        let entry = hvm_memmap_table_entry {
            addr: range.base,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        };
        bytes.extend(entry.as_slice());
    }
    mem::write_bytes(ram, layout::PVH_START_INFO, &bytes)
}

/// Returns the low 32 bits of an address or length. Everything that we place is below 4 GiB.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

const _: () = assert!(
    layout::PVH_START_INFO + 0x400 < layout::ZERO_PAGE
        && layout::ZERO_PAGE + size_of::<boot_params>() as u64 <= layout::BOOT_STACK
);

#[cfg(test)]
mod tests {
    use super::super::Entry;
    use super::super::e820;
    use super::*;
    use crate::layout::{MIB, ram_regions};

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let regions = ram_regions(64 * MIB);
        let ram = mem::map_ram(&regions).unwrap();
        let kernel = Kernel {
            entry: Entry::Long64 { rip: 0 },
            end: 0,
            bytes: 0,
            initrd_limit: 0,
            cmdline_bytes_max: 0,
            header: Default::default(),
        };
        let initrd = Initrd { base: 0x300_0000, len: 5 };
        write_zero_page(&ram, &kernel, Some(initrd), 9, &e820::map(&regions, false)).unwrap();
        let mut page = boot_params::default();
        mem::read_bytes(&ram, layout::ZERO_PAGE, page.as_mut_slice()).unwrap();
        let (image, size, line) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size, page.hdr.cmd_line_ptr);
        assert_eq!((image, size, u64::from(line)), (0x300_0000, 5, layout::CMDLINE));
        assert_eq!(page.e820_entries, 3);
        let last = page.e820_table[2];
        let (addr, size, kind) = (last.addr, last.size, last.r#type);
        assert_eq!((addr, size, kind), (MIB, 63 * MIB, 1));
    }

    #[test]
    fn the_start_info_points_at_its_lists() {
        let regions = ram_regions(64 * MIB);
        let ram = mem::map_ram(&regions).unwrap();
        write_start_info(&ram, Some(Initrd { base: 0x300_0000, len: 5 }), &e820::map(&regions, false))
            .unwrap();
        let mut info = hvm_start_info::default();
        mem::read_bytes(&ram, layout::PVH_START_INFO, info.as_mut_slice()).unwrap();
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 3));
        let mut module = hvm_modlist_entry::default();
        mem::read_bytes(&ram, info.modlist_paddr, module.as_mut_slice()).unwrap();
        assert_eq!((module.paddr, module.size), (0x300_0000, 5));
        let mut first = hvm_memmap_table_entry::default();
        mem::read_bytes(&ram, info.memmap_paddr, first.as_mut_slice()).unwrap();
        assert_eq!((first.addr, first.size, first.type_), (0, layout::LOW_RAM_END, 1));
    }
}
