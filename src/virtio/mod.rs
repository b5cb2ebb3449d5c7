//! virtio's transports: what a device behind its registers is to the machine.
//!
//! The register and status machine is [`core`]; [`mmio`] and [`pci`] map addresses to its registers. What a device
//! is to a transport, and the rings, are the block crate's. Knows nothing of blocks, files or KVM.

pub mod core;
pub mod mmio;
pub mod pci;

use std::sync::Arc;

pub use minivmm_block::virtio::{
    ActivateError, Activation, EnabledQueue, Interrupt, VirtioDevice, feature, queue,
};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// How a guest reaches a virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportChoice {
    /// virtio-pci with MSI-X (virtio 4.1).
    Pci,
    /// virtio-mmio (virtio 4.2).
    Mmio,
}

impl TransportChoice {
    /// Returns the transport of this name on the command line, or `None` if the name is unknown.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "pci" => Some(Self::Pci),
            "mmio" => Some(Self::Mmio),
            _ => None,
        }
    }

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pci => "pci",
            Self::Mmio => "mmio",
        }
    }
}

/// A device behind its transport, as the machine sees it.
pub trait Transport: BusDevice {
    /// Returns one eventfd per queue, which KVM signals at each notification.
    fn doorbells(&self) -> &[Arc<EventFd>];
    /// Resets the device. When this returns no I/O is in flight.
    fn stop(&mut self);
}
