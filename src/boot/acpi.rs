//! The ACPI tables: RSDP, XSDT, FADT (hardware-reduced), MADT, MCFG, DSDT.
//!
//! Owns how the machine describes itself to a kernel that reads ACPI (6.5). The tables describe CPUs,
//! interrupt controllers, power-off and reset, the serial port, the clock, pvpanic, each virtio-mmio device
//! and the PCI host bridge. Addresses, and the meaning of the devices' registers, are `layout`'s.

use acpi_tables::aml::{
    AddressSpace as Window, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::MmioDevice;
use crate::layout;
use crate::mem::{self, OutsideRam, Ram};

const OEM: [u8; 6] = *b"MINIVM";
const TABLE: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;
/// IAPC_BOOT_ARCH: there is no VGA. A clear bit 1 says that there is no i8042, and a clear bit 5 says that
/// there is a CMOS clock.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// Why the tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// The tables do not fit into their area.
    #[error("they need {bytes} bytes, and only {max} are reserved for them")]
    TooLong {
        /// The bytes that the tables need.
        bytes: u64,
        /// The size of their area in bytes.
        max: u64,
    },
    /// RAM does not reach as far as their area.
    #[error(transparent)]
    Ram(#[from] OutsideRam),
}

/// The hardware that the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Hardware<'a> {
    /// The number of CPUs.
    pub cpus: u8,
    /// The virtio-mmio devices.
    pub devices: &'a [MmioDevice],
    /// `true` if there is a PCI bus.
    pub pci: bool,
}

/// Writes all tables to `layout::ACPI`, the RSDP first.
pub fn write(ram: &Ram, hardware: &Hardware<'_>) -> Result<(), AcpiError> {
    let tables = tables(layout::ACPI, hardware);
    let (bytes, max) = (tables.len() as u64, layout::ACPI_END - layout::ACPI);
    if bytes > max {
        return Err(AcpiError::TooLong { bytes, max });
    }
    Ok(mem::write_bytes(ram, layout::ACPI, &tables)?)
}

/// Returns the tables as they are laid out at `base`.
fn tables(base: u64, hardware: &Hardware<'_>) -> Vec<u8> {
    // The RSDP points to the tables after it, so it is written last, into the space left for it.
    let mut area = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let at = base + area.len() as u64;
        table.to_aml_bytes(&mut area);
        area.resize(area.len().next_multiple_of(16), 0);
        at
    };
    let dsdt_at = place(&dsdt(hardware));
    let fadt_at = place(&fadt(dsdt_at));
    let madt_at = place(&madt(hardware.cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    if hardware.pci {
        let mut mcfg = MCFG::new(OEM, TABLE, OEM_REVISION);
        mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
        xsdt.add_entry(place(&mcfg));
    }
    let xsdt_at = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt_at).to_aml_bytes(&mut rsdp);
    for (to, from) in area.iter_mut().zip(rsdp) {
        *to = from;
    }
    area
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |port| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let mut fadt = FADTBuilder::new(OEM, TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.century = layout::CMOS_CENTURY;
    fadt.reset_reg = register(layout::PORT_ACPI_RESET);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.sleep_control_reg = register(layout::PORT_ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = register(layout::PORT_ACPI_SLEEP_STATUS);
    fadt.finalize()
}

/// Makes the MADT. APIC ids are the CPUs' numbers, as in their CPUID.
fn madt(cpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM, TABLE, OEM_REVISION, LocalInterruptController::Address(low32(layout::LAPIC)));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, low32(layout::IOAPIC), 0));
    madt
}

fn dsdt(hardware: &Hardware<'_>) -> impl Aml {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, OEM_REVISION);
    let mut aml = Vec::new();
    let s5 = layout::ACPI_S5_SLEEP_TYPE;
    let zero = 0_u8;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &zero, &zero, &zero])).to_aml_bytes(&mut aml);
    let mut inside = Vec::new();
    for cpu in 0..hardware.cpus {
        processor(cpu, &mut inside);
    }
    serial(&mut inside);
    clock(&mut inside);
    pvpanic(&mut inside);
    for (index, device) in hardware.devices.iter().enumerate() {
        virtio_mmio(index, device, &mut inside);
    }
    if hardware.pci {
        pci_bridge(&mut inside);
    }
    aml.extend(Scope::raw("_SB_".into(), inside));
    for byte in aml {
        dsdt.byte(byte);
    }
    dsdt
}

/// Adds a CPU's device object. Linux reports a CPU without one as a firmware bug.
fn processor(cpu: u8, aml: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &cpu);
    Device::new(path(&format!("C{cpu:03X}")), vec![&hid, &uid]).to_aml_bytes(aml);
}

fn serial(aml: &mut Vec<u8>) {
    let ports = ports(layout::PORT_SERIAL, 8);
    let irq = Interrupt::new(true, true, false, false, layout::IRQ_SERIAL);
    let resources = ResourceTemplate::new(vec![&ports, &irq]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &0_u8);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("COM1".into(), vec![&hid, &uid, &crs]).to_aml_bytes(aml);
}

/// Adds the clock. It has no interrupt, because it has no alarm.
fn clock(aml: &mut Vec<u8>) {
    let ports = ports(layout::PORT_RTC, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("RTC_".into(), vec![&hid, &crs]).to_aml_bytes(aml);
}

fn pvpanic(aml: &mut Vec<u8>) {
    let ports = ports(layout::PORT_PVPANIC, 1);
    let resources = ResourceTemplate::new(vec![&ports]);
    let hid = Name::new("_HID".into(), &"QEMU0001");
    // Present, enabled, shown, working.
    let status = Name::new("_STA".into(), &0x0f_u8);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("PEVT".into(), vec![&hid, &status, &crs]).to_aml_bytes(aml);
}

fn virtio_mmio(index: usize, device: &MmioDevice, aml: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, low32(device.base), low32(layout::VIRTIO_MMIO_STRIDE));
    let irq = Interrupt::new(true, true, false, false, device.irq);
    let resources = ResourceTemplate::new(vec![&registers, &irq]);
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &index);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(path(&format!("VR{index:02X}")), vec![&hid, &uid, &crs]).to_aml_bytes(aml);
}

/// Adds a PCI Express host bridge with one bus. It has no _PRT, because no function has an interrupt pin.
fn pci_bridge(aml: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &0_u8);
    let bus = Name::new("_BBN".into(), &0_u8);
    let uid = Name::new("_UID".into(), &0_u8);
    let own = ports(layout::PORT_PCI, 8);
    let numbers = Window::new_bus_number(0_u16, 0_u16);
    let memory = Window::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low32(layout::PCI_MEMORY),
        low32(layout::PCI_MEMORY_END - 1),
        None,
    );
    let resources = ResourceTemplate::new(vec![&numbers, &own, &memory]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("PCI0".into(), vec![&hid, &cid, &segment, &bus, &uid, &crs]).to_aml_bytes(aml);
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn ports(first: u64, len: u8) -> IO {
    let first = u16::try_from(first).unwrap_or(u16::MAX);
    IO::new(first, first, 1, len)
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = layout::ACPI;

    fn devices(count: u32) -> Vec<MmioDevice> {
        (0..count)
            .map(|i| MmioDevice { base: layout::VIRTIO_MMIO + u64::from(i) * 0x1000, irq: 5 + i })
            .collect()
    }

    fn at(area: &[u8], address: u64) -> &[u8] {
        let table = &area[usize::try_from(address - BASE).unwrap()..];
        let len = u32::from_le_bytes(table[4..8].try_into().unwrap());
        &table[..len as usize]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn address(bytes: &[u8]) -> u64 {
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    fn signatures(area: &[u8]) -> Vec<(String, Vec<u8>)> {
        let xsdt = at(area, address(&area[24..32]));
        let mut found = vec![xsdt.to_vec()];
        for entry in xsdt[36..].chunks(8) {
            found.push(at(area, address(entry)).to_vec());
        }
        let fadt = &found[1];
        found.push(at(area, address(&fadt[140..148])).to_vec());
        found.into_iter().map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t)).collect()
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        for (cpus, count, pci) in [(1, 0, true), (2, 1, false), (254, 16, true)] {
            let area = tables(BASE, &Hardware { cpus, devices: &devices(count), pci });
            assert!(area.len() as u64 <= layout::ACPI_END - layout::ACPI);
            assert_eq!(&area[..8], b"RSD PTR ");
            assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
            let tables = signatures(&area);
            let names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
            let expected: &[&str] = if pci {
                &["XSDT", "FACP", "APIC", "MCFG", "DSDT"]
            } else {
                &["XSDT", "FACP", "APIC", "DSDT"]
            };
            assert_eq!(names, expected);
            for (name, table) in &tables {
                assert_eq!(sum(table), 0, "{name}");
            }
            assert_eq!(tables[2].1.len(), 44 + 8 * usize::from(cpus) + 12);
        }
    }

    #[test]
    fn the_disassembler_understands_the_dsdt() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("dsdt.aml");
        let area = tables(BASE, &Hardware { cpus: 2, devices: &devices(2), pci: true });
        std::fs::write(&file, &signatures(&area)[4].1).unwrap();
        let Ok(output) = std::process::Command::new("iasl").arg("-d").arg(&file).output() else {
            eprintln!("skipped: iasl (acpica-tools) is not installed");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let text = std::fs::read_to_string(directory.path().join("dsdt.dsl")).unwrap();
        for word in [
            "LNRO0005",
            "VR01",
            "QEMU0001",
            "PNP0501",
            "_S5",
            "ACPI0007",
            "Edge, ActiveHigh, Exclusive",
            "PNP0A08",
            "WordBusNumber",
            "0xD10FFFFF",
        ] {
            assert!(text.contains(word), "{word} is missing in:\n{text}");
        }
    }
}
