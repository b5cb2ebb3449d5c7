//! virtio over MMIO (virtio 4.2), version 2.
//!
//! Owns the map from offsets and widths to registers, and the interrupt status. The machine behind the
//! registers is [`super::core`]. Knows nothing of KVM: the interrupt line is an eventfd.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::core::{Core, DeviceStatus, Half, QueuePart, Reg};
use super::{Interrupt, Transport, VirtioDevice};
use crate::bus::{BusDevice, Outcome};
use crate::mem::Ram;

/// Offset of QueueNotify, for the ioeventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt", little endian (virtio 4.2.2).
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "MVMM", little endian.
const VENDOR_ID: u32 = 0x4d4d_564d;
/// First byte of configuration space.
const CONFIG: u64 = 0x100;

/// Bits of InterruptStatus.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// What lies at an offset of the control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Magic,
    Version,
    Vendor,
    Core(Reg),
    InterruptStatus,
    InterruptAck,
    /// Length and base of a shared memory region; all ones, since there is none.
    SharedMemory,
    Unknown,
}

fn register(offset: u64) -> Register {
    use Half::{High, Low};
    use QueuePart::{Available, Descriptors, Used};
    Register::Core(match offset {
        0x000 => return Register::Magic,
        0x004 => return Register::Version,
        0x008 => Reg::DeviceId,
        0x00c => return Register::Vendor,
        0x010 => Reg::DeviceFeatures,
        0x014 => Reg::DeviceFeaturesSel,
        0x020 => Reg::DriverFeatures,
        0x024 => Reg::DriverFeaturesSel,
        0x030 => Reg::QueueSel,
        0x034 => Reg::QueueSizeMax,
        0x038 => Reg::QueueSize,
        0x044 => Reg::QueueReady,
        QUEUE_NOTIFY => Reg::QueueNotify,
        0x060 => return Register::InterruptStatus,
        0x064 => return Register::InterruptAck,
        0x070 => Reg::Status,
        0x080 => Reg::QueueAddr(Descriptors, Low),
        0x084 => Reg::QueueAddr(Descriptors, High),
        0x090 => Reg::QueueAddr(Available, Low),
        0x094 => Reg::QueueAddr(Available, High),
        0x0a0 => Reg::QueueAddr(Used, Low),
        0x0a4 => Reg::QueueAddr(Used, High),
        0x0b0..=0x0bc => return Register::SharedMemory,
        0x0fc => Reg::ConfigGeneration,
        _ => return Register::Unknown,
    })
}

/// Returns `true` for a register that only the driver writes. Such registers read 0 (virtio 4.2.2).
fn is_write_only(reg: Reg) -> bool {
    matches!(
        reg,
        Reg::DeviceFeaturesSel
            | Reg::DriverFeatures
            | Reg::DriverFeaturesSel
            | Reg::QueueSel
            | Reg::QueueSize
            | Reg::QueueAddr(..)
            | Reg::QueueNotify
    )
}

/// The interrupt line of one device, with the register that says why the line was raised.
struct Line {
    status: Arc<DeviceStatus>,
    pending: AtomicU32,
    irq: EventFd,
}

impl Line {
    fn raise(&self, why: u32) {
        self.pending.fetch_or(why, Ordering::SeqCst);
        // The counter reaches 2^64 - 2 before a write could fail, and KVM empties it at once.
        if let Err(error) = self.irq.write(1) {
            log::error!("virtio: an interrupt was lost: {error}");
        }
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.raise(USED_BUFFER);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    fn needs_reset(&self) {
        if self.status.set_needs_reset() {
            self.config();
        }
    }
}

/// A virtio device behind MMIO registers.
pub struct MmioTransport {
    core: Core,
    line: Arc<Line>,
}

impl MmioTransport {
    /// Puts `device` behind registers. `irq` is bound to the device's interrupt line, edge triggered.
    pub fn new(device: Box<dyn VirtioDevice>, ram: Ram, irq: EventFd) -> io::Result<Self> {
        let status = Arc::new(DeviceStatus::default());
        let line = Arc::new(Line { status: Arc::clone(&status), pending: AtomicU32::new(0), irq });
        let interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(&line);
        Ok(Self { core: Core::new(device, ram, status, interrupt)?, line })
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match register(offset) {
            Register::Magic => MAGIC,
            Register::Version => VERSION,
            Register::Vendor => VENDOR_ID,
            Register::Core(reg) if is_write_only(reg) => 0,
            Register::Core(reg) => self.core.read(reg),
            Register::InterruptStatus => self.line.pending.load(Ordering::SeqCst),
            Register::SharedMemory => u32::MAX,
            Register::InterruptAck | Register::Unknown => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match register(offset) {
            Register::Core(Reg::Status) => {
                self.core.write(Reg::Status, value);
                if value == 0 {
                    self.line.pending.store(0, Ordering::SeqCst);
                }
            }
            Register::Core(reg) => self.core.write(reg, value),
            Register::InterruptAck => {
                self.line.pending.fetch_and(!value, Ordering::SeqCst);
            }
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    /// Reads control registers or configuration space (virtio 4.2.2.2).
    ///
    /// Control registers are read as aligned 32 bits; any other access to them reads 0. Configuration space
    /// begins behind them and is read with any width and alignment.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (control, config) = data.split_at_mut(control_bytes(offset, data.len()));
        if control.len() == 4 && offset.is_multiple_of(4) {
            control.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
        if !config.is_empty() {
            self.core.read_config(offset.saturating_sub(CONFIG), config);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        let (control, config) = data.split_at(control_bytes(offset, data.len()));
        if let Ok(bytes) = <[u8; 4]>::try_from(control)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        if !config.is_empty() {
            self.core.write_config(offset.saturating_sub(CONFIG), config);
        }
        Outcome::Continue
    }
}

/// Returns how many bytes of an access come before configuration space.
fn control_bytes(offset: u64, len: usize) -> usize {
    usize::try_from(CONFIG.saturating_sub(offset)).map_or(len, |before| before.min(len))
}

impl Transport for MmioTransport {
    /// Returns the doorbells. Each is rung by a write of its queue's index to [`QUEUE_NOTIFY`].
    fn doorbells(&self) -> &[Arc<EventFd>] {
        self.core.doorbells()
    }

    fn stop(&mut self) {
        self.core.reset();
    }
}
