//! A block device behind its registers, with its real workers, over a simulated host.
//!
//! Owns the steps of an input and what holds after each. Above all: every chain that was made available
//! comes back once, or the queue is declared broken; nothing but what was granted is written; and
//! whatever happened, a reset works and a good request after it.

mod requests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use minivmm::blk::BlockDevice;
use minivmm::blk::config::{CONFIG_WCE, DISCARD, FLUSH, MQ, WRITE_ZEROES};
use minivmm::bus::Bus;
use minivmm::disk::cache::{POLICIES, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, StableBy};
use minivmm::disk::geometry::{Alignment, Geometry};
use minivmm::disk::{DiskConfig, Image};
use minivmm::pci::memory::DoorbellSink;
use minivmm::pci::msix::{Message, MessageSink};
use minivmm::pci::root::{ConfigPorts, Ecam, OnBus, PciFunction, PciMemory, PciRoot};
use minivmm::virtio::mmio::MmioTransport;
use minivmm::virtio::pci::PciTransport;
use minivmm::virtio::queue::QueueConfig;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{HELD, Host, Posture};
use super::input::Input;
use super::lane::Lane;
use super::logs;
use super::memory::{Memory, REGIONS};
use super::registers::{Mmio, PLACE, Pci, Register, Registers, WINDOW, bring_up};
use super::spy::{Driver, Notes, Spy};
use super::walk::{Chain, F_EVENT_IDX, F_INDIRECT, WRITE};

const VERSION_1: u64 = 1 << 32;
const STEPS_MAX: usize = 160;

/// Where a driver puts its things: rings by queue, then what chains point to.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const HEADERS: u64 = 0x8000;
const STATUSES: u64 = 0x9000;
const TABLES: u64 = 0xa000;
const DATA: u64 = 0x1_0000;

pub fn over_mmio(data: &[u8]) {
    run(data, |spy, memory| {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Box::new(Mmio(MmioTransport::new(spy, memory.ram.clone(), line).unwrap()))
    });
}

pub fn over_pci(data: &[u8]) {
    run(data, |spy, memory| {
        let sent = Arc::<AtomicU64>::default();
        let sink = Box::new(Messages { routed: Vec::new(), sent: Arc::clone(&sent) });
        let function = PciTransport::new(spy, memory.ram.clone(), PLACE, sink).unwrap();
        let function = Arc::new(Mutex::new(function));
        let on_bus: Arc<Mutex<dyn PciFunction>> = Arc::clone(&function) as _;
        let on_bus: OnBus = (on_bus, Box::new(Nowhere));
        let root = Arc::new(PciRoot::new(WINDOW, [on_bus]));
        Box::new(Pci {
            function,
            ports: ConfigPorts::new(Arc::clone(&root), Bus::new()),
            ecam: Ecam(Arc::clone(&root)),
            memory: PciMemory(root),
            sent,
        })
    });
}

/// The function's doorbells are rung through its registers alone.
struct Nowhere;

impl DoorbellSink for Nowhere {
    fn place(&mut self, base: Option<u64>) -> std::io::Result<()> {
        assert!(base.is_none_or(|base| WINDOW.contains(&base) && base % 0x8000 == 0), "placed at {base:x?}");
        Ok(())
    }
}

/// Takes messages, and looks that none is sent that was not routed before.
struct Messages {
    routed: Vec<Option<Message>>,
    sent: Arc<AtomicU64>,
}

impl MessageSink for Messages {
    fn route(&mut self, vector: u16, message: Message) -> std::io::Result<()> {
        assert!(vector < 17, "no such vector: {vector}");
        self.routed.resize(17, None);
        self.routed[usize::from(vector)] = Some(message);
        Ok(())
    }

    fn send(&self, vector: u16) -> std::io::Result<()> {
        let routed = self.routed.get(usize::from(vector));
        assert!(routed.is_some_and(Option::is_some), "sent before it was routed");
        self.sent.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

type Behind = fn(Box<Spy>, &Memory) -> Box<dyn Registers>;

fn run(data: &[u8], behind: Behind) {
    let mut input = Input::new(data);
    logs::begin();
    let mut machine = Machine::new(&mut input, behind);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        machine.step(&mut input);
        machine.look();
    }
    machine.quiesce();
    machine.work_again();
    logs::check();
}

struct Machine {
    memory: Memory,
    host: Arc<Host>,
    notes: Arc<Notes>,
    registers: Box<dyn Registers>,
    image: Arc<Image>,
    queues: u16,
    size_max: u16,
    lanes: Vec<Option<Lane>>,
    resets: u64,
    /// avail.idx as the driver last wrote it.
    avail: Vec<u16>,
}

impl Machine {
    fn new(input: &mut Input<'_>, behind: Behind) -> Self {
        let memory = Memory::new();
        let policy = &POLICIES[input.below(POLICIES.len())];
        let queues = u16::try_from(input.pick(&[1, 1, 1, 2, 3])).unwrap();
        let size_max = input.pick(&[4, 8, 16, 64]);
        let stable = input.pick(&[StableBy::Dsync, StableBy::Fdatasync, StableBy::Group, StableBy::Auto]);
        let block = input.pick(&[512, 512, 4096]);
        let memory_align = if policy.direct { input.pick(&[512, 4, 4096]) } else { 1 };
        let flags = input.u8();
        let options = DiskConfig {
            cache: policy,
            readonly: flags & 7 == 7,
            queue_size: size_max,
            queues: Some(queues),
            discard: flags & 8 == 0,
            poll_us: Some(0),
            stable,
            bounce_always: flags & 0x30 == 0x30,
            ..DiskConfig::new("fuzz.img")
        };
        let alignment = Alignment {
            memory: memory_align,
            offset: if policy.direct { block } else { 512 },
            found_by: "the fuzzer",
        };
        let geometry =
            Geometry { capacity_sectors: 64, logical_block: block, physical_block: 4096, alignment };
        let image = Arc::new(Image::simulated(&options, geometry).expect("an image"));
        let room = input.pick(&[64, 1, 3]);
        let host = Arc::new(Host::new(memory.host(), &geometry, policy.direct, options.readonly, room));
        let cache = Arc::new(WriteCache::new(policy));
        let disk = |_| DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), host.engine(), stable);
        let disks = (0..queues).map(disk).collect();
        let device = BlockDevice::with_disks("vda", Arc::clone(&image), cache, disks).expect("a device");
        let notes = Arc::<Notes>::default();
        let spy = Spy { inner: Box::new(device), notes: Arc::clone(&notes), host: Some(Arc::clone(&host)) };
        let registers = behind(Box::new(spy), &memory);
        let lanes = (0..queues).map(|_| None).collect();
        let avail = vec![0; usize::from(queues)];
        Self { memory, host, notes, registers, image, queues, size_max, lanes, resets: 0, avail }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let queue = u16::try_from(input.below(usize::from(self.queues))).unwrap();
        match input.below(21) {
            0 => self.bring_up(input),
            1..=6 => {
                self.submit(input, queue);
                if input.flag() {
                    self.ring(queue);
                }
            }
            7 => self.write_descriptor(input, queue),
            8 => {
                let at = if input.once_in(4) { input.edgy() } else { u64::from(input.u16()) };
                let bytes = input.bytes(64).to_vec();
                self.memory.put(at, &bytes);
            }
            9 => self.make_available(input, queue),
            10 => self.ring(queue),
            11 | 12 => self.attack(input),
            13 => {
                let (which, decision) = (input.below(8), input.u8());
                self.grant();
                self.host.lock().release(queue.into(), which, decision);
            }
            14 => self.host.lock().decide(queue.into(), input.bytes(8)),
            15 => self.read_config(input),
            16 => {
                let value = input.pick(&[0, 1, 1, 0xff]);
                self.grant();
                self.registers.write_config(32, &[value]);
            }
            17 => {
                // So that something is there for whatever comes next.
                self.host.lock().decide(queue.into(), &[HELD; 4]);
            }
            18 => self.quiesce(),
            19 => self.storm(input, queue),
            _ => self.stop_something(input),
        }
    }

    /// The whole way to DRIVER_OK, mostly as a good driver goes it.
    fn bring_up(&mut self, input: &mut Input<'_>) {
        let odd = input.u8();
        let mut features = VERSION_1;
        for (bit, feature) in
            [FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES, MQ, F_INDIRECT, F_EVENT_IDX].into_iter().enumerate()
        {
            if odd >> bit & 1 == 0 {
                features |= feature;
            }
        }
        features &= self.offered();
        if input.once_in(16) {
            features ^= 1 << input.below(40);
        }
        self.reset();
        let mut queues = Vec::new();
        for index in 0..if features & MQ == 0 && odd & 0x80 == 0 { 1 } else { self.queues } {
            if !input.once_in(8) {
                queues.push((index, self.place(input, index)));
            }
        }
        bring_up(&mut *self.registers, features, &queues);
    }

    fn reset(&mut self) {
        self.drain();
        self.registers.recover();
        self.registers.set(Register::Status, 0);
        self.drained();
        self.look();
        assert_eq!(self.host.lock().in_flight(), 0, "R15: operations in flight after a reset");
    }

    fn offered(&self) -> u64 {
        minivmm::blk::config::offered(&self.image, self.queues)
    }

    fn place(&mut self, input: &mut Input<'_>, index: u16) -> QueueConfig {
        let base = RINGS + RING_BYTES * u64::from(index);
        let mut config = QueueConfig {
            size: u32::from(self.size_max) >> input.below(3),
            descriptors: base,
            available: base + AVAILABLE,
            used: base + USED,
        };
        match input.below(16) {
            0 => config.used = input.edgy(),
            1 => config.available = REGIONS[0].1 - input.below(0x100) as u64,
            2 => config.descriptors = REGIONS[1].0 - 16 * input.below(8) as u64,
            3 => config.used = config.descriptors,
            4 => config.size = input.u32(),
            _ => {}
        }
        self.avail[usize::from(index)] = 0;
        self.memory.put(base, &[0; 0x1000]);
        config
    }

    fn ring(&mut self, queue: u16) {
        self.grant();
        self.registers.notify(queue);
    }

    /// The same chains again and again, those in flight among them (R8), and doorbells (R17).
    fn storm(&mut self, input: &mut Input<'_>, queue: u16) {
        let (heads, rounds) = (input.bytes(4).to_vec(), input.below(24));
        for _ in 0..rounds {
            let Some(config) = self.config(queue) else { return };
            for head in &heads {
                self.put_available(config, queue, u16::from(*head) % config.size as u16);
            }
            self.ring(queue);
            self.look();
        }
    }

    /// Any access: it may reset the device, take a queue back, or start a driver.
    fn attack(&mut self, input: &mut Input<'_>) {
        self.drain();
        self.registers.attack(input);
        self.drained();
    }

    /// What is held ends, should somebody wait for it from now on.
    fn drain(&mut self) {
        self.grant();
        self.host.lock().draining = true;
    }

    fn drained(&mut self) {
        self.host.lock().draining = false;
    }

    fn read_config(&mut self, input: &mut Input<'_>) {
        let (offset, width) = (u64::from(input.u8()), input.below(9));
        let mut data = [0; 8];
        let mut again = [0; 8];
        self.registers.read_config(offset, &mut data[..width]);
        self.registers.read_config(offset, &mut again[..width]);
        assert_eq!(data, again, "configuration space reads differently");
        for (at, byte) in (offset..).zip(&data[..width]) {
            let mut one = [0];
            self.registers.read_config(at, &mut one);
            assert_eq!(one[0], *byte, "a byte of configuration space by itself, at {at}");
        }
    }

    fn stop_something(&mut self, input: &mut Input<'_>) {
        self.drain();
        match input.below(4) {
            0 => {
                self.registers.set(Register::QueueSel, input.below(4) as u64);
                self.registers.set(Register::QueueReady, 0);
            }
            1 => self.registers.transport(&mut |transport| transport.stop()),
            _ => {
                self.registers.set(Register::Status, 0);
            }
        }
        self.drained();
    }

    /// Before anything that may make the device run.
    fn grant(&mut self) {
        let parts: Vec<_> = self.lanes.iter().flatten().flat_map(Lane::parts).collect();
        let touched = self.memory.take_touched();
        for lane in self.lanes.iter_mut().flatten() {
            lane.touch(&touched);
            lane.grant(&self.memory);
            lane.look_for_wildness(&parts);
        }
        // What is wild for one queue is so for all of them, since any may write any's rings.
        if self.lanes.iter().flatten().any(|lane| lane.wild) {
            self.lanes.iter_mut().flatten().for_each(|lane| lane.wild = true);
        }
        if self.lanes.iter().flatten().count() > 1 {
            self.lanes.iter_mut().flatten().for_each(Lane::blur);
        }
    }

    /// After each step: the device is at rest again, and has done nothing that it may not.
    fn look(&mut self) {
        let postures = self.host.settle();
        if !std::mem::take(&mut self.host.lock().ran) && self.notes.is_quiet(self.resets) {
            return;
        }
        self.meet_driver();
        let lanes = &self.lanes;
        self.memory.take_changes(|changed| {
            let is_granted = lanes.iter().flatten().any(|lane| lane.wild || lane.allows(&changed));
            assert!(is_granted, "R9: {changed:#x?} was written, which nobody had granted");
        });
        let broken = self.notes.broken.load(Ordering::SeqCst);
        for (index, (lane, posture)) in self.lanes.iter_mut().zip(postures).enumerate() {
            let Some(live) = lane else { continue };
            live.collect(&self.memory, self.notes.told[index].load(Ordering::SeqCst));
            if posture == Posture::Parked {
                wait_until("a worker gives up and does not say so", || {
                    self.notes.broken.load(Ordering::SeqCst)
                });
                assert!(live.may_break || live.wild, "a queue is broken without a reason");
                // It owes nothing any more.
                *lane = None;
            }
        }
        if broken {
            let failed = self.notes.failed.load(Ordering::SeqCst);
            assert!(failed || self.lanes.iter().any(Option::is_none), "it needs a reset without a reason");
        }
    }

    /// Follows what the device was told meanwhile: a reset, queues that were taken back, a new driver.
    fn meet_driver(&mut self) {
        let resets = self.notes.resets.load(Ordering::SeqCst);
        if resets != self.resets {
            self.resets = resets;
            self.finish_lanes(|_| true);
        }
        let stopped = std::mem::take(&mut *self.notes.stopped.lock().unwrap());
        self.finish_lanes(|index| stopped.contains(&index));
        if let Some(Driver { queues, features }) = self.notes.came.lock().unwrap().take() {
            self.memory.take_touched();
            for (index, config) in queues {
                let told = self.notes.told[usize::from(index)].load(Ordering::SeqCst);
                let mut lane = Lane::new(&self.memory, config, features, told, lengths);
                // It may have run already, with what was there.
                lane.grant(&self.memory);
                self.lanes[usize::from(index)] = Some(lane);
            }
            let parts: Vec<_> = self.lanes.iter().flatten().flat_map(Lane::parts).collect();
            let overlap = (0..parts.len()).any(|one| {
                (0..one).any(|two| parts[one].start < parts[two].end && parts[two].start < parts[one].end)
            });
            for lane in self.lanes.iter_mut().flatten() {
                lane.look_for_wildness(&parts);
                lane.wild |= overlap;
            }
            if self.lanes.iter().flatten().any(|lane| lane.wild) {
                self.lanes.iter_mut().flatten().for_each(|lane| lane.wild = true);
            }
            if self.lanes.iter().flatten().count() > 1 {
                self.lanes.iter_mut().flatten().for_each(Lane::blur);
            }
        }
    }

    /// These are over: what the device wrote until then was granted, and from now on nothing is.
    fn finish_lanes(&mut self, is_over: impl Fn(u16) -> bool) {
        if !(0..self.queues).any(|index| is_over(index) && self.lanes[usize::from(index)].is_some()) {
            return;
        }
        let lanes = &self.lanes;
        self.memory.take_changes(|changed| {
            let is_granted = lanes.iter().flatten().any(|lane| lane.wild || lane.allows(&changed));
            assert!(is_granted, "R15: {changed:#x?} was written at the end, which nobody had granted");
        });
        for index in 0..self.queues {
            if is_over(index) {
                if let Some(mut lane) = self.lanes[usize::from(index)].take() {
                    let told = self.notes.told[usize::from(index)].load(Ordering::SeqCst);
                    lane.collect(&self.memory, told);
                }
                self.avail[usize::from(index)] = 0;
            }
        }
    }

    /// Everything that is in flight ends, and everything that is available is taken.
    fn quiesce(&mut self) {
        self.grant();
        self.host.lock().release_all();
        self.look();
        for queue in 0..self.queues {
            if self.lanes[usize::from(queue)].is_some() {
                self.grant();
                self.registers.transport(&mut |transport| {
                    transport.doorbells()[usize::from(queue)].write(1).unwrap();
                });
                self.look();
            }
        }
        assert_eq!(self.host.lock().in_flight(), 0, "an operation is in flight, and nobody waits for it");
        self.lanes.iter().flatten().for_each(Lane::check_complete);
    }

    /// Whatever came before: a reset works, and after it a write, a read and a serial number.
    fn work_again(&mut self) {
        self.reset();
        let config =
            QueueConfig { size: 4, descriptors: RINGS, available: RINGS + AVAILABLE, used: RINGS + USED };
        self.memory.put(RINGS, &[0; 0x1000]);
        self.avail[0] = 0;
        let came = bring_up(&mut *self.registers, VERSION_1 | FLUSH, &[(0, config)]);
        assert!(came, "a good driver does not get to DRIVER_OK");
        self.look();
        let sync_failed = self.host.lock().sync_failed;
        let write = if self.image.config().readonly {
            vec![1]
        } else if sync_failed {
            vec![0, 1]
        } else {
            vec![0]
        };
        let block = self.image.geometry().logical_block;
        let kept = self.host.lock().storage[..block as usize].to_vec();
        let content = vec![0x5a; block as usize];
        self.memory.put(DATA, &content);
        let status = self.good_request(1, (DATA, block, 0));
        assert!(write.contains(&status), "a good write ends with status {status}");
        self.memory.put(DATA, &vec![0; block as usize]);
        assert_eq!(self.good_request(0, (DATA, block, WRITE)), 0, "a good read fails");
        let read = self.memory.get(DATA, block.into()).unwrap();
        assert!(read == content || write != [0] && read == kept, "a read does not find what was written");
        assert_eq!(self.good_request(8, (DATA, 20, WRITE)), 0, "GET_ID fails");
    }

    fn good_request(&mut self, kind: u32, data: (u64, u32, u16)) -> u8 {
        let config = self.config(0).expect("a live queue");
        self.memory.put(HEADERS, &[kind.to_le_bytes(), [0; 4]].concat());
        self.memory.put(HEADERS + 8, &[0; 8]);
        self.memory.put(STATUSES, &[0xaa]);
        for (index, part) in (0..).zip([(HEADERS, 16, 0), data, (STATUSES, 1, WRITE)]) {
            self.put_descriptor(config.descriptors, index, part, index < 2, index + 1);
        }
        self.put_available(config, 0, 0);
        self.registers.interrupted();
        self.ring(0);
        self.look();
        assert!(self.registers.interrupted(), "a good driver is not interrupted");
        let lane = self.lanes[0].as_ref().expect("the queue is still whole");
        assert_eq!(lane.owed(), 0, "a good request does not come back");
        self.memory.get(STATUSES, 1).unwrap()[0]
    }
}

/// What a driver may find in the used ring for a chain (virtio 2.7.8.2): the whole data and the status,
/// or nothing that counts.
fn lengths(memory: &Memory, chain: &Chain) -> Vec<u64> {
    let Some(room) = chain.writable_bytes().checked_sub(1) else { return Vec::new() };
    let nothing = u64::from(room == 0);
    let kind = chain.first(memory, 16).map(|bytes| u32::from_le_bytes(bytes[..4].try_into().unwrap()));
    match kind {
        _ if chain.is_faulty => vec![nothing],
        Some(0) => vec![nothing, room + 1],
        Some(8) if room == 20 => vec![nothing, 21],
        Some(8) => vec![nothing, 20],
        _ => vec![nothing],
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed().as_secs() < 20, "{what}");
        std::thread::yield_now();
    }
}
