//! Puts a guest into memory: kernel, initrd, command line, boot parameters, ACPI tables, MP table.
//!
//! Owns what the boot protocols and the firmware tables require. Of devices it knows only what must be
//! announced. Nothing read from a file is trusted before it is checked here. Only [`cpu`] names KVM.

pub mod acpi;
mod bzimage;
pub mod caveats;
pub mod cmdline;
pub mod cpu;
mod e820;
mod elf;
mod initrd;
mod kernel;
mod kernel_file;
mod mptable;
mod need;
mod params;
mod tail;

use std::io;
use std::path::{Path, PathBuf};

use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

use acpi::Hardware;
use initrd::InitrdError;
pub use kernel_file::KernelError;
pub use tail::{Piece, Tail};

/// A virtio-mmio device, as it is announced to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// The first guest physical address of its registers.
    pub base: u64,
    /// Its interrupt line.
    pub irq: u32,
}

/// What is to be booted.
#[derive(Debug)]
pub struct Guest<'a> {
    /// The kernel image.
    pub kernel: &'a Path,
    /// The initial RAM disk; `None` boots without one.
    pub initrd: Option<&'a Path>,
    /// One more archive, appended to the initial RAM disk at a multiple of 4.
    pub initrd_tail: Tail<'a>,
    /// The kernel's parameters, without the announcement of devices.
    pub cmdline: &'a str,
    /// The number of CPUs.
    pub cpus: u8,
    /// The virtio-mmio devices to announce.
    pub devices: &'a [MmioDevice],
    /// `true` if there is a PCI bus.
    pub pci: bool,
}

/// Where the first CPU starts, and by which protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, with the zero page in RSI (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Long64 {
        /// The address of the first instruction.
        rip: u64,
    },
    /// 32-bit mode without paging, with hvm_start_info in EBX (Xen's PVH).
    Pvh32 {
        /// The address of the first instruction.
        eip: u32,
    },
}

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image cannot be booted.
    #[error("cannot boot kernel {path}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
    },
    /// The initial RAM disk cannot be used.
    #[error("cannot use initrd {path}")]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: initrd::InitrdError,
    },
    /// A file to be appended to the initial RAM disk cannot be read.
    #[error("cannot add {path} to the guest")]
    Added {
        /// The file.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// The guest has too little memory to unpack its initial RAM disk.
    #[error(transparent)]
    TooLittle(need::TooLittle),
    /// The command line cannot be used.
    #[error("cannot use the kernel command line")]
    Cmdline(#[from] cmdline::CmdlineError),
    /// The ACPI tables cannot be written.
    #[error("cannot place the ACPI tables")]
    Acpi(#[from] acpi::AcpiError),
    /// RAM is smaller than what belongs into its first MiB.
    #[error("cannot write the boot parameters")]
    Params(#[from] OutsideRam),
}

/// Loads `guest` into `ram`.
pub fn load(ram: &Ram, guest: &Guest<'_>) -> Result<Entry, BootError> {
    let kernel = kernel::load(ram, guest.kernel).map_err(|source| no_kernel(ram, guest, source))?;
    let initrd = match guest.initrd {
        None => None,
        Some(path) => {
            let loaded = initrd::load(ram, path, &guest.initrd_tail, &kernel, guest.cmdline);
            Some(loaded.map_err(|source| match source {
                InitrdError::Added { path, source } => BootError::Added { path, source },
                InitrdError::TooLittle(source) => BootError::TooLittle(source),
                source => BootError::Initrd { path: path.into(), source },
            })?)
        }
    };
    let cmdline = cmdline::announce(guest.cmdline, guest.devices);
    cmdline::check(&cmdline, kernel.cmdline_bytes_max)?;
    log::info!("kernel command line: {cmdline}");
    let devices = caveats::Devices { pci: guest.pci, mmio: !guest.devices.is_empty() };
    for caveat in caveats::of(guest.cmdline, devices) {
        log::warn!("{caveat}");
    }
    write_cmdline(ram, &cmdline)?;
    mem::write_bytes(ram, layout::RESET_VECTOR, &RESET_CODE)?;
    acpi::write(ram, &Hardware { cpus: guest.cpus, devices: guest.devices, pci: guest.pci })?;
    mptable::write(ram, guest.cpus)?;
    let regions: Vec<_> = ram.regions().iter().map(|&(base, _, len)| (base, len)).collect();
    let map = e820::map(&regions, guest.pci);
    match kernel.entry {
        Entry::Long64 { .. } => params::write_zero_page(ram, &kernel, initrd, cmdline.len(), &map)?,
        Entry::Pvh32 { .. } => params::write_start_info(ram, initrd, &map)?,
    }
    Ok(kernel.entry)
}

/// Returns the error for a kernel that could not be loaded. If memory is too small even for the kernel, the
/// suggested size also counts what else must be unpacked.
fn no_kernel(ram: &Ram, guest: &Guest<'_>, source: KernelError) -> BootError {
    if let KernelError::NoRoom { to, .. } = &source
        && *to < layout::RAM_HOLE
        && let Some(initrd) = guest.initrd
        && let Err(too_little) =
            initrd::need(initrd, &guest.initrd_tail, to - layout::HIGH_RAM, guest.cmdline)
                .map_or(Ok(()), |need| need.check(ram.size_bytes()))
    {
        return BootError::TooLittle(too_little);
    }
    BootError::Kernel { path: guest.kernel.into(), source }
}

/// The whole BIOS, in real mode: `mov al, 0xfe; out 0x64, al`, which resets, and a halt. Linux uses the ACPI
/// reset register of a hardware-reduced machine only if `reboot=` says so. By default it expects EFI there,
/// and without EFI it jumps to the BIOS.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

fn write_cmdline(ram: &Ram, cmdline: &str) -> Result<(), OutsideRam> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem::write_bytes(ram, layout::CMDLINE, &bytes)
}
