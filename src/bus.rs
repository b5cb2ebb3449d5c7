//! Port and MMIO dispatch: finds the device that owns an address and hands it the access.
//!
//! Owns the map from ranges to devices. Knows nothing of KVM or of what a device is. A device never reaches
//! into the VMM: it answers an access with an [`Outcome`], and the vCPU loop acts on it. [`lanes`] cuts an
//! access into the registers that it touches.

pub mod lanes;

use std::sync::{Arc, Mutex, MutexGuard};

use crate::sync::unpoisoned;

/// What the machine must do after a device has handled an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Continue.
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

/// A device behind ports or MMIO. `offset` counts from the start of the range that the device was placed at.
///
/// Accesses of every width from 0 to 8 bytes and every alignment arrive here as the guest made them. None
/// reaches beyond the range: the bus cuts an access where a range begins or ends. A device answers accesses
/// that it does not know with zeroes, and never panics. A write takes effect on every register that it touches,
/// wherever it begins.
pub trait BusDevice: Send {
    /// Fills `data`, which is already zeroed, with what the guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Handles a write by the guest.
    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome;
}

/// What a range of addresses leads to. It is a device behind a lock, or one that several CPUs use at once and
/// that has locks of its own where it needs them.
pub trait SharedDevice: Send + Sync {
    /// Reads as [`BusDevice::read`] does.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes as [`BusDevice::write`] does.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome;
}

impl<T: BusDevice + ?Sized> SharedDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(self).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        lock(self).write(offset, data)
    }
}

/// Why a device could not be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices would own the same address.
    #[error("cannot place {name} at {base:#x}, {len:#x} bytes: the range overlaps that of {other}")]
    Overlap {
        /// The device that was to be placed.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Length of the range in bytes.
        len: u64,
        /// The device that owns part of the range already.
        other: &'static str,
    },
    /// The range has no bytes, or ends beyond the address space.
    #[error(
        "cannot place {name} at {base:#x}, {len:#x} bytes: the range is empty or ends beyond the address space"
    )]
    Range {
        /// The device that was to be placed.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Length of the range in bytes.
        len: u64,
    },
}

struct Slot {
    name: &'static str,
    base: u64,
    len: u64,
    device: Arc<dyn SharedDevice>,
}

/// An address space: ports, or MMIO. It is built once and then shared by all vCPUs.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// Creates an empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base..base + len`.
    pub fn place(
        &mut self,
        name: &'static str,
        base: u64,
        len: u64,
        device: Arc<dyn SharedDevice>,
    ) -> Result<(), BusError> {
        let overlap = |other: &'static str| BusError::Overlap { name, base, len, other };
        let end = base.checked_add(len).filter(|_| len > 0).ok_or(BusError::Range { name, base, len })?;
        if let Some(slot) = self.slots.iter().find(|slot| base < slot.base + slot.len && slot.base < end) {
            return Err(overlap(slot.name));
        }
        let at = self.slots.partition_point(|slot| slot.base < base);
        self.slots.insert(at, Slot { name, base, len, device });
        Ok(())
    }

    /// Reads for the guest. Addresses that no device owns read as all ones, as on a PC.
    pub fn read(&self, mut addr: u64, mut data: &mut [u8]) {
        loop {
            let (slot, bytes) = self.piece(addr, data.len());
            let (piece, rest) = data.split_at_mut(bytes);
            match slot {
                Some(slot) => {
                    piece.fill(0);
                    slot.device.read(addr - slot.base, piece);
                }
                None => piece.fill(0xff),
            }
            if rest.is_empty() {
                return;
            }
            (addr, data) = (addr.wrapping_add(bytes as u64), rest);
        }
    }

    /// Writes for the guest. Addresses that no device owns ignore the write. After an outcome other than
    /// [`Outcome::Continue`] the rest of the access is dropped.
    pub fn write(&self, mut addr: u64, mut data: &[u8]) -> Outcome {
        loop {
            let (slot, bytes) = self.piece(addr, data.len());
            let (piece, rest) = data.split_at(bytes);
            let outcome = slot.map_or(Outcome::Continue, |slot| slot.device.write(addr - slot.base, piece));
            if rest.is_empty() || outcome != Outcome::Continue {
                return outcome;
            }
            (addr, data) = (addr.wrapping_add(bytes as u64), rest);
        }
    }

    /// Returns the owner of `addr`, and how many of `len` bytes from there on have the same owner.
    fn piece(&self, addr: u64, len: usize) -> (Option<&Slot>, usize) {
        let limit = |end: u64| len.min(usize::try_from(end - addr).unwrap_or(len));
        let after = self.slots.partition_point(|slot| slot.base <= addr);
        let before = after.checked_sub(1).and_then(|at| self.slots.get(at));
        if let Some(slot) = before.filter(|slot| addr - slot.base < slot.len) {
            return (Some(slot), limit(slot.base + slot.len));
        }
        (None, self.slots.get(after).map_or(len, |next| limit(next.base)))
    }
}

/// Locks a device even if the lock is poisoned.
///
/// A poisoned lock means that a thread panicked while it held the lock, and its error is already on its way to
/// `main`. The device's state is plain data, so the other threads continue until they are stopped.
fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(device.lock())
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

    fn device(value: u8) -> Arc<Mutex<Echo>> {
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

    /// A device of single bytes: each byte reads as its address, and writes are kept.
    #[derive(Default)]
    struct Bytes(Vec<(u64, u8)>);
    impl BusDevice for Bytes {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (at, byte) in (offset..).zip(data) {
                *byte = 0x80 + u8::try_from(at).unwrap();
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
            self.0.extend((offset..).zip(data.iter().copied()));
            if data.contains(&0xee) { Outcome::Reset } else { Outcome::Continue }
        }
    }

    #[test]
    fn an_access_across_an_edge_reaches_every_device_that_it_touches() {
        let [low, high] = [(); 2].map(|()| Arc::new(Mutex::new(Bytes::default())));
        let mut bus = Bus::new();
        bus.place("low", 0x10, 4, low.clone()).unwrap();
        bus.place("high", 0x16, 2, high.clone()).unwrap();
        // Compare with the same access made byte by byte.
        let owner = |addr: u64| match addr {
            0x10..0x14 => Some((0, addr - 0x10)),
            0x16..0x18 => Some((1, addr - 0x16)),
            _ => None,
        };
        for addr in 0..0x20_u64 {
            for width in 0..=8_usize {
                let bytes = || (addr..).take(width);
                let mut data = vec![0x55; width];
                bus.read(addr, &mut data);
                let expected: Vec<u8> = bytes()
                    .map(|at| owner(at).map_or(0xff, |(_, at)| 0x80 + u8::try_from(at).unwrap()))
                    .collect();
                assert_eq!(data, expected, "{addr:#x} {width}");
                let values: Vec<u8> = (1..=8).take(width).collect();
                assert_eq!(bus.write(addr, &values), Outcome::Continue);
                for (number, device) in [&low, &high].into_iter().enumerate() {
                    let expected: Vec<(u64, u8)> = bytes()
                        .zip(&values)
                        .filter_map(|(at, value)| {
                            owner(at).filter(|(who, _)| *who == number).map(|(_, at)| (at, *value))
                        })
                        .collect();
                    assert_eq!(std::mem::take(&mut device.lock().unwrap().0), expected, "{addr:#x} {width}");
                }
            }
        }
        assert_eq!(bus.write(0x12, &[0, 0xee, 0, 0, 1]), Outcome::Reset);
        assert_eq!(
            (low.lock().unwrap().0.len(), high.lock().unwrap().0.len()),
            (2, 0),
            "the end is the last"
        );
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
