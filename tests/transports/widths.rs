//! Accesses of every width and start to the registers of PCI and virtio, against models that know nothing
//! but bytes: what an access reads and does is what its bytes read and do, register by register.

use std::sync::{Arc, Mutex};

use minivmm::bus::{Bus, BusDevice, Outcome};
use minivmm::devices::power::ResetControl;
use minivmm::mem;
use minivmm::pci::msix::Message;
use minivmm::pci::root::{ConfigPorts, Ecam, PciFunction, PciMemory};
use minivmm::virtio::mmio::MmioTransport;
use minivmm::virtio::pci::{NOTIFY, NOTIFY_STRIDE, PciTransport};
use minivmm::virtio::{ActivateError, Activation, Interrupt, Transport, VirtioDevice, feature};
use minivmm_testkit::over_pci::{
    CONFIG_VECTOR, DEVICE, ISR, PENDING, PLACE, QUEUE_VECTOR, STATUS, Sent, TABLE, WINDOW, bus_of, capability,
};
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUES: usize = 2;
const CONFIG_BYTES: usize = 0x40;

/// A device whose configuration space is memory, and which hands out its way to the driver.
#[derive(Clone)]
struct Probe(Arc<Mutex<Inside>>);

struct Inside {
    config: [u8; CONFIG_BYTES],
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Probe {
    fn new() -> Self {
        let config = std::array::from_fn(|at| at as u8 ^ 0x5a);
        Self(Arc::new(Mutex::new(Inside { config, interrupt: None })))
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        self.0.lock().unwrap().config
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.0.lock().unwrap().interrupt.clone().unwrap()
    }
}

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        feature::VERSION_1 | 0x1234_5678
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256; QUEUES]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = config.get(at as usize).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let config = &mut self.0.lock().unwrap().config;
        for (at, byte) in (offset..).zip(data) {
            if let Some(to) = config.get_mut(at as usize) {
                *to = *byte;
            }
        }
    }
    fn negotiated(&mut self, _: u64) {}
    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError> {
        self.0.lock().unwrap().interrupt = Some(parts.interrupt);
        Ok(())
    }
    fn stop_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

fn function() -> (PciTransport, Probe, Sent) {
    let (probe, sent) = (Probe::new(), Sent::default());
    let ram = mem::map_ram(&[(0, 8 << 20)]).unwrap();
    let pci = PciTransport::new(Box::new(probe.clone()), ram, PLACE, Box::new(sent.clone())).unwrap();
    (pci, probe, sent)
}

/// VERSION_1, no queue, DRIVER_OK; each queue's event has the vector after its number.
fn start(pci: &mut PciTransport) {
    for (at, value, width) in
        [(STATUS, 0, 1), (STATUS, 3, 1), (0x08, 1, 4), (0x0c, 1, 4), (STATUS, 11, 1), (STATUS, 15, 1)]
    {
        pci.write(at, &u64::to_le_bytes(value)[..width]);
    }
    pci.write(CONFIG_VECTOR, &[0, 0]);
    for queue in 0..QUEUES as u8 {
        pci.write(0x16, &[queue, 0]);
        pci.write(QUEUE_VECTOR, &[queue + 1, 0]);
    }
}

fn window(pci: &mut PciTransport) -> usize {
    let mut at = capability(pci, 9);
    loop {
        let mut head = [0; 4];
        pci.read_config(at, &mut head);
        if head[0] == 9 && head[3] == 5 {
            return at;
        }
        at = usize::from(head[1]);
    }
}

/// The bits of configuration space that a guest may change: PCI 3.0, chapter 6, and MSI-X's control.
fn writable(window: usize, msix: usize) -> [u8; 256] {
    let mut bits = [0; 256];
    bits[0x04..0x06].copy_from_slice(&[0x06, 0x04]);
    bits[0x0c] = 0xff;
    bits[0x10..0x18].copy_from_slice(&(!0x7fff_u64).to_le_bytes());
    bits[0x3c] = 0xff;
    bits[window + 4] = 0xff;
    bits[window + 8..window + 20].fill(0xff);
    bits[msix + 3] = 0xc0;
    bits
}

/// Of MSI-X's message control: what becomes of a signalled vector that no entry masks.
#[derive(Default)]
struct Control {
    pending: bool,
    sent: usize,
}

impl Control {
    fn settle(&mut self, control: u8) {
        if control & 0xc0 == 0x80 && std::mem::take(&mut self.pending) {
            self.sent += 1;
        }
    }
}

/// The guest's two ways to the function's configuration space.
struct Ways {
    ports: Bus,
    ecam: Bus,
    memory: Bus,
}

impl Ways {
    fn new(function: Arc<Mutex<dyn PciFunction>>) -> Self {
        let root = bus_of(function);
        let mut others = Bus::new();
        others.place("reset", 0, 4, Arc::new(Mutex::new(ResetControl::default()))).unwrap();
        let mut ways = Self { ports: Bus::new(), ecam: Bus::new(), memory: Bus::new() };
        let ports = ConfigPorts::new(Arc::clone(&root), others);
        ways.ports.place("ports", 0xcf8, 8, Arc::new(Mutex::new(ports))).unwrap();
        let memory = Arc::new(PciMemory(Arc::clone(&root)));
        ways.memory.place("memory", WINDOW.start, WINDOW.end - WINDOW.start, memory).unwrap();
        ways.ecam.place("ECAM", 0, 1 << 20, Arc::new(Ecam(root))).unwrap();
        ways
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn configuration_space_and_what_it_switches_are_its_bytes(
        acts in prop::collection::vec((any::<bool>(), 0..300_usize, 1..=8_usize, any::<u64>()), 1..150)
    ) {
        let (mut pci, probe, sent) = function();
        start(&mut pci);
        let (window, msix) = (window(&mut pci), capability(&mut pci, 0x11));
        for vector in 0..3 {
            pci.write(TABLE + 16 * vector + 12, &[0; 4]);
        }
        let mut model = [0; 256];
        for (at, byte) in model.iter_mut().enumerate() {
            pci.read_config(at, std::slice::from_mut(byte));
        }
        let bits = writable(window, msix);
        let pci = Arc::new(Mutex::new(pci));
        let ways = Ways::new(pci.clone());
        let (mut control, mut at_last) = (Control::default(), Some(PLACE));
        for (by_ports, at, width, value) in acts {
            // Often where something happens.
            let at = [at, msix + at % 8, 0x10 + at % 8, 4, at][at % 5];
            let (way, first, width) = if by_ports {
                if at >= 256 {
                    continue;
                }
                ways.ports.write(0xcf8, &(1_u32 << 31 | 1 << 11 | at as u32 & 0xfc).to_le_bytes());
                (&ways.ports, 0xcfc + (at as u64 & 3), width.min(4 - at % 4))
            } else {
                (&ways.ecam, (1 << 15) + at as u64, width)
            };
            // The window's data make accesses of their own, which another test is about.
            if at < window + 20 && at + width > window + 4 {
                continue;
            }
            // Addresses inside the window come up as well.
            let value = if value % 3 == 0 && (0x0c..0x18).contains(&at) {
                (WINDOW.start + (value >> 8 & 7) * 0x8000) << (8 * 0x10_usize.saturating_sub(at))
            } else {
                value
            };
            let value = value.to_le_bytes();
            way.write(first, &value[..width]);
            for (at, new) in (at..256.min(at + width)).zip(value) {
                model[at] = model[at] & !bits[at] | new & bits[at];
            }
            control.settle(model[msix + 3]);
            let mut read = vec![0x55; width];
            way.read(first, &mut read);
            let expected: Vec<u8> = (at..at + width).map(|at| model.get(at).copied().unwrap_or(0)).collect();
            prop_assert_eq!(read, expected, "{} bytes at {:#x}", width, at);
            let mut all = vec![0; 256];
            ways.ecam.read(1 << 15, &mut all);
            all[window + 16..window + 20].copy_from_slice(&model[window + 16..window + 20]);
            prop_assert_eq!(&all, &model.to_vec(), "after {} bytes at {:#x}", width, at);
            // The number of queues is where the registers are, and nowhere else.
            let address = u64::from_le_bytes(model[0x10..0x18].try_into().unwrap()) & !0xf;
            let sizing = address & 0xffff_ffff == 0xffff_8000 || address >> 32 == 0xffff_ffff;
            at_last = match model[4] & 2 {
                0 => None,
                _ if sizing => at_last,
                _ => Some(address).filter(|at| WINDOW.contains(at)),
            };
            for base in [Some(PLACE), Some(0xd100_0000), at_last].into_iter().flatten() {
                let mut count = [0; 2];
                ways.memory.read(base + 0x12, &mut count);
                let expected = if at_last == Some(base) { [QUEUES as u8, 0] } else { [0xff; 2] };
                prop_assert_eq!(count, expected, "registers at {:#x}", base);
            }
            control.pending |= model[msix + 3] & 0x80 != 0;
            control.settle(model[msix + 3]);
            probe.interrupt().queue(0);
            prop_assert_eq!(sent.take().len(), std::mem::take(&mut control.sent), "messages, {:#x}", at);
        }
    }

    #[test]
    fn the_table_of_messages_is_its_bytes(
        acts in prop::collection::vec((0..0x40_u64, 1..=8_usize, any::<u64>(), 0..3_u16), 1..200)
    ) {
        let (mut pci, probe, sent) = function();
        start(&mut pci);
        let msix = capability(&mut pci, 0x11);
        pci.write_config(msix, &[0, 0, 0, 0x80]);
        // Three entries; a fourth would be beyond the table.
        let mut bits = [0xff; 0x40];
        for entry in bits.chunks_mut(16) {
            entry[0] = 0xfc;
            entry[12..].copy_from_slice(&[1, 0, 0, 0]);
        }
        bits[0x30..].fill(0);
        let mut model = [0; 0x40];
        for vector in 0..3 {
            model[16 * vector + 12] = 1;
        }
        let mut pending = [false; 3];
        for (at, width, value, signalled) in acts {
            let value = value.to_le_bytes();
            pci.write(TABLE + at, &value[..width]);
            for (at, new) in (at as usize..0x40).zip(value).take(width) {
                model[at] = model[at] & !bits[at] | new & bits[at];
            }
            let mut read = vec![0x55; width];
            pci.read(TABLE + at, &mut read);
            let expected: Vec<u8> =
                (at as usize..).take(width).map(|at| model.get(at).copied().unwrap_or(0)).collect();
            prop_assert_eq!(read, expected, "{} bytes at {:#x}", width, at);
            let message = |vector: usize| {
                let at = 16 * vector;
                Message {
                    address: u64::from_le_bytes(model[at..at + 8].try_into().unwrap()),
                    data: u32::from_le_bytes(model[at + 8..at + 12].try_into().unwrap()),
                }
            };
            let mut expected = Vec::new();
            let mut settle = |pending: &mut [bool; 3]| {
                for vector in 0..3 {
                    if model[16 * vector + 12] & 1 == 0 && std::mem::take(&mut pending[vector]) {
                        expected.push((vector as u16, message(vector)));
                    }
                }
            };
            settle(&mut pending);
            if signalled == 0 {
                probe.interrupt().config();
            } else {
                probe.interrupt().queue(signalled - 1);
            }
            pending[usize::from(signalled)] = true;
            settle(&mut pending);
            prop_assert_eq!(sent.take(), expected, "{} bytes at {:#x}", width, at);
            let mut bits = [0; 8];
            pci.read(PENDING, &mut bits);
            let expected = (0..3).fold(0, |byte, vector| byte | u8::from(pending[vector]) << vector);
            prop_assert_eq!(bits, [expected, 0, 0, 0, 0, 0, 0, 0]);
        }
    }

    /// Shows P3 and R16.
    #[test]
    fn the_common_configuration_is_its_bytes(
        acts in prop::collection::vec((any::<bool>(), 0..0x3c_u64, 1..=8_usize, any::<u64>(), 0..4_u8), 1..200)
    ) {
        let (mut pci, ..) = function();
        let mut model = Common::new();
        for (write, at, width, value, small) in acts {
            let mut data = value.to_le_bytes();
            for (place, byte) in (at..).zip(&mut data) {
                match place {
                    // Neither beyond DRIVER nor to an enabled queue: other tests are about these.
                    0x14 => *byte &= 0x83,
                    0x1c | 0x1d => *byte &= 0xfe,
                    0x10..0x20 if small != 0 => *byte %= 3,
                    _ => {}
                }
            }
            if write {
                pci.write(at, &data[..width]);
                model.write(at as usize, &data[..width]);
            } else {
                let mut read = vec![0x55; width];
                pci.read(at, &mut read);
                prop_assert_eq!(read, model.read(at as usize, width), "{} bytes at {:#x}", width, at);
            }
        }
    }

    #[test]
    fn the_devices_configuration_is_its_bytes_over_both_transports(
        acts in prop::collection::vec((0..0x48_u64, 1..=8_usize, any::<u64>()), 1..100)
    ) {
        let (mut pci, behind_pci, _) = function();
        start(&mut pci);
        let behind_mmio = Probe::new();
        let ram = mem::map_ram(&[(0, 8 << 20)]).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut mmio = MmioTransport::new(Box::new(behind_mmio.clone()), ram, line).unwrap();
        for (at, value) in [(0x24, 1_u32), (0x20, 1), (0x70, 11), (0x70, 15)] {
            mmio.write(at, &value.to_le_bytes());
        }
        let mut model = behind_pci.config();
        for (at, width, value) in acts {
            let value = value.to_le_bytes();
            pci.write(DEVICE + at, &value[..width]);
            // Some of it begins in the registers before configuration space.
            mmio.write(0x100 + at, &value[..width]);
            for (at, new) in (at as usize..CONFIG_BYTES).zip(value).take(width) {
                model[at] = new;
            }
            prop_assert_eq!((behind_pci.config(), behind_mmio.config()), (model, model));
            let expected: Vec<u8> =
                (at as usize..).take(width).map(|at| model.get(at).copied().unwrap_or(0)).collect();
            let (mut by_pci, mut by_mmio) = (vec![0x55; width], vec![0x55; width]);
            pci.read(DEVICE + at, &mut by_pci);
            mmio.read(0x100 + at, &mut by_mmio);
            prop_assert_eq!((&by_pci, &by_mmio), (&expected, &expected));
        }
    }
}

/// The common configuration as virtio 4.1.4.3 has it, before a driver has set FEATURES_OK.
struct Common {
    device_select: u32,
    driver_select: u32,
    driver: u64,
    config_vector: u16,
    status: u8,
    generation: u8,
    changed: bool,
    select: u16,
    queues: [(u16, u16, [u64; 3]); QUEUES],
}

/// Offset and width of each register.
const REGISTERS: [(usize, usize); 16] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (0x14, 1),
    (0x15, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1e, 2),
    (0x20, 8),
    (0x28, 8),
    (0x30, 8),
];

impl Common {
    fn new() -> Self {
        Self {
            device_select: 0,
            driver_select: 0,
            driver: 0,
            config_vector: 0xffff,
            status: 0,
            generation: 0,
            changed: false,
            select: 0,
            queues: [(256, 0xffff, [0; 3]); QUEUES],
        }
    }

    fn get(&self, register: usize) -> u64 {
        let half = |select: u32, bits: u64| match select {
            0 => bits & 0xffff_ffff,
            1 => bits >> 32,
            _ => 0,
        };
        let queue = self.queues.get(usize::from(self.select));
        match register {
            0x00 => self.device_select.into(),
            0x04 => half(self.device_select, 1 << 32 | 0x1234_5678),
            0x08 => self.driver_select.into(),
            0x0c => half(self.driver_select, self.driver),
            0x10 => self.config_vector.into(),
            0x12 => QUEUES as u64,
            0x14 => self.status.into(),
            0x15 => self.generation.into(),
            0x16 => self.select.into(),
            0x18 => queue.map_or(0, |queue| queue.0.into()),
            0x1a => queue.map_or(0xffff, |queue| queue.1.into()),
            0x1e => queue.map_or(0, |_| self.select.into()),
            0x20 | 0x28 | 0x30 => queue.map_or(0, |queue| queue.2[(register - 0x20) / 8]),
            _ => 0,
        }
    }

    fn set(&mut self, register: usize, value: u64) {
        let vector = |value: u64| if value < 3 { value as u16 } else { 0xffff };
        let select = usize::from(self.select);
        match register {
            0x00 => self.device_select = value as u32,
            0x08 => self.driver_select = value as u32,
            0x0c if self.driver_select == 0 => self.driver = self.driver >> 32 << 32 | value,
            0x0c if self.driver_select == 1 => self.driver = self.driver & 0xffff_ffff | value << 32,
            0x10 => self.config_vector = vector(value),
            0x14 if value == 0 => {
                *self = Self { generation: self.generation, changed: true, ..Self::new() };
            }
            0x14 if self.status & !(value as u8) == 0 => self.status = value as u8,
            0x16 => self.select = value as u16,
            0x18 if select < QUEUES => self.queues[select].0 = value as u16,
            0x1a if select < QUEUES => self.queues[select].1 = vector(value),
            0x20 | 0x28 | 0x30 if select < QUEUES => self.queues[select].2[(register - 0x20) / 8] = value,
            _ => {}
        }
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        for (register, width) in REGISTERS {
            let mut bytes = self.get(register).to_le_bytes();
            let mut touched = false;
            for (place, new) in (at..).zip(data) {
                if (register..register + width).contains(&place) {
                    (bytes[place - register], touched) = (*new, true);
                }
            }
            if touched {
                self.set(register, u64::from_le_bytes(bytes));
            }
        }
    }

    fn read(&mut self, at: usize, width: usize) -> Vec<u8> {
        let byte = |this: &mut Self, at: usize| {
            if at == 0x15 && std::mem::take(&mut this.changed) {
                this.generation = this.generation.wrapping_add(1);
            }
            let found =
                REGISTERS.iter().find(|(register, width)| (*register..register + width).contains(&at));
            found.map_or(0, |(register, _)| this.get(*register).to_le_bytes()[at - register])
        };
        (at..at + width).map(|at| byte(self, at)).collect()
    }
}

/// MSI-X is switched on by whatever write reaches bit 15 of message control: Linux writes 16 bits there,
/// the BSDs 32 from the capability's first byte on.
#[test]
fn messages_are_enabled_by_every_write_that_reaches_message_control() {
    for (at, bytes) in [
        (2, &[0, 0x80][..]),
        (3, &[0x80]),
        (0, &[0, 0, 0, 0x80]),
        (1, &[0, 0, 0x80]),
        (3, &[0x80, 0]),
        (0, &[0, 0, 0, 0x80, 0, 0, 0, 0]),
    ] {
        let (mut pci, probe, sent) = function();
        start(&mut pci);
        let msix = capability(&mut pci, 0x11);
        pci.write(TABLE + 16 + 12, &[0; 4]);
        let pci = Arc::new(Mutex::new(pci));
        let ways = Ways::new(pci.clone());
        probe.interrupt().queue(0);
        assert_eq!(sent.take().len(), 0);
        ways.ecam.write((1 << 15) + (msix + at) as u64, bytes);
        probe.interrupt().queue(0);
        assert_eq!(sent.take(), [(1, Message::default())], "{bytes:x?} at {at}");
    }
}

#[test]
fn a_queue_is_enabled_by_every_write_that_makes_its_register_one() {
    for (at, bytes) in [
        (0x1c, &[1, 0][..]),
        (0x1c, &[1]),
        (0x1c, &[1, 0, 0, 0]),
        (0x1b, &[0xff, 1]),
        (0x1a, &[0xff, 0xff, 1, 0]),
        (0x18, &[16, 0, 0xff, 0xff, 1, 0, 0, 0]),
    ] {
        let (mut pci, ..) = function();
        for (part, address) in [(0x20, 0x1000_u64), (0x28, 0x2000), (0x30, 0x3000)] {
            pci.write(part, &address.to_le_bytes());
        }
        pci.write(at, bytes);
        let mut ready = [0; 2];
        pci.read(0x1c, &mut ready);
        assert_eq!(ready, [1, 0], "{bytes:x?} at {at:#x}");
    }
}

#[test]
fn an_access_beyond_the_region_ends() {
    let (mut pci, ..) = function();
    for at in [0x7ff9, 0x8000, u64::MAX - 8, u64::MAX] {
        for width in 0..=8_usize {
            let mut data = vec![0x55; width];
            pci.write(at, &data);
            pci.read(at, &mut data);
            assert_eq!(data, vec![0; width], "{width} bytes at {at:#x}");
        }
    }
}

/// Shows P6.
#[test]
fn the_isr_status_is_read_and_cleared_by_every_access_that_reaches_its_byte() {
    let (mut pci, probe, _) = function();
    start(&mut pci);
    for at in ISR - 8..ISR + 4 {
        for width in 1..=8_usize {
            probe.interrupt().queue(0);
            let mut data = vec![0x55; width];
            pci.read(at, &mut data);
            let reached = (at..at + width as u64).contains(&ISR);
            let expected: Vec<u8> = (at..).take(width).map(|at| u8::from(at == ISR)).collect();
            assert_eq!(data, expected, "{width} bytes at {at:#x}");
            let mut after = [0];
            pci.read(ISR, &mut after);
            assert_eq!(after[0], u8::from(!reached));
        }
    }
}

#[test]
fn a_doorbell_is_rung_by_every_write_that_reaches_its_register() {
    let (mut pci, ..) = function();
    let rung =
        |pci: &PciTransport| pci.doorbells().iter().map(|bell| bell.read().is_ok()).collect::<Vec<_>>();
    for at in NOTIFY - 8..NOTIFY + 12 {
        for width in 1..=8_usize {
            pci.write(at, &[0xff; 8][..width]);
            let expected: Vec<bool> = (0..QUEUES as u64)
                .map(|queue| NOTIFY + queue * NOTIFY_STRIDE)
                .map(|register| at < register + NOTIFY_STRIDE && register < at + width as u64)
                .collect();
            assert_eq!(rung(&pci), expected, "{width} bytes at {at:#x}");
        }
    }
}

/// virtio 4.1.4.9.1: any access to the data is one of the length that the window says, to where it says.
/// Shows P8.
#[test]
fn the_window_makes_its_access_for_every_access_that_reaches_its_data() {
    for length in [1_u32, 2, 4] {
        for first in 0..4_usize {
            for width in 1..=4 - first {
                let (mut pci, probe, _) = function();
                start(&mut pci);
                let window = window(&mut pci);
                let pci = Arc::new(Mutex::new(pci));
                let ways = Ways::new(pci.clone());
                let base = (1 << 15) + window as u64;
                ways.ecam.write(base + 8, &(DEVICE as u32 + 4).to_le_bytes());
                ways.ecam.write(base + 12, &length.to_le_bytes());
                let mut before = probe.config();
                let mut data = vec![0; width];
                ways.ecam.read(base + 16 + first as u64, &mut data);
                let read: Vec<u8> =
                    (0..4).map(|at| if at < length as usize { before[4 + at] } else { 0 }).collect();
                assert_eq!(data, read[first..first + width], "{width} bytes at {first}, length {length}");
                let written = vec![0xc3; width];
                ways.ecam.write(base + 16 + first as u64, &written);
                // The bytes that were not written are what the read before left there.
                let mut stored = read.clone();
                stored[first..first + width].copy_from_slice(&written);
                before[4..4 + length as usize].copy_from_slice(&stored[..length as usize]);
                assert_eq!(probe.config(), before, "{width} bytes at {first}, length {length}");
            }
        }
    }
}

/// Ports 0xCF8 to 0xCFF: 32 bits set the address; any other access finds the reset register in between.
#[test]
fn the_ports_take_an_address_at_once_and_data_in_every_lane() {
    let (pci, ..) = function();
    let ways = Ways::new(Arc::new(Mutex::new(pci)));
    let address = 1_u32 << 31 | 1 << 11 | 0x3c;
    for port in 0xcf4..0xd04_u64 {
        for width in [1, 2, 4_usize] {
            ways.ports.write(0xcf8, &address.to_le_bytes());
            ways.ports.write(0xcfc, &[0x77, 0, 0, 0]);
            ways.ports.write(0xcf9, &[0]);
            let data = [2; 4];
            assert_eq!(ways.ports.write(port, &data[..width]), Outcome::Continue);
            let touched = |place: u64| (port..port + width as u64).contains(&place);
            let (mut now, mut reset, mut line) = ([0; 4], [0], [0]);
            ways.ports.read(0xcf8, &mut now);
            let takes_address = port == 0xcf8 && width == 4;
            let expected = if takes_address { 0x0202_0202 } else { address };
            assert_eq!(u32::from_le_bytes(now), expected, "{width} bytes at {port:#x}");
            ways.ports.read(0xcf9, &mut reset);
            assert_eq!(
                reset[0],
                if touched(0xcf9) && !takes_address { 2 } else { 0 },
                "{width} at {port:#x}"
            );
            ways.ports.write(0xcf8, &address.to_le_bytes());
            ways.ports.read(0xcfc, &mut line);
            assert_eq!(line[0], if touched(0xcfc) { 2 } else { 0x77 }, "{width} bytes at {port:#x}");
            let mut all = vec![0x55; width];
            ways.ports.read(port, &mut all);
            let lanes = [if touched(0xcfc) { 2 } else { 0x77 }, 0, 0, 0];
            let byte = |place: u64| match place {
                0xcf8..0xcfc if takes_address => address.to_le_bytes()[(place - 0xcf8) as usize],
                0xcf9 => reset[0],
                0xcfc..0xd00 => lanes[(place - 0xcfc) as usize],
                _ => 0xff,
            };
            assert_eq!(
                all,
                (port..).take(width).map(byte).collect::<Vec<u8>>(),
                "{width} bytes at {port:#x}"
            );
        }
    }
    assert_eq!(ways.ports.write(0xcf8, &[0, 6]), Outcome::Reset, "16 bits reach the reset register");
    assert_eq!(ways.ports.write(0xcf8, &[0, 6, 0, 0]), Outcome::Continue, "32 bits are an address");
}
