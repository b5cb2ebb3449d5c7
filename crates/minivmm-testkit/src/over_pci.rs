//! A device behind PCI for drivers that speak virtio-mmio's registers: each access becomes one to the
//! function's region, so that every suite runs over both transports (`MINIVMM_TRANSPORT=pci`).
//!
//! Vector 0 is the configuration's, vector 1 + q queue q's; InterruptStatus is made of those that came.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use minivmm::bus::{BusDevice, Outcome};
use minivmm::mem::Ram;
use minivmm::pci::memory::DoorbellSink;
use minivmm::pci::msix::{Message, MessageSink};
use minivmm::pci::root::{OnBus, PciFunction, PciRoot};
use minivmm::virtio::mmio::MmioTransport;
use minivmm::virtio::pci::{NOTIFY, PciTransport};
use minivmm::virtio::{Transport, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

/// Where the function's memory is, in the window that the bus has.
pub const PLACE: u64 = 0xd100_8000;
/// The window for memory of functions.
pub const WINDOW: std::ops::Range<u64> = 0xd100_0000..0xd110_0000;

/// Doorbells that nobody catches.
struct NoDoorbells;

impl DoorbellSink for NoDoorbells {
    fn place(&mut self, _: Option<u64>) -> io::Result<()> {
        Ok(())
    }
}

/// Messages that a function has sent, in their order, each with its vector.
#[derive(Clone, Default)]
pub struct Sent(Arc<Mutex<Vec<(u16, Message)>>>, Vec<Message>);

impl Sent {
    /// Takes what was sent since the last time.
    pub fn take(&self) -> Vec<(u16, Message)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// Returns how many messages were sent since they were last taken.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl MessageSink for Sent {
    fn route(&mut self, vector: u16, message: Message) -> io::Result<()> {
        let vector = usize::from(vector);
        self.1.resize(self.1.len().max(vector + 1), Message::default());
        self.1[vector] = message;
        Ok(())
    }

    fn send(&self, vector: u16) -> io::Result<()> {
        let message = self.1.get(usize::from(vector)).copied().unwrap_or_default();
        self.0.lock().unwrap().push((vector, message));
        Ok(())
    }
}

/// A bus with this function as device 1.
pub fn bus_of(function: Arc<Mutex<dyn PciFunction>>) -> Arc<PciRoot> {
    let on_bus: OnBus = (function, Box::new(NoDoorbells));
    Arc::new(PciRoot::new(WINDOW, [on_bus]))
}
/// Parts of its region.
pub const ISR: u64 = 0x1000;
/// The device's configuration space.
pub const DEVICE: u64 = 0x2000;
/// The table of vectors.
pub const TABLE: u64 = 0x4000;
/// The pending bits of the vectors.
pub const PENDING: u64 = 0x6000;
/// The common configuration's registers.
pub const STATUS: u64 = 0x14;
/// queue_select.
pub const QUEUE_SELECT: u64 = 0x16;
/// queue_msix_vector.
pub const QUEUE_VECTOR: u64 = 0x1a;
/// config_msix_vector.
pub const CONFIG_VECTOR: u64 = 0x10;

/// A device behind the transport that MINIVMM_TRANSPORT names, with virtio-mmio's registers.
pub fn transport(device: Box<dyn VirtioDevice>, ram: Ram, irq: EventFd) -> Behind {
    Behind(if is_pci() {
        Box::new(OverPci::new(device, ram, irq))
    } else {
        Box::new(MmioTransport::new(device, ram, irq).unwrap())
    })
}

/// One of the two.
pub struct Behind(Box<dyn Transport>);

impl BusDevice for Behind {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write(offset, data)
    }
}

impl Transport for Behind {
    fn doorbells(&self) -> &[Arc<EventFd>] {
        self.0.doorbells()
    }

    fn stop(&mut self) {
        self.0.stop();
    }
}

/// Whether MINIVMM_TRANSPORT says so.
pub fn is_pci() -> bool {
    std::env::var("MINIVMM_TRANSPORT").is_ok_and(|name| name == "pci")
}

/// Messages set InterruptStatus and ring the test's interrupt.
struct Sink {
    pending: Arc<AtomicU32>,
    irq: EventFd,
}

impl MessageSink for Sink {
    fn route(&mut self, vector: u16, message: Message) -> io::Result<()> {
        assert_eq!(message, Message { address: 0xfee0_0000, data: vector.into() });
        Ok(())
    }

    fn send(&self, vector: u16) -> io::Result<()> {
        self.pending.fetch_or(if vector == 0 { 2 } else { 1 }, Ordering::SeqCst);
        self.irq.write(1)
    }
}

/// A PCI function that is driven by virtio-mmio's registers.
pub struct OverPci {
    /// The function.
    pub pci: PciTransport,
    pending: Arc<AtomicU32>,
}

impl OverPci {
    /// Maps the function's region and its vectors; each vector rings `irq`.
    pub fn new(device: Box<dyn VirtioDevice>, ram: Ram, irq: EventFd) -> Self {
        let queues = device.queue_sizes().len() as u64;
        let pending = Arc::new(AtomicU32::new(0));
        let sink = Sink { pending: Arc::clone(&pending), irq };
        let mut pci = PciTransport::new(device, ram, PLACE, Box::new(sink)).unwrap();
        let at = capability(&mut pci, 0x11);
        pci.write_config(at + 2, &[0, 0x80]);
        for vector in 0..=queues {
            let entry = TABLE + 16 * vector;
            pci.write(entry, &0xfee0_0000_u64.to_le_bytes());
            pci.write(entry + 8, &vector.to_le_bytes());
        }
        let mut over = Self { pci, pending };
        over.map_vectors();
        over
    }

    /// What a driver does after each reset.
    fn map_vectors(&mut self) {
        self.pci.write(CONFIG_VECTOR, &0_u16.to_le_bytes());
        for queue in 0..self.read16(0x12) {
            self.pci.write(QUEUE_SELECT, &queue.to_le_bytes());
            self.pci.write(QUEUE_VECTOR, &(queue + 1).to_le_bytes());
        }
        self.pci.write(QUEUE_SELECT, &0_u16.to_le_bytes());
    }

    fn read16(&mut self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.pci.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            0x000 => 0x7472_6976,
            0x004 => 2,
            0x008 => {
                let mut id = [0; 2];
                self.pci.read_config(2, &mut id);
                u32::from(u16::from_le_bytes(id)) - 0x1040
            }
            0x060 => self.pending.load(Ordering::SeqCst),
            // The size is the largest until the driver says another.
            0x034 => self.read16(0x18).into(),
            _ => match place(offset) {
                Some((_, _, true)) | None => 0,
                Some((at, width, false)) => {
                    let mut data = [0; 4];
                    self.pci.read(at, &mut data[..width]);
                    u32::from_le_bytes(data)
                }
            },
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x050 => {
                self.pci.write(NOTIFY + 4 * u64::from(value), &value.to_le_bytes()[..2]);
            }
            0x064 => {
                self.pending.fetch_and(!value, Ordering::SeqCst);
            }
            _ => {
                let Some((at, width, _)) = place(offset) else { return };
                // A selector that does not fit is one that is not there.
                let fits = width == 4 || value < 1 << (8 * width);
                let value = if fits { value } else { 0xffff };
                self.pci.write(at, &value.to_le_bytes()[..width]);
                if offset == 0x070 && value == 0 {
                    self.pending.store(0, Ordering::SeqCst);
                    self.map_vectors();
                }
            }
        }
    }
}

/// virtio-mmio's offset in the common configuration: offset, width, and whether mmio only writes it.
fn place(offset: u64) -> Option<(u64, usize, bool)> {
    Some(match offset {
        0x010 => (0x04, 4, false),
        0x014 => (0x00, 4, true),
        0x020 => (0x0c, 4, true),
        0x024 => (0x08, 4, true),
        0x030 => (QUEUE_SELECT, 2, true),
        0x038 => (0x18, 2, true),
        0x044 => (0x1c, 2, false),
        0x070 => (STATUS, 1, false),
        0x080 => (0x20, 4, true),
        0x084 => (0x24, 4, true),
        0x090 => (0x28, 4, true),
        0x094 => (0x2c, 4, true),
        0x0a0 => (0x30, 4, true),
        0x0a4 => (0x34, 4, true),
        0x0fc => (0x15, 1, false),
        _ => return None,
    })
}

impl BusDevice for OverPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(0x100) {
            self.pci.read(DEVICE.saturating_add(at).min(NOTIFY - 1), data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        if let Some(at) = offset.checked_sub(0x100) {
            self.pci.write(DEVICE.saturating_add(at).min(NOTIFY - 1), data);
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        Outcome::Continue
    }
}

impl Transport for OverPci {
    fn doorbells(&self) -> &[Arc<EventFd>] {
        self.pci.doorbells()
    }

    fn stop(&mut self) {
        self.pci.stop();
    }
}

/// Offset of the first capability with this ID.
pub fn capability(pci: &mut PciTransport, id: u8) -> usize {
    let mut at = [0];
    pci.read_config(0x34, &mut at);
    while at[0] != 0 {
        let mut head = [0; 2];
        pci.read_config(at[0].into(), &mut head[..1]);
        pci.read_config(usize::from(at[0]) + 1, &mut head[1..]);
        if head[0] == id {
            return at[0].into();
        }
        at[0] = head[1];
    }
    panic!("no capability {id:#x}")
}
