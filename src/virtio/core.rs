//! The register and status machine of a virtio device (virtio 2.1, 2.2, 3.1), for every transport.
//!
//! Owns the status byte, feature negotiation, queue set-up and their rules. A transport only maps
//! an offset and a width to a [`Reg`] and back. Knows nothing of addresses or interrupt lines.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{QueueConfig, Ring};
use super::{Activation, EnabledQueue, Interrupt, VirtioDevice, feature};
use crate::doorbell;
use crate::mem::Ram;
use crate::ratelimit::RateLimit;
use crate::warn_limited;

/// The largest configuration space that is compared; every device here has a smaller one.
const CONFIG_BYTES_MAX: usize = 128;

/// Bits of the device status field (virtio 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive the device.
    pub const DRIVER: u32 = 2;
    /// The driver is ready; the device is live.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot continue.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// A register. Both halves of a 64-bit field share their code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// Device ID.
    DeviceId,
    /// The selected 32 bits of the device's features.
    DeviceFeatures,
    /// Selects which 32 bits of the device's features are read.
    DeviceFeaturesSel,
    /// The selected 32 bits of the driver's features.
    DriverFeatures,
    /// Selects which 32 bits of the driver's features are accessed.
    DriverFeaturesSel,
    /// Selects a queue.
    QueueSel,
    /// Largest size of the selected queue; 0 if there is none.
    QueueSizeMax,
    /// Size of the selected queue.
    QueueSize,
    /// 1 if the selected queue is enabled, else 0.
    QueueReady,
    /// An address of the selected queue.
    QueueAddr(QueuePart, Half),
    /// Available-buffer notification; the value written is the queue's index.
    QueueNotify,
    /// Device status.
    Status,
    /// Changes after configuration space may have changed by itself.
    ConfigGeneration,
}

/// The three parts of a split virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueuePart {
    /// Descriptor table.
    Descriptors,
    /// Driver area: available ring.
    Available,
    /// Device area: used ring.
    Used,
}

/// A half of a 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    fn shift(self) -> u32 {
        match self {
            Half::Low => 0,
            Half::High => 32,
        }
    }

    fn of(self, value: u64) -> u32 {
        ((value >> self.shift()) & 0xffff_ffff) as u32
    }

    fn replace(self, value: &mut u64, half: u32) {
        *value = *value & !(0xffff_ffff << self.shift()) | u64::from(half) << self.shift();
    }

    fn selected(sel: u32) -> Option<Half> {
        match sel {
            0 => Some(Half::Low),
            1 => Some(Half::High),
            _ => None,
        }
    }
}

/// The device status byte, shared with the transport's [`Interrupt`]. A worker may set DEVICE_NEEDS_RESET in it
/// without going through the register machine.
#[derive(Debug, Default)]
pub struct DeviceStatus(AtomicU32);

impl DeviceStatus {
    /// Returns the current bits.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    /// Sets DEVICE_NEEDS_RESET. Returns `true` if the driver must be notified, which is so once it has set
    /// DRIVER_OK (virtio 2.1.2).
    pub fn set_needs_reset(&self) -> bool {
        self.0.fetch_or(status::DEVICE_NEEDS_RESET, Ordering::SeqCst) & status::DRIVER_OK != 0
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct QueueState {
    config: QueueConfig,
    ready: bool,
}

/// The registers of one device.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    ram: Ram,
    status: Arc<DeviceStatus>,
    interrupt: Arc<dyn Interrupt>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueState>,
    doorbells: Vec<Arc<EventFd>>,
    config_generation: u32,
    /// `true` if configuration space may have changed by itself since the generation was last read.
    config_changed: bool,
    /// Configuration space when it was last compared with the device's.
    config_seen: [u8; CONFIG_BYTES_MAX],
    errors: RateLimit,
}

impl Core {
    /// Creates the registers in the state that they have after reset. `interrupt` shares `status`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Ram,
        status: Arc<DeviceStatus>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let doorbell = |_: &u16| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let doorbells = device.queue_sizes().iter().map(doorbell).collect::<io::Result<_>>()?;
        let mut core = Self {
            device,
            ram,
            status,
            interrupt,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: Vec::new(),
            doorbells,
            config_generation: 0,
            config_changed: false,
            config_seen: [0; CONFIG_BYTES_MAX],
            errors: RateLimit::for_guest_errors("virtio"),
        };
        core.forget_driver();
        core.device.read_config(0, &mut core.config_seen);
        Ok(core)
    }

    /// Returns one eventfd per queue, which KVM signals at each notification.
    pub fn doorbells(&self) -> &[Arc<EventFd>] {
        &self.doorbells
    }

    /// Returns the selected queue index, whether or not such a queue exists.
    pub fn queue_sel(&self) -> u32 {
        self.queue_sel
    }

    /// Reads a register. One that can only be written reads 0.
    pub fn read(&mut self, reg: Reg) -> u32 {
        match reg {
            Reg::DeviceId => self.device.device_id(),
            Reg::DeviceFeatures => {
                Half::selected(self.device_features_sel).map_or(0, |half| half.of(self.device.features()))
            }
            Reg::DriverFeatures => {
                Half::selected(self.driver_features_sel).map_or(0, |half| half.of(self.driver_features))
            }
            Reg::DeviceFeaturesSel => self.device_features_sel,
            Reg::DriverFeaturesSel => self.driver_features_sel,
            Reg::QueueSel => self.queue_sel,
            Reg::QueueSizeMax => self.selected().map_or(0, |at| u32::from(self.device.queue_sizes()[at])),
            Reg::QueueSize => self.selected().map_or(0, |at| self.queues[at].config.size),
            Reg::QueueReady => self.selected().map_or(0, |at| u32::from(self.queues[at].ready)),
            Reg::QueueAddr(part, half) => self.selected().map_or(0, |at| {
                let config = &self.queues[at].config;
                half.of(match part {
                    QueuePart::Descriptors => config.descriptors,
                    QueuePart::Available => config.available,
                    QueuePart::Used => config.used,
                })
            }),
            Reg::QueueNotify => 0,
            Reg::Status => self.status.get(),
            Reg::ConfigGeneration => self.generation(),
        }
    }

    /// Writes a register. A write that is not allowed, now or ever, is ignored.
    pub fn write(&mut self, reg: Reg, value: u32) {
        match reg {
            Reg::DeviceFeaturesSel => self.device_features_sel = value,
            Reg::DriverFeaturesSel => self.driver_features_sel = value,
            Reg::DriverFeatures => self.write_driver_features(value),
            Reg::QueueSel => self.queue_sel = value,
            Reg::QueueSize => self.configure(|config| config.size = value),
            Reg::QueueAddr(part, half) => self.configure(|config| {
                let addr = match part {
                    QueuePart::Descriptors => &mut config.descriptors,
                    QueuePart::Available => &mut config.available,
                    QueuePart::Used => &mut config.used,
                };
                half.replace(addr, value);
            }),
            Reg::QueueReady => self.write_queue_ready(value),
            Reg::QueueNotify => self.notify(value),
            Reg::Status => self.write_status(value),
            Reg::DeviceId | Reg::DeviceFeatures | Reg::QueueSizeMax | Reg::ConfigGeneration => {}
        }
    }

    /// Reads configuration space. Bytes that do not exist read 0.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// Writes configuration space. Writes before FEATURES_OK are ignored (virtio 3.1.1).
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status.get() & status::FEATURES_OK != 0 {
            self.look_at_config();
            self.device.write_config(offset, data);
            // The driver knows of its own write, so that write counts as seen.
            self.device.read_config(0, &mut self.config_seen);
        }
    }

    /// Drains and resets the device (virtio 2.4.1). When this returns status reads 0, no I/O is in flight and
    /// no notification follows. Linux's mmio driver does not poll for the end of the reset.
    pub fn reset(&mut self) {
        self.device.reset();
        self.status.0.store(0, Ordering::SeqCst);
        self.forget_driver();
        // The reset may have restored fields that the driver had changed.
        self.config_changed = true;
    }

    /// Returns the configuration generation, which is incremented if the driver may have seen a half-made
    /// change.
    ///
    /// It is incremented only when it is read. So two successive values always differ if there was a change
    /// between them, although PCI has room for only 256 values (virtio 4.1.4.3.1).
    fn generation(&mut self) -> u32 {
        self.look_at_config();
        let changed = std::mem::take(&mut self.config_changed);
        self.config_generation = self.config_generation.wrapping_add(u32::from(changed)) & 0xff;
        self.config_generation
    }

    /// Checks whether the device has changed its configuration space by itself since the last check: a
    /// console's size, for example.
    fn look_at_config(&mut self) {
        let mut now = [0; CONFIG_BYTES_MAX];
        self.device.read_config(0, &mut now);
        self.config_changed |= std::mem::replace(&mut self.config_seen, now) != now;
    }

    fn forget_driver(&mut self) {
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        let fresh = |&size: &u16| QueueState {
            config: QueueConfig { size: u32::from(size), ..QueueConfig::default() },
            ready: false,
        };
        self.queues = self.device.queue_sizes().iter().map(fresh).collect();
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|&at| at < self.queues.len())
    }

    fn is_live(&self) -> bool {
        self.status.get() & status::DRIVER_OK != 0
    }

    fn write_driver_features(&mut self, value: u32) {
        // Writing features after FEATURES_OK is a driver error (virtio 3.1.1) and is ignored.
        if self.status.get() & status::FEATURES_OK == 0
            && let Some(half) = Half::selected(self.driver_features_sel)
        {
            half.replace(&mut self.driver_features, value);
        }
    }

    /// Changes the selected queue's configuration, unless the queue is enabled: then it is immutable (R14).
    fn configure(&mut self, change: impl FnOnce(&mut QueueConfig)) {
        if let Some(at) = self.selected().filter(|&at| !self.queues[at].ready) {
            change(&mut self.queues[at].config);
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let Some(at) = self.selected() else { return };
        if self.is_live() {
            return self.stop_queue(at, value);
        }
        self.queues[at].ready = value == 1
            && match Ring::new(&self.ram, &self.queues[at].config, self.device.queue_sizes()[at], 0) {
                Ok(_) => true,
                Err(error) => {
                    warn_limited!(self.errors, "virtio: queue {at} is not enabled: {error}");
                    false
                }
            };
    }

    /// Stops a live queue; drivers of mmio wait until QueueReady reads 0 (virtio 4.2.2.2). The queue cannot be
    /// started again before reset: RING_RESET is not offered (virtio 2.6.1).
    fn stop_queue(&mut self, at: usize, value: u32) {
        if value == 0
            && std::mem::take(&mut self.queues[at].ready)
            && let Ok(index) = u16::try_from(at)
        {
            self.device.stop_queue(index);
        }
    }

    /// Rings a doorbell that KVM did not catch. The worker wakes the same way.
    fn notify(&mut self, queue: u32) {
        let doorbell = usize::try_from(queue).ok().and_then(|at| self.doorbells.get(at));
        if let Some(doorbell) = doorbell
            && let Err(error) = doorbell::ring(doorbell)
        {
            warn_limited!(self.errors, "virtio: the doorbell of queue {queue} cannot be rung: {error}");
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.status.get();
        let value = value & 0xff & !status::DEVICE_NEEDS_RESET;
        if old & !status::DEVICE_NEEDS_RESET & !value != 0 {
            warn_limited!(
                self.errors,
                "virtio: the driver may not clear bits of status {old:#x} with {value:#x}"
            );
            return;
        }
        let mut added = value & !old;
        if added & status::FEATURES_OK != 0 && !self.features_are_ok() {
            added &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && (old | added) & status::FEATURES_OK == 0 {
            warn_limited!(self.errors, "virtio: DRIVER_OK without FEATURES_OK is ignored");
            added &= !status::DRIVER_OK;
        }
        if added & status::FEATURES_OK != 0 {
            self.device.negotiated(self.driver_features);
            // The device may have changed fields to suit what was negotiated (virtio 5.2.5.2).
            self.config_changed = true;
        }
        self.status.0.fetch_or(added, Ordering::SeqCst);
        if added & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    /// Returns `true` if the driver's features are a subset of those offered, with VERSION_1 (virtio 6.2).
    fn features_are_ok(&mut self) -> bool {
        let unknown = self.driver_features & !self.device.features();
        if unknown != 0 {
            warn_limited!(
                self.errors,
                "virtio: the driver wants features that were not offered: {unknown:#x}"
            );
        }
        let modern = self.driver_features & feature::VERSION_1 != 0;
        if !modern {
            warn_limited!(
                self.errors,
                "virtio: the driver does not take VERSION_1; legacy drivers are not served"
            );
        }
        unknown == 0 && modern
    }

    fn activate(&mut self) {
        let features = self.driver_features;
        let there_are = self.device.queues_with(features);
        let mut queues = Vec::new();
        for (index, (state, &size_max)) in (0u16..).zip(self.queues.iter().zip(self.device.queue_sizes())) {
            if !state.ready {
                continue;
            }
            if usize::from(index) >= there_are {
                warn_limited!(
                    self.errors,
                    "virtio: the driver has enabled queue {index}, but with the features that it has \
                     negotiated there are {there_are}, from 0 on: the queue is not served"
                );
                continue;
            }
            match Ring::new(&self.ram, &state.config, size_max, features) {
                Ok(ring) => {
                    let doorbell = Arc::clone(&self.doorbells[usize::from(index)]);
                    queues.push(EnabledQueue { index, ring, doorbell });
                }
                Err(error) => {
                    warn_limited!(self.errors, "virtio: queue {index}: {error}");
                    return self.interrupt.needs_reset();
                }
            }
        }
        let interrupt = Arc::clone(&self.interrupt);
        let parts = Activation { ram: self.ram.clone(), features, queues, interrupt };
        if let Err(error) = self.device.activate(parts) {
            warn_limited!(self.errors, "virtio: the device cannot start: {error}");
            self.interrupt.needs_reset();
        }
    }
}
