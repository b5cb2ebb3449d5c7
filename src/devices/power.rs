//! Power-off and reset: ACPI's sleep and reset registers, the i8042's reset line, and the reset control
//! register of PC chipsets.
//!
//! Owns the registers (ACPI 6.5, 4.8.3.6 and 4.8.3.7; the PC's ports 0x64 and 0xCF9). The FADT and DSDT
//! announce them (`boot::acpi`); what both must agree on is in `layout`.

use crate::bus::lanes::each_byte;
use crate::bus::{BusDevice, Outcome};
use crate::layout;
use crate::layout::{ACPI_RESET_VALUE as RESET_VALUE, ACPI_S5_SLEEP_TYPE as S5_SLEEP_TYPE};

/// Offsets of the registers.
const SLEEP_CONTROL: u64 = 0;
#[cfg(test)]
const SLEEP_STATUS: u64 = layout::PORT_ACPI_SLEEP_STATUS - layout::PORT_ACPI_SLEEP_CONTROL;
const RESET: u64 = layout::PORT_ACPI_RESET - layout::PORT_ACPI_SLEEP_CONTROL;
/// Length of all three registers in bytes.
pub const ACPI_LEN: u64 = 3;

/// SLP_EN in the sleep control register; the sleep type is in the three bits from bit 2.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep control, sleep status and reset registers of hardware-reduced ACPI.
#[derive(Debug, Default)]
pub struct AcpiRegisters;

impl BusDevice for AcpiRegisters {
    /// Reads as 0: the status never shows a wake-up, because soft off is the only sleep state.
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        each_byte(offset, data, |register, value| match (register, value) {
            (SLEEP_CONTROL, _) if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5_SLEEP_TYPE => {
                Outcome::Shutdown
            }
            (RESET, RESET_VALUE) => Outcome::Reset,
            _ => Outcome::Continue,
        })
    }
}

/// Length of the i8042's ports, 0x60 to 0x64.
pub const I8042_LEN: u64 = 5;
/// Offset of the command and status port.
const COMMAND: u64 = 4;
/// The command that pulses the reset line.
const COMMAND_RESET: u8 = 0xfe;
/// The command that writes the output port, whose bit 0 is the reset line. The value follows on the data
/// port.
const COMMAND_WRITE_OUTPUT: u8 = 0xd1;
/// The status: output buffer full, for ever; input buffer empty. A driver that probes for a keyboard finds
/// the output buffer stuck and concludes at once that there is no controller. A driver that wants to reset
/// the machine first waits for the input buffer, which is always ready.
const STATUS: u8 = 0x01;

/// The reset line of a keyboard controller without a keyboard. The FADT says that there is no controller.
#[derive(Debug, Default)]
pub struct I8042 {
    expects_output: bool,
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = if register == COMMAND { STATUS } else { 0 };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        each_byte(offset, data, |register, value| {
            let expects_output = std::mem::take(&mut self.expects_output);
            match register {
                COMMAND if value == COMMAND_RESET => return Outcome::Reset,
                COMMAND => self.expects_output = value == COMMAND_WRITE_OUTPUT,
                0 if expects_output && value & 1 == 0 => return Outcome::Reset,
                _ => {}
            }
            Outcome::Continue
        })
    }
}

/// Length of the reset control register's ports, 0xCF8 to 0xCFB.
pub const RESET_CONTROL_LEN: u64 = 4;
/// Offset of the register.
const CONTROL: u64 = 1;
/// A hard reset, not only of the CPU; here both end the machine.
const SYSTEM_RESET: u8 = 1 << 1;
/// The reset itself, which happens when this bit becomes 1.
const RESET_CPU: u8 = 1 << 2;
/// A reset that takes the power away for a moment.
const FULL_RESET: u8 = 1 << 3;

/// Port 0xCF9, which resets the machine (used by Linux with `reboot=pci`, and by firmware and boot loaders).
/// A 32-bit access to 0xCF8 belongs to PCI's address register, even if there is no PCI: a kernel that probes
/// for a bus must not reset the machine.
#[derive(Debug, Default)]
pub struct ResetControl {
    /// The kind of reset that the guest has chosen.
    kind: u8,
}

/// Returns `true` if an access is one of PCI's address register.
fn is_address(offset: u64, len: usize) -> bool {
    offset == 0 && len == 4
}

impl BusDevice for ResetControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let is_address = is_address(offset, data.len());
        for (register, byte) in (offset..).zip(data) {
            *byte = if register == CONTROL && !is_address { self.kind } else { 0xff };
        }
    }

    /// The bit that resets never stays set, so every write of 1 changes it.
    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        if is_address(offset, data.len()) {
            return Outcome::Continue;
        }
        each_byte(offset, data, |register, value| {
            if register != CONTROL {
                return Outcome::Continue;
            }
            self.kind = value & (SYSTEM_RESET | FULL_RESET);
            if value & RESET_CPU == 0 { Outcome::Continue } else { Outcome::Reset }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_with_sleep_enable_powers_off_and_nothing_else_does() {
        for value in 0..=255 {
            let expected = if value & 0b11_1100 == 0b11_0100 { Outcome::Shutdown } else { Outcome::Continue };
            assert_eq!(AcpiRegisters.write(SLEEP_CONTROL, &[value]), expected, "{value:#x}");
            assert_eq!(AcpiRegisters.write(SLEEP_STATUS, &[value]), Outcome::Continue);
        }
    }

    #[test]
    fn the_reset_register_takes_its_value_only() {
        assert_eq!(AcpiRegisters.write(RESET, &[RESET_VALUE]), Outcome::Reset);
        assert_eq!(AcpiRegisters.write(RESET, &[0]), Outcome::Continue);
        assert_eq!(AcpiRegisters.write(RESET, &[]), Outcome::Continue);
    }

    #[test]
    fn a_wide_write_reaches_every_register_that_it_touches() {
        assert_eq!(AcpiRegisters.write(SLEEP_CONTROL, &[0, 0, RESET_VALUE]), Outcome::Reset);
        assert_eq!(AcpiRegisters.write(SLEEP_STATUS, &[0, RESET_VALUE]), Outcome::Reset);
        assert_eq!(AcpiRegisters.write(SLEEP_CONTROL, &[0x34, 0, RESET_VALUE]), Outcome::Shutdown);
        let mut i8042 = I8042::default();
        assert_eq!(i8042.write(0, &[0, 0, 0, 0, 0xfe]), Outcome::Reset);
        let mut all = [0xee; 5];
        i8042.read(0, &mut all);
        assert_eq!(all, [0, 0, 0, 0, STATUS]);
    }

    #[test]
    fn the_reset_control_register_resets_by_its_bit_and_remembers_the_rest() {
        let mut control = ResetControl::default();
        for value in 0..=255_u8 {
            let expected = if value & 4 == 0 { Outcome::Continue } else { Outcome::Reset };
            assert_eq!(control.write(1, &[value]), expected, "{value:#x}");
            let mut data = [0xee; 2];
            control.read(1, &mut data);
            assert_eq!(data, [value & 0x0a, 0xff]);
        }
        // The sequence that Linux writes with reboot=pci.
        assert_eq!(control.write(1, &[0x02]), Outcome::Continue);
        assert_eq!(control.write(1, &[0x0e]), Outcome::Reset);
        assert_eq!(control.write(0, &[0, 0x0e]), Outcome::Reset);
        assert_eq!(control.write(2, &[0x0e]), Outcome::Continue);
        assert_eq!(control.write(1, &[]), Outcome::Continue);
    }

    /// A kernel that scans for PCI writes 0x80000000 and more there, whether there is a bus or not.
    #[test]
    fn an_address_of_pci_is_no_reset() {
        let mut control = ResetControl::default();
        for device in 0..256_u32 {
            let address = 1 << 31 | device << 8;
            assert_eq!(control.write(0, &address.to_le_bytes()), Outcome::Continue, "{address:#x}");
        }
        let mut data = [0; 4];
        control.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn the_keyboard_controller_resets_by_pulse_and_by_output_port() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.write(4, &[0xfe]), Outcome::Reset);
        assert_eq!(i8042.write(0, &[0xfe]), Outcome::Continue);
        assert_eq!(i8042.write(4, &[0xd1]), Outcome::Continue);
        assert_eq!(i8042.write(0, &[0xfe]), Outcome::Reset);
        assert_eq!(i8042.write(4, &[0xd1]), Outcome::Continue);
        assert_eq!(i8042.write(0, &[0xdf]), Outcome::Continue);
        assert_eq!(i8042.write(0, &[0xfe]), Outcome::Continue);
        let mut status = [0];
        i8042.read(4, &mut status);
        assert_eq!(status[0] & 2, 0, "the input buffer is always ready");
    }
}
