//! A driver of a console for tests: every queue of a device, rings byte by byte.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use minivmm::bus::{BusDevice, Outcome};
use minivmm::console::stream::{Sink, Source};
use minivmm::console::window::{Window, WindowSize};
use minivmm::console::{CONTROL_RX, CONTROL_TX, ConsoleDevice, PortConfig, rx_queue, tx_queue};
use minivmm::mem::{self, Ram};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::desc::{self, Desc};
pub use crate::driver::{INDIRECT, NEXT, WRITE};
use crate::over_pci::{self, Behind};

/// VIRTIO_CONSOLE_F_MULTIPORT: more than one port, and control messages.
pub const MULTIPORT: u64 = 1 << 1;

/// Bytes of the guest's RAM, from address 0.
pub const RAM_BYTES: u64 = 16 << 20;
/// Each queue has so much of RAM for its rings, at its index.
const RINGS: u64 = 0x10_0000;
const RING_STRIDE: u64 = 0x3000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// And so much for its buffers, one a descriptor.
pub const BUFFERS: u64 = 0x20_0000;
const QUEUE_BUFFERS: u64 = 0x8_0000;
const BUFFER: u64 = 0x8000;

const SIZE: u16 = 16;
const PATIENCE: Duration = Duration::from_secs(10);

/// A console behind its transport, and the driver's side of all its queues.
pub struct ConsoleRig {
    ram: Ram,
    mmio: Behind,
    _irq: EventFd,
    queues: u16,
    avail: Vec<u16>,
    seen: Vec<u16>,
}

impl ConsoleRig {
    /// Makes a device with these ports beside port 0.
    pub fn new(ports: Vec<PortConfig>) -> Self {
        let queues = u16::try_from(4 + 2 * ports.len()).unwrap();
        Self::of(ConsoleDevice::new(ports).unwrap(), queues)
    }

    /// A terminal's device, which has port 0 alone.
    pub fn terminal(source: Source, sink: Sink, size: WindowSize) -> (Self, Arc<Window>) {
        let (device, window) = ConsoleDevice::terminal(source, sink, size).unwrap();
        (Self::of(device, 2), window)
    }

    fn of(device: ConsoleDevice, queues: u16) -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = over_pci::transport(Box::new(device), ram.clone(), irq.try_clone().unwrap());
        let none = vec![0; usize::from(queues)];
        Self { ram, mmio, _irq: irq, queues, avail: none.clone(), seen: none }
    }

    /// Reads a register of virtio-mmio.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register of virtio-mmio.
    pub fn write(&mut self, offset: u64, value: u32) {
        assert_eq!(self.mmio.write(offset, &value.to_le_bytes()), Outcome::Continue);
    }

    /// Reads four bytes of the configuration space.
    pub fn config32(&mut self, offset: u64) -> u32 {
        self.read(0x100 + offset)
    }

    /// From reset to DRIVER_OK, with all queues.
    pub fn start(&mut self, features: u64) {
        self.write(0x070, 0);
        for status in [1, 3] {
            self.write(0x070, status);
        }
        for (sel, half) in [(0, features), (1, 1)] {
            self.write(0x024, sel);
            self.write(0x020, u32::try_from(half).unwrap());
        }
        self.write(0x070, 11);
        self.avail.fill(0);
        self.seen.fill(0);
        for queue in 0..self.queues {
            let rings = rings(queue);
            self.poke(rings, &[0; 0x3000]);
            self.write(0x030, u32::from(queue));
            self.write(0x038, u32::from(SIZE));
            for (offset, addr) in [(0x080, rings), (0x090, rings + AVAIL), (0x0a0, rings + USED)] {
                self.write(offset, u32::try_from(addr).unwrap());
                self.write(offset + 4, 0);
            }
            self.write(0x044, 1);
            assert_eq!(self.read(0x044), 1);
        }
        self.write(0x070, 15);
        assert_eq!(self.read(0x070), 15);
    }

    /// What Linux does until a program has each of its ports open.
    pub fn hello(&mut self, ports: u32) {
        self.offer(CONTROL_RX, SIZE, 64);
        self.say(0, 0, 1);
        for _ in 0..ports {
            self.hear();
        }
        for id in 1..=ports {
            self.say(id, 3, 1);
            self.hear();
            self.hear();
            self.say(id, 6, 1);
        }
        self.offer(CONTROL_RX, 3, 64);
    }

    /// Writes 0 to QueueReady.
    pub fn stop_queue(&mut self, queue: u16) {
        self.write(0x030, u32::from(queue));
        self.write(0x044, 0);
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        mem::write_bytes(&self.ram, addr, bytes).unwrap();
    }

    fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        mem::read_bytes(&self.ram, addr, &mut bytes).unwrap();
        bytes
    }

    fn peek16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.peek(addr, 2).try_into().unwrap())
    }

    /// Writes a descriptor into the queue's table.
    pub fn put_desc(&self, queue: u16, index: u16, desc: Desc) {
        self.poke(rings(queue) + 16 * u64::from(index), &desc::bytes(desc));
    }

    /// Makes a chain available, without the doorbell.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let avail = &mut self.avail[usize::from(queue)];
        let at = rings(queue) + AVAIL + 4 + 2 * u64::from(*avail % SIZE);
        *avail = avail.wrapping_add(1);
        let idx = *avail;
        self.poke(at, &head.to_le_bytes());
        self.set_avail_idx(queue, idx);
    }

    /// Publishes this index of the available ring.
    pub fn set_avail_idx(&mut self, queue: u16, idx: u16) {
        fence(Ordering::SeqCst);
        self.poke(rings(queue) + AVAIL + 2, &idx.to_le_bytes());
    }

    /// Rings the queue's doorbell.
    pub fn ring(&mut self, queue: u16) {
        self.write(0x050, u32::from(queue));
    }

    /// How many chains of a queue the device has returned since the start.
    pub fn used(&self, queue: u16) -> u16 {
        self.peek16(rings(queue) + USED + 2)
    }

    /// Waits for the next returned chain: head and length.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let begin = Instant::now();
        let seen = self.seen[usize::from(queue)];
        while self.used(queue) == seen {
            assert!(begin.elapsed() < PATIENCE, "queue {queue}: nothing came back");
            std::thread::yield_now();
        }
        fence(Ordering::SeqCst);
        let at = rings(queue) + USED + 4 + 8 * u64::from(seen % SIZE);
        self.seen[usize::from(queue)] = seen.wrapping_add(1);
        let entry = self.peek(at, 8);
        (u16::from_le_bytes([entry[0], entry[1]]), u32::from_le_bytes(entry[4..].try_into().unwrap()))
    }

    /// Waits until the device has returned nothing for a while: how many it has.
    pub fn settled(&mut self, queue: u16) -> usize {
        let mut last = (self.used(queue), Instant::now());
        while last.1.elapsed() < Duration::from_millis(200) {
            let now = self.used(queue);
            if now != last.0 {
                last = (now, Instant::now());
            }
            std::thread::yield_now();
        }
        usize::from(last.0)
    }

    fn next_slot(&self, queue: u16) -> u16 {
        self.avail[usize::from(queue)] % SIZE
    }

    /// Gives the device a chain of these parts, and waits for it to come back.
    pub fn submit(&mut self, queue: u16, parts: &[(u64, u32, u16)]) -> u32 {
        // What is held of this queue comes back by itself only at reset.
        for (index, &(addr, len, flags)) in (0..).zip(parts) {
            let next = if usize::from(index) + 1 == parts.len() { 0 } else { NEXT };
            self.put_desc(queue, index, (addr, len, flags | next, index + 1));
        }
        self.make_available(queue, 0);
        self.ring(queue);
        self.wait_used(queue).1
    }

    /// Output for a port, not waited for.
    pub fn post(&mut self, id: u16, bytes: &[u8]) -> u16 {
        let queue = tx_queue(id);
        let slot = self.next_slot(queue);
        let addr = buffer(queue, slot);
        self.poke(addr, bytes);
        self.put_desc(queue, slot, (addr, u32::try_from(bytes.len()).unwrap(), 0, 0));
        self.make_available(queue, slot);
        self.ring(queue);
        slot
    }

    /// Output for a port, waited for; the used length.
    pub fn send(&mut self, id: u16, bytes: &[u8]) -> u32 {
        self.post(id, bytes);
        self.wait_used(tx_queue(id)).1
    }

    /// Gives the device buffers to fill.
    pub fn offer(&mut self, queue: u16, count: u16, len: u32) {
        for _ in 0..count {
            let slot = self.next_slot(queue);
            self.put_desc(queue, slot, (buffer(queue, slot), len, WRITE, 0));
            self.make_available(queue, slot);
        }
        self.ring(queue);
    }

    /// One buffer's worth of input.
    pub fn receive(&mut self, id: u16, len: u32) -> Vec<u8> {
        let queue = rx_queue(id);
        self.offer(queue, 1, len);
        let (head, len) = self.wait_used(queue);
        self.peek(buffer(queue, head), len as usize)
    }

    /// A control message.
    pub fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        let slot = self.next_slot(CONTROL_TX);
        let addr = buffer(CONTROL_TX, slot);
        self.poke(addr, &bytes);
        self.put_desc(CONTROL_TX, slot, (addr, 8, 0, 0));
        self.make_available(CONTROL_TX, slot);
        self.ring(CONTROL_TX);
        assert_eq!(self.wait_used(CONTROL_TX).1, 0);
    }

    /// The device's next control message.
    pub fn hear(&mut self) -> (u32, u16, u16, String) {
        let (head, len) = self.wait_used(CONTROL_RX);
        let bytes = self.peek(buffer(CONTROL_RX, head), len as usize);
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let rest = String::from_utf8(bytes[8..].to_vec()).unwrap();
        (u32::from_le_bytes(bytes[..4].try_into().unwrap()), number(4), number(6), rest)
    }

    /// Returns whether the status has DEVICE_NEEDS_RESET.
    pub fn needs_reset(&mut self) -> bool {
        self.read(0x070) & 64 != 0
    }

    /// Waits until the device asks for a reset; `what` has made it do so.
    pub fn wait_needs_reset(&mut self, what: &str) {
        let begin = Instant::now();
        while !self.needs_reset() {
            assert!(begin.elapsed() < PATIENCE, "{what}: the device goes on");
            std::thread::yield_now();
        }
    }
}

fn rings(queue: u16) -> u64 {
    RINGS + RING_STRIDE * u64::from(queue)
}

fn buffer(queue: u16, slot: u16) -> u64 {
    BUFFERS + QUEUE_BUFFERS * u64::from(queue) + BUFFER * u64::from(slot)
}
