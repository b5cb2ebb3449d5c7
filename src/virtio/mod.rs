//! virtio, device side: what a device is to a transport, and a transport to a device.
//!
//! Owns the traits between them. Knows nothing of blocks, files or KVM. The register and status
//! machine is [`core`]; [`mmio`] and [`pci`] map addresses to its registers; [`queue`] walks the rings.

pub mod core;
pub mod mmio;
pub mod pci;
pub mod queue;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::mem::Ram;
use queue::Ring;

/// Feature bits of every device (virtio 6), as masks.
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC (virtio 2.7.5.3).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX (virtio 2.7.7, 2.7.10).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1 (virtio 6.1): without it a driver is refused.
    pub const VERSION_1: u64 = 1 << 32;
}

/// How a device reaches the driver: mmio's line, PCI's messages; tests count.
pub trait Interrupt: Send + Sync {
    /// A used-buffer notification for queue `index`.
    fn queue(&self, index: u16);
    /// A configuration-change notification.
    fn config(&self);
    /// The device cannot go on: sets DEVICE_NEEDS_RESET, then notifies (virtio 2.1.2).
    fn needs_reset(&self);
}

/// A queue that the driver has enabled, checked by the register core.
pub struct EnabledQueue {
    /// Its index.
    pub index: u16,
    /// Its rings.
    pub ring: Ring,
    /// Written at each available-buffer notification, by KVM itself (ioeventfd) or the transport.
    pub doorbell: Arc<EventFd>,
}

/// What a device gets at DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub ram: Ram,
    /// The features that were negotiated.
    pub features: u64,
    /// The enabled queues, in order of their index. They move into the device: the data path
    /// shares no lock with the transport.
    pub queues: Vec<EnabledQueue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue that the device cannot do without was not enabled.
    #[error("queue {0} was not enabled")]
    MissingQueue(u16),
    /// A worker is gone.
    #[error("the worker of queue {0} has ended")]
    Worker(u16),
}

/// A device behind its transport, as the machine sees it.
pub trait Transport: BusDevice {
    /// One eventfd a queue, for KVM to signal at each notification.
    fn doorbells(&self) -> &[Arc<EventFd>];
    /// Resets the device: when this returns no I/O is in flight.
    fn stop(&mut self);
}

/// A virtio device, as its transport sees it.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 5).
    fn device_id(&self) -> u32;
    /// All features offered, VERSION_1 among them.
    fn features(&self) -> u64;
    /// The largest size of each queue; the number of queues is its length.
    fn queue_sizes(&self) -> &[u16];
    /// How many of the queues, from 0 on, there are for a driver that has negotiated `features`. Those
    /// beyond are not served, whether the driver enables them or not.
    fn queues_with(&self, features: u64) -> usize {
        let _ = features;
        self.queue_sizes().len()
    }
    /// Reads configuration space at `offset`; bytes that do not exist read 0 (virtio 2.5).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space, after FEATURES_OK; whatever is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// FEATURES_OK: this subset of [`VirtioDevice::features`] holds until reset.
    fn negotiated(&mut self, features: u64);
    /// DRIVER_OK: takes the queues and starts to work.
    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError>;
    /// The driver takes one queue back (virtio 4.2.2.2): waits for its I/O in flight; when it returns
    /// the queue is not touched any more, until reset and the next activation.
    fn stop_queue(&mut self, index: u16);
    /// Stops, having waited for all I/O in flight (S10, R15): when it returns no queue is touched
    /// and no notification is sent any more.
    fn reset(&mut self);
}
