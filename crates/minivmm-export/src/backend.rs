//! The back end of one disk: what the front end's messages do to the device.
//!
//! Owns the connection's state (features, memory table, rings, inflight region) and the order of every change to it.
//! While a ring is served, its memory does not change: a message that changes it first stops the rings, which waits
//! for all I/O in flight, and lets them go on where they stood. The messages' form was checked by the crate `vhost`
//! ([`crate::handler`]); what they say is checked here.

use std::fs::File;
use std::io;
use std::sync::Arc;

use minivmm_block::blk::{BlockDevice, config};
use minivmm_block::disk::Image;
use minivmm_block::mem::{MemoryLoss, OutsideRam};
use minivmm_block::ratelimit::RateLimit;
use minivmm_block::virtio::queue::{Position, QueueConfigError, Ring};
use minivmm_block::virtio::{ActivateError, Activation, EnabledQueue, Interrupt, VirtioDevice, feature};
use minivmm_block::warn_limited;
use vmm_sys_util::eventfd::EventFd;

use crate::inflight::{Description, InflightRegion, Kept, RegionError};
use crate::notify::{ForeignEvent, NoEvent};
use crate::ring::{Addresses, RingSetup};
use crate::table::{MemoryTable, Region, TableError};

/// VHOST_USER_F_PROTOCOL_FEATURES, beside virtio's own feature bits.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Why a message is refused. The connection ends, and nothing that was in flight is lost.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it")]
pub enum Refused {
    #[error("the features {0:#x} were not offered")]
    Features(u64),
    #[error(
        "the driver is a legacy one, without VIRTIO_F_VERSION_1 (QEMU: give the device disable-legacy=on, or the guest \
         a newer driver)"
    )]
    Legacy,
    #[error("the message changes a ring that is being served, and GET_VRING_BASE has not stopped it")]
    Running,
    #[error("there is no ring {index}: the disk has {queues} (its key queues= changes that)")]
    NoRing { index: u32, queues: u16 },
    #[error("{0} is no index of a ring")]
    Base(u32),
    #[error("the ring has no kick eventfd; rings that must be polled are not supported")]
    Polling,
    #[error(transparent)]
    Event(#[from] NoEvent),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("the rings' addresses are not in the memory table")]
    RingOutside,
    #[error("the ring cannot be used (the disk's key queue-size= sets the largest size)")]
    Ring(#[from] QueueConfigError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("the inflight region has no part for the ring")]
    NoNotes(#[from] OutsideRam),
    #[error(
        "the configuration space has one writable byte, writeback at 32: {bytes} bytes at {offset} are refused"
    )]
    Config { offset: u32, bytes: usize },
    #[error(transparent)]
    Device(#[from] ActivateError),
    #[error("cannot make an eventfd")]
    Host(#[from] io::Error),
}

/// A disk and its connection.
pub struct Backend {
    device: BlockDevice,
    image: Arc<Image>,
    /// The driver's features; `None` until they are set.
    features: Option<u64>,
    table: MemoryTable,
    rings: Vec<RingSetup>,
    inflight: Option<InflightRegion>,
    /// `true` if the device's `writeback` byte is the one that the driver believes in.
    knows_writeback: bool,
    notes: RateLimit,
}

impl Backend {
    /// Creates the back end of a device, with no connection yet.
    pub fn new(device: BlockDevice, image: Arc<Image>) -> io::Result<Self> {
        let table = MemoryTable::new(MemoryLoss::new()?);
        let mut backend = Self {
            device,
            image,
            features: None,
            table,
            rings: Vec::new(),
            inflight: None,
            knows_writeback: false,
            notes: RateLimit::for_guest_errors("export"),
        };
        backend.forget_rings();
        Ok(backend)
    }

    /// Returns the image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Begins a connection. The device is as after a reset. Returns what is told if the front end's memory is lost.
    pub fn begin(&mut self) -> io::Result<Arc<MemoryLoss>> {
        self.end();
        let loss = MemoryLoss::new()?;
        self.table = MemoryTable::new(Arc::clone(&loss));
        self.knows_writeback = false;
        Ok(loss)
    }

    /// Ends the connection: stops all rings, which waits for their I/O in flight, and gives the memory back.
    pub fn end(&mut self) {
        self.device.reset();
        self.features = None;
        self.forget_rings();
        self.forget_inflight();
        // The mapping of an empty table cannot fail.
        let _ = self.table.set(Vec::new());
    }

    fn forget_inflight(&mut self) {
        self.image.latch.on_first_error(None);
        self.inflight = None;
    }

    fn forget_rings(&mut self) {
        self.rings = (0..self.device.queues()).map(|_| RingSetup::default()).collect();
    }

    fn ring(&mut self, index: u32) -> Result<&mut RingSetup, Refused> {
        let queues = self.device.queues();
        let found = usize::try_from(index).ok().and_then(|at| self.rings.get_mut(at));
        found.ok_or(Refused::NoRing { index, queues })
    }

    /// Returns the ring if it is not being served.
    fn idle_ring(&mut self, index: u32) -> Result<&mut RingSetup, Refused> {
        let ring = self.ring(index)?;
        if ring.is_running { Err(Refused::Running) } else { Ok(ring) }
    }

    /// Returns the features that are offered.
    pub fn offered(&self) -> u64 {
        self.device.features() | PROTOCOL_FEATURES
    }

    /// Returns the number of queues.
    pub fn queues(&self) -> u16 {
        self.device.queues()
    }

    /// Accepts the driver's features.
    pub fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(Refused::Features(unknown));
        }
        if self.features != Some(features) && self.rings.iter().any(|ring| ring.is_running) {
            return Err(Refused::Running);
        }
        if self.features != Some(features) {
            self.device.negotiated(features & !PROTOCOL_FEATURES);
            self.features = Some(features);
        }
        self.start_what_is_due()
    }

    /// Replaces the memory table.
    pub fn set_table(&mut self, regions: Vec<Region>) -> Result<(), Refused> {
        self.pause();
        self.table.set(regions)?;
        self.start_what_is_due()
    }

    /// Adds a region to the memory table.
    pub fn add_region(&mut self, region: Region) -> Result<(), Refused> {
        self.pause();
        self.table.add(region)?;
        self.start_what_is_due()
    }

    /// Removes a region from the memory table.
    pub fn remove_region(&mut self, guest: u64, bytes: u64, user: u64) -> Result<(), Refused> {
        self.pause();
        self.table.remove(guest, bytes, user)?;
        self.start_what_is_due()
    }

    /// Sets the number of descriptors of a ring.
    pub fn set_size(&mut self, index: u32, size: u32) -> Result<(), Refused> {
        let ring = self.ring(index)?;
        if ring.size == size {
            return Ok(());
        }
        self.idle_ring(index)?.size = size;
        self.start_what_is_due()
    }

    /// Sets the addresses of a ring.
    pub fn set_addresses(&mut self, index: u32, addresses: Addresses) -> Result<(), Refused> {
        let ring = self.ring(index)?;
        if ring.addresses == Some(addresses) {
            return Ok(());
        }
        self.idle_ring(index)?.addresses = Some(addresses);
        self.start_what_is_due()
    }

    /// Sets the next entry of a ring's available ring.
    pub fn set_base(&mut self, index: u32, base: u32) -> Result<(), Refused> {
        let base = u16::try_from(base).map_err(|_| Refused::Base(base))?;
        self.idle_ring(index)?.base = base;
        Ok(())
    }

    /// Stops a ring, which waits for its I/O in flight. Returns the next entry of its available ring.
    pub fn stop_ring(&mut self, index: u32) -> Result<u16, Refused> {
        self.ring(index)?;
        self.pause_ring(index);
        let ring = self.ring(index)?;
        ring.kick = None;
        ring.notify.set_call(None);
        Ok(ring.base)
    }

    /// Sets what the driver writes when it has made chains available: starts the ring.
    pub fn set_kick(&mut self, index: u32, file: Option<File>) -> Result<(), Refused> {
        let event = ForeignEvent::new(file.ok_or(Refused::Polling)?)?;
        self.ring(index)?;
        self.pause_ring(index);
        self.ring(index)?.kick = Some(Arc::new(event.into_fd()));
        self.start_what_is_due()
    }

    /// Sets what the device writes when it has returned chains; `None` if the driver looks by itself.
    pub fn set_call(&mut self, index: u32, file: Option<File>) -> Result<(), Refused> {
        let event = file.map(ForeignEvent::new).transpose()?;
        self.ring(index)?.notify.set_call(event);
        Ok(())
    }

    /// Sets what the device writes when a ring cannot be followed.
    pub fn set_err(&mut self, index: u32, file: Option<File>) -> Result<(), Refused> {
        let event = file.map(ForeignEvent::new).transpose()?;
        self.ring(index)?.notify.set_err(event);
        Ok(())
    }

    /// Lets a ring be served, or not.
    pub fn enable(&mut self, index: u32, on: bool) -> Result<(), Refused> {
        self.ring(index)?.is_enabled = on;
        if !on {
            self.pause_ring(index);
        }
        self.start_what_is_due()
    }

    /// Resets the device. The `writeback` byte stays, because front ends keep a copy of it over a reset (QEMU).
    pub fn reset(&mut self) {
        self.pause();
        self.features = None;
        self.forget_rings();
        self.forget_inflight();
    }

    /// Disables all rings (RESET_OWNER).
    pub fn disable_all(&mut self) {
        self.pause();
        self.rings.iter_mut().for_each(|ring| ring.is_enabled = false);
    }

    /// Reads the configuration space. Bytes that do not exist are 0.
    pub fn read_config(&self, offset: u32, bytes: u32) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.device.read_config(u64::from(offset), &mut data);
        data
    }

    /// Writes the configuration space: the driver sets its `writeback` byte.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Refused> {
        let refused = || Refused::Config { offset, bytes: data.len() };
        let length = u32::try_from(data.len()).map_err(|_| refused())?;
        let at = config::WRITEBACK.checked_sub(usize::try_from(offset).map_err(|_| refused())?);
        let at = at.filter(|at| *at < data.len()).ok_or_else(refused)?;
        let present = self.read_config(offset, length);
        let is_same = |(position, (new, old)): (usize, (&u8, &u8))| position == at || new == old;
        if !data.iter().zip(&present).enumerate().all(is_same) {
            return Err(refused());
        }
        let on = data.get(at).is_some_and(|byte| *byte != 0);
        self.device.set_writeback(on);
        self.knows_writeback = true;
        self.keep_for_restart();
        Ok(())
    }

    fn kept(&self) -> Kept {
        Kept { writeback: self.device.writeback(), sync_failed: self.image.latch.check().is_err() }
    }

    fn keep_for_restart(&self) {
        if let Some(region) = &self.inflight {
            region.keep(self.kept());
        }
    }

    /// Makes an inflight region for the front end to keep.
    pub fn make_inflight(&mut self, queues: u16, queue_size: u16) -> Result<(Description, File), Refused> {
        let made = InflightRegion::create(queues, queue_size, self.queues(), self.table.loss());
        let (region, file) = made?;
        region.keep(self.kept());
        Ok((region.description, file))
    }

    /// Takes the inflight region that the front end keeps, for rings that are started from now on.
    pub fn take_inflight(&mut self, description: Description, file: &File) -> Result<(), Refused> {
        if self.rings.iter().any(|ring| ring.is_running) {
            return Err(Refused::Running);
        }
        let region = InflightRegion::open(description, file, self.queues(), self.table.loss())?;
        if let Some(kept) = region.kept() {
            if !self.knows_writeback {
                self.device.set_writeback(kept.writeback);
                self.knows_writeback = true;
            }
            if kept.sync_failed {
                // Linux tells a failed sync once. The driver was told, and no later FLUSH may make it hope.
                self.image.latch.set(&io::Error::from_raw_os_error(libc::EIO));
            }
        }
        let noted = region.clone();
        self.image.latch.on_first_error(Some(Box::new(move || noted.keep_sync_failure())));
        self.inflight = Some(region);
        self.keep_for_restart();
        Ok(())
    }

    /// Stops a ring, if it is served, so that it can go on where it stood.
    fn pause_ring(&mut self, index: u32) {
        let Ok(queue) = u16::try_from(index) else { return };
        let Ok(ring) = self.ring(index) else { return };
        if !std::mem::take(&mut ring.is_running) {
            return;
        }
        if let Some(position) = self.device.stop_queue_at(queue)
            && let Ok(ring) = self.ring(index)
        {
            ring.base = position.available;
        }
    }

    fn pause(&mut self) {
        (0..self.queues()).for_each(|index| self.pause_ring(u32::from(index)));
    }

    fn start_what_is_due(&mut self) -> Result<(), Refused> {
        let Some(features) = self.features.filter(|_| self.table.ram().is_some()) else { return Ok(()) };
        for index in 0..self.queues() {
            let needs_enable = features & PROTOCOL_FEATURES != 0;
            if self.ring(u32::from(index))?.is_due(needs_enable) {
                self.start(index, features & !PROTOCOL_FEATURES)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, index: u16, features: u64) -> Result<(), Refused> {
        let Some(ram) = self.table.ram().cloned() else { return Ok(()) };
        if features & feature::VERSION_1 == 0 {
            return Err(Refused::Legacy);
        }
        let Some(setup) = self.rings.get(usize::from(index)) else { return Ok(()) };
        let queue = setup.config(&self.table).ok_or(Refused::RingOutside)?;
        let size_max = self.image.config().queue_size;
        let ring = Ring::new(&ram, &queue, size_max, features)?;
        let told = Position { available: setup.base, used: ring.used_idx_in_memory() };
        // Linux makes chains as long as the configuration space permits, whatever the ring's size.
        let mut ring = ring.resume_at(told).with_chains_of(size_max);
        if let Some(region) = &self.inflight {
            ring = ring.tracked_by(region.notes(index)?)?;
        }
        let position = ring.position();
        let interrupt: Arc<dyn Interrupt> = setup.notify.clone();
        let kick = setup.kick.clone();
        let is_resumed = position != Position::default() || ring.has_available();
        self.settle_writeback(is_resumed, index);
        let lost = position.available.wrapping_sub(position.used);
        if lost != 0 && self.inflight.is_none() {
            warn_limited!(
                self.notes,
                "ring {index}: {lost} requests were taken by an earlier back end and never returned; without an inflight \
                 region they cannot be repeated"
            );
        }
        let doorbell = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let queues = vec![EnabledQueue { index, ring, doorbell }];
        self.device.activate_kicked(Activation { ram, features, queues, interrupt }, kick.as_ref())?;
        self.ring(u32::from(index))?.is_running = true;
        Ok(())
    }

    /// Makes sure that no driver relies on stable writes that are not. A driver that was running before this
    /// connection may have turned its write cache off, of which only SET_CONFIG or an inflight region tells.
    fn settle_writeback(&mut self, is_resumed: bool, index: u16) {
        if !self.knows_writeback && is_resumed && self.device.writeback() {
            warn_limited!(
                self.notes,
                "ring {index} goes on with a driver whose write-cache setting is not known: writes are made stable before \
                 they are acknowledged, until the driver turns its write cache on"
            );
            self.device.set_writeback(false);
        }
        self.knows_writeback = true;
        self.keep_for_restart();
    }
}
