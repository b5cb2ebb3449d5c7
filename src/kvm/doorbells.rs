//! Doorbells that follow a PCI function: ioeventfds at addresses that the guest changes.
//!
//! Owns which of a function's doorbells KVM catches, and at which address. The thread of the CPU that wrote
//! the base address register binds and unbinds them.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::pci::memory::DoorbellSink;

/// The doorbells of one function.
pub struct Doorbells {
    vm: Arc<VmFd>,
    /// Each doorbell's offset in the function's memory, and its eventfd. KVM writes the eventfd when the
    /// guest writes anything there, in any width.
    bells: Vec<(u64, Arc<EventFd>)>,
    /// The bound doorbells: the address, and the index in `bells`.
    bound: Vec<(u64, usize)>,
}

impl Doorbells {
    /// Creates doorbells at these offsets. None is bound yet.
    pub fn new(vm: Arc<VmFd>, bells: impl IntoIterator<Item = (u64, Arc<EventFd>)>) -> Self {
        Self { vm, bells: bells.into_iter().collect(), bound: Vec::new() }
    }

    /// Unbinds all doorbells. Tries every one, and returns the first error.
    fn unbind(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for (address, which) in self.bound.drain(..) {
            if let Some((_, event)) = self.bells.get(which)
                && let Err(error) =
                    self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            {
                result = result.and(Err(error.into()));
            }
        }
        result
    }
}

impl DoorbellSink for Doorbells {
    fn place(&mut self, base: Option<u64>) -> io::Result<()> {
        self.unbind()?;
        let Some(base) = base else { return Ok(()) };
        for (which, (offset, event)) in self.bells.iter().enumerate() {
            let address = base + offset;
            self.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?;
            self.bound.push((address, which));
        }
        Ok(())
    }
}
