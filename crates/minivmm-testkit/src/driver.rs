//! A driver for tests: registers by number, rings byte by byte.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use minivmm::blk::BlockDevice;
use minivmm::bus::BusDevice;
use minivmm::disk::Image;
use minivmm::disk::cache::WriteCache;
use minivmm::disk::disk_queue::{DiskQueue, StableBy};
use minivmm::disk::engine::Engine;
use minivmm::mem::{self, Ram};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Registers of virtio-mmio, by their names in the specification.
pub mod reg {
    /// MagicValue.
    pub const MAGIC: u64 = 0x000;
    /// Version.
    pub const VERSION: u64 = 0x004;
    /// DeviceID.
    pub const DEVICE_ID: u64 = 0x008;
    /// DeviceFeatures.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// DeviceFeaturesSel.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// DriverFeatures.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// DriverFeaturesSel.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// QueueSel.
    pub const QUEUE_SEL: u64 = 0x030;
    /// QueueSizeMax.
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    /// QueueSize.
    pub const QUEUE_SIZE: u64 = 0x038;
    /// QueueReady.
    pub const QUEUE_READY: u64 = 0x044;
    /// QueueNotify.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// InterruptStatus.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// InterruptACK.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Status.
    pub const STATUS: u64 = 0x070;
    /// QueueDescLow, with QueueDescHigh behind it.
    pub const QUEUE_DESC: u64 = 0x080;
    /// QueueDriverLow, with QueueDriverHigh behind it.
    pub const QUEUE_DRIVER: u64 = 0x090;
    /// QueueDeviceLow, with QueueDeviceHigh behind it.
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    /// ConfigGeneration.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// Where the configuration space begins.
    pub const CONFIG: u64 = 0x100;
}

/// VIRTIO_BLK_F_SEG_MAX.
pub const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// A bit of the device status.
pub const ACKNOWLEDGE: u32 = 1;
/// A bit of the device status.
pub const DRIVER: u32 = 2;
/// A bit of the device status.
pub const DRIVER_OK: u32 = 4;
/// A bit of the device status.
pub const FEATURES_OK: u32 = 8;
/// DEVICE_NEEDS_RESET, a bit of the device status.
pub const NEEDS_RESET: u32 = 64;

/// VIRTIO_BLK_T_IN, a read.
pub const IN: u32 = 0;
/// VIRTIO_BLK_T_OUT, a write.
pub const OUT: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub const FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub const GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub const DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub const WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_S_OK.
pub const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const UNSUPP: u8 = 2;
/// What a status byte is before the device has written it.
pub const UNTOUCHED: u8 = 0xaa;

/// VIRTQ_DESC_F_NEXT: the chain goes on.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the device writes this buffer.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Where the driver keeps its things in RAM.
pub const RAM_BYTES: u64 = 8 << 20;
/// Address of the descriptor table.
pub const DESC: u64 = 0x1_0000;
/// Address of the available ring.
pub const AVAIL: u64 = 0x2_0000;
/// Address of the used ring.
pub const USED: u64 = 0x3_0000;
/// Address of an indirect table.
pub const INDIRECT_TABLE: u64 = 0x4_0000;
/// Address of the request's header.
pub const HEADER: u64 = 0x5_0000;
/// Address of the request's status byte.
pub const STATUS_BYTE: u64 = 0x6_0000;
/// Address of the request's data.
pub const DATA: u64 = 0x10_0000;

pub use crate::desc::{self, Desc};
use crate::over_pci::{self, Behind};

/// A device behind its transport, and the driver's side of queue 0.
pub struct Rig {
    /// The guest's memory.
    pub ram: Ram,
    /// The device, with virtio-mmio's registers.
    pub mmio: Behind,
    /// The disk's image.
    pub image: Arc<Image>,
    /// The disk's write cache.
    pub cache: Arc<WriteCache>,
    /// The interrupt that the device raises.
    pub irq: EventFd,
    /// Entries of the queue that the next start sets up.
    pub size: u16,
    avail: u16,
    used: u16,
}

impl Rig {
    /// The device over the engine, and the way to stable writes, that the image was opened with.
    pub fn new(image: Arc<Image>) -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let mut chosen = minivmm::disk::choice::choose(&image, Some(&ram), 1).unwrap();
        let stable_by = image.config().stable;
        Self::with_parts(image, ram, chosen.engines.remove(0), stable_by)
    }

    /// Makes a device over this engine, with writes that become stable in this way.
    pub fn with_engine(image: Arc<Image>, engine: Box<dyn Engine>, stable_by: StableBy) -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        Self::with_parts(image, ram, engine, stable_by)
    }

    fn with_parts(image: Arc<Image>, ram: Ram, engine: Box<dyn Engine>, stable_by: StableBy) -> Self {
        let cache = Arc::new(WriteCache::new(image.config().cache));
        let disk = DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), engine, stable_by);
        let device =
            BlockDevice::with_disks("vda", Arc::clone(&image), Arc::clone(&cache), vec![disk]).unwrap();
        Self::over(image, cache, ram, device)
    }

    /// A device of any making, with however many queues.
    pub fn over(image: Arc<Image>, cache: Arc<WriteCache>, ram: Ram, device: BlockDevice) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = over_pci::transport(Box::new(device), ram.clone(), irq.try_clone().unwrap());
        Self { ram, mmio, image, cache, irq, size: 16, avail: 0, used: 0 }
    }

    /// A live device with these features.
    pub fn live(image: Arc<Image>, features: u64) -> Self {
        let mut rig = Self::new(image);
        rig.start(features);
        rig
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) {
        let outcome = self.mmio.write(offset, &value.to_le_bytes());
        assert_eq!(outcome, minivmm::bus::Outcome::Continue);
    }

    /// Writes a pair of registers, the lower half first.
    pub fn write64(&mut self, offset: u64, value: u64) {
        self.write(offset, (value & 0xffff_ffff) as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }

    /// Reads `len` bytes of the configuration space, at most 8.
    pub fn config(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(reg::CONFIG + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Writes the configuration's byte `writeback`.
    pub fn set_writeback(&mut self, on: u8) {
        self.mmio.write(reg::CONFIG + 32, &[on]);
    }

    /// Returns the features that the device offers.
    pub fn offered(&mut self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.read(reg::DEVICE_FEATURES));
        self.write(reg::DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.read(reg::DEVICE_FEATURES)) << 32
    }

    /// Reset, then everything up to FEATURES_OK; whether the device has accepted.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.write(reg::STATUS, 0);
        assert_eq!(self.read(reg::STATUS), 0);
        // Who looks at the used ring before the interrupt comes leaves it there. Nothing comes after
        // a reset (virtio 2.4.1), so what is there now is old.
        let _ = self.irq.read();
        self.write(reg::STATUS, ACKNOWLEDGE);
        self.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
        for (sel, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(reg::DRIVER_FEATURES_SEL, sel);
            self.write(reg::DRIVER_FEATURES, half as u32);
        }
        self.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(reg::STATUS) & FEATURES_OK != 0
    }

    /// Gives queue 0 fresh rings.
    pub fn set_up_queue(&mut self) {
        for addr in [DESC, AVAIL, USED] {
            self.fill(addr, 0, 0x1_0000);
        }
        (self.avail, self.used) = (0, 0);
        self.write(reg::QUEUE_SEL, 0);
        self.write(reg::QUEUE_SIZE, u32::from(self.size));
        self.write64(reg::QUEUE_DESC, DESC);
        self.write64(reg::QUEUE_DRIVER, AVAIL);
        self.write64(reg::QUEUE_DEVICE, USED);
        self.write(reg::QUEUE_READY, 1);
    }

    /// From reset to DRIVER_OK.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | F_VERSION_1), "the device refuses {features:#x}");
        self.set_up_queue();
        assert_eq!(self.read(reg::QUEUE_READY), 1);
        self.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.read(reg::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Writes to the guest's memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        mem::write_bytes(&self.ram, addr, bytes).unwrap();
    }

    /// Reads from the guest's memory.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        mem::read_bytes(&self.ram, addr, &mut bytes).unwrap();
        bytes
    }

    /// Fills a part of the guest's memory.
    pub fn fill(&self, addr: u64, byte: u8, len: usize) {
        self.poke(addr, &vec![byte; len]);
    }

    /// Reads a little-endian number from the guest's memory.
    pub fn peek16(&self, addr: u64) -> u16 {
        let bytes = self.peek(addr, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Writes a descriptor.
    pub fn put_desc(&self, table: u64, index: u16, desc: Desc) {
        self.poke(table + 16 * u64::from(index), &desc::bytes(desc));
    }

    /// Writes descriptors from index 0 of a table, each chained to the next.
    pub fn put_chain(&self, table: u64, parts: &[desc::Part]) {
        self.poke(table, &desc::chain(parts));
    }

    /// Writes the request's header.
    pub fn put_header(&self, kind: u32, sector: u64) {
        self.poke(HEADER, &kind.to_le_bytes());
        self.poke(HEADER + 4, &[0; 4]);
        self.poke(HEADER + 8, &sector.to_le_bytes());
    }

    /// Makes heads available, without the doorbell.
    pub fn make_available(&mut self, heads: &[u16]) {
        for &head in heads {
            self.poke(AVAIL + 4 + 2 * u64::from(self.avail % self.size), &head.to_le_bytes());
            self.avail = self.avail.wrapping_add(1);
        }
        self.set_avail_idx(self.avail);
    }

    /// Publishes this index of the available ring.
    pub fn set_avail_idx(&mut self, idx: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.poke(AVAIL + 2, &idx.to_le_bytes());
    }

    /// Rings the queue's doorbell.
    pub fn ring_doorbell(&mut self) {
        self.write(reg::QUEUE_NOTIFY, 0);
    }

    /// Returns the used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.peek16(USED + 2)
    }

    /// Waits for the interrupt line, at most ten seconds; what InterruptStatus said.
    pub fn wait_interrupt(&mut self) -> u32 {
        assert!(self.has_interrupt(10_000), "no interrupt within ten seconds");
        let status = self.read(reg::INTERRUPT_STATUS);
        self.write(reg::INTERRUPT_ACK, status);
        status
    }

    /// Whether the line was raised within so many milliseconds.
    pub fn has_interrupt(&mut self, within_ms: i32) -> bool {
        let mut poll = libc::pollfd { fd: self.irq.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&raw mut poll, 1, within_ms) } == 1;
        if ready {
            self.irq.read().unwrap();
        }
        ready
    }

    /// Waits for the next used entry: head and length.
    pub fn wait_used(&mut self) -> (u16, u32) {
        while self.used_idx() == self.used {
            self.wait_interrupt();
        }
        let at = USED + 4 + 8 * u64::from(self.used % self.size);
        let entry = self.peek(at, 8);
        self.used = self.used.wrapping_add(1);
        (u16::from_le_bytes([entry[0], entry[1]]), u32::from_le_bytes(entry[4..8].try_into().unwrap()))
    }

    /// Submits the chain at descriptor 0 and waits: status byte and used length.
    pub fn submit_chain(&mut self) -> (u8, u32) {
        self.fill(STATUS_BYTE, UNTOUCHED, 1);
        self.make_available(&[0]);
        self.ring_doorbell();
        let (head, len) = self.wait_used();
        assert_eq!(head, 0);
        (self.peek(STATUS_BYTE, 1)[0], len)
    }

    /// One request in the classic layout: header, data, status.
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<(u32, u16)>) -> (u8, u32) {
        self.put_header(kind, sector);
        let mut parts = vec![(HEADER, 16, 0)];
        if let Some((len, flags)) = data {
            parts.push((DATA, len, flags));
        }
        parts.push((STATUS_BYTE, 1, WRITE));
        self.put_chain(DESC, &parts);
        self.submit_chain()
    }

    /// Reads from the disk: status and data.
    pub fn read_sectors(&mut self, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
        self.fill(DATA, 0xee, bytes as usize);
        let (status, _) = self.request(IN, sector, Some((bytes, WRITE)));
        (status, self.peek(DATA, bytes as usize))
    }

    /// Writes to the disk; returns the status.
    pub fn write_sectors(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.poke(DATA, data);
        self.request(OUT, sector, Some((u32::try_from(data.len()).unwrap(), 0))).0
    }

    /// Flushes; returns the status.
    pub fn flush(&mut self) -> u8 {
        self.request(FLUSH, 0, None).0
    }

    /// A DISCARD or WRITE_ZEROES of (sector, sectors, flags).
    pub fn erase(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let mut payload = Vec::new();
        for (sector, sectors, flags) in segments {
            payload.extend(sector.to_le_bytes());
            payload.extend(sectors.to_le_bytes());
            payload.extend(flags.to_le_bytes());
        }
        self.poke(DATA, &payload);
        self.request(kind, 0, Some((u32::try_from(payload.len()).unwrap(), 0))).0
    }

    /// Returns whether the status has DEVICE_NEEDS_RESET.
    pub fn needs_reset(&mut self) -> bool {
        self.read(reg::STATUS) & NEEDS_RESET != 0
    }
}
