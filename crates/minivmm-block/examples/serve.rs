//! Serves one virtqueue from a file, without any VMM: the example plays the driver, and the transport.
//!
//! `cargo run --example serve -- disk.img`, a file of at least 64 KiB whose first 4 KiB may be overwritten.

use std::process::ExitCode;
use std::sync::Arc;

use minivmm_block::blk::{BlockDevice, config};
use minivmm_block::disk::{DiskConfig, Image};
use minivmm_block::mem::{Ram, read_bytes, write_bytes};
use minivmm_block::virtio::queue::{QueueConfig, Ring};
use minivmm_block::virtio::{Activation, EnabledQueue, Interrupt, VirtioDevice, feature};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

type Failure = Box<dyn std::error::Error>;

/// Where the driver has its rings, a request's header, status and data: guest addresses.
const RINGS: QueueConfig = QueueConfig { size: 8, descriptors: 0, available: 0x1000, used: 0x2000 };
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3800;
const DATA: u64 = 0x4000;
const DATA_BYTES: u32 = 4096;

/// The requests (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

/// Flags of a descriptor (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The transport's way to the driver: an eventfd where a VMM would interrupt a CPU.
struct ToDriver(EventFd);

impl Interrupt for ToDriver {
    fn queue(&self, _index: u16) {
        // The counter is never full: the driver reads it.
        let _ = self.0.write(1);
    }
    fn config(&self) {}
    fn needs_reset(&self) {
        eprintln!("the device asks for a reset");
    }
}

struct Driver {
    ram: Ram,
    doorbell: Arc<EventFd>,
    interrupt: Arc<ToDriver>,
    requests: u16,
}

impl Driver {
    /// Submits a request for the first sectors as a chain of descriptors, and returns its status byte.
    fn request(&mut self, kind: u32) -> Result<u8, Failure> {
        write_bytes(&self.ram, HEADER, &kind.to_le_bytes())?;
        write_bytes(&self.ram, HEADER + 4, &[0; 12])?;
        let data = (DATA, DATA_BYTES, if kind == IN { WRITE } else { 0 });
        let chain = match kind {
            FLUSH => vec![(HEADER, 16, 0), (STATUS, 1, WRITE)],
            _ => vec![(HEADER, 16, 0), data, (STATUS, 1, WRITE)],
        };
        for (at, &(addr, len, flags)) in (0u16..).zip(&chain) {
            let next = if usize::from(at) + 1 < chain.len() { NEXT } else { 0 };
            let (len, flags): (u32, u16) = (len, flags | next);
            let fields =
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &(at + 1).to_le_bytes()];
            write_bytes(&self.ram, RINGS.descriptors + 16 * u64::from(at), &fields.concat())?;
        }
        let slot = RINGS.available + 4 + 2 * u64::from(self.requests % 8);
        write_bytes(&self.ram, slot, &0u16.to_le_bytes())?;
        self.requests += 1;
        write_bytes(&self.ram, RINGS.available + 2, &self.requests.to_le_bytes())?;
        self.doorbell.write(1)?;
        let mut used = [0; 2];
        while used != self.requests.to_le_bytes() {
            self.interrupt.0.read()?;
            read_bytes(&self.ram, RINGS.used + 2, &mut used)?;
        }
        let mut status = [0xff];
        read_bytes(&self.ram, STATUS, &mut status)?;
        Ok(status[0])
    }
}

fn main() -> ExitCode {
    let Err(error) = serve() else { return ExitCode::SUCCESS };
    eprint!("serve: {error}");
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.for_each(|cause| eprint!(": {cause}"));
    eprintln!();
    ExitCode::FAILURE
}

fn serve() -> Result<(), Failure> {
    let path = std::env::args_os().nth(1).ok_or("usage: serve FILE (its first 4 KiB are overwritten)")?;
    let asked = DiskConfig { queues: Some(1), queue_size: 8, ..DiskConfig::new(path) };
    let image = Arc::new(Image::open(&asked)?);
    println!("{}", image.banner());
    image.warnings().iter().for_each(|warning| eprintln!("{warning}"));

    // The VMM's part: guest memory, the device, and what the driver negotiates.
    let ram = Ram::from_memory(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
    let mut device = BlockDevice::with_ram("vda", Arc::clone(&image), Some(&ram))?;
    let features = device.features() & (feature::VERSION_1 | config::FLUSH);
    device.negotiated(features);
    let doorbell = Arc::new(EventFd::new(0)?);
    let interrupt = Arc::new(ToDriver(EventFd::new(0)?));
    let ring = Ring::new(&ram, &RINGS, asked.queue_size, features)?;
    let queue = EnabledQueue { index: 0, ring, doorbell: Arc::clone(&doorbell) };
    let to_driver: Arc<dyn Interrupt> = interrupt.clone();
    device.activate(Activation { ram: ram.clone(), features, queues: vec![queue], interrupt: to_driver })?;

    // The driver's part.
    let mut driver = Driver { ram: ram.clone(), doorbell, interrupt, requests: 0 };
    let words = b"O_DIRECT, O_SYNC, and fsync are not the same mechanism.";
    write_bytes(&ram, DATA, words)?;
    println!("write: status {}", driver.request(OUT)?);
    println!("FLUSH: status {}; what was written is on the disk", driver.request(FLUSH)?);
    write_bytes(&ram, DATA, &[0; 64])?;
    println!("read: status {}", driver.request(IN)?);
    let mut back = [0; 55];
    read_bytes(&ram, DATA, &mut back)?;
    assert_eq!(&back, words);
    println!("{}", String::from_utf8_lossy(&back));

    device.reset();
    Ok(image.close()?)
}
