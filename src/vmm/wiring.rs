//! Connects virtio devices to their transports: addresses, doorbells, interrupt lines and messages.
//!
//! Owns which place a device gets. PCI functions are in the order of the devices, so that a guest finds vda
//! first; so are virtio-mmio devices.

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::machine::Planned;
use super::{VmmError, host, preflight};
use crate::boot::MmioDevice;
use crate::bus::Bus;
use crate::kvm::doorbells::Doorbells;
use crate::kvm::{self, routes::Routes};
use crate::layout;
use crate::mem::Ram;
use crate::pci::root::{ECAM_BYTES, Ecam, OnBus, PciMemory, PciRoot};
use crate::virtio::TransportChoice;
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::virtio::pci::{BAR_BYTES, NOTIFY, NOTIFY_STRIDE, PciTransport, vectors_of};
use crate::virtio::{Transport, VirtioDevice};

const _: () = assert!(BAR_BYTES == layout::PCI_MEMORY_STRIDE);
const _: () = assert!(ECAM_BYTES == layout::PCI_ECAM_END - layout::PCI_ECAM);

/// Everything that the guest reaches through memory accesses.
#[derive(Default)]
pub struct Wired {
    /// The bus on which all of it is placed.
    pub mmio: Bus,
    /// The transports of the devices, in order.
    pub transports: Vec<Arc<Mutex<dyn Transport>>>,
    /// The virtio-mmio devices, which must be announced to the guest.
    pub announced: Vec<MmioDevice>,
    /// The PCI bus, or `None` if no device is on it.
    pub root: Option<Arc<PciRoot>>,
}

/// Gives each device its place.
pub fn connect(vm: &Arc<VmFd>, ram: &Ram, devices: Vec<Planned>) -> Result<Wired, VmmError> {
    let asked = devices.iter().filter(|(_, transport)| *transport == TransportChoice::Mmio).count();
    preflight::too_many_mmio(asked)?;
    let mut wired = Wired::default();
    let routes = Arc::new(Routes::new(Arc::clone(vm)));
    let mut functions = Vec::new();
    for (device, transport) in devices {
        match transport {
            TransportChoice::Mmio => connect_mmio(vm, ram, device, &mut wired)?,
            TransportChoice::Pci => {
                let number = functions.len() as u64 + 1;
                functions.push(connect_pci(vm, &routes, ram, device, number, &mut wired)?);
            }
        }
    }
    if !functions.is_empty() {
        let window = layout::PCI_MEMORY..layout::PCI_MEMORY_END;
        let len = window.end - window.start;
        let root = Arc::new(PciRoot::new(window, functions));
        let ecam = Arc::new(Ecam(Arc::clone(&root)));
        wired.mmio.place("PCI configuration space", layout::PCI_ECAM, ECAM_BYTES, ecam)?;
        let memory = Arc::new(PciMemory(Arc::clone(&root)));
        wired.mmio.place("PCI memory", layout::PCI_MEMORY, len, memory)?;
        wired.root = Some(root);
    }
    Ok(wired)
}

fn connect_mmio(
    vm: &VmFd,
    ram: &Ram,
    device: Box<dyn VirtioDevice>,
    wired: &mut Wired,
) -> Result<(), VmmError> {
    let index = wired.announced.len();
    let base = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_STRIDE;
    let irq = layout::VIRTIO_IRQS[index];
    let line = kvm::interrupt(vm, irq)?;
    let transport =
        MmioTransport::new(device, ram.clone(), line).map_err(host("make the doorbells of a device"))?;
    for (queue, doorbell) in (0..).zip(transport.doorbells()) {
        kvm::bind_doorbell(vm, doorbell, base + QUEUE_NOTIFY, queue)?;
    }
    let transport = Arc::new(Mutex::new(transport));
    wired.mmio.place("virtio-mmio", base, layout::VIRTIO_MMIO_STRIDE, transport.clone())?;
    wired.transports.push(transport);
    wired.announced.push(MmioDevice { base, irq });
    Ok(())
}

/// Makes the PCI function for device `number` of the bus. Its doorbells are bound when its BAR is placed.
fn connect_pci(
    vm: &Arc<VmFd>,
    routes: &Arc<Routes>,
    ram: &Ram,
    device: Box<dyn VirtioDevice>,
    number: u64,
    wired: &mut Wired,
) -> Result<OnBus, VmmError> {
    let base = layout::PCI_MEMORY + number * layout::PCI_MEMORY_STRIDE;
    let messages = routes.vectors(vectors_of(&*device))?;
    let transport = PciTransport::new(device, ram.clone(), base, Box::new(messages))
        .map_err(host("make the doorbells of a device"))?;
    let bell = |(queue, event): (u64, &Arc<EventFd>)| (NOTIFY + queue * NOTIFY_STRIDE, Arc::clone(event));
    let doorbells = Doorbells::new(Arc::clone(vm), (0..).zip(transport.doorbells()).map(bell));
    let transport = Arc::new(Mutex::new(transport));
    wired.transports.push(transport.clone());
    Ok((transport, Box::new(doorbells)))
}
