//! Port and MMIO dispatch: finds the device that owns an address and hands it the access.
//!
//! Owns the map from ranges to devices. Knows nothing of KVM or of what a device is. A device never
//! reaches into the VMM: it answers an access with an [`Outcome`], and the vCPU loop acts on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the machine has to do after a device has taken an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Go on.
    Continue,
    /// The guest has powered the machine off.
    Shutdown,
    /// The guest has asked for a reset.
    Reset,
    /// The guest has written this status to the exit port.
    Exit(u8),
    /// The guest has reported a panic (pvpanic).
    GuestPanic,
}

/// A device behind ports or MMIO. `offset` counts from the start of the range it was placed at.
///
/// Accesses of every width from 0 to 8 bytes and every alignment arrive here as the guest made
/// them: a device answers those it does not know with zeroes, and never panics.
pub trait BusDevice: Send {
    /// Fills `data` (already zeroed) with what the guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes.
    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome;
}

/// Why a device could not be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices would answer one address.
    #[error(
        "cannot place {name} at {base:#x}, {len:#x} bytes: the range overlaps that of {other}, or is empty"
    )]
    Overlap {
        /// Whom we tried to place.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Length of the range in bytes.
        len: u64,
        /// Who is there already.
        other: &'static str,
    },
}

struct Slot {
    name: &'static str,
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// An address space: ports, or MMIO. Built once, then shared by all vCPUs.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base..base + len`.
    pub fn place(
        &mut self,
        name: &'static str,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let overlap = |other: &'static str| BusError::Overlap { name, base, len, other };
        let end = base.checked_add(len).ok_or_else(|| overlap("the end of the address space"))?;
        if len == 0 {
            return Err(overlap("nobody"));
        }
        if let Some(slot) = self.slots.iter().find(|slot| base < slot.base + slot.len && slot.base < end) {
            return Err(overlap(slot.name));
        }
        let at = self.slots.partition_point(|slot| slot.base < base);
        self.slots.insert(at, Slot { name, base, len, device });
        Ok(())
    }

    /// A read of the guest's; addresses that nobody owns read as all ones, as on a PC.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr) {
            Some(slot) => {
                data.fill(0);
                lock(&slot.device).read(addr - slot.base, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A write of the guest's; addresses that nobody owns ignore it.
    pub fn write(&self, addr: u64, data: &[u8]) -> Outcome {
        match self.find(addr) {
            Some(slot) => lock(&slot.device).write(addr - slot.base, data),
            None => Outcome::Continue,
        }
    }

    fn find(&self, addr: u64) -> Option<&Slot> {
        let after = self.slots.partition_point(|slot| slot.base <= addr);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        (addr - slot.base < slot.len).then_some(slot)
    }
}

/// A poisoned lock means that a thread failed while it held it; its error is already on its way to
/// `main`, and the device's state is plain data, so the others go on until they are stopped.
fn lock<'a>(device: &'a Arc<Mutex<dyn BusDevice + 'static>>) -> MutexGuard<'a, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Outcome {
            self.0 = data[0];
            Outcome::Exit(self.0)
        }
    }

    fn device(value: u8) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Echo(value)))
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_the_address() {
        let mut bus = Bus::new();
        bus.place("b", 0x20, 0x10, device(0x80)).unwrap();
        bus.place("a", 0x10, 0x10, device(0x40)).unwrap();
        let mut data = [0];
        for (addr, expected) in [(0x10, 0x40), (0x1f, 0x4f), (0x20, 0x80), (0xf, 0xff), (0x30, 0xff)] {
            bus.read(addr, &mut data);
            assert_eq!(data[0], expected, "at {addr:#x}");
        }
        assert_eq!(bus.write(0x2f, &[3]), Outcome::Exit(3));
        assert_eq!(bus.write(0x30, &[3]), Outcome::Continue);
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.place("a", 0x10, 0x10, device(0)).unwrap();
        for (base, len) in [(0x1f, 1), (0x8, 9), (0x10, 0x10), (0, 0x100), (0x40, 0), (u64::MAX, 2)] {
            assert!(bus.place("b", base, len, device(0)).is_err(), "{base:#x} {len:#x}");
        }
    }
}
