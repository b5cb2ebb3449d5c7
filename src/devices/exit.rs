//! How a guest reports its end: the exit port of bare-metal guests, and pvpanic.
//!
//! Owns their registers (QEMU's isa-debug-exit and docs/specs/pvpanic). What follows from a report is the
//! vCPU loop's.

use crate::bus::{BusDevice, Outcome};

/// The exit port. The guest ends with the byte that it writes as its status.
#[derive(Debug, Default)]
pub struct ExitPort;

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) -> Outcome {
        data.first().map_or(Outcome::Continue, |&value| Outcome::Exit(value))
    }
}

/// The guest has panicked and will do nothing about it.
const PANICKED: u8 = 1 << 0;
/// The guest has panicked, and a crash kernel is about to run.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device. A read returns the known events; a write reports those that occurred.
#[derive(Debug, Default)]
pub struct Pvpanic {
    /// `true` once a crash was reported: a guest may write any number of times, and is reported once.
    crash_reported: bool,
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Outcome {
        match data.first() {
            Some(event) if event & PANICKED != 0 => Outcome::GuestPanic,
            Some(event) if event & CRASH_LOADED != 0 => {
                if !std::mem::replace(&mut self.crash_reported, true) {
                    log::warn!("the guest has panicked and starts its crash kernel");
                }
                Outcome::Continue
            }
            _ => Outcome::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_port_hands_on_the_byte() {
        assert_eq!(ExitPort.write(0, &[7, 0, 0, 0]), Outcome::Exit(7));
        assert_eq!(ExitPort.write(0, &[]), Outcome::Continue);
    }

    #[test]
    fn pvpanic_ends_the_vm_unless_a_crash_kernel_runs() {
        for (event, outcome) in [(1, Outcome::GuestPanic), (3, Outcome::GuestPanic), (2, Outcome::Continue)] {
            assert_eq!(Pvpanic::default().write(0, &[event]), outcome, "{event}");
        }
        let mut data = [0];
        Pvpanic::default().read(0, &mut data);
        assert_eq!(data, [3]);
    }
}
