//! Messages as interrupts: KVM's routing table, and an irqfd for each vector.
//!
//! Owns the numbers of the routes (GSIs) and the table, which KVM accepts only as a whole. The first 24
//! routes are the lines of PIC and IOAPIC, the same as KVM's defaults.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::KvmError;
use crate::pci::msix::{Message, MessageSink};
use crate::sync::unpoisoned;

/// The number of IOAPIC lines.
const LINES: u32 = 24;
/// The number of lines of one PIC; there are two.
const PIC_LINES: u32 = 8;

/// The routing table of one VM.
pub struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    entries: Vec<kvm_irq_routing_entry>,
    next: u32,
}

impl Routes {
    /// Creates the table with KVM's default routes.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, table: Mutex::new(Table { entries: lines(), next: LINES }) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        unpoisoned(self.table.lock())
    }

    /// Allocates `count` vectors for one function, each with an irqfd.
    pub fn vectors(self: &Arc<Self>, count: u16) -> Result<Vectors, KvmError> {
        let refused = |error| KvmError::Refused("an interrupt by message (irqfd)", error);
        let mut table = self.table();
        let first = table.next;
        table.next += u32::from(count);
        let mut events = Vec::with_capacity(usize::from(count));
        for gsi in first..table.next {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|error| refused(error.into()))?;
            self.vm.register_irqfd(&event, gsi).map_err(refused)?;
            events.push(event);
        }
        drop(table);
        Ok(Vectors { routes: Arc::clone(self), first, events })
    }

    /// Makes route `gsi` deliver `message` from now on.
    fn set(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut table = self.table();
        table.entries.retain(|entry| entry.gsi != gsi);
        table.entries.push(message_route(gsi, message));
        let routing = KvmIrqRouting::from_entries(&table.entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }
}

/// The vectors of one function.
pub struct Vectors {
    routes: Arc<Routes>,
    first: u32,
    events: Vec<EventFd>,
}

impl MessageSink for Vectors {
    fn route(&mut self, vector: u16, message: Message) -> io::Result<()> {
        self.routes.set(self.first + u32::from(vector), message)
    }

    fn send(&self, vector: u16) -> io::Result<()> {
        self.events.get(usize::from(vector)).map_or(Ok(()), |event| event.write(1))
    }
}

/// Returns the routes of the lines. Each leads to the IOAPIC pin of its number, and the first 16 also lead to
/// the PICs.
fn lines() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for line in 0..LINES {
        entries.push(line_route(line, KVM_IRQCHIP_IOAPIC, line));
        if line < PIC_LINES {
            entries.push(line_route(line, KVM_IRQCHIP_PIC_MASTER, line));
        } else if line < 2 * PIC_LINES {
            entries.push(line_route(line, KVM_IRQCHIP_PIC_SLAVE, line - PIC_LINES));
        }
    }
    entries
}

fn line_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let half = |shift: u32| ((message.address >> shift) & 0xffff_ffff) as u32;
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: half(0),
        address_hi: half(32),
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_leads_to_the_ioapic_and_the_first_sixteen_to_a_pic() {
        let entries = lines();
        assert_eq!(entries.len(), 40);
        // SAFETY: every bit pattern is a valid pin and chip, and the entries of lines have both.
        let chips: Vec<_> = entries.iter().map(|e| (e.gsi, unsafe { e.u.irqchip })).collect();
        for line in 0..LINES {
            let on: Vec<_> = chips.iter().filter(|(gsi, _)| *gsi == line).collect();
            assert!(on.iter().any(|(_, chip)| chip.irqchip == KVM_IRQCHIP_IOAPIC && chip.pin == line));
            assert_eq!(on.len(), if line < 16 { 2 } else { 1 });
        }
        let slave = chips.iter().find(|(gsi, chip)| *gsi == 9 && chip.irqchip == KVM_IRQCHIP_PIC_SLAVE);
        assert_eq!(slave.map(|(_, chip)| chip.pin), Some(1));
    }
}
