//! An independent driver, which nobody here wrote, drives the device: the crate `virtio-drivers`
//! through its `Transport` trait, implemented over our mmio registers behind the bus.
//!
//! Its DMA memory is the device's guest RAM, in two regions with a hole between: rings lie in the
//! lower, what the driver shares is copied to and from the upper. The content of the image is
//! checked from outside.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use minivmm::blk::BlockDevice;
use minivmm::bus::{Bus, Outcome};
use minivmm::disk::disk_queue::StableBy;
use minivmm::disk::{DiskConfig, Image};
use minivmm::layout::VIRTIO_MMIO;
use minivmm::mem::{self, Ram};
use minivmm::virtio::Transport as _;
use minivmm_testkit::driver::reg;
use minivmm_testkit::images::{TestImage, modes, pattern, policies};
use minivmm_testkit::over_pci;
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const MIB: u64 = 1 << 20;
/// Rings are here.
const LOW: (u64, u64) = (0, MIB);
/// Shared buffers are here.
const HIGH: (u64, u64) = (4 << 30, 24 * MIB);
const F_FLUSH: u64 = minivmm_testkit::driver::F_FLUSH;
const F_INDIRECT: u64 = minivmm_testkit::driver::F_INDIRECT;
const F_EVENT_IDX: u64 = minivmm_testkit::driver::F_EVENT_IDX;

/// One region of guest RAM, given out by the page.
struct Pages {
    guest: u64,
    host: u64,
    taken: Vec<bool>,
}

impl Pages {
    fn new(ram: &Ram, (base, bytes): (u64, u64)) -> Self {
        let &(guest, host, _) = ram.regions().iter().find(|region| region.0 == base).unwrap();
        let mut taken = vec![false; usize::try_from(bytes).unwrap() / PAGE_SIZE];
        // The driver takes the guest address 0 for a failure.
        taken[0] = true;
        Self { guest, host, taken }
    }

    fn take(&mut self, pages: usize) -> (PhysAddr, NonNull<u8>) {
        let at = self.taken.windows(pages).position(|run| !run.contains(&true)).expect("guest RAM is full");
        self.taken[at..at + pages].fill(true);
        let offset = (at * PAGE_SIZE) as u64;
        (self.guest + offset, NonNull::new((self.host + offset) as *mut u8).unwrap())
    }

    fn give_back(&mut self, addr: PhysAddr, pages: usize) {
        let at = usize::try_from(addr - self.guest).unwrap() / PAGE_SIZE;
        assert!(self.taken[at..at + pages].iter().all(|&taken| taken), "given back twice");
        self.taken[at..at + pages].fill(false);
    }
}

/// The guest's memory of the test on this thread: [`Hal`] has no `self`.
struct GuestRam {
    ram: Ram,
    rings: Pages,
    buffers: Pages,
}

thread_local! {
    static GUEST: RefCell<Option<GuestRam>> = const { RefCell::new(None) };
}

fn guest<T>(what: impl FnOnce(&mut GuestRam) -> T) -> T {
    GUEST.with_borrow_mut(|guest| what(guest.as_mut().unwrap()))
}

struct GuestHal;

// SAFETY: `dma_alloc` hands out each page of the guest's RAM once until it is given back, mapped for
// as long as the thread lives, on page boundaries and zeroed.
unsafe impl Hal for GuestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        guest(|guest| {
            let (addr, pointer) = guest.rings.take(pages);
            mem::write_bytes(&guest.ram, addr, &vec![0; pages * PAGE_SIZE]).unwrap();
            (addr, pointer)
        })
    }

    unsafe fn dma_dealloc(addr: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        guest(|guest| guest.rings.give_back(addr, pages));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only the PCI transport asks for this")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        guest(|guest| {
            let (addr, _) = guest.buffers.take(buffer.len().div_ceil(PAGE_SIZE));
            let bytes = match direction {
                // What the device does not fill must not look filled.
                BufferDirection::DeviceToDriver => vec![0xee; buffer.len()],
                // SAFETY: the caller promises a valid buffer that nobody else uses meanwhile.
                _ => unsafe { buffer.as_ref() }.to_vec(),
            };
            mem::write_bytes(&guest.ram, addr, &bytes).unwrap();
            addr
        })
    }

    unsafe fn unshare(addr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        guest(|guest| {
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: as above.
                mem::read_bytes(&guest.ram, addr, unsafe { buffer.as_mut() }).unwrap();
            }
            guest.buffers.give_back(addr, buffer.len().div_ceil(PAGE_SIZE));
        });
    }
}

/// The driver crate's way to our registers.
struct Registers {
    bus: Arc<Bus>,
    /// Features that the driver is not shown, to make it negotiate less.
    hidden: u64,
}

impl Registers {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(VIRTIO_MMIO + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        assert_eq!(self.bus.write(VIRTIO_MMIO + offset, &value.to_le_bytes()), Outcome::Continue);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write(offset, (value & 0xffff_ffff) as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        DeviceType::try_from(self.read(reg::DEVICE_ID)).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.read(reg::DEVICE_FEATURES));
        self.write(reg::DEVICE_FEATURES_SEL, 1);
        (low | u64::from(self.read(reg::DEVICE_FEATURES)) << 32) & !self.hidden
    }

    fn write_driver_features(&mut self, features: u64) {
        for (sel, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(reg::DRIVER_FEATURES_SEL, sel);
            self.write(reg::DRIVER_FEATURES, half as u32);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(reg::QUEUE_SEL, queue.into());
        self.read(reg::QUEUE_SIZE_MAX)
    }

    fn notify(&mut self, queue: u16) {
        self.write(reg::QUEUE_NOTIFY, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(reg::STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(reg::STATUS, status.bits());
        assert!(self.get_status().contains(status), "the device refuses status {status:?}");
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, desc: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.write(reg::QUEUE_SEL, queue.into());
        self.write(reg::QUEUE_SIZE, size);
        self.write64(reg::QUEUE_DESC, desc);
        self.write64(reg::QUEUE_DRIVER, driver);
        self.write64(reg::QUEUE_DEVICE, device);
        self.write(reg::QUEUE_READY, 1);
        assert_eq!(self.read(reg::QUEUE_READY), 1);
    }

    /// virtio 4.2.2.2: write 0, and read it back. Over PCI a queue goes with all of the device.
    fn queue_unset(&mut self, queue: u16) {
        if over_pci::is_pci() {
            return self.write(reg::STATUS, 0);
        }
        self.write(reg::QUEUE_SEL, queue.into());
        self.write(reg::QUEUE_READY, 0);
        assert_eq!(self.read(reg::QUEUE_READY), 0, "the queue does not stop");
        self.write(reg::QUEUE_SIZE, 0);
        for part in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
            self.write64(part, 0);
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(reg::QUEUE_SEL, queue.into());
        self.read(reg::QUEUE_READY) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let pending = self.read(reg::INTERRUPT_STATUS);
        self.write(reg::INTERRUPT_ACK, pending);
        InterruptStatus::from_bits_truncate(pending)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(reg::CONFIG_GENERATION)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<T> {
        let mut bytes = vec![0; size_of::<T>()];
        self.bus.read(VIRTIO_MMIO + reg::CONFIG + offset as u64, &mut bytes);
        Ok(T::read_from_bytes(&bytes).unwrap())
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.bus.write(VIRTIO_MMIO + reg::CONFIG + offset as u64, value.as_bytes());
        Ok(())
    }
}

type Driver = VirtIOBlk<GuestHal, Registers>;

/// A machine with one disk, for any number of drivers one after another.
struct Machine {
    image: Arc<Image>,
    bus: Arc<Bus>,
    irq: EventFd,
    _ringer: Sender<()>,
}

/// Rings now and then, for as long as the sender lives. This driver (0.13) has no barrier between its
/// store of avail.idx and its load of the device's flags (virtio 2.7.13.4.1 wants one), so it may
/// take the doorbell for unwanted while the device asks for it, and then waits for ever. A doorbell
/// too many must be tolerated (virtio 2.7.10.2).
fn ringer(doorbell: Arc<EventFd>) -> Sender<()> {
    let (alive, ended) = channel();
    std::thread::spawn(move || {
        while ended.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
            doorbell.write(1).unwrap();
        }
    });
    alive
}

impl Machine {
    fn new(options: &DiskConfig) -> Self {
        let ram = mem::map_ram(&[LOW, HIGH]).unwrap();
        let (rings, buffers) = (Pages::new(&ram, LOW), Pages::new(&ram, HIGH));
        GUEST.set(Some(GuestRam { ram: ram.clone(), rings, buffers }));
        let image = Arc::new(Image::open(options).unwrap());
        let device = BlockDevice::with_ram("vda", Arc::clone(&image), Some(&ram)).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = over_pci::transport(Box::new(device), ram, irq.try_clone().unwrap());
        let ringer = ringer(Arc::clone(&transport.doorbells()[0]));
        let mut bus = Bus::new();
        bus.place("vda", VIRTIO_MMIO, 0x1000, Arc::new(Mutex::new(transport))).unwrap();
        Self { image, bus: Arc::new(bus), irq, _ringer: ringer }
    }

    /// The driver, without the features in `hidden`.
    fn driver_without(&self, hidden: u64) -> Driver {
        VirtIOBlk::new(Registers { bus: Arc::clone(&self.bus), hidden }).unwrap()
    }

    fn driver(&self) -> Driver {
        self.driver_without(0)
    }

    /// Waits for the interrupt line, at most ten seconds.
    fn wait_interrupt(&self) {
        let mut poll = libc::pollfd { fd: self.irq.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1, "no interrupt within ten seconds");
        self.irq.read().unwrap();
    }

    fn counter(&self, name: &str) -> u64 {
        self.image.stats.counters().snapshot().into_iter().find(|counter| counter.0 == name).unwrap().1
    }
}

/// Every negotiation that this driver knows.
fn negotiations() -> Vec<u64> {
    let all = F_FLUSH | F_INDIRECT | F_EVENT_IDX;
    [0, F_EVENT_IDX, F_INDIRECT, F_FLUSH, F_EVENT_IDX | F_INDIRECT, all].to_vec()
}

#[test]
fn the_driver_finds_capacity_serial_and_a_writable_disk() {
    let test = TestImage::new(MIB);
    for (serial, expected) in [
        (None, "test.img"),
        (Some("disk-7"), "disk-7"),
        (Some("twenty-bytes-exactly"), "twenty-bytes-exactly"),
    ] {
        let machine = Machine::new(&DiskConfig { serial: serial.map(str::to_owned), ..test.options("none") });
        let mut driver = machine.driver();
        assert_eq!(driver.capacity(), MIB / 512);
        assert!(!driver.readonly());
        let mut id = [0xee; 20];
        let len = driver.device_id(&mut id).unwrap();
        assert_eq!(std::str::from_utf8(&id[..len]).unwrap(), expected);
        assert!(id[len..].iter().all(|&byte| byte == 0), "padded with NUL");
    }
}

#[test]
fn what_the_driver_writes_and_flushes_is_in_the_image_in_every_mode_and_negotiation() {
    for policy in policies() {
        for hidden in negotiations() {
            let test = TestImage::new(MIB);
            let mut expected = test.content();
            let machine = Machine::new(&test.options(policy.name));
            let mut driver = machine.driver_without(hidden);
            for (round, (sector, sectors)) in [(0, 1), (7, 8), (512, 256), (2047, 1)].into_iter().enumerate()
            {
                let data: Vec<u8> =
                    (0..sectors * 512).map(|i| u8::try_from((i + round * 31) % 253).unwrap()).collect();
                driver.write_blocks(sector, &data).unwrap();
                driver.flush().unwrap();
                expected[sector * 512..][..data.len()].copy_from_slice(&data);
                assert_eq!(test.content(), expected, "{} without {hidden:#x}", policy.name);
                let mut back = vec![0; data.len()];
                driver.read_blocks(sector, &mut back).unwrap();
                assert_eq!(back, data, "{} without {hidden:#x}", policy.name);
            }
        }
    }
}

#[test]
fn each_write_and_flush_costs_the_host_syncs_that_its_mode_says() {
    // This driver never takes CONFIG_WCE: with FLUSH the mode rules, without it all but unsafe
    // must be stable. (mode, FLUSH taken, stable writes, fdatasyncs) of 3 writes and 2 flushes.
    let here = modes();
    for (mode, flush, dsyncs, fdatasyncs) in [
        ("none", true, 0, 2),
        ("writeback", true, 0, 2),
        ("writethrough", true, 3, 2),
        ("directsync", true, 3, 2),
        ("unsafe", true, 0, 0),
        ("dontcache", true, 0, 2),
        ("none", false, 3, 0),
        ("writeback", false, 3, 0),
        ("writethrough", false, 3, 0),
        ("directsync", false, 3, 0),
        ("unsafe", false, 0, 0),
        ("dontcache", false, 3, 0),
    ] {
        if !here.contains(&mode) {
            continue;
        }
        let test = TestImage::new(MIB);
        let machine = Machine::new(&test.options(mode));
        let mut driver = machine.driver_without(if flush { 0 } else { F_FLUSH });
        for sector in [8, 16, 24] {
            driver.write_blocks(sector, &[0x5a; 4096]).unwrap();
        }
        driver.flush().unwrap();
        driver.flush().unwrap();
        // Where the writes' own way is an fdatasync each (they come one after another).
        let by_dsync = matches!(machine.image.config().stable, StableBy::Dsync | StableBy::Auto);
        let (dsyncs, fdatasyncs) = if by_dsync { (dsyncs, fdatasyncs) } else { (0, fdatasyncs + dsyncs) };
        let seen = (machine.counter("pwritevs_dsync"), machine.counter("fdatasyncs"));
        assert_eq!(seen, (dsyncs, fdatasyncs), "{mode}, FLUSH {flush}");
        assert_eq!(machine.counter("flushes"), if flush { 2 } else { 0 }, "{mode}, FLUSH {flush}");
    }
}

#[test]
fn many_requests_in_flight_end_each_once_and_right() {
    for policy in policies() {
        for hidden in [0, F_EVENT_IDX, F_INDIRECT] {
            let test = TestImage::new(MIB);
            let machine = Machine::new(&test.options(policy.name));
            let mut driver = machine.driver_without(hidden);
            // Without indirect descriptors a request takes three of the driver's 16.
            let count = if hidden & F_INDIRECT == 0 { 16 } else { 5 };
            for round in 0..4u8 {
                many_in_flight(&machine, &mut driver, &test, count, round);
            }
        }
    }
}

fn many_in_flight(machine: &Machine, driver: &mut Driver, test: &TestImage, count: usize, round: u8) {
    struct Request {
        write: bool,
        sector: usize,
        req: BlkReq,
        data: Vec<u8>,
        resp: BlkResp,
        done: bool,
    }
    let mut requests: Vec<(u16, Box<Request>)> = Vec::new();
    for at in 0..count {
        let (write, sector) = (at % 2 == 0, at * 100 + 1024 * usize::from(at % 2 == 0) % 1000);
        let data = if write { vec![round * 20 + u8::try_from(at).unwrap(); 8192] } else { vec![0; 8192] };
        let (req, resp) = (BlkReq::default(), BlkResp::default());
        let mut request = Box::new(Request { write, sector, req, data, resp, done: false });
        let Request { req, data, resp, .. } = &mut *request;
        // SAFETY: the buffers stay in `requests`, untouched, until they are handed back below.
        let token = unsafe {
            if write {
                driver.write_blocks_nb(sector, req, data, resp)
            } else {
                driver.read_blocks_nb(sector, req, data, resp)
            }
        };
        requests.push((token.unwrap(), request));
    }
    for _ in 0..count {
        let token = loop {
            match driver.peek_used() {
                Some(token) => break token,
                None => machine.wait_interrupt(),
            }
        };
        driver.ack_interrupt();
        // A head that is in use again belongs to the one that is not done.
        let (_, request) = requests.iter_mut().find(|(other, r)| *other == token && !r.done).unwrap();
        let Request { write, req, data, resp, done, .. } = &mut **request;
        // SAFETY: the same buffers as above.
        unsafe {
            if *write {
                driver.complete_write_blocks(token, req, data, resp).unwrap();
            } else {
                driver.complete_read_blocks(token, req, data, resp).unwrap();
            }
        }
        assert_eq!(resp.status(), RespStatus::OK);
        *done = true;
    }
    assert_eq!(driver.peek_used(), None);
    let content = test.content();
    for (_, request) in &requests {
        assert_eq!(request.data, content[request.sector * 512..][..8192], "at {}", request.sector);
    }
}

#[test]
fn one_request_larger_than_any_bounce_moves_whole() {
    for mode in ["none", "writeback"] {
        let test = TestImage::new(8 * MIB);
        let machine = Machine::new(&DiskConfig { bounce_always: mode == "none", ..test.options(mode) });
        let mut driver = machine.driver();
        let data: Vec<u8> = (0..4 * MIB).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        driver.write_blocks(1024, &data).unwrap();
        assert_eq!(test.content()[1024 * 512..][..data.len()], data, "{mode}");
        let mut back = vec![0; data.len()];
        driver.read_blocks(1024, &mut back).unwrap();
        assert_eq!(back, data, "{mode}");
    }
}

/// Shows B9.
#[test]
fn a_readonly_disk_says_so_refuses_writes_and_takes_flushes() {
    let test = TestImage::new(MIB);
    let before = test.content();
    let machine = Machine::new(&DiskConfig { readonly: true, ..test.options("none") });
    let mut driver = machine.driver();
    assert!(driver.readonly());
    assert_eq!(driver.write_blocks(8, &[0x5a; 4096]), Err(Error::IoError));
    assert_eq!(driver.flush(), Ok(()));
    let mut back = [0; 4096];
    driver.read_blocks(8, &mut back).unwrap();
    assert_eq!((back[0], back[4095]), (pattern(8), pattern(15)));
    assert_eq!(test.content(), before);
}

#[test]
fn requests_beyond_the_end_fail_and_change_nothing() {
    let test = TestImage::new(MIB);
    let before = test.content();
    let machine = Machine::new(&test.options("none"));
    let mut driver = machine.driver();
    for (sector, bytes) in [(2048, 512), (2041, 4096), (usize::MAX, 512), (1 << 55, 512)] {
        assert_eq!(driver.write_blocks(sector, &vec![0x5a; bytes]), Err(Error::IoError), "{sector}");
        assert_eq!(driver.read_blocks(sector, &mut vec![0; bytes]), Err(Error::IoError), "{sector}");
    }
    driver.read_blocks(0, &mut [0; 4096]).unwrap();
    assert_eq!(test.content(), before);
}

#[test]
fn one_driver_after_another_finds_the_device_as_new() {
    let test = TestImage::new(MIB);
    let machine = Machine::new(&test.options("none"));
    for round in 0..20u8 {
        let hidden = negotiations()[usize::from(round) % 6];
        let mut driver = machine.driver_without(hidden);
        let sector = usize::from(round) * 8;
        driver.write_blocks(sector, &[round + 1; 4096]).unwrap();
        driver.flush().unwrap();
        // Going away, the driver writes 0 to QueueReady and waits until it reads 0.
        drop(driver);
        assert_eq!(test.content()[sector * 512..][..4096], [round + 1; 4096]);
    }
}
