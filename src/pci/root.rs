//! The bus and the two ways to configuration space: ports 0xCF8 and 0xCFC, and ECAM.
//!
//! Owns which device number has which function. One bus, function 0 of each device; what is not
//! there reads as all ones (PCI Local Bus 3.0, 3.2.2.3; PCI Express 7.2.2).

use std::sync::{Arc, Mutex, PoisonError};

use super::config::{CONFIG_BYTES, ConfigSpace, Identity};
use crate::bus::{BusDevice, Outcome};

/// Device numbers of a bus, of which 0 is the host bridge.
pub const DEVICES_MAX: usize = 32;
/// Ports of the first way: an address at 0xCF8, data at 0xCFC.
pub const PORTS_LEN: u64 = 8;
/// ECAM of one bus: 4 KiB for each of eight functions of each device.
pub const ECAM_BYTES: u64 = 1 << 20;

/// The address register's bit without which data is not configuration.
const ENABLE: u32 = 1 << 31;

/// A function, as the bus sees it. Accesses are 1, 2 or 4 bytes and cross no multiple of four.
pub trait PciFunction: Send {
    /// Reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Writes it.
    fn write_config(&mut self, offset: usize, data: &[u8]);
}

/// The bus.
pub struct PciRoot {
    /// By device number.
    functions: Vec<Arc<Mutex<dyn PciFunction>>>,
}

/// The host bridge, a function that does nothing; kernels look for one before they trust the ports.
struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.get(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
}

impl PciRoot {
    /// A host bridge, and behind it these functions, as devices 1, 2, ...
    pub fn new(functions: impl IntoIterator<Item = Arc<Mutex<dyn PciFunction>>>) -> Self {
        // A PCI Express host bridge without registers of its own, as QEMU has it.
        let bridge = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [6, 0, 0],
            subsystem: [0x1af4, 0x1100],
        };
        let bridge: Arc<Mutex<dyn PciFunction>> = Arc::new(Mutex::new(HostBridge(ConfigSpace::new(&bridge))));
        Self { functions: std::iter::once(bridge).chain(functions).collect() }
    }

    /// `offset` is that of ECAM: device in bits 15 to 19, function in 12 to 14, register below.
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, register)) if register < CONFIG_BYTES => {
                function.lock().unwrap_or_else(PoisonError::into_inner).read_config(register, data);
            }
            Some(_) => data.fill(0),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.find(offset, data.len()) {
            function.lock().unwrap_or_else(PoisonError::into_inner).write_config(register, data);
        }
    }

    fn find(&self, offset: u64, len: usize) -> Option<(&Mutex<dyn PciFunction>, usize)> {
        let (device, function, register) = (offset >> 15, offset >> 12 & 7, offset & 0xfff);
        let is_access = matches!((len, register % 4), (1, _) | (2, 0 | 2) | (4, 0));
        let found = self.functions.get(usize::try_from(device).ok()?)?;
        (function == 0 && is_access).then_some((&**found, usize::try_from(register).ok()?))
    }
}

/// The way by ports, which every kernel knows.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: u32,
}

impl ConfigPorts {
    /// Ports to `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: 0 }
    }

    /// Where in ECAM the data register is now, if it is configuration of bus 0.
    fn target(&self, offset: u64) -> Option<u64> {
        let (bus, device, register) =
            (self.address >> 16 & 0xff, self.address >> 8 & 0xff, self.address & 0xfc);
        let byte = offset.checked_sub(4)?;
        (self.address & ENABLE != 0 && bus == 0).then_some(u64::from(device << 12 | register) + byte)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (self.target(offset), <&mut [u8; 4]>::try_from(&mut *data)) {
            (_, Ok(data)) if offset == 0 => *data = self.address.to_le_bytes(),
            (Some(target), _) => self.root.read(target, data),
            _ => {}
        }
    }

    /// The address register takes 32 bits at once; other accesses there are other devices' on a PC.
    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address = u32::from_le_bytes(bytes);
        } else if let Some(target) = self.target(offset) {
            self.root.write(target, data);
        }
        Outcome::Continue
    }
}

/// The way by memory.
pub struct Ecam(pub Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write(offset, data);
        Outcome::Continue
    }
}
