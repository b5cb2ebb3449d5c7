//! virtio over PCI (virtio 4.1), modern only: all registers in one memory region, MSI-X, no INTx.
//!
//! Owns the meaning of the region's registers, the capabilities that describe them, and the vectors that events
//! are mapped to. `region` maps offsets to registers. An access of any width and start takes effect on each
//! register that it touches. The machine behind the registers is [`super::core`]; masks and pending bits are in
//! [`crate::pci::msix`]. Knows nothing of KVM: doorbells are eventfds, messages go to a [`MessageSink`].

mod region;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::core::{Core, DeviceStatus, Reg};
use super::{Interrupt, Transport, VirtioDevice};
use crate::bus::lanes::lanes;
use crate::bus::{BusDevice, Outcome};
use crate::mem::Ram;
use crate::pci::config::{ConfigSpace, Identity, Memory, touches};
use crate::pci::msix::{self, MessageSink, Msix};
use crate::pci::root::PciFunction;
use crate::sync::unpoisoned;
pub use region::{BAR_BYTES, NOTIFY, NOTIFY_STRIDE};
use region::{
    COMMON, COMMON_BYTES, DEVICE, DEVICE_BYTES, Field, ISR, PENDING, Part, TABLE, VECTORS_MAX, field,
    first_part, locate,
};

/// virtio's own vendor ID, and the first device ID without legacy registers (virtio 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_0: u16 = 0x1040;
/// The revision of a device that is not transitional (virtio 4.1.2.1).
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x40;

/// The vector of an event that is mapped to no vector (virtio 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status (virtio 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The vendor-specific capability, and virtio's types of it (virtio 4.1.4).
const CAP_VENDOR: u8 = 9;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
/// Offsets in such a capability.
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: usize = 16;

/// Which event is mapped to which vector, and the ISR status.
struct Vectors {
    status: Arc<DeviceStatus>,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    msix: Mutex<Msix>,
}

impl Vectors {
    fn msix(&self) -> MutexGuard<'_, Msix> {
        unpoisoned(self.msix.lock())
    }

    /// Signals the vector that `event` is mapped to. Returns `true` if messages are in use at all.
    fn signal(&self, event: Option<&AtomicU16>) -> bool {
        let mut msix = self.msix();
        if msix.is_enabled()
            && let Some(event) = event
        {
            // No vector has the number NO_VECTOR.
            msix.signal(event.load(Ordering::SeqCst));
        }
        msix.is_enabled()
    }

    /// Maps an event to a vector. A vector that does not exist reads back as NO_VECTOR (virtio 4.1.5.1.2.1).
    fn map(&self, event: Option<&AtomicU16>, vector: u32) {
        let known = u16::try_from(vector).ok().filter(|vector| *vector < self.msix().vectors());
        if let Some(event) = event {
            event.store(known.unwrap_or(NO_VECTOR), Ordering::SeqCst);
        }
    }

    /// Unmaps all events and forgets pending notifications, after a reset of the device (virtio 4.1.5.1.2.1,
    /// 2.4.1).
    fn reset(&self) {
        for event in self.queues.iter().chain([&self.config]) {
            event.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.msix().forget_pending();
    }
}

impl Interrupt for Vectors {
    fn queue(&self, index: u16) {
        if !self.signal(self.queues.get(usize::from(index))) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        }
    }

    /// Sets the ISR status as well, even if messages are in use (virtio 4.1.4.5.1).
    fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.signal(Some(&self.config));
    }

    fn needs_reset(&self) {
        if self.status.set_needs_reset() {
            self.config();
        }
    }
}

/// A virtio device as a PCI function.
pub struct PciTransport {
    core: Core,
    vectors: Arc<Vectors>,
    space: ConfigSpace,
    /// Offsets of MSI-X's capability, and of the capability that is a window to the registers.
    msix_at: usize,
    window_at: usize,
}

impl PciTransport {
    /// Makes a PCI function of `device`, with its registers at `address`, a multiple of [`BAR_BYTES`]. `sink`
    /// has as many vectors as [`vectors_of`] returns.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Ram,
        address: u64,
        sink: Box<dyn MessageSink>,
    ) -> io::Result<Self> {
        let (id, vectors) = (device.device_id(), vectors_of(&*device));
        let status = Arc::new(DeviceStatus::default());
        let vectors = Arc::new(Vectors {
            status: Arc::clone(&status),
            isr: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: device.queue_sizes().iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            msix: Mutex::new(Msix::new(vectors, sink)),
        });
        let interrupt: Arc<dyn Interrupt> = Arc::<Vectors>::clone(&vectors);
        let core = Core::new(device, ram, status, interrupt)?;
        let mut space = ConfigSpace::new(&identity(id));
        space.place(address, BAR_BYTES);
        let (msix_at, window_at) = add_capabilities(&mut space, vectors.msix().vectors());
        Ok(Self { core, vectors, space, msix_at, window_at })
    }

    fn read_region(&mut self, mut offset: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let (part, bytes) = first_part(offset, data.len());
            let (piece, rest) = data.split_at_mut(bytes);
            piece.fill(0);
            match part {
                Part::Common(at) => self.read_common(at, piece),
                Part::Isr(0) => {
                    if let Some(byte) = piece.first_mut() {
                        *byte = self.vectors.isr.swap(0, Ordering::SeqCst);
                    }
                }
                Part::Device(at) => self.core.read_config(at, piece),
                Part::Table(at) => self.vectors.msix().read_table(at, piece),
                Part::Pending(at) => self.vectors.msix().read_pending(at, piece),
                Part::Notify(_) | Part::Isr(_) | Part::Nothing => {}
            }
            (offset, data) = (offset.wrapping_add(bytes as u64), rest);
        }
    }

    fn write_region(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (part, bytes) = first_part(offset, data.len());
            let (piece, rest) = data.split_at(bytes);
            match part {
                Part::Common(at) => self.write_common(at, piece),
                Part::Device(at) => self.core.write_config(at, piece),
                Part::Table(at) => self.vectors.msix().write_table(at, piece),
                Part::Notify(at) => self.notify(at, bytes),
                Part::Isr(_) | Part::Pending(_) | Part::Nothing => {}
            }
            (offset, data) = (offset.wrapping_add(bytes as u64), rest);
        }
    }

    /// Rings the doorbells of the queues whose registers are written. The address selects the queue, not the
    /// value.
    fn notify(&mut self, at: u64, bytes: usize) {
        for lane in lanes(at, bytes, |at| (at - at % NOTIFY_STRIDE, 4)) {
            let queue = u32::try_from(lane.register / NOTIFY_STRIDE).unwrap_or(u32::MAX);
            self.core.write(Reg::QueueNotify, queue);
        }
    }

    fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        for lane in lanes(offset, data.len(), locate) {
            if let Some(field) = field(lane.register) {
                lane.fill(self.read_field(field), data);
            }
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        for lane in lanes(offset, data.len(), locate) {
            if let Some(field) = field(lane.register) {
                let old = if lane.is_whole() { 0 } else { self.read_field(field) };
                self.write_field(field, lane.merge(old, data));
            }
        }
    }

    fn read_field(&mut self, field: Field) -> u32 {
        let vector =
            |event: Option<&AtomicU16>| event.map_or(NO_VECTOR, |event| event.load(Ordering::SeqCst));
        match field {
            Field::Core(reg) => self.core.read(reg),
            Field::ConfigVector => vector(Some(&self.vectors.config)).into(),
            Field::QueueCount => u32::try_from(self.core.doorbells().len()).unwrap_or(0),
            Field::QueueVector => vector(self.selected()).into(),
            Field::NotifyOffset if self.selected().is_some() => self.core.read(Reg::QueueSel),
            Field::NotifyOffset => 0,
        }
    }

    fn write_field(&mut self, field: Field, value: u32) {
        match field {
            // A driver may not write 0 to QueueReady (virtio 4.1.4.3.2), so a queue is never taken back.
            Field::Core(Reg::QueueReady) if value != 1 => {}
            Field::Core(Reg::Status) => {
                self.core.write(Reg::Status, value);
                if value == 0 {
                    self.vectors.reset();
                }
            }
            Field::Core(reg) => self.core.write(reg, value),
            Field::ConfigVector => self.vectors.map(Some(&self.vectors.config), value),
            Field::QueueVector => self.vectors.map(self.selected(), value),
            Field::QueueCount | Field::NotifyOffset => {}
        }
    }

    fn selected(&self) -> Option<&AtomicU16> {
        self.vectors.queues.get(usize::try_from(self.core.queue_sel()).ok()?)
    }

    /// Returns offset and length of the access that the window in configuration space asks for. `None` if the
    /// driver could not make that access to the region itself (virtio 4.1.4.9.1).
    fn window(&self) -> Option<(u64, usize)> {
        let word = |at| {
            let mut bytes = [0; 4];
            self.space.get(self.window_at + at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (bar, offset, length) = (word(CAP_BAR) & 0xff, word(CAP_OFFSET), word(CAP_LENGTH));
        let fits = bar == 0 && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        (fits && u64::from(offset) < BAR_BYTES).then_some((u64::from(offset), usize::try_from(length).ok()?))
    }

    fn window_data(&self) -> Range<usize> {
        self.window_at + CAP_DATA..self.window_at + CAP_DATA + 4
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if touches(&self.window_data(), offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut bytes = [0; 4];
            self.read_region(at, &mut bytes[..length]);
            self.space.put(self.window_at + CAP_DATA, &bytes[..length]);
        }
        self.space.get(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
        if touches(&self.window_data(), offset, data.len())
            && let Some((at, length)) = self.window()
        {
            let mut bytes = [0; 4];
            self.space.get(self.window_at + CAP_DATA, &mut bytes);
            self.write_region(at, &bytes[..length]);
        }
        let control_at = self.msix_at + 2;
        if touches(&(control_at..control_at + 2), offset, data.len()) {
            let mut control = [0; 2];
            self.space.get(control_at, &mut control);
            self.vectors.msix().set_control(u16::from_le_bytes(control));
        }
    }

    fn memory(&self) -> Memory {
        self.space.memory()
    }
}

/// The function's memory. The bus has found the function already, so offsets count from its base.
impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.read_region(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.write_region(offset, data);
        Outcome::Continue
    }
}

impl Transport for PciTransport {
    fn doorbells(&self) -> &[Arc<EventFd>] {
        self.core.doorbells()
    }

    fn stop(&mut self) {
        self.core.reset();
        self.vectors.reset();
    }
}

/// Returns the number of vectors of a device's function: one for each queue and one for its configuration.
pub fn vectors_of(device: &dyn VirtioDevice) -> u16 {
    let vectors = device.queue_sizes().len() as u64 + 1;
    u16::try_from(vectors.min(VECTORS_MAX)).unwrap_or(u16::MAX)
}

fn identity(device_id: u32) -> Identity {
    let class = match device_id {
        // Mass storage; communication; everything else is unclassified.
        2 => [0x01, 0x80, 0],
        3 => [0x07, 0x80, 0],
        _ => [0xff, 0, 0],
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_0 + u16::try_from(device_id & 0x3f).unwrap_or(0),
        revision: REVISION,
        class,
        subsystem: [VENDOR, SUBSYSTEM],
    }
}

/// Adds the capabilities that tell where the parts of the region are (virtio 4.1.4). Returns the offsets of
/// MSI-X's capability and of the window.
fn add_capabilities(space: &mut ConfigSpace, vectors: u16) -> (usize, usize) {
    let queues = u64::from(vectors.saturating_sub(1));
    space.add_capability(CAP_VENDOR, &capability(CAP_COMMON, COMMON, COMMON_BYTES, &[]), &[]);
    let multiplier = (NOTIFY_STRIDE & 0xff) as u8;
    let notify = capability(CAP_NOTIFY, NOTIFY, queues * NOTIFY_STRIDE, &[multiplier, 0, 0, 0]);
    space.add_capability(CAP_VENDOR, &notify, &[]);
    space.add_capability(CAP_VENDOR, &capability(CAP_ISR, ISR, 1, &[]), &[]);
    space.add_capability(CAP_VENDOR, &capability(CAP_DEVICE, DEVICE, DEVICE_BYTES, &[]), &[]);
    // The driver may write bar, offset, length and data of the window.
    let mut open = [0xff; CAP_DATA + 4 - 2];
    open[..CAP_BAR - 2].fill(0);
    open[CAP_BAR - 1..CAP_OFFSET - 2].fill(0);
    let window = space.add_capability(CAP_VENDOR, &capability(CAP_PCI, 0, 0, &[0; 4]), &open);
    let low = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    let mut table = Vec::from(vectors.saturating_sub(1).to_le_bytes());
    // Table and pending bits are in base address register 0, whose number is in the lowest three bits.
    table.extend(low(TABLE));
    table.extend(low(PENDING));
    let control = (msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes();
    let msix = space.add_capability(msix::CAPABILITY, &table, &control);
    (usize::from(msix), usize::from(window))
}

/// Builds a struct virtio_pci_cap, from its third byte on.
fn capability(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let low = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    let bytes = u8::try_from(CAP_DATA + more.len()).unwrap_or(0);
    let mut body = vec![bytes, kind, 0, 0, 0, 0];
    body.extend(low(offset));
    body.extend(low(length));
    body.extend(more);
    body
}
