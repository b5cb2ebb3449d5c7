//! virtio, device side: what a device is to a transport, and the split queue.
//!
//! Owns the traits between a device and its transport, and walks the rings ([`queue`]). Knows nothing of blocks,
//! files or registers: the transport is the embedder's.

pub mod queue;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

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

/// Notifies the driver: mmio's line or PCI's messages; tests count.
pub trait Interrupt: Send + Sync {
    /// Sends a used-buffer notification for queue `index`.
    fn queue(&self, index: u16);
    /// Sends a configuration-change notification.
    fn config(&self);
    /// Sets DEVICE_NEEDS_RESET and then notifies the driver: the device cannot continue (virtio 2.1.2).
    fn needs_reset(&self);
}

/// A queue that the driver has enabled, checked by the register core.
pub struct EnabledQueue {
    /// The queue's index.
    pub index: u16,
    /// The queue's rings.
    pub ring: Ring,
    /// The queue's doorbell. KVM itself (ioeventfd) or the transport writes it at each available-buffer
    /// notification.
    pub doorbell: Arc<EventFd>,
}

/// What a device is given at DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub ram: Ram,
    /// The negotiated feature bits.
    pub features: u64,
    /// The enabled queues, in order of their index. They move into the device, so the data path shares no lock
    /// with the transport.
    pub queues: Vec<EnabledQueue>,
    /// Notifies the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The device has no worker for a queue that the driver has enabled.
    #[error("the driver has enabled queue {0}, which has no worker")]
    MissingQueue(u16),
    /// A worker's thread has exited.
    #[error("the worker of queue {0} has ended")]
    Worker(u16),
}

/// A virtio device, as its transport sees it.
pub trait VirtioDevice: Send {
    /// Returns the device ID (virtio 5).
    fn device_id(&self) -> u32;
    /// Returns all features that are offered, VERSION_1 among them.
    fn features(&self) -> u64;
    /// Returns the largest size of each queue. The length of the slice is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Returns how many of the queues, from 0 on, exist for a driver that has negotiated `features`. Queues
    /// beyond are not served, whether the driver enables them or not.
    fn queues_with(&self, features: u64) -> usize {
        let _ = features;
        self.queue_sizes().len()
    }
    /// Reads configuration space at `offset`; bytes that do not exist read 0 (virtio 2.5).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space, after FEATURES_OK. Writes to bytes that are not writable are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Accepts the negotiated features at FEATURES_OK. This subset of [`VirtioDevice::features`] holds until
    /// reset.
    fn negotiated(&mut self, features: u64);
    /// Takes the queues at DRIVER_OK and starts to serve them.
    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError>;
    /// Stops one queue, which the driver takes back (virtio 4.2.2.2). Waits for its I/O in flight. When this
    /// returns the queue is not touched any more until reset and the next activation.
    fn stop_queue(&mut self, index: u16);
    /// Stops the device after waiting for all I/O in flight (S10, R15). When this returns no queue is touched
    /// and no notification is sent any more.
    fn reset(&mut self);
}
