//! Power-off and reset: ACPI's sleep and reset registers, and the i8042's reset line.
//!
//! Owns the registers (ACPI 6.5, 4.8.3.6 and 4.8.3.7; the PC's port 0x64). That they are there is
//! announced in the FADT and DSDT (`boot::acpi`); what both must agree on is in `layout`.

use crate::bus::{BusDevice, Outcome};
use crate::layout;
use crate::layout::{ACPI_RESET_VALUE as RESET_VALUE, ACPI_S5_SLEEP_TYPE as S5_SLEEP_TYPE};

/// Offsets of the registers.
const SLEEP_CONTROL: u64 = 0;
#[cfg(test)]
const SLEEP_STATUS: u64 = layout::PORT_ACPI_SLEEP_STATUS - layout::PORT_ACPI_SLEEP_CONTROL;
const RESET: u64 = layout::PORT_ACPI_RESET - layout::PORT_ACPI_SLEEP_CONTROL;
/// Length of all three, in bytes.
pub const ACPI_LEN: u64 = 3;

/// SLP_EN of the sleep control register; the sleep type is in the three bits from 2.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep control, sleep status and reset registers of hardware-reduced ACPI.
#[derive(Debug, Default)]
pub struct AcpiRegisters;

impl BusDevice for AcpiRegisters {
    /// The status never shows a wake-up, because S5 is all there is.
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (SLEEP_CONTROL, &[value, ..])
                if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5_SLEEP_TYPE =>
            {
                Outcome::Shutdown
            }
            (RESET, &[RESET_VALUE, ..]) => Outcome::Reset,
            _ => Outcome::Continue,
        }
    }
}

/// Length of the i8042's ports, 0x60 to 0x64.
pub const I8042_LEN: u64 = 5;
/// Offset of the command and status port.
const COMMAND: u64 = 4;
/// Pulse the reset line.
const COMMAND_RESET: u8 = 0xfe;
/// Write the output port, whose bit 0 is the reset line: the value follows on the data port.
const COMMAND_WRITE_OUTPUT: u8 = 0xd1;
/// Output buffer full, for ever; input buffer empty. A driver that looks for a keyboard finds the
/// buffer stuck and concludes at once that no controller is there; a driver that wants to reset the
/// machine first waits for the input buffer, which is always ready.
const STATUS: u8 = 0x01;

/// The reset line of a keyboard controller that has no keyboard. The FADT says that there is none.
#[derive(Debug, Default)]
pub struct I8042 {
    expects_output: bool,
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (COMMAND, Some(first)) = (offset, data.first_mut()) {
            *first = STATUS;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        let Some(&value) = data.first() else { return Outcome::Continue };
        let expects_output = std::mem::take(&mut self.expects_output);
        match offset {
            COMMAND if value == COMMAND_RESET => return Outcome::Reset,
            COMMAND => self.expects_output = value == COMMAND_WRITE_OUTPUT,
            0 if expects_output && value & 1 == 0 => return Outcome::Reset,
            _ => {}
        }
        Outcome::Continue
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
