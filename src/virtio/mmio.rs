//! Being built.

use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use crate::bus::{BusDevice, Outcome};
use crate::mem::Ram;

/// Offset of QueueNotify, for the ioeventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// A virtio device behind mmio registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
}

impl MmioTransport {
    /// `irq` is bound to the device's interrupt line.
    pub fn new(device: Box<dyn VirtioDevice>, _ram: Ram, _irq: EventFd) -> Self {
        Self { device }
    }

    /// The doorbells, by queue index: bind each to a write of its index to `QUEUE_NOTIFY`.
    pub fn doorbells(&self) -> &[EventFd] {
        self.device.doorbells()
    }

    /// Resets the device: when this returns no I/O is in flight.
    pub fn stop(&mut self) {
        self.device.reset();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn write(&mut self, _offset: u64, _data: &[u8]) -> Outcome {
        Outcome::Continue
    }
}
