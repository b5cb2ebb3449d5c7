//! A device behind a device: hands everything on, and notes what passes between transport and device.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use minivmm::virtio::queue::QueueConfig;
use minivmm::virtio::{ActivateError, Activation, Interrupt, VirtioDevice};

use super::engine::Host;

/// A driver that has come: its queues by index, and what it has negotiated.
#[derive(Clone)]
pub struct Driver {
    pub queues: Vec<(u16, QueueConfig)>,
    pub features: u64,
}

/// What was noted.
#[derive(Default)]
pub struct Notes {
    /// Drivers that have come since it was last looked.
    pub came: Mutex<Option<Driver>>,
    /// Queues that were taken back.
    pub stopped: Mutex<Vec<u16>>,
    pub resets: AtomicU64,
    /// The device could not start.
    pub failed: AtomicBool,
    /// The device has said that it needs a reset.
    pub broken: AtomicBool,
    /// Notifications by queue.
    pub told: [AtomicU64; 16],
}

impl Notes {
    /// Nothing was noted of drivers since so many resets.
    pub fn is_quiet(&self, resets: u64) -> bool {
        self.resets.load(Ordering::SeqCst) == resets
            && self.came.lock().unwrap().is_none()
            && self.stopped.lock().unwrap().is_empty()
    }
}

pub struct Spy {
    pub inner: Box<dyn VirtioDevice>,
    pub notes: Arc<Notes>,
    /// Whose workers are about to work, if they are threads.
    pub host: Option<Arc<Host>>,
}

impl VirtioDevice for Spy {
    fn device_id(&self) -> u32 {
        self.inner.device_id()
    }

    fn features(&self) -> u64 {
        self.inner.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.inner.queue_sizes()
    }

    fn queues_with(&self, features: u64) -> usize {
        self.inner.queues_with(features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.inner.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.inner.write_config(offset, data);
    }

    fn negotiated(&mut self, features: u64) {
        assert_eq!(features & !self.inner.features(), 0, "S4: more than was offered is negotiated");
        self.inner.negotiated(features);
    }

    fn activate(&mut self, mut parts: Activation) -> Result<(), ActivateError> {
        let queues: Vec<_> = parts.queues.iter().map(|queue| (queue.index, *queue.ring.config())).collect();
        parts.interrupt =
            Arc::new(Heard { inner: Arc::clone(&parts.interrupt), notes: Arc::clone(&self.notes) });
        let features = parts.features;
        let start = |does| {
            for (index, config) in &queues {
                if let Some(host) = &self.host {
                    host.starts(usize::from(*index), config.size, does);
                }
            }
        };
        start(true);
        let result = self.inner.activate(parts);
        if result.is_err() {
            start(false);
            self.notes.failed.store(true, Ordering::SeqCst);
        } else {
            *self.notes.came.lock().unwrap() = Some(Driver { queues, features });
        }
        result
    }

    fn stop_queue(&mut self, index: u16) {
        self.inner.stop_queue(index);
        self.notes.stopped.lock().unwrap().push(index);
    }

    fn reset(&mut self) {
        self.inner.reset();
        // Whoever comes next may break it again, before anybody looks.
        self.notes.broken.store(false, Ordering::SeqCst);
        self.notes.failed.store(false, Ordering::SeqCst);
        self.notes.resets.fetch_add(1, Ordering::SeqCst);
    }
}

struct Heard {
    inner: Arc<dyn Interrupt>,
    notes: Arc<Notes>,
}

impl Interrupt for Heard {
    fn queue(&self, index: u16) {
        self.notes.told[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        self.inner.queue(index);
    }

    fn config(&self) {
        self.inner.config();
    }

    fn needs_reset(&self) {
        self.inner.needs_reset();
        self.notes.broken.store(true, Ordering::SeqCst);
    }
}
