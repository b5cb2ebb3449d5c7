//! virtio-pci without a guest: capabilities, registers of every width, vectors, the ISR status, the
//! window in configuration space, both ways to it, and a driver that means harm (virtio 4.1).
//!
//! What the register machine itself does is tried by the other suites, over this transport too
//! (`MINIVMM_TRANSPORT=pci`).

use std::sync::{Arc, Mutex};

use minivmm::blk::BlockDevice;
use minivmm::bus::{Bus, BusDevice, SharedDevice};
use minivmm::mem::{self, Ram};
use minivmm::pci::root::{ConfigPorts, Ecam, PciFunction, PciRoot};
use minivmm::virtio::Transport;
use minivmm::virtio::pci::{BAR_BYTES, NOTIFY, PciTransport};
use minivmm_testkit::driver::{
    ACKNOWLEDGE, AVAIL, DESC, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, NEEDS_RESET, RAM_BYTES, USED,
};
use minivmm_testkit::images::TestImage;
use minivmm_testkit::over_pci::{
    CONFIG_VECTOR, DEVICE, ISR, PENDING, PLACE, QUEUE_SELECT, QUEUE_VECTOR, STATUS, Sent, TABLE, WINDOW,
    bus_of, capability,
};
use proptest::prelude::*;

const NO_VECTOR: u64 = 0xffff;
const READY: u64 = (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK) as u64;

struct Function {
    pci: PciTransport,
    ram: Ram,
    sent: Sent,
    _image: TestImage,
}

impl Function {
    fn new() -> Self {
        let image = TestImage::new(1 << 20);
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let device = BlockDevice::with_ram("vda", image.open("none"), Some(&ram)).unwrap();
        let sent = Sent::default();
        let pci = PciTransport::new(Box::new(device), ram.clone(), PLACE, Box::new(sent.clone())).unwrap();
        Self { pci, ram, sent, _image: image }
    }

    fn get(&mut self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn put(&mut self, offset: u64, width: usize, value: u64) {
        self.pci.write(offset, &value.to_le_bytes()[..width]);
    }

    fn config(&mut self, offset: usize, width: usize) -> u32 {
        let mut data = [0; 4];
        self.pci.read_config(offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn set_config(&mut self, offset: usize, width: usize, value: u32) {
        self.pci.write_config(offset, &value.to_le_bytes()[..width]);
    }

    /// Messages in use, every vector unmasked.
    fn enable_messages(&mut self) {
        let at = capability(&mut self.pci, 0x11);
        self.set_config(at + 2, 2, 0x8000);
        for vector in 0..2 {
            self.put(TABLE + 16 * vector + 12, 4, 0);
        }
    }

    /// From reset to DRIVER_OK, with queue 0 mapped to vector 1 and changes to vector 0.
    fn start(&mut self) {
        self.put(STATUS, 1, 0);
        for ring in [AVAIL, USED] {
            mem::write_bytes(&self.ram, ring, &[0; 64]).unwrap();
        }
        self.put(CONFIG_VECTOR, 2, 0);
        self.put(QUEUE_VECTOR, 2, 1);
        self.put(STATUS, 1, u64::from(ACKNOWLEDGE | DRIVER));
        self.put(0x08, 4, 1);
        self.put(0x0c, 4, F_VERSION_1 >> 32);
        self.put(STATUS, 1, u64::from(ACKNOWLEDGE | DRIVER | FEATURES_OK));
        self.put(0x18, 2, 16);
        // Halves, and 64 bits at once.
        self.put(0x20, 4, DESC);
        self.put(0x24, 4, 0);
        self.put(0x28, 8, AVAIL);
        self.put(0x30, 8, USED);
        self.put(0x1c, 2, 1);
        self.put(STATUS, 1, READY);
        assert_eq!((self.get(STATUS, 1), self.get(0x1c, 2)), (READY, 1));
    }

    /// Breaks the ring and waits until the device has said so.
    fn break_ring(&mut self) {
        mem::write_bytes(&self.ram, AVAIL + 2, &100_u16.to_le_bytes()).unwrap();
        self.put(NOTIFY, 2, 0);
        while self.get(STATUS, 1) & u64::from(NEEDS_RESET) == 0 {
            std::thread::yield_now();
        }
    }

    fn sent(&self) -> Vec<u16> {
        self.sent.take().into_iter().map(|(vector, _)| vector).collect()
    }

    /// Waits for so many messages.
    fn wait_sent(&self, count: usize) -> Vec<u16> {
        while self.sent.count() < count {
            std::thread::yield_now();
        }
        self.sent()
    }
}

/// Shows P1.
#[test]
fn it_is_a_modern_block_device_without_an_interrupt_pin() {
    let mut function = Function::new();
    assert_eq!(function.config(0, 4), 0x1042_1af4);
    assert!(function.config(8, 1) >= 1, "revision (virtio 4.1.2.1)");
    assert!(function.config(0x2e, 2) >= 0x40, "subsystem (virtio 4.1.2.1)");
    assert_eq!(function.config(0x3d, 1), 0);
    assert_eq!(function.config(0x10, 4), PLACE as u32 | 4);
}

/// P2, P5: one of each kind; offsets aligned; every part inside the region and apart from the others.
#[test]
fn every_part_of_the_region_has_its_capability() {
    let mut function = Function::new();
    let mut parts = Vec::new();
    let mut at = function.config(0x34, 1) as usize;
    let mut msix = None;
    while at != 0 {
        match function.config(at, 1) {
            9 => {
                let (len, kind) = (function.config(at + 2, 1), function.config(at + 3, 1));
                assert_eq!(function.config(at + 4, 1), 0, "BAR 0");
                assert_eq!(len, if matches!(kind, 2 | 5) { 20 } else { 16 });
                let (offset, length) = (function.config(at + 8, 4), function.config(at + 12, 4));
                if kind == 2 {
                    let multiplier = function.config(at + 16, 4);
                    assert!(multiplier.is_power_of_two() && length >= multiplier);
                }
                assert!(kind == 3 || offset % 4 == 0);
                parts.push((kind, u64::from(offset), u64::from(length)));
            }
            0x11 => {
                msix =
                    Some((function.config(at + 2, 2), function.config(at + 4, 4), function.config(at + 8, 4)))
            }
            other => panic!("capability {other:#x}"),
        }
        at = function.config(at + 1, 1) as usize;
    }
    assert_eq!(parts.iter().map(|part| part.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let (control, table, pending) = msix.unwrap();
    assert_eq!(control, 1, "two vectors, and not in use");
    parts.retain(|part| part.0 != 5);
    parts.extend([(10, u64::from(table), 32), (11, u64::from(pending), 8)]);
    parts.sort_by_key(|part| part.1);
    for pair in parts.windows(2) {
        assert!(pair[0].1 + pair[0].2 <= pair[1].1, "{pair:x?}");
    }
    let last = parts.last().unwrap();
    assert!(last.1 + last.2 <= BAR_BYTES);
}

#[test]
fn queues_that_there_are_not_have_no_registers() {
    let mut function = Function::new();
    assert_eq!(function.get(0x12, 2), 1, "one queue");
    for sel in [1, 2, 0x8000, 0xffff] {
        function.put(QUEUE_SELECT, 2, sel);
        let absent = [(0x18, 0), (QUEUE_VECTOR, NO_VECTOR), (0x1c, 0), (0x1e, 0)];
        for (offset, expected) in absent {
            assert_eq!(function.get(offset, 2), expected, "queue {sel}, {offset:#x}");
            function.put(offset, 2, 1);
            assert_eq!(function.get(offset, 2), expected, "queue {sel}, {offset:#x}");
        }
    }
}

/// P4: a queue is not taken back by writing 0, and what is enabled does not change any more.
#[test]
fn an_enabled_queue_stays_as_it_is() {
    let mut function = Function::new();
    function.start();
    function.put(0x1c, 2, 0);
    function.put(0x18, 2, 4);
    function.put(0x20, 8, 0);
    assert_eq!((function.get(0x1c, 2), function.get(0x18, 2), function.get(0x20, 8)), (1, 16, DESC));
    function.put(STATUS, 1, 0);
    assert_eq!((function.get(0x1c, 2), function.get(0x18, 2), function.get(STATUS, 1)), (0, 256, 0));
}

/// Shows P7.
#[test]
fn any_event_is_mapped_to_any_vector_and_unmapped_by_reset() {
    let mut function = Function::new();
    function.enable_messages();
    assert_eq!((function.get(CONFIG_VECTOR, 2), function.get(QUEUE_VECTOR, 2)), (NO_VECTOR, NO_VECTOR));
    for (vector, read) in [(0, 0), (1, 1), (2, NO_VECTOR), (1, 1), (NO_VECTOR, NO_VECTOR), (0x100, NO_VECTOR)]
    {
        for register in [CONFIG_VECTOR, QUEUE_VECTOR] {
            function.put(register, 2, vector);
            assert_eq!(function.get(register, 2), read);
        }
    }
    function.start();
    function.put(CONFIG_VECTOR, 2, 1);
    function.break_ring();
    assert_eq!(function.wait_sent(1), [1], "the change, at the vector that it was mapped to");
    function.start();
    function.put(CONFIG_VECTOR, 2, NO_VECTOR);
    function.break_ring();
    assert!(function.sent().is_empty(), "no vector, no message");
    function.put(STATUS, 1, 0);
    assert_eq!((function.get(CONFIG_VECTOR, 2), function.get(QUEUE_VECTOR, 2)), (NO_VECTOR, NO_VECTOR));
}

/// A read of sector 0, and its end seen in the used ring.
fn read_sector(function: &mut Function, turn: u16) {
    let put = |at: u64, bytes: &[u8]| mem::write_bytes(&function.ram, at, bytes).unwrap();
    put(0x5_0000, &[0; 16]);
    let chain = [(0x5_0000, 16, 0), (0x10_0000, 512, 2), (0x6_0000, 1, 2)];
    put(DESC, &minivmm_testkit::desc::chain(&chain));
    put(AVAIL + 4 + 2 * u64::from(turn), &0_u16.to_le_bytes());
    put(AVAIL + 2, &(turn + 1).to_le_bytes());
    function.put(NOTIFY, 2, 0);
    let mut idx = [0; 2];
    while u16::from_le_bytes(idx) != turn + 1 {
        mem::read_bytes(&function.ram, USED + 2, &mut idx).unwrap();
    }
}

/// P6: without messages the queue's bit is set and nothing is sent; with them only a change sets one.
#[test]
fn the_isr_status_tells_what_messages_do_not_and_is_cleared_by_reading() {
    let mut function = Function::new();
    function.start();
    read_sector(&mut function, 0);
    while function.get(ISR, 1) != 1 {
        std::thread::yield_now();
    }
    assert_eq!(function.get(ISR, 1), 0);
    function.enable_messages();
    read_sector(&mut function, 1);
    assert_eq!(function.wait_sent(1), [1]);
    assert_eq!(function.get(ISR, 1), 0);
    function.break_ring();
    assert_eq!(function.wait_sent(1), [0]);
    assert_eq!((function.get(ISR, 1), function.get(ISR, 1)), (2, 0));
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked_or_the_device_reset() {
    let mut function = Function::new();
    function.enable_messages();
    function.start();
    function.put(TABLE + 16 + 12, 4, 1);
    read_sector(&mut function, 0);
    while function.get(PENDING, 8) != 2 {
        std::thread::yield_now();
    }
    assert!(function.sent().is_empty());
    function.put(TABLE + 16 + 12, 4, 0);
    assert_eq!((function.sent(), function.get(PENDING, 8)), (vec![1], 0));
    function.put(TABLE + 16 + 12, 4, 1);
    read_sector(&mut function, 1);
    while function.get(PENDING, 8) != 2 {
        std::thread::yield_now();
    }
    function.put(STATUS, 1, 0);
    function.put(TABLE + 16 + 12, 4, 0);
    assert!(function.sent().is_empty(), "no notification after a reset (virtio 2.4.1)");
}

/// Shows P8.
#[test]
fn the_window_makes_the_access_that_it_describes_and_no_other() {
    let mut function = Function::new();
    let mut window = function.config(0x34, 1) as usize;
    while function.config(window, 1) != 9 || function.config(window + 3, 1) != 5 {
        window = function.config(window + 1, 1) as usize;
    }
    let mut at = |bar: u32, offset: u32, length: u32, value: Option<u32>| {
        function.set_config(window + 4, 1, bar);
        function.set_config(window + 8, 4, offset);
        function.set_config(window + 12, 4, length);
        match value {
            Some(value) => function.set_config(window + 16, 4, value),
            None => function.set_config(window + 8, 4, offset),
        }
        function.config(window + 16, 4)
    };
    assert_eq!(at(0, 0x12, 2, None), 1, "number of queues");
    assert_eq!(at(0, STATUS as u32, 1, Some(u32::from(ACKNOWLEDGE as u8))), 1);
    assert_eq!(at(0, DEVICE as u32, 4, None), (1 << 20) / 512, "capacity");
    for (bar, offset, length) in [
        (1, 0x12, 2),
        (0, 0x12, 3),
        (0, 0x12, 0),
        (0, 0x13, 2),
        (0, BAR_BYTES as u32, 4),
        (0, u32::MAX, 1),
        (0, 0x12, u32::MAX),
    ] {
        assert_eq!(at(bar, offset, length, Some(0xabcd)), 0xabcd, "{bar} {offset:#x} {length}: only stored");
    }
    assert_eq!(function.get(STATUS, 1), u64::from(ACKNOWLEDGE));
}

/// P4: changed once read, whatever happened in between.
#[test]
fn the_generation_differs_after_any_number_of_changes() {
    let mut function = Function::new();
    for resets in [1, 255, 256, 257, 512] {
        let before = function.get(0x15, 1);
        for _ in 0..resets {
            function.put(STATUS, 1, 0);
        }
        let after = function.get(0x15, 1);
        assert_ne!(before, after, "{resets} changes");
        assert_eq!(function.get(0x15, 1), after);
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let root = bus_of(Arc::new(Mutex::new(Function::new().pci)));
    let (mut ports, ecam) = (ConfigPorts::new(Arc::clone(&root), Bus::new()), Ecam(root));
    let mut by_ports = |device: u32, function: u32, register: u32, width: usize| {
        let address = 1 << 31 | device << 11 | function << 8 | register & 0xfc;
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4 + u64::from(register & 3), &mut data[..width]);
        u32::from_le_bytes(data)
    };
    let by_memory = |device: u64, function: u64, register: u64, width: usize| {
        let mut data = [0; 4];
        SharedDevice::read(&ecam, device << 15 | function << 12 | register, &mut data[..width]);
        u32::from_le_bytes(data)
    };
    for device in 0..32 {
        for (function, register, width) in
            [(0, 0, 4), (0, 2, 2), (0, 8, 4), (0, 0xb, 1), (0, 0x34, 1), (1, 0, 4), (7, 0, 2)]
        {
            let one = by_ports(device, function, register, width);
            assert_eq!(one, by_memory(device.into(), function.into(), register.into(), width));
            let there = device < 2 && function == 0;
            assert_eq!(there, one != u32::MAX >> (32 - 8 * width), "{device} {function} {register:#x}");
        }
    }
    assert_eq!((by_ports(0, 0, 8, 4) >> 16, by_ports(1, 0, 0, 4)), (0x0600, 0x1042_1af4));
    assert_eq!(by_memory(1, 0, 0x100, 4), 0, "no extended capabilities");
}

#[test]
fn ports_take_an_address_of_32_bits_and_only_of_this_bus() {
    let root = Arc::new(PciRoot::new(WINDOW, []));
    let mut ports = ConfigPorts::new(root, Bus::new());
    let mut read = |offset: u64, width: usize| {
        let mut data = [0; 8];
        ports.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    };
    assert_eq!((read(0, 4), read(4, 4), read(0, 1), read(4, 8)), (0, 0xffff_ffff, 0xff, u64::MAX));
    for (address, there) in [(0x8000_0000_u32, true), (0, false), (0x8001_0000, false), (0x80ff_0000, false)]
    {
        ports.write(0, &address.to_le_bytes());
        ports.write(1, &[0xff]);
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), address);
        ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data) == 0x0008_1b36, there, "{address:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is written anywhere, in any width, nothing panics, and after a reset a driver starts.
    #[test]
    fn a_driver_that_means_harm_cannot_break_the_function(
        acts in prop::collection::vec((0..4_u8, any::<u16>(), 0..9_usize, any::<u64>()), 1..200)
    ) {
        let mut function = Function::new();
        for (kind, at, width, value) in acts {
            let (bytes, mut data) = (value.to_le_bytes(), [0; 8]);
            match kind {
                0 => function.pci.read(u64::from(at) % (BAR_BYTES + 16), &mut data[..width]),
                1 => { function.pci.write(u64::from(at) % (BAR_BYTES + 16), &bytes[..width]); }
                2 => function.pci.read_config(usize::from(at % 256), &mut data[..width.min(4)]),
                _ => function.pci.write_config(usize::from(at % 256), &bytes[..width.min(4)]),
            }
        }
        function.set_config(4, 2, 6);
        function.set_config(0x10, 4, PLACE as u32);
        function.set_config(0x14, 4, 0);
        function.enable_messages();
        function.put(QUEUE_SELECT, 2, 0);
        function.put(STATUS, 1, 0);
        function.sent();
        function.start();
        read_sector(&mut function, 0);
        prop_assert_eq!(function.wait_sent(1), [1]);
        function.pci.stop();
    }
}
