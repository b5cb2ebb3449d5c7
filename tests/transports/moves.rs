//! Functions that the guest moves: base address registers, the command register, and the doorbells that
//! follow, over the bus as a machine has it, without KVM.

use std::io;
use std::sync::{Arc, Mutex};

use minivmm::blk::BlockDevice;
use minivmm::bus::{Bus, BusDevice, Outcome};
use minivmm::mem::{self, Ram};
use minivmm::pci::memory::DoorbellSink;
use minivmm::pci::root::{Ecam, OnBus, PciMemory, PciRoot};
use minivmm::virtio::pci::{BAR_BYTES, NOTIFY, PciTransport};
use minivmm_testkit::driver::{
    ACKNOWLEDGE, AVAIL, DATA, DESC, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, HEADER, OK, OUT, RAM_BYTES,
    STATUS_BYTE, UNTOUCHED, USED, WRITE,
};
use minivmm_testkit::images::TestImage;
use minivmm_testkit::over_pci::{STATUS, Sent, WINDOW};

const ECAM: u64 = 0xe000_0000;
/// Where nobody is from the start: the host bridge has no memory.
const HOLE: u64 = WINDOW.start;

fn place(device: u64) -> u64 {
    WINDOW.start + device * BAR_BYTES
}

/// Where each function's doorbells are, and how often they were placed. No two may be at one place, as in KVM.
#[derive(Default)]
struct Bells {
    bound: Vec<Option<u64>>,
    changes: usize,
    fails: bool,
}

struct Sink(Arc<Mutex<Bells>>, usize);

impl DoorbellSink for Sink {
    fn place(&mut self, base: Option<u64>) -> io::Result<()> {
        let mut bells = self.0.lock().unwrap();
        bells.changes += 1;
        bells.bound[self.1] = None;
        if base.is_some() && (bells.fails || bells.bound.contains(&base)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        bells.bound[self.1] = base;
        Ok(())
    }
}

/// RAM, another device, and two disks on a PCI bus, as a machine has them.
struct Machine {
    mmio: Bus,
    ram: Ram,
    bells: Arc<Mutex<Bells>>,
    functions: Vec<Arc<Mutex<PciTransport>>>,
    images: Vec<TestImage>,
}

struct Other;

impl BusDevice for Other {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0x42);
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Outcome {
        Outcome::Continue
    }
}

impl Machine {
    fn new() -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let bells = Arc::new(Mutex::new(Bells { bound: vec![None; 2], ..Bells::default() }));
        let (mut functions, mut images, mut on_bus) = (Vec::new(), Vec::new(), Vec::<OnBus>::new());
        for index in 0..2 {
            // The second disk is smaller, so that they can be told apart.
            let image = TestImage::new((2 - index as u64) << 20);
            let device = BlockDevice::with_ram("vda", image.open("none"), Some(&ram)).unwrap();
            let base = place(index as u64 + 1);
            let function =
                PciTransport::new(Box::new(device), ram.clone(), base, Box::new(Sent::default())).unwrap();
            let function = Arc::new(Mutex::new(function));
            on_bus.push((function.clone(), Box::new(Sink(Arc::clone(&bells), index))));
            functions.push(function);
            images.push(image);
        }
        let root = Arc::new(PciRoot::new(WINDOW, on_bus));
        let mut mmio = Bus::new();
        let memory = Arc::new(PciMemory(Arc::clone(&root)));
        mmio.place("PCI memory", WINDOW.start, WINDOW.end - WINDOW.start, memory).unwrap();
        mmio.place("ECAM", ECAM, 1 << 20, Arc::new(Ecam(root))).unwrap();
        mmio.place("other", 0xd000_0000, 0x1000, Arc::new(Mutex::new(Other))).unwrap();
        Self { mmio, ram, bells, functions, images }
    }

    fn config(&self, device: u64, offset: u64, bytes: &[u8]) {
        self.mmio.write(ECAM + (device << 15) + offset, bytes);
    }

    fn set_bar(&self, device: u64, address: u64) {
        self.config(device, 0x10, &address.to_le_bytes()[..4]);
        self.config(device, 0x14, &address.to_le_bytes()[4..]);
    }

    fn set_memory(&self, device: u64, on: bool) {
        self.config(device, 4, &[if on { 6 } else { 4 }, 0]);
    }

    fn read(&self, address: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// Which function answers at an address, told by its disk's size.
    fn who(&self, base: u64) -> Option<u64> {
        match self.read(base + 0x2000, 4) {
            4096 => Some(1),
            2048 => Some(2),
            0xffff_ffff => None,
            other => panic!("{other:#x} at {base:#x}"),
        }
    }

    fn bound(&self) -> [Option<u64>; 2] {
        self.bells.lock().unwrap().bound.clone().try_into().unwrap()
    }

    /// A driver comes, by whatever is at `base`.
    fn start(&self, base: u64) {
        let put = |at: u64, bytes: &[u8]| {
            self.mmio.write(base + at, bytes);
        };
        put(STATUS, &[0]);
        for ring in [AVAIL, USED] {
            mem::write_bytes(&self.ram, ring, &[0; 0x100]).unwrap();
        }
        put(STATUS, &[(ACKNOWLEDGE | DRIVER) as u8]);
        put(0x08, &1_u32.to_le_bytes());
        put(0x0c, &((F_VERSION_1 >> 32) as u32).to_le_bytes());
        put(STATUS, &[(ACKNOWLEDGE | DRIVER | FEATURES_OK) as u8]);
        put(0x16, &[0, 0]);
        put(0x18, &[16, 0]);
        for (at, address) in [(0x20, DESC), (0x28, AVAIL), (0x30, USED)] {
            put(at, &address.to_le_bytes());
        }
        put(0x1c, &[1, 0]);
        put(STATUS, &[(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK) as u8]);
        assert_eq!(self.read(base + STATUS, 1) as u32, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Request number `turn`, a write of a sector of `byte`, made available.
    fn offer(&self, turn: u16, byte: u8) {
        let put = |at: u64, bytes: &[u8]| mem::write_bytes(&self.ram, at, bytes).unwrap();
        let mut header = [0; 16];
        header[0] = OUT as u8;
        header[8] = turn as u8;
        put(HEADER, &header);
        put(DATA, &[byte; 512]);
        put(STATUS_BYTE, &[UNTOUCHED]);
        let chain = [(HEADER, 16, 0), (DATA, 512, 0), (STATUS_BYTE, 1, WRITE)];
        put(DESC, &minivmm_testkit::desc::chain(&chain));
        put(AVAIL + 4 + 2 * u64::from(turn % 16), &[0, 0]);
        put(AVAIL + 2, &(turn + 1).to_le_bytes());
    }

    fn wait(&self, turn: u16) {
        let mut idx = [0; 2];
        while u16::from_le_bytes(idx) != turn + 1 {
            mem::read_bytes(&self.ram, USED + 2, &mut idx).unwrap();
            std::thread::yield_now();
        }
        let mut status = [0];
        mem::read_bytes(&self.ram, STATUS_BYTE, &mut status).unwrap();
        assert_eq!(status[0], OK);
    }

    fn write_sector(&self, base: u64, turn: u16, byte: u8) {
        self.offer(turn, byte);
        self.mmio.write(base + NOTIFY, &[0, 0]);
        self.wait(turn);
    }

    fn sector(&self, device: usize, sector: usize) -> Vec<u8> {
        self.images[device - 1].content()[512 * sector..512 * (sector + 1)].to_vec()
    }
}

#[test]
fn functions_are_where_they_were_placed_and_their_doorbells_too() {
    let machine = Machine::new();
    assert_eq!(
        [HOLE, place(1), place(2), place(3)].map(|base| machine.who(base)),
        [None, Some(1), Some(2), None]
    );
    assert_eq!(machine.bound(), [Some(place(1)), Some(place(2))]);
}

/// What Linux does on a rescan: memory off, the new address, memory on. A driver goes on afterwards, and
/// one that was there all the time as well.
#[test]
fn a_function_answers_at_its_new_address_with_all_that_it_was() {
    let machine = Machine::new();
    machine.start(place(1));
    machine.write_sector(place(1), 0, 0x11);
    machine.set_memory(1, false);
    assert_eq!((machine.who(place(1)), machine.bound()), (None, [None, Some(place(2))]));
    machine.set_bar(1, HOLE);
    assert_eq!((machine.who(HOLE), machine.bound()), (None, [None, Some(place(2))]));
    machine.set_memory(1, true);
    assert_eq!([HOLE, place(1), place(2)].map(|base| machine.who(base)), [Some(1), None, Some(2)]);
    assert_eq!(machine.bound(), [Some(HOLE), Some(place(2))]);
    // The device was not reset by any of it, and a reset of the device moves nothing.
    assert_eq!(machine.read(HOLE + STATUS, 1), 15);
    machine.write_sector(HOLE, 1, 0x22);
    machine.start(HOLE);
    machine.write_sector(HOLE, 0, 0x33);
    assert_eq!((machine.sector(1, 0), machine.sector(1, 1)), (vec![0x33; 512], vec![0x22; 512]));
    assert_eq!(machine.bound(), [Some(HOLE), Some(place(2))]);
}

#[test]
fn a_request_in_flight_is_completed_wherever_the_function_goes() {
    let machine = Machine::new();
    machine.start(place(1));
    for turn in 0..200 {
        let (from, to) = if turn % 2 == 0 { (place(1), place(7)) } else { (place(7), place(1)) };
        machine.offer(turn, turn as u8);
        machine.mmio.write(from + NOTIFY, &[0, 0]);
        machine.set_bar(1, to);
        machine.wait(turn);
        assert_eq!(machine.sector(1, usize::from(turn)), vec![turn as u8; 512]);
        // A doorbell at the old place is heard by nobody.
        machine.mmio.write(from + NOTIFY, &[0, 0]);
        assert_eq!((machine.who(from), machine.who(to)), (None, Some(1)));
    }
}

#[test]
fn asking_for_the_size_moves_nothing() {
    let machine = Machine::new();
    machine.start(place(1));
    let changes = machine.bells.lock().unwrap().changes;
    for offset in [0x10, 0x14] {
        machine.config(1, offset, &[0xff; 4]);
        assert_eq!(machine.read(ECAM + (1 << 15) + 0x10, 4) & 0xf, 4);
        machine.write_sector(place(1), if offset == 0x10 { 0 } else { 1 }, 0x44);
    }
    machine.set_bar(1, place(1));
    assert_eq!(machine.who(place(1)), Some(1));
    assert_eq!(machine.bells.lock().unwrap().changes, changes, "the doorbells were not touched");
    // Switched off while it is asked, it answers nowhere until an address is there.
    machine.config(1, 0x10, &[0xff; 4]);
    machine.set_memory(1, false);
    machine.set_memory(1, true);
    assert_eq!((machine.who(place(1)), machine.bound()[0]), (None, None));
    machine.config(1, 0x10, &(place(4) as u32).to_le_bytes());
    assert_eq!((machine.who(place(4)), machine.bound()[0]), (Some(1), Some(place(4))));
}

#[test]
fn of_two_functions_at_one_address_the_first_answers_and_the_other_when_it_has_gone() {
    let machine = Machine::new();
    machine.set_bar(1, place(2));
    assert_eq!([place(1), place(2)].map(|base| machine.who(base)), [None, Some(1)]);
    assert_eq!(machine.bound(), [Some(place(2)), None]);
    machine.set_bar(1, place(9));
    assert_eq!([place(9), place(2)].map(|base| machine.who(base)), [Some(1), Some(2)]);
    assert_eq!(machine.bound(), [Some(place(9)), Some(place(2))]);
    machine.set_bar(2, place(9));
    assert_eq!([place(9), place(2)].map(|base| machine.who(base)), [Some(1), None]);
    machine.set_memory(1, false);
    assert_eq!((machine.who(place(9)), machine.bound()), (Some(2), [None, Some(place(9))]));
    machine.set_memory(1, true);
    assert_eq!((machine.who(place(9)), machine.bound()), (Some(1), [Some(place(9)), None]));
    // They change places, through a place where both are.
    machine.set_bar(1, place(1));
    machine.set_bar(2, place(2));
    machine.set_bar(1, place(2));
    machine.set_bar(2, place(1));
    assert_eq!([place(1), place(2)].map(|base| machine.who(base)), [Some(2), Some(1)]);
    assert_eq!(machine.bound(), [Some(place(2)), Some(place(1))]);
}

/// RAM, the IOAPIC, the local APICs, ECAM, virtio-mmio, nothing, and half outside the window: whoever is
/// there stays there, and the function comes back.
#[test]
fn a_function_answers_nowhere_outside_the_window() {
    let machine = Machine::new();
    mem::write_bytes(&machine.ram, 0x10_2000, b"here").unwrap();
    for address in [
        0,
        0x10_0000,
        0xfec0_0000,
        0xfee0_0000,
        ECAM,
        0xd000_0000,
        0xd200_0000,
        WINDOW.end,
        WINDOW.start - BAR_BYTES,
        1 << 32,
        1 << 63,
        place(1) | 1 << 40,
    ] {
        machine.set_bar(1, address);
        assert_eq!((machine.who(place(1)), machine.bound()[0]), (None, None), "{address:#x}");
        let mut read = [0; 4];
        mem::read_bytes(&machine.ram, 0x10_2000, &mut read).unwrap();
        assert_eq!(&read, b"here");
        assert_eq!(machine.read(0xd000_2000 - 0x1800, 1), 0x42, "{address:#x}");
        assert_eq!(machine.read(ECAM + (1 << 15), 4), 0x1042_1af4, "{address:#x}");
        if address == 0xd200_0000 {
            assert_eq!(machine.read(address + 0x2000, 4), 0xffff_ffff);
        }
        assert_eq!((machine.who(place(2)), machine.bound()[1]), (Some(2), Some(place(2))), "{address:#x}");
        machine.set_bar(1, place(1));
        assert_eq!((machine.who(place(1)), machine.bound()[0]), (Some(1), Some(place(1))), "{address:#x}");
    }
}

/// KVM may refuse a doorbell: the write then reaches the registers, and rings all the same.
#[test]
fn a_doorbell_that_cannot_be_bound_is_rung_through_the_registers() {
    let machine = Machine::new();
    machine.bells.lock().unwrap().fails = true;
    machine.set_bar(1, place(5));
    assert_eq!((machine.who(place(5)), machine.bound()[0]), (Some(1), None));
    machine.start(place(5));
    machine.write_sector(place(5), 0, 0x55);
    machine.bells.lock().unwrap().fails = false;
    machine.set_bar(1, place(6));
    assert_eq!((machine.who(place(6)), machine.bound()[0]), (Some(1), Some(place(6))));
}

#[test]
fn an_access_across_two_functions_is_one_of_each() {
    let machine = Machine::new();
    machine.start(place(1));
    let pending = machine.read(place(1) + BAR_BYTES - 4, 4) | machine.read(place(2), 4) << 32;
    assert_eq!(machine.read(place(2) - 4, 8), pending);
    assert_eq!(machine.read(place(1) - 4, 8), machine.read(place(1), 4) << 32 | 0xffff_ffff);
    machine.mmio.write(place(2) - 4, &[0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(machine.read(place(2), 4), 1, "device_feature_select of the second");
}

/// CPUs that move functions about, read registers and ring doorbells at once: nothing blocks for ever, and
/// in the end everything is where it should be.
#[test]
fn cpus_that_move_and_use_functions_at_once_do_not_block_each_other() {
    let machine = Machine::new();
    machine.start(place(1));
    std::thread::scope(|scope| {
        for mover in 0..2_u64 {
            let machine = &machine;
            scope.spawn(move || {
                for round in 0..2000 {
                    let device = (round + mover) % 2 + 1;
                    machine.set_bar(device, place((round * 7 + mover) % 5));
                    machine.set_memory(device, round % 3 != 0);
                }
            });
            scope.spawn(move || {
                for round in 0..4000 {
                    let base = place(round % 5);
                    machine.read(base + 0x12, 2);
                    machine.mmio.write(base + NOTIFY, &[0, 0]);
                }
            });
        }
    });
    for device in [1, 2] {
        machine.set_bar(device, place(device));
        machine.set_memory(device, true);
    }
    assert_eq!([1, 2].map(|device| machine.who(place(device))), [Some(1), Some(2)]);
    assert_eq!(machine.bound(), [Some(place(1)), Some(place(2))]);
    machine.start(place(1));
    machine.write_sector(place(1), 0, 0x66);
    assert_eq!(machine.functions.len(), 2);
}
