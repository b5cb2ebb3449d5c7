//! virtio-blk (virtio 5.2): the device that a transport sees.
//!
//! Owns activation, reset and configuration space. [`worker`] moves requests, [`request`] parses them, and
//! [`crate::disk`] carries them out. Knows nothing of KVM or transports.

pub mod config;
mod job;
mod poll;
pub mod request;
mod requests;
mod stopwatch;
pub mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::disk::Image;
use crate::disk::cache::{Negotiated, WriteCache};
use crate::disk::choice::{Chosen, EngineError, EngineKind, choose};
use crate::disk::disk_queue::DiskQueue;
use crate::mem::Ram;
use crate::virtio::queue::Position;
use crate::virtio::{ActivateError, Activation, EnabledQueue, VirtioDevice};
use worker::{Job, WorkerThread};

/// Device ID of a block device (virtio 5.2.1).
const DEVICE_ID: u32 = 2;

/// Why a device could not be made for an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The image's engine is not available.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A worker's thread cannot be started.
    #[error("a disk's worker cannot be started")]
    Thread(#[source] io::Error),
}

/// A virtio-blk device: one image, and for each queue a worker thread, a state machine and an engine.
pub struct BlockDevice {
    image: Arc<Image>,
    cache: Arc<WriteCache>,
    queue_sizes: Vec<u16>,
    workers: Vec<WorkerThread>,
    engine: EngineKind,
}

impl BlockDevice {
    /// Creates the device and its parked workers, one for each queue that the image is to have. `name` is vda,
    /// vdb, ..., and names the threads.
    pub fn new(name: &str, image: Arc<Image>) -> Result<Self, DeviceError> {
        Self::with_ram(name, image, None)
    }

    /// Creates the device like [`BlockDevice::new`]. If guest memory is to be registered with the engine
    /// (buffers=fixed), `ram` is that memory.
    pub fn with_ram(name: &str, image: Arc<Image>, ram: Option<&Ram>) -> Result<Self, DeviceError> {
        let cache = Arc::new(WriteCache::new(image.config().cache));
        let Chosen { engines, kind, why } = choose(&image, ram, image.config().queue_count())?;
        if let Some(why) = why {
            log::info!("disk {}: engine=sync: {why}", image.config().path.display());
        }
        let disk =
            |engine| DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), engine, image.config().stable);
        let disks = engines.into_iter().map(disk).collect();
        let mut device = Self::with_disks(name, image, cache, disks).map_err(DeviceError::Thread)?;
        device.engine = kind;
        Ok(device)
    }

    /// Creates a device over `disks`, one for each queue. All of them work on `image` and `cache`.
    pub fn with_disks(
        name: &str,
        image: Arc<Image>,
        cache: Arc<WriteCache>,
        disks: Vec<DiskQueue>,
    ) -> io::Result<Self> {
        let queue_sizes = vec![image.config().queue_size; disks.len()];
        let thread = |(index, disk)| WorkerThread::park(format!("{name}-q{index}"), disk, image.threads());
        let workers = disks.into_iter().enumerate().map(thread).collect::<io::Result<_>>()?;
        Ok(Self { image, cache, queue_sizes, workers, engine: EngineKind::Blocking })
    }

    /// Returns the engine that does the I/O.
    pub fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Returns the number of queues.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX)
    }

    /// Serves the queues like [`VirtioDevice::activate`], of which this may be a part: other queues may be active.
    /// If the driver does not write the doorbells, but an eventfd of another process, that is `kick`.
    pub fn activate_kicked(
        &mut self,
        parts: Activation,
        kick: Option<&Arc<OwnedFd>>,
    ) -> Result<(), ActivateError> {
        let Activation { ram, features, queues, interrupt } = parts;
        for EnabledQueue { index, ring, doorbell } in queues {
            let worker = self.workers.get(usize::from(index)).ok_or(ActivateError::MissingQueue(index))?;
            let (ram, kick, interrupt) = (ram.clone(), kick.cloned(), Arc::clone(&interrupt));
            let job = Job { ram, features, index, ring, doorbell, kick, interrupt };
            worker.start(job).map_err(|_| ActivateError::Worker(index))?;
        }
        Ok(())
    }

    /// Stops one queue like [`VirtioDevice::stop_queue`]. Returns how far its ring was served, so that another
    /// ring can resume there ([`crate::virtio::queue::Ring::resume_at`]); `None` if the queue was not active.
    pub fn stop_queue_at(&mut self, index: u16) -> Option<Position> {
        let position = self.workers.get(usize::from(index)).and_then(WorkerThread::stop);
        if self.cache.is_switch_pending() {
            // The worker that was woken to handle the switch may have been stopped before it did.
            self.wake_for_switch();
        }
        position
    }

    /// Returns the present value of the `writeback` byte.
    pub fn writeback(&self) -> bool {
        self.cache.writeback()
    }

    /// Sets the `writeback` byte on behalf of a transport which has told the driver this value, or has it from the
    /// driver, whatever features are negotiated by now. Otherwise like a driver's write of that byte: if it turns
    /// the write cache off, what has completed by now is made stable.
    pub fn set_writeback(&mut self, on: bool) {
        if self.cache.transport_sets_writeback(on) {
            self.wake_for_switch();
        }
    }

    /// Wakes a worker after the guest has turned its write cache off; the worker makes stable what is complete
    /// by then. Any worker can do it, except one that is parked because its queue was not enabled or was
    /// stopped.
    fn wake_for_switch(&self) {
        // If no worker is running, nothing can be in flight, and the first to start will see the switch.
        let _ = self.workers.iter().any(WorkerThread::wake);
    }
}

impl VirtioDevice for BlockDevice {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        config::offered(&self.image, self.queues())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Returns 1 without MQ, whatever `num_queues` says (virtio 5.2.2).
    fn queues_with(&self, features: u64) -> usize {
        if features & config::MQ == 0 { 1 } else { self.queue_sizes.len() }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = config::space(&self.image, self.queues(), self.cache.writeback());
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        for (to, from) in data.iter_mut().zip(&space[from..]) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `writeback` is the only field that a driver may write (virtio 5.2.5).
        let at = (config::WRITEBACK as u64).checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        let Some(&value) = at.and_then(|at| data.get(at)) else { return };
        if self.cache.guest_sets_writeback(value != 0) {
            self.wake_for_switch();
        }
    }

    fn negotiated(&mut self, features: u64) {
        self.cache.negotiate(Negotiated {
            flush: features & config::FLUSH != 0,
            config_wce: features & config::CONFIG_WCE != 0,
        });
    }

    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError> {
        self.activate_kicked(parts, None)
    }

    fn stop_queue(&mut self, index: u16) {
        self.stop_queue_at(index);
    }

    fn reset(&mut self) {
        for worker in &self.workers {
            worker.stop();
        }
        self.cache.reset();
    }
}
