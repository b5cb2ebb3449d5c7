//! Puts a guest into memory: kernel, initrd, command line, boot parameters, ACPI tables, MP
//! table.
//!
//! Owns what the boot protocols and the firmware tables say; knows of devices no more than what has
//! to be announced. Everything read from a file is an allegation until it is checked here. Only
//! [`cpu`] names KVM.

pub mod acpi;
mod bzimage;
pub mod cmdline;
pub mod cpu;
mod e820;
mod elf;
mod initrd;
mod kernel;
mod mptable;
mod params;

use std::path::{Path, PathBuf};

use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

use acpi::Hardware;
pub use kernel::KernelError;

/// A virtio-mmio device, as it is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// First guest physical address of its page.
    pub base: u64,
    /// Its interrupt line.
    pub irq: u32,
}

/// What is to be booted.
#[derive(Debug)]
pub struct Guest<'a> {
    /// The kernel image.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// What is put behind it: one more archive, which begins at a multiple of 4.
    pub initrd_tail: &'a [u8],
    /// The kernel's parameters, without the announcement of devices.
    pub cmdline: &'a str,
    /// How many CPUs.
    pub cpus: u8,
    /// The virtio-mmio devices to announce.
    pub devices: &'a [MmioDevice],
    /// There is a PCI bus.
    pub pci: bool,
}

/// Where the first CPU starts, and by which protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, the zero page in RSI (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Long64 {
        /// First instruction.
        rip: u64,
    },
    /// 32-bit mode without paging, hvm_start_info in EBX (Xen's PVH).
    Pvh32 {
        /// First instruction.
        eip: u32,
    },
}

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image.
    #[error("cannot boot kernel {path}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
    },
    /// The initial RAM disk.
    #[error("cannot use initrd {path}")]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: initrd::InitrdError,
    },
    /// The command line.
    #[error("cannot use the kernel command line")]
    Cmdline(#[from] cmdline::CmdlineError),
    /// The ACPI tables.
    #[error("cannot lay the ACPI tables")]
    Acpi(#[from] acpi::AcpiError),
    /// RAM is smaller than what belongs into its first MiB.
    #[error("cannot write the boot parameters")]
    Params(#[from] OutsideRam),
}

/// Loads `guest` into `ram`.
pub fn load(ram: &Ram, guest: &Guest<'_>) -> Result<Entry, BootError> {
    let kernel = kernel::load(ram, guest.kernel)
        .map_err(|source| BootError::Kernel { path: guest.kernel.into(), source })?;
    let initrd = match guest.initrd {
        None => None,
        Some(path) => Some(
            initrd::load(ram, path, guest.initrd_tail, &kernel)
                .map_err(|source| BootError::Initrd { path: path.into(), source })?,
        ),
    };
    let cmdline = cmdline::announce(guest.cmdline, guest.devices);
    cmdline::check(&cmdline, kernel.cmdline_bytes_max)?;
    log::info!("kernel command line: {cmdline}");
    write_cmdline(ram, &cmdline)?;
    mem::write_bytes(ram, layout::RESET_VECTOR, &RESET_CODE)?;
    acpi::write(ram, &Hardware { cpus: guest.cpus, devices: guest.devices, pci: guest.pci })?;
    mptable::write(ram, guest.cpus)?;
    let regions: Vec<_> = mem::regions(ram).iter().map(|&(base, _, len)| (base, len)).collect();
    let map = e820::map(&regions, guest.pci);
    match kernel.entry {
        Entry::Long64 { .. } => params::write_zero_page(ram, &kernel, initrd, cmdline.len(), &map)?,
        Entry::Pvh32 { .. } => params::write_start_info(ram, initrd, &map)?,
    }
    Ok(kernel.entry)
}

/// All the BIOS that there is, in real mode: `mov al, 0xfe; out 0x64, al`, which resets, and a halt.
/// Linux does not use the ACPI reset register of a hardware-reduced machine unless `reboot=` says so:
/// it expects EFI there, and without EFI goes to the BIOS.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

fn write_cmdline(ram: &Ram, cmdline: &str) -> Result<(), OutsideRam> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem::write_bytes(ram, layout::CMDLINE, &bytes)
}
