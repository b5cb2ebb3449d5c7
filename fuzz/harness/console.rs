//! The console: its queues, control messages and flow control, on pipes that the input fills and
//! empties. The device's own thread is left out: its turns are made here, one after another.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use minivmm::console::live::Live;
use minivmm::console::stream::{Sink, Source};
use minivmm::console::{ConsoleDevice, PortConfig};
use minivmm::ratelimit::RateLimit;
use minivmm::virtio::mmio::MmioTransport;
use minivmm::virtio::queue::QueueConfig;
use minivmm::virtio::{ActivateError, Activation, VirtioDevice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use super::lane::Lane;
use super::logs;
use super::memory::{Memory, REGIONS};
use super::registers::{Mmio, Register, Registers, bring_up};
use super::spy::{Driver, Notes, Spy};
use super::walk::{Chain, F_EVENT_IDX, F_INDIRECT, INDIRECT, NEXT, WRITE};

const VERSION_1: u64 = 1 << 32;
const MULTIPORT: u64 = 1 << 1;
const STEPS_MAX: usize = 160;
/// Two ports: queues 0 and 1 are nobody's, 2 and 3 for control, then two a port.
const QUEUES: u16 = 8;
const SIZE: u16 = 8;
/// Turns after which a device that still has something to do at once is a busy loop.
const TURNS_MAX: usize = 64;

const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x400;
const BUFFERS: u64 = 0x8000;

/// What the device's thread would hold.
struct Inside {
    ports: Vec<PortConfig>,
    live: Option<Live>,
    errors: RateLimit,
}

impl Inside {
    fn turn(&mut self) -> bool {
        let Some(live) = &mut self.live else { return false };
        live.quieten();
        let _ = live.waits_for(&self.ports);
        match live.turn(&mut self.ports, &mut self.errors) {
            Ok(more) => more,
            Err(error) => {
                minivmm::warn_limited!(self.errors, "console: {error}");
                live.interrupt().needs_reset();
                self.live = None;
                false
            }
        }
    }
}

/// A console whose thread stays parked.
struct Inline {
    device: ConsoleDevice,
    inside: Arc<Mutex<Inside>>,
}

impl VirtioDevice for Inline {
    fn device_id(&self) -> u32 {
        self.device.device_id()
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.device.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    fn negotiated(&mut self, features: u64) {
        self.device.negotiated(features);
    }

    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError> {
        let mut inside = self.inside.lock().unwrap();
        inside.live = Some(Live::new(parts, &inside.ports, None));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) {
        if let Some(live) = &mut self.inside.lock().unwrap().live {
            live.stop_queue(index);
        }
    }

    fn reset(&mut self) {
        self.inside.lock().unwrap().live = None;
    }
}

/// Our ends of a port's pipes.
struct Ends {
    input: Option<File>,
    output: Option<File>,
}

fn pipe() -> (File, File) {
    let mut fds = [0; 2];
    // SAFETY: room for the two descriptors that pipe2 makes.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) }, 0);
    // SAFETY: just made, and owned by nobody else.
    let [read, write] = fds.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    (read, write)
}

struct Machine {
    memory: Memory,
    notes: Arc<Notes>,
    registers: Mmio,
    inside: Arc<Mutex<Inside>>,
    lanes: Vec<Option<Lane>>,
    avail: [u16; QUEUES as usize],
    ends: Vec<Ends>,
    resets: u64,
    /// Bytes that were put into the pipes.
    given: u64,
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    logs::begin();
    // As Rust's own `main` has it, which libFuzzer's is not: a reader that went away is an error.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let mut machine = Machine::new(&mut input);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        machine.step(&mut input);
        machine.turns();
    }
    machine.work_again();
    logs::check();
}

impl Machine {
    fn new(input: &mut Input<'_>) -> Self {
        let memory = Memory::new();
        let shape = input.u8();
        let mut ends = Vec::new();
        let mut ports = Vec::new();
        for (name, bits) in [("one", shape), ("two", shape >> 3)] {
            let (input_read, input_write) = pipe();
            let (output_read, output_write) = pipe();
            ports.push(PortConfig {
                name,
                source: (bits & 1 == 0).then(|| Source::new(input_read.as_fd()).unwrap()),
                sink: (bits & 2 == 0).then(|| Sink::new(output_write.as_fd()).unwrap()),
                after_others: bits & 4 != 0,
            });
            ends.push(Ends { input: Some(input_write), output: Some(output_read) });
        }
        let inside = Inside { ports, live: None, errors: RateLimit::for_guest_errors("console") };
        let inside = Arc::new(Mutex::new(inside));
        let bare = |name| PortConfig { name, source: None, sink: None, after_others: false };
        let device = ConsoleDevice::new(vec![bare("one"), bare("two")]).expect("a device");
        let inline = Inline { device, inside: Arc::clone(&inside) };
        let notes = Arc::<Notes>::default();
        let spy = Spy { inner: Box::new(inline), notes: Arc::clone(&notes), host: None };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let registers = Mmio(MmioTransport::new(Box::new(spy), memory.ram.clone(), line).unwrap());
        let lanes = (0..QUEUES).map(|_| None).collect();
        Self {
            memory,
            notes,
            registers,
            inside,
            lanes,
            avail: [0; QUEUES as usize],
            ends,
            resets: 0,
            given: 0,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.u8()) % QUEUES;
        match input.below(16) {
            0 => {
                let wanted = [MULTIPORT, F_INDIRECT, F_EVENT_IDX];
                let bits = input.u8();
                let features =
                    wanted.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 0).map(|(_, f)| f);
                let features = VERSION_1 | features.sum::<u64>();
                self.start(features, |queue| bits & 0x80 == 0 || queue % 3 != 0);
            }
            1..=3 => self.offer(input, queue),
            4..=6 => self.say(input),
            7 => {
                let at = u64::from(input.u16());
                let bytes = input.bytes(64).to_vec();
                self.memory.put(at, &bytes);
            }
            8 => {
                let Some(lane) = &self.lanes[usize::from(queue)] else { return };
                let at = lane.config.available + input.pick(&[0, 2, 2, 4 + 2 * u64::from(SIZE)]);
                let value = if input.flag() { self.avail[usize::from(queue)] } else { input.u16() };
                self.memory.put(at, &value.to_le_bytes());
            }
            9 => self.registers.attack(input),
            10 => {
                let bytes = input.bytes(255).to_vec();
                let end = &mut self.ends[input.below(2)].input;
                if let Some(end) = end
                    && let Ok(count) = end.write(&bytes)
                {
                    self.given += count as u64;
                }
            }
            11 => {
                let mut bytes = vec![0; 16 * input.below(256)];
                if let Some(end) = &mut self.ends[input.below(2)].output {
                    let _ = end.read(&mut bytes);
                }
            }
            12 if input.once_in(4) => self.ends[input.below(2)].input = None,
            12 if input.once_in(4) => self.ends[input.below(2)].output = None,
            13 => {
                self.registers.set(Register::QueueSel, queue.into());
                self.registers.set(Register::QueueReady, 0);
            }
            14 => self.registers.set(Register::Status, 0),
            _ => self.registers.notify(queue),
        }
    }

    fn start(&mut self, features: u64, is_wanted: impl Fn(u16) -> bool) -> bool {
        self.registers.set(Register::Status, 0);
        self.turns();
        let queues: Vec<_> =
            (0..QUEUES).filter(|queue| is_wanted(*queue)).map(|queue| (queue, place(queue))).collect();
        self.memory.put(RINGS, &vec![0; usize::from(QUEUES) * 0x400]);
        bring_up(&mut self.registers, features, &queues)
    }

    /// A buffer, in one of several shapes.
    fn offer(&mut self, input: &mut Input<'_>, queue: u16) {
        let addr = match input.below(8) {
            0 => input.edgy(),
            1 => REGIONS[0].1 - 16,
            2 => u64::from(input.u16()),
            _ => BUFFERS + 0x400 * u64::from(input.u8() & 31),
        };
        let len = input.pick(&[0, 1, 7, 8, 9, 12, 64, 512, 4096, 0x8000, u32::MAX]);
        let writable = if input.once_in(8) { queue & 1 == 1 } else { queue & 1 == 0 };
        let flags = if writable { WRITE } else { 0 };
        let pieces = 1 + input.below(3);
        let mut parts = Vec::new();
        for piece in 0..pieces as u64 {
            parts.push((addr.wrapping_add(piece * u64::from(len)), len, flags));
        }
        if input.once_in(8) {
            parts.push((BUFFERS, 16, flags ^ WRITE));
        }
        self.put(queue, u16::from(input.u8()) % SIZE, &parts, input.once_in(4));
    }

    /// A control message.
    fn say(&mut self, input: &mut Input<'_>) {
        let id = input.pick(&[0_u32, 1, 1, 2, 2, 3, u32::MAX]);
        let event = input.pick(&[0_u16, 0, 3, 3, 6, 6, 1, 99]);
        let value = input.pick(&[1_u16, 1, 1, 0, 2]);
        let slot = u16::from(input.u8()) % SIZE;
        let at = BUFFERS + 0x7000 + 16 * u64::from(slot);
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        self.memory.put(at, &bytes);
        self.put(3, slot, &[(at, 8, 0)], false);
        self.registers.notify(3);
    }

    fn put(&mut self, queue: u16, head: u16, parts: &[(u64, u32, u16)], indirect: bool) {
        let config = place(queue);
        let table = if indirect { BUFFERS + 0x7800 } else { config.descriptors };
        for (index, &(addr, len, flags)) in (0..).zip(parts) {
            let goes_on = usize::from(index) + 1 < parts.len();
            let at = if indirect { index } else { (head + index) % SIZE };
            let next = if indirect { index + 1 } else { (head + index + 1) % SIZE };
            self.put_descriptor(table, at, (addr, len, flags | if goes_on { NEXT } else { 0 }), next);
        }
        if indirect {
            let bytes = 16 * u32::try_from(parts.len()).unwrap();
            self.put_descriptor(config.descriptors, head, (table, bytes, INDIRECT), 0);
        }
        let avail = &mut self.avail[usize::from(queue)];
        let at = config.available + 4 + 2 * u64::from(*avail % SIZE);
        *avail = avail.wrapping_add(1);
        let idx = *avail;
        self.memory.put(at, &head.to_le_bytes());
        self.memory.put(config.available + 2, &idx.to_le_bytes());
    }

    fn put_descriptor(&mut self, table: u64, index: u16, (addr, len, flags): (u64, u32, u16), next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.put(table + 16 * u64::from(index), &bytes);
    }

    /// The device runs until it has nothing to do at once, and is looked at.
    fn turns(&mut self) {
        self.meet_driver();
        let mut turns = 0;
        loop {
            self.grant();
            let more = self.inside.lock().unwrap().turn();
            self.look();
            turns += 1;
            if !more {
                return;
            }
            assert!(turns < TURNS_MAX + 4096, "a busy loop");
        }
    }

    fn grant(&mut self) {
        let parts: Vec<_> = self.lanes.iter().flatten().flat_map(Lane::parts).collect();
        let touched = self.memory.take_touched();
        for lane in self.lanes.iter_mut().flatten() {
            lane.touch(&touched);
            lane.grant(&self.memory);
            lane.look_for_wildness(&parts);
            lane.blur();
        }
        if self.lanes.iter().flatten().any(|lane| lane.wild) {
            self.lanes.iter_mut().flatten().for_each(|lane| lane.wild = true);
        }
    }

    fn look(&mut self) {
        let lanes = &self.lanes;
        self.memory.take_changes(|changed| {
            let is_granted = lanes.iter().flatten().any(|lane| lane.wild || lane.allows(&changed));
            assert!(is_granted, "R9: {changed:#x?} was written, which nobody had granted");
        });
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            if let Some(lane) = lane {
                lane.collect(&self.memory, self.notes.told[index].load(Ordering::SeqCst));
            }
        }
        if self.notes.broken.load(Ordering::SeqCst) {
            let has_reason = self.lanes.iter().flatten().any(|lane| lane.may_break || lane.wild);
            assert!(has_reason || self.lanes.iter().all(Option::is_none), "broken without a reason");
            self.lanes.iter_mut().for_each(|lane| *lane = None);
        }
    }

    fn meet_driver(&mut self) {
        let resets = self.notes.resets.load(Ordering::SeqCst);
        if resets != self.resets {
            self.resets = resets;
            self.lanes.iter_mut().for_each(|lane| *lane = None);
            self.avail = [0; QUEUES as usize];
        }
        for index in std::mem::take(&mut *self.notes.stopped.lock().unwrap()) {
            self.lanes[usize::from(index)] = None;
        }
        if let Some(Driver { queues, features }) = self.notes.came.lock().unwrap().take() {
            self.memory.take_touched();
            for (index, config) in queues {
                let told = self.notes.told[usize::from(index)].load(Ordering::SeqCst);
                let lane = Lane::new(&self.memory, config, features, told, lengths);
                self.lanes[usize::from(index)] = Some(lane);
            }
            let parts: Vec<_> = self.lanes.iter().flatten().flat_map(Lane::parts).collect();
            let overlap = (0..parts.len()).any(|one| {
                (0..one).any(|two| parts[one].start < parts[two].end && parts[two].start < parts[one].end)
            });
            self.lanes.iter_mut().flatten().for_each(|lane| lane.wild |= overlap);
        }
    }

    /// A driver that behaves finds both ports, and what it says comes out.
    fn work_again(&mut self) {
        assert!(self.start(VERSION_1 | MULTIPORT, |_| true), "a good driver does not get to DRIVER_OK");
        self.turns();
        for slot in 0..6 {
            let at = BUFFERS + 64 * u64::from(slot);
            self.put(2, slot, &[(at, 64, WRITE)], false);
        }
        for (slot, message) in (0..).zip([[0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 3, 0, 1, 0]]) {
            let at = BUFFERS + 0x400 + 16 * u64::from(slot);
            self.memory.put(at, &message);
            self.put(3, slot, &[(at, 8, 0)], false);
        }
        self.turns();
        let told = self.memory.u16(place(2).used + 2).unwrap();
        assert_eq!(told, 4, "PORT_ADD twice, PORT_OPEN, PORT_NAME");
        let mut heard = Vec::new();
        for slot in 0..told {
            let message = self.memory.get(BUFFERS + 64 * u64::from(slot), 8).unwrap();
            heard.push((message[0], message[4]));
        }
        heard.sort_unstable();
        assert_eq!(heard, [(1, 1), (1, 6), (1, 7), (2, 1)]);
        let owed: usize = self.lanes.iter().flatten().map(Lane::owed).sum();
        assert_eq!(owed, 2, "only the two buffers that are left");
    }
}

fn place(queue: u16) -> QueueConfig {
    let base = RINGS + RING_BYTES * u64::from(queue);
    QueueConfig { size: SIZE.into(), descriptors: base, available: base + 0x100, used: base + 0x200 }
}

/// A console says how much it has written; more than there is room for it never is.
fn lengths(_: &Memory, chain: &Chain) -> Vec<u64> {
    vec![0, chain.writable_bytes()]
}
