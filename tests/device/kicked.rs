//! A queue whose driver is another process's: it is kicked through that process's eventfd, and it can be stopped,
//! moved to other memory, and resumed where it stood, or where a process that was killed has left it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use minivmm::blk::BlockDevice;
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm::mem::{self, Ram};
use minivmm::virtio::VirtioDevice;
use minivmm_block::virtio::queue::inflight::Inflight;
use minivmm_block::virtio::queue::{Position, QueueConfig, Ring};
use minivmm_block::virtio::{Activation, EnabledQueue, Interrupt};
use minivmm_testkit::desc;
use minivmm_testkit::driver::{AVAIL, DATA, DESC, F_VERSION_1, HEADER, IN, OUT, STATUS_BYTE, USED, WRITE};
use minivmm_testkit::images::{TestImage, pattern};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u16 = 8;
const RING: QueueConfig = QueueConfig { size: SIZE as u32, descriptors: DESC, available: AVAIL, used: USED };
const RAM_BYTES: u64 = 2 << 20;

struct Quiet(AtomicU64);

impl Interrupt for Quiet {
    fn queue(&self, _: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {}

    fn needs_reset(&self) {}
}

/// The other process: its memory, and the eventfd that it writes.
struct Remote {
    ram: Ram,
    kick: EventFd,
    theirs: Arc<OwnedFd>,
    available: u16,
}

impl Remote {
    fn new(flags: i32) -> Self {
        let kick = EventFd::new(flags).unwrap();
        // SAFETY: the descriptor is a new one, which nobody else owns.
        let theirs = Arc::new(unsafe { OwnedFd::from_raw_fd(libc::dup(kick.as_raw_fd())) });
        Self { ram: mem::map_ram(&[(0, RAM_BYTES)]).unwrap(), kick, theirs, available: 0 }
    }

    /// Makes a request for one sector available, without a kick.
    fn submit(&mut self, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        mem::write_bytes(&self.ram, HEADER, &header).unwrap();
        let data = if kind == IN { WRITE } else { 0 };
        let chain = desc::chain(&[(HEADER, 16, 0), (DATA, 512, data), (STATUS_BYTE, 1, WRITE)]);
        mem::write_bytes(&self.ram, DESC, &chain).unwrap();
        mem::write_bytes(&self.ram, STATUS_BYTE, &[0xaa]).unwrap();
        mem::write_bytes(&self.ram, AVAIL + 4 + 2 * u64::from(self.available % SIZE), &[0; 2]).unwrap();
        self.available += 1;
        mem::write_bytes(&self.ram, AVAIL + 2, &self.available.to_le_bytes()).unwrap();
    }

    fn used_idx(&self) -> u16 {
        let mut idx = [0; 2];
        mem::read_bytes(&self.ram, USED + 2, &mut idx).unwrap();
        u16::from_le_bytes(idx)
    }

    /// Waits until everything has come back, and returns the status of the last request.
    fn wait(&self) -> u8 {
        let until = Instant::now() + Duration::from_secs(20);
        while self.used_idx() != self.available {
            assert!(Instant::now() < until, "{} of {} came back", self.used_idx(), self.available);
            std::thread::sleep(Duration::from_micros(100));
        }
        let mut status = [0];
        mem::read_bytes(&self.ram, STATUS_BYTE, &mut status).unwrap();
        status[0]
    }

    fn data(&self) -> [u8; 512] {
        let mut data = [0; 512];
        mem::read_bytes(&self.ram, DATA, &mut data).unwrap();
        data
    }

    fn activate(&self, device: &mut BlockDevice, ring: Ring) {
        let doorbell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queues = vec![EnabledQueue { index: 0, ring, doorbell }];
        let interrupt = Arc::new(Quiet(AtomicU64::new(0)));
        let parts = Activation { ram: self.ram.clone(), features: F_VERSION_1, queues, interrupt };
        device.activate_kicked(parts, Some(&self.theirs)).unwrap();
    }

    fn ring(&self) -> Ring {
        Ring::new(&self.ram, &RING, SIZE, F_VERSION_1).unwrap()
    }
}

fn flags(fd: &EventFd) -> i32 {
    // SAFETY: F_GETFL touches no memory.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
}

#[test]
fn a_foreign_kick_wakes_the_worker_and_stays_as_it_is() {
    for (engine, flag) in ["sync", "auto"].into_iter().flat_map(|it| [(it, 0), (it, EFD_NONBLOCK)]) {
        let test = TestImage::new(1 << 20);
        let keys = format!("x,engine={engine},poll-us=0");
        let keyed = disk_options::parse(keys).unwrap().config;
        let image = Arc::new(Image::open(&DiskConfig { path: test.path.clone(), ..keyed }).unwrap());
        let mut device = BlockDevice::new("vda", image).unwrap();
        device.negotiated(F_VERSION_1);
        let mut remote = Remote::new(flag);
        let before = flags(&remote.kick);
        remote.activate(&mut device, remote.ring());
        for round in 0..200 {
            // Now and then the worker is asleep for certain.
            if round % 50 == 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            remote.submit(IN, round);
            remote.kick.write(1).unwrap();
            assert_eq!((remote.wait(), remote.data()), (0, [pattern(round); 512]), "{engine}");
        }
        assert_eq!(device.stop_queue_at(0), Some(Position { available: 200, used: 200 }), "{engine}");
        assert_eq!(device.stop_queue_at(0), None, "it was stopped before");
        assert_eq!(flags(&remote.kick), before, "{engine}: the flags of the front end's eventfd");
        // Whoever has a queue without a kick afterwards hears nothing of it.
        remote.kick.write(1).unwrap();
    }
}

#[test]
fn a_stopped_queue_resumes_in_other_memory() {
    let test = TestImage::new(1 << 20);
    let mut device = BlockDevice::new("vda", test.open("none")).unwrap();
    device.negotiated(F_VERSION_1);
    let mut remote = Remote::new(0);
    remote.activate(&mut device, remote.ring());
    for sector in 0..5 {
        remote.submit(IN, sector);
        remote.kick.write(1).unwrap();
        remote.wait();
    }
    let position = device.stop_queue_at(0).unwrap();
    let moved = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    let mut all = vec![0; RAM_BYTES as usize];
    mem::read_bytes(&remote.ram, 0, &mut all).unwrap();
    mem::write_bytes(&moved, 0, &all).unwrap();
    remote.ram = moved;
    // Nobody kicks for a request that was made available meanwhile.
    remote.submit(IN, 77);
    remote.activate(&mut device, remote.ring().resume_at(position));
    assert_eq!((remote.wait(), remote.data()), (0, [pattern(77); 512]));
    device.reset();
}

#[test]
fn a_request_that_a_killed_process_had_taken_is_done_again_by_the_next() {
    let test = TestImage::new(1 << 20);
    let mut remote = Remote::new(0);
    let region = mem::map_ram(&[(0, 1 << 16)]).unwrap();
    let notes = || Inflight::new(&region, 0, SIZE).unwrap();
    mem::write_bytes(&remote.ram, DATA, &[0x77; 512]).unwrap();
    remote.submit(OUT, 3);
    // The first process pops the request, and is killed before it has done anything.
    let mut killed = remote.ring().tracked_by(notes()).unwrap();
    assert!(killed.pop().unwrap().is_some());
    drop(killed);
    let mut device = BlockDevice::new("vda", test.open("none")).unwrap();
    device.negotiated(F_VERSION_1);
    remote.activate(&mut device, remote.ring().tracked_by(notes()).unwrap());
    assert_eq!(remote.wait(), 0);
    assert_eq!(device.stop_queue_at(0), Some(Position { available: 1, used: 1 }));
    assert_eq!(test.content()[3 * 512..4 * 512], [0x77; 512]);
}
