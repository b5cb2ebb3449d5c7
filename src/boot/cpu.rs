//! The first CPU's registers at its first instruction.
//!
//! Owns the state that both boot protocols require, and the GDT and page tables in guest memory that this
//! state refers to. This is the only file of `boot` that names KVM. The other CPUs wait for a start-up
//! interrupt and need no set-up.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::Entry;
use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

/// Why a CPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refused this part of the state.
    #[error("KVM refuses the first CPU's {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// RAM has no room for the tables.
    #[error("cannot write the first CPU's tables")]
    Ram(#[from] OutsideRam),
}

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set; interrupts are off.
const FLAGS: u64 = 1 << 1;
/// x87 control word: all exceptions masked, as after FNINIT.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Segment selectors. Linux's protocol prescribes the numbers for code and data.
const CODE_64: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const CODE_32: u16 = 0x30;
/// Access bytes with the granularity nibble above them, as in bits 40 to 55 of a descriptor.
const FLAGS_CODE_64: u16 = 0xa09b;
const FLAGS_CODE_32: u16 = 0xc09b;
const FLAGS_DATA: u16 = 0xc093;
const FLAGS_TASK: u16 = 0x008b;
const GDT_ENTRIES: usize = 7;

/// Sets the registers of `vcpu`, and writes the tables.
pub fn set_up(vcpu: &VcpuFd, ram: &Ram, entry: Entry) -> Result<(), CpuError> {
    write_gdt(ram)?;
    if let Entry::Long64 { .. } = entry {
        write_page_tables(ram)?;
    }
    set_system_registers(vcpu, entry)?;
    let regs = match entry {
        Entry::Long64 { rip } => kvm_regs {
            rip,
            rsi: layout::ZERO_PAGE,
            rsp: layout::BOOT_STACK,
            rflags: FLAGS,
            ..Default::default()
        },
        Entry::Pvh32 { eip } => kvm_regs {
            rip: u64::from(eip),
            rbx: layout::PVH_START_INFO,
            rsp: layout::BOOT_STACK,
            rflags: FLAGS,
            ..Default::default()
        },
    };
    vcpu.set_regs(&regs).map_err(|e| CpuError::Kvm("registers", e))?;
    let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|e| CpuError::Kvm("floating-point state", e))
}

fn set_system_registers(vcpu: &VcpuFd, entry: Entry) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(|e| CpuError::Kvm("system registers", e))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = u16::try_from(GDT_ENTRIES * 8 - 1).unwrap_or_default();
    // The kernel takes no interrupt before it has loaded its own table.
    sregs.idt.limit = 0;
    let data = segment(DATA, FLAGS_DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, FLAGS_TASK);
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    match entry {
        Entry::Pvh32 { .. } => {
            sregs.cs = segment(CODE_32, FLAGS_CODE_32);
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
        Entry::Long64 { .. } => {
            sregs.cs = segment(CODE_64, FLAGS_CODE_64);
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
        }
    }
    vcpu.set_sregs(&sregs).map_err(|e| CpuError::Kvm("system registers", e))
}

/// Returns a flat segment from 0. All but the task segment reach to 4 GiB.
fn segment(selector: u16, flags: u16) -> kvm_segment {
    let bit = |n: u16| u8::from(flags & (1 << n) != 0);
    let bits = |n: u16, mask: u16| u8::try_from((flags >> n) & mask).unwrap_or_default();
    kvm_segment {
        base: 0,
        limit: if bit(15) != 0 { u32::MAX } else { 0x67 },
        selector,
        type_: bits(0, 15),
        s: bit(4),
        dpl: bits(5, 3),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        ..Default::default()
    }
}

fn write_gdt(ram: &Ram) -> Result<(), OutsideRam> {
    let mut gdt = [0_u64; GDT_ENTRIES];
    let entries =
        [(CODE_64, FLAGS_CODE_64), (DATA, FLAGS_DATA), (TASK, FLAGS_TASK), (CODE_32, FLAGS_CODE_32)];
    for (selector, flags) in entries {
        let limit: u64 = if flags & (1 << 15) != 0 { 0x000f_0000_0000_ffff } else { 0x67 };
        if let Some(entry) = gdt.get_mut(usize::from(selector / 8)) {
            *entry = limit | u64::from(flags) << 40;
        }
    }
    let bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    mem::write_bytes(ram, layout::GDT, &bytes)
}

/// Maps the first 4 GiB one to one, in pages of 2 MiB.
fn write_page_tables(ram: &Ram) -> Result<(), OutsideRam> {
    const PAGE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let pointers = layout::PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    let put = |at: u64, entry: u64| mem::write_bytes(ram, at, &(entry | PRESENT_WRITABLE).to_le_bytes());
    put(layout::PAGE_TABLES, pointers)?;
    for gib in 0..4 {
        put(pointers + gib * 8, directories + gib * PAGE)?;
    }
    for index in 0..4 * 512 {
        put(directories + index * 8, (index * 2 * layout::MIB) | LARGE)?;
    }
    Ok(())
}

const _: () = assert!(layout::PAGE_TABLES_END == layout::PAGE_TABLES + 6 * 0x1000);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;

    #[test]
    fn the_gdt_agrees_with_the_segment_registers() {
        let ram = mem::map_ram(&[(0, MIB)]).unwrap();
        write_gdt(&ram).unwrap();
        let mut gdt = [0; GDT_ENTRIES * 8];
        mem::read_bytes(&ram, layout::GDT, &mut gdt).unwrap();
        let entry = |selector: u16| {
            let at = usize::from(selector);
            u64::from_le_bytes(gdt[at..at + 8].try_into().unwrap())
        };
        assert_eq!(entry(CODE_64), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(CODE_32), 0x00cf_9b00_0000_ffff);
        let code = segment(CODE_64, FLAGS_CODE_64);
        assert_eq!((code.l, code.db, code.g, code.present, code.s, code.type_), (1, 0, 1, 1, 1, 11));
        assert_eq!(segment(TASK, FLAGS_TASK).limit, 0x67);
    }

    #[test]
    fn every_page_below_four_gib_is_mapped_to_itself() {
        let ram = mem::map_ram(&[(0, MIB)]).unwrap();
        write_page_tables(&ram).unwrap();
        let read = |at: u64| {
            let mut bytes = [0; 8];
            mem::read_bytes(&ram, at, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        for address in [0, 0x20_0000, 0x4000_0000, 0xfee0_0000, 0xffe0_0000_u64] {
            let pointers = read(layout::PAGE_TABLES) & !0xfff;
            let directory = read(pointers + (address >> 30) * 8) & !0xfff;
            let page = read(directory + ((address >> 21) & 511) * 8);
            assert_eq!(page, address | 0x83, "{address:#x}");
        }
    }
}
