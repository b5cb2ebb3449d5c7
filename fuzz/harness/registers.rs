//! The registers of both transports under the same names, and a driver's accesses to them.

use minivmm::bus::{BusDevice, Outcome, SharedDevice};
use minivmm::pci::root::{ConfigPorts, Ecam, PciMemory};
use minivmm::virtio::Transport;
use minivmm::virtio::mmio::MmioTransport;
use minivmm::virtio::pci::{NOTIFY, PciTransport};
use minivmm::virtio::queue::QueueConfig;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::input::Input;

/// A register that both transports have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    FeatureSel,
    Feature,
    QueueSel,
    QueueSize,
    QueueReady,
    Status,
    Descriptors,
    Available,
    Used,
}

/// Where it is over mmio, over PCI, and its width in bytes there.
fn place(register: Register) -> (u64, u64, usize) {
    match register {
        Register::FeatureSel => (0x024, 0x08, 4),
        Register::Feature => (0x020, 0x0c, 4),
        Register::QueueSel => (0x030, 0x16, 2),
        Register::QueueSize => (0x038, 0x18, 2),
        Register::QueueReady => (0x044, 0x1c, 2),
        Register::Status => (0x070, 0x14, 1),
        Register::Descriptors => (0x080, 0x20, 8),
        Register::Available => (0x090, 0x28, 8),
        Register::Used => (0x0a0, 0x30, 8),
    }
}

/// A driver's way to a device.
pub trait Registers {
    fn set(&mut self, register: Register, value: u64);
    fn get(&mut self, register: Register) -> u64;
    /// Reads configuration space of the device.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
    fn notify(&mut self, queue: u16);
    /// Any access that a guest can make.
    fn attack(&mut self, input: &mut Input<'_>);
    /// Asks for interrupts, as a driver does after each reset.
    fn map_interrupts(&mut self, queues: u16);
    /// Whether the driver was interrupted since this was last asked.
    fn interrupted(&mut self) -> bool;
    /// Whatever was done to it, registers are reached again.
    fn recover(&mut self);
    fn transport(&mut self, then: &mut dyn FnMut(&mut dyn Transport));
}

/// From reset to DRIVER_OK; whether the driver got there.
pub fn bring_up(registers: &mut dyn Registers, features: u64, queues: &[(u16, QueueConfig)]) -> bool {
    registers.recover();
    registers.set(Register::Status, 0);
    assert_eq!(registers.get(Register::Status), 0, "S10: status after reset");
    registers.set(Register::Status, 1);
    registers.set(Register::Status, 3);
    for half in 0..2 {
        registers.set(Register::FeatureSel, half);
        registers.set(Register::Feature, features >> (32 * half) & 0xffff_ffff);
    }
    registers.set(Register::Status, 11);
    if registers.get(Register::Status) & 8 == 0 {
        return false;
    }
    registers.map_interrupts(queues.last().map_or(0, |(last, _)| last + 1));
    for (index, config) in queues {
        registers.set(Register::QueueSel, (*index).into());
        registers.set(Register::QueueSize, config.size.into());
        registers.set(Register::Descriptors, config.descriptors);
        registers.set(Register::Available, config.available);
        registers.set(Register::Used, config.used);
        registers.set(Register::QueueReady, 1);
    }
    registers.set(Register::Status, 15);
    registers.get(Register::Status) & (4 | 64) == 4
}

pub struct Mmio(pub MmioTransport);

impl Registers for Mmio {
    fn set(&mut self, register: Register, value: u64) {
        let (at, _, width) = place(register);
        for half in 0..if width == 8 { 2 } else { 1 } {
            let value = (value >> (32 * half) & 0xffff_ffff) as u32;
            self.0.write(at + 4 * half, &value.to_le_bytes());
        }
    }

    fn get(&mut self, register: Register) -> u64 {
        let mut data = [0; 4];
        self.0.read(place(register).0, &mut data);
        u32::from_le_bytes(data).into()
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(0x100 + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write(0x100 + offset, data);
    }

    fn notify(&mut self, queue: u16) {
        self.0.write(0x050, &u32::from(queue).to_le_bytes());
    }

    fn attack(&mut self, input: &mut Input<'_>) {
        let offset = match input.below(8) {
            0 => input.edgy(),
            1 => 0x100 + u64::from(input.u8()),
            2 => u64::from(input.u16() & 0xfff),
            _ => 4 * u64::from(input.u8() & 0x3f),
        };
        let bytes = input.edgy().to_le_bytes();
        let width = if input.flag() { 4 } else { input.below(9) };
        access(&mut self.0, offset, &bytes[..width], input.flag());
    }

    /// There is one line, and it is always there.
    fn map_interrupts(&mut self, _: u16) {}

    fn interrupted(&mut self) -> bool {
        let mut status = [0; 4];
        self.0.read(0x060, &mut status);
        self.0.write(0x064, &status);
        status[0] & 1 != 0
    }

    fn recover(&mut self) {}

    fn transport(&mut self, then: &mut dyn FnMut(&mut dyn Transport)) {
        then(&mut self.0);
    }
}

/// A write, or a read twice where nothing lies between: registers that a read changes are few.
fn access(device: &mut dyn BusDevice, offset: u64, bytes: &[u8], write: bool) {
    if write {
        device.write(offset, bytes);
    } else {
        let mut data = bytes.to_vec();
        device.read(offset, &mut data);
    }
}

/// A device that several CPUs use at once, for one.
struct Shared<'a, T>(&'a T);

impl<T: SharedDevice> BusDevice for Shared<'_, T> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write(offset, data)
    }
}

/// The bus's memory, and where the function's is, as device 1, before anybody moves it.
pub const WINDOW: std::ops::Range<u64> = 0xd100_0000..0xd110_0000;
pub const PLACE: u64 = 0xd100_8000;
const DEVICE: u64 = 0x2000;
const TABLE: u64 = 0x4000;
/// Message control, in the last of the capabilities.
const MSIX_CONTROL: u64 = 0x98 + 2;
/// Configuration space of device 1, in ECAM.
const FUNCTION: u64 = 1 << 15;

pub struct Pci {
    pub function: Arc<Mutex<PciTransport>>,
    pub ports: ConfigPorts,
    pub ecam: Ecam,
    pub memory: PciMemory,
    /// Messages that were sent.
    pub sent: Arc<AtomicU64>,
}

impl Pci {
    fn with<T>(&self, then: impl FnOnce(&mut PciTransport) -> T) -> T {
        then(&mut self.function.lock().unwrap())
    }
}

impl Registers for Pci {
    fn set(&mut self, register: Register, value: u64) {
        let (_, at, width) = place(register);
        self.with(|function| function.write(at, &value.to_le_bytes()[..width]));
    }

    fn get(&mut self, register: Register) -> u64 {
        let (_, at, width) = place(register);
        let mut data = [0; 8];
        self.with(|function| function.read(at, &mut data[..width]));
        u64::from_le_bytes(data)
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.with(|function| function.read(DEVICE + offset, data));
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.with(|function| function.write(DEVICE + offset, data));
    }

    fn notify(&mut self, queue: u16) {
        self.with(|function| function.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes()));
    }

    fn attack(&mut self, input: &mut Input<'_>) {
        let kind = input.below(8);
        let offset = match kind {
            0 => input.edgy(),
            1 => u64::from(input.u16()) & 0x7fff,
            2 => TABLE + 4 * u64::from(input.u8() & 0x3f),
            3 => u64::from(input.u8() & 0x3f),
            // ECAM: device 1 mostly.
            4 => u64::from(input.u32()) & 0xf_ffff,
            5 => FUNCTION + u64::from(input.u8()),
            // Ports.
            6 => input.below(8) as u64,
            _ => 0,
        };
        let bytes = match input.below(3) {
            0 => input.edgy(),
            1 => PLACE | 4,
            _ => u64::from(input.u32()),
        }
        .to_le_bytes();
        let width = input.pick(&[1, 2, 4, 4, 8, 0, 3, 5]);
        let write = input.flag();
        match kind {
            // By the bus's memory, wherever the function is now.
            1 => {
                let place = PLACE - WINDOW.start + offset;
                access(&mut Shared(&self.memory), place, &bytes[..width], write);
            }
            0 | 2 | 3 => self.with(|function| access(function, offset, &bytes[..width], write)),
            4 | 5 => access(&mut Shared(&self.ecam), offset, &bytes[..width], write),
            6 => access(&mut self.ports, offset, &bytes[..width], write),
            _ => {
                // A whole access by ports: the address, then data.
                let address = 1_u32 << 31 | u32::from(input.u8() & 3) << 11 | u32::from(input.u8() & 0xfc);
                self.ports.write(0, &address.to_le_bytes());
                access(&mut self.ports, 4 + (input.u8() & 3) as u64, &bytes[..width], write);
            }
        }
    }

    /// Every event a vector of its own, none of them masked.
    fn map_interrupts(&mut self, queues: u16) {
        for vector in 0..=u64::from(queues) {
            let entry = TABLE + 16 * vector;
            self.with(|function| {
                function.write(entry, &0xfee0_0000_u64.to_le_bytes());
                function.write(entry + 8, &vector.to_le_bytes());
            });
        }
        self.ecam.write(FUNCTION + MSIX_CONTROL, &0x8000_u16.to_le_bytes());
        self.with(|function| {
            function.write(0x10, &0_u16.to_le_bytes());
            for queue in 0..queues {
                function.write(0x16, &queue.to_le_bytes());
                function.write(0x1a, &(queue + 1).to_le_bytes());
            }
        });
    }

    fn interrupted(&mut self) -> bool {
        self.sent.swap(0, Ordering::SeqCst) > 0
    }

    /// As a driver would that finds the function somewhere else, or switched off.
    fn recover(&mut self) {
        self.ecam.write(FUNCTION + 0x10, &PLACE.to_le_bytes()[..4]);
        self.ecam.write(FUNCTION + 0x14, &PLACE.to_le_bytes()[4..]);
        self.ecam.write(FUNCTION + 4, &6_u16.to_le_bytes());
    }

    fn transport(&mut self, then: &mut dyn FnMut(&mut dyn Transport)) {
        self.with(|function| then(function));
    }
}
