//! The bus and the two ways to configuration space: ports 0xCF8 and 0xCFC, and ECAM.
//!
//! Owns which device number has which function, and hands accesses of the bus's memory to the function that
//! [`super::memory`] finds there. There is one bus, with function 0 of each device. What does not exist reads
//! as all ones (PCI Local Bus 3.0, 3.2.2.3; PCI Express 7.2.2).

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::config::{CONFIG_BYTES, ConfigSpace, Identity, Memory};
use super::memory::{DoorbellSink, MemoryMap};
use crate::bus::{Bus, BusDevice, Outcome, SharedDevice};
use crate::sync::unpoisoned;

/// Number of device numbers of a bus; device 0 is the host bridge.
pub const DEVICES_MAX: usize = 32;
/// Number of ports for configuration: the address at 0xCF8, data at 0xCFC.
pub const PORTS_LEN: u64 = 8;
/// Offset of the data register from the first port.
const DATA: u64 = 4;
/// Size in bytes of one bus's ECAM: 4 KiB for each of eight functions of each device.
pub const ECAM_BYTES: u64 = 1 << 20;

/// The bit of the address register without which data accesses are not configuration accesses.
const ENABLE: u32 = 1 << 31;

/// A function as the bus sees it: its memory, in which offsets count from its base, and its configuration.
///
/// Accesses of configuration space are 1 to 4 bytes and cross no multiple of four.
pub trait PciFunction: BusDevice {
    /// Reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// Returns what configuration space says about the function's memory now.
    fn memory(&self) -> Memory;
}

/// A function on the bus, and the sink that makes its doorbells follow it.
pub type OnBus = (Arc<Mutex<dyn PciFunction>>, Box<dyn DoorbellSink>);

/// The bus: its functions, and where they answer.
pub struct PciRoot {
    /// The functions, by device number.
    functions: Vec<Arc<Mutex<dyn PciFunction>>>,
    map: MemoryMap,
}

/// The host bridge, a function that does nothing. Kernels look for one before they trust the ports.
struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.get(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn memory(&self) -> Memory {
        self.0.memory()
    }
}

/// The host bridge has no memory, so none of this is reached.
impl BusDevice for HostBridge {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, _: &[u8]) -> Outcome {
        Outcome::Continue
    }
}

/// The doorbells of the host bridge: none.
struct NoDoorbells;

impl DoorbellSink for NoDoorbells {
    fn place(&mut self, _: Option<u64>) -> io::Result<()> {
        Ok(())
    }
}

impl PciRoot {
    /// Creates a bus with a host bridge and, behind it, `functions` as devices 1, 2, ...
    ///
    /// The bridge passes on the addresses of `window`. The functions answer in it where their configuration
    /// says.
    pub fn new(window: Range<u64>, functions: impl IntoIterator<Item = OnBus>) -> Self {
        // A PCI Express host bridge without registers of its own, with QEMU's IDs.
        let bridge = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [6, 0, 0],
            subsystem: [0x1af4, 0x1100],
        };
        let bridge: OnBus =
            (Arc::new(Mutex::new(HostBridge(ConfigSpace::new(&bridge)))), Box::new(NoDoorbells));
        let (functions, doorbells): (Vec<_>, Vec<_>) = std::iter::once(bridge).chain(functions).unzip();
        let map = MemoryMap::new(window, doorbells);
        for (device, function) in functions.iter().enumerate() {
            map.update(device, lock(function).memory());
        }
        Self { functions, map }
    }

    /// Reads configuration space at `offset` in ECAM: device in bits 15 to 19, function in 12 to 14, register
    /// below. An access of several words, or across words, is split into one access per word.
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, range) in words(offset, data.len()) {
            let Some(data) = data.get_mut(range) else { return };
            match self.find(at) {
                Some((device, register)) if register < CONFIG_BYTES => {
                    lock(&self.functions[device]).read_config(register, data);
                }
                Some(_) => data.fill(0),
                None => data.fill(0xff),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, range) in words(offset, data.len()) {
            if let (Some((device, register)), Some(data)) = (self.find(at), data.get(range)) {
                let mut function = lock(&self.functions[device]);
                function.write_config(register, data);
                // Update under the function's lock, so that the last write decides.
                self.map.update(device, function.memory());
            }
        }
    }

    /// Returns the device number and the register that an offset in ECAM leads to. `None` if there is no
    /// function.
    fn find(&self, offset: u64) -> Option<(usize, usize)> {
        let (device, function, register) = (offset >> 15, offset >> 12 & 7, offset & 0xfff);
        let device = usize::try_from(device).ok().filter(|device| *device < self.functions.len())?;
        (function == 0).then_some((device, usize::try_from(register).ok()?))
    }
}

fn lock(function: &Mutex<dyn PciFunction>) -> MutexGuard<'_, dyn PciFunction + 'static> {
    unpoisoned(function.lock())
}

/// Cuts an access of `len` bytes at multiples of four. Each piece is its offset and its range of bytes.
fn words(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = offset.wrapping_add(from as u64);
        let range = from..len.min(from + 4 - usize::try_from(at % 4).unwrap_or(0));
        from = range.end;
        (!range.is_empty()).then_some((at, range))
    })
}

/// Access to configuration space by ports, which every kernel knows.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: u32,
    /// What accesses reach at the address register's ports if they are not 32 bits wide.
    others: Bus,
}

impl ConfigPorts {
    /// Creates ports to `root`.
    ///
    /// The address register accepts only 32 bits at once. Accesses of any other width to its four ports go to
    /// `others`, in which offsets count from the first port.
    pub fn new(root: Arc<PciRoot>, others: Bus) -> Self {
        Self { root, address: 0, others }
    }

    /// Returns the offset in ECAM that byte `lane` of the data register leads to now. `None` if that is not
    /// configuration of bus 0.
    fn target(&self, lane: u64) -> Option<u64> {
        let (bus, device, register) =
            (self.address >> 16 & 0xff, self.address >> 8 & 0xff, self.address & 0xfc);
        (self.address & ENABLE != 0 && bus == 0).then_some(u64::from(device << 12 | register) + lane)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, range) in words(offset, data.len()) {
            let Some(data) = data.get_mut(range) else { return };
            data.fill(0xff);
            match (at, <&mut [u8; 4]>::try_from(&mut *data)) {
                (0, Ok(data)) => *data = self.address.to_le_bytes(),
                (0..DATA, _) => self.others.read(at, data),
                (DATA..PORTS_LEN, _) => {
                    if let Some(target) = self.target(at - DATA) {
                        self.root.read(target, data);
                    }
                }
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        for (at, range) in words(offset, data.len()) {
            let Some(data) = data.get(range) else { break };
            match (at, <[u8; 4]>::try_from(data)) {
                (0, Ok(bytes)) => self.address = u32::from_le_bytes(bytes),
                (0..DATA, _) => match self.others.write(at, data) {
                    Outcome::Continue => {}
                    outcome => return outcome,
                },
                (DATA..PORTS_LEN, _) => {
                    if let Some(target) = self.target(at - DATA) {
                        self.root.write(target, data);
                    }
                }
                _ => {}
            }
        }
        Outcome::Continue
    }
}

/// Access to configuration space by memory.
pub struct Ecam(pub Arc<PciRoot>);

impl SharedDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write(offset, data);
        Outcome::Continue
    }
}

/// The memory that the host bridge passes on. Offsets count from the window's first address. While a function
/// works, its lock is the only one that is held.
pub struct PciMemory(pub Arc<PciRoot>);

impl SharedDevice for PciMemory {
    fn read(&self, offset: u64, mut data: &mut [u8]) {
        let map = &self.0.map;
        let mut addr = map.base() + offset;
        while !data.is_empty() {
            let (found, bytes) = map.find(addr, data.len());
            let (piece, rest) = data.split_at_mut(bytes);
            if let Some((device, offset)) = found {
                piece.fill(0);
                lock(&self.0.functions[device]).read(offset, piece);
            } else {
                piece.fill(0xff);
                map.stray("reads from", addr);
            }
            (addr, data) = (addr + bytes as u64, rest);
        }
    }

    fn write(&self, offset: u64, mut data: &[u8]) -> Outcome {
        let map = &self.0.map;
        let mut addr = map.base() + offset;
        while !data.is_empty() {
            let (found, bytes) = map.find(addr, data.len());
            let (piece, rest) = data.split_at(bytes);
            let outcome = match found {
                Some((device, offset)) => lock(&self.0.functions[device]).write(offset, piece),
                None => {
                    map.stray("writes to", addr);
                    Outcome::Continue
                }
            };
            if outcome != Outcome::Continue {
                return outcome;
            }
            (addr, data) = (addr + bytes as u64, rest);
        }
        Outcome::Continue
    }
}
