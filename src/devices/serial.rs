//! COM1, a 16550: `vm-superio` has the registers, this file its place on the bus and the flow of its input.
//!
//! Owns when input is handed over. It is never more than the receive FIFO takes. It never comes before the
//! guest listens, because a driver that starts up discards what it finds in the FIFO. Where input comes from
//! and where output goes is decided elsewhere.

use std::io;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::ConsoleOutput;
use crate::bus::{BusDevice, Outcome};

/// Length of the ports in bytes.
pub const LEN: u64 = 8;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
/// In the line control register: offsets 0 and 1 are the baud rate.
const DIVISOR_LATCH: u8 = 0x80;
/// In the interrupt enable register: interrupt on received data.
const RECEIVE_INTERRUPT: u8 = 0x01;
/// All interrupts of a 16550: the value that a driver writes to see which bits exist.
const ALL_INTERRUPTS: u8 = 0x0f;
/// The number of line status reads without a write in between that shows a polling reader. A guest without
/// interrupts reads the line status over and over while it waits for input; one that transmits reads it once
/// or twice a byte.
const POLLS_OF_A_LISTENER: u32 = 8;

/// The interrupt line, as an eventfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        match self.0.write(1) {
            // The counter is full, so an interrupt is already pending.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

/// COM1.
pub struct SerialPort {
    uart: Serial<Line, NoEvents, ConsoleOutput>,
    divisor_latch: bool,
    /// `true` once the guest has shown that it wants input.
    listens: bool,
    polls: u32,
    /// `true` if offered bytes found no room; `wants_input` is then written when there is room.
    owed: bool,
    wants_input: EventFd,
}

impl SerialPort {
    /// Creates the port. `irq` is bound to the interrupt line; `wants_input` is written when bytes that
    /// [`offer`] refused may be offered again.
    ///
    /// [`offer`]: SerialPort::offer
    pub fn new(irq: EventFd, output: ConsoleOutput, wants_input: EventFd) -> Self {
        let uart = Serial::new(Line(irq), output);
        Self { uart, divisor_latch: false, listens: false, polls: 0, owed: false, wants_input }
    }

    /// Offers input, and returns how many bytes, from the first, were taken.
    pub fn offer(&mut self, bytes: &[u8]) -> usize {
        let room = if self.listens { self.uart.fifo_capacity().min(bytes.len()) } else { 0 };
        let taken = match bytes.get(..room) {
            None | Some([]) => 0,
            Some(part) => self.uart.enqueue_raw_bytes(part).unwrap_or_else(|error| {
                // The bytes were taken; only the interrupt is missing.
                log::warn!("serial port: {error}");
                part.len()
            }),
        };
        self.owed = taken < bytes.len();
        taken
    }

    fn listen(&mut self) {
        self.listens = true;
        self.ask();
    }

    fn ask(&mut self) {
        if std::mem::take(&mut self.owed)
            && let Err(error) = self.wants_input.write(1)
        {
            log::warn!("serial port: cannot ask for input: {error}");
        }
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let value = self.uart.read(u8::try_from(offset).unwrap_or(u8::MAX));
        match offset {
            DATA if !self.divisor_latch && self.uart.fifo_capacity() == FIFO_BYTES => self.ask(),
            LINE_STATUS if !self.listens => {
                self.polls += 1;
                if self.polls >= POLLS_OF_A_LISTENER {
                    self.listen();
                }
            }
            _ => {}
        }
        value
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        self.polls = 0;
        if let Err(error) = self.uart.write(u8::try_from(offset).unwrap_or(u8::MAX), value) {
            log::warn!("serial port: {error}");
        }
        match offset {
            LINE_CONTROL => self.divisor_latch = value & DIVISOR_LATCH != 0,
            INTERRUPT_ENABLE
                if !self.divisor_latch
                    && value & RECEIVE_INTERRUPT != 0
                    && value & ALL_INTERRUPTS != ALL_INTERRUPTS =>
            {
                self.listen();
            }
            // Loopback mode, in which no input is taken, may have ended.
            MODEM_CONTROL => self.ask(),
            _ => {}
        }
    }
}

/// Size of the receive FIFO in `vm-superio`.
const FIFO_BYTES: usize = 64;

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..LEN).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        for (register, &byte) in (offset..LEN).zip(data) {
            self.write_register(register, byte);
        }
        Outcome::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::super::console::Stopping;
    use super::*;

    struct Bench {
        port: SerialPort,
        irq: EventFd,
        wants: EventFd,
    }

    fn bench() -> Bench {
        let new = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (irq, wants) = (new(), new());
        let output = ConsoleOutput::new(None, Stopping::default());
        let port = SerialPort::new(irq.try_clone().unwrap(), output, wants.try_clone().unwrap());
        Bench { port, irq, wants }
    }

    fn receive(port: &mut SerialPort) -> u8 {
        let mut data = [0];
        port.read(DATA, &mut data);
        data[0]
    }

    #[test]
    fn no_byte_is_lost_when_the_fifo_is_full() {
        let Bench { mut port, irq, wants } = bench();
        port.write(INTERRUPT_ENABLE, &[RECEIVE_INTERRUPT]);
        let input: Vec<u8> = (0..200).collect();
        let mut at = port.offer(&input);
        assert_eq!(at, FIFO_BYTES);
        irq.read().unwrap();
        assert_eq!(port.offer(&input[at..]), 0);
        let mut received = Vec::new();
        while received.len() < input.len() {
            received.push(receive(&mut port));
            if wants.read().is_ok() {
                at += port.offer(&input[at..]);
            }
        }
        assert_eq!(received, input);
        assert!(wants.read().is_err(), "nothing is owed any more");
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let Bench { mut port, wants, .. } = bench();
        assert_eq!(port.offer(b"x"), 0);
        // A guest that probes which interrupts exist, or transmits, does not listen.
        port.write(INTERRUPT_ENABLE, &[ALL_INTERRUPTS]);
        port.write(INTERRUPT_ENABLE, &[0]);
        for _ in 0..100 {
            port.read(LINE_STATUS, &mut [0]);
            port.write(DATA, b"y");
        }
        assert_eq!(port.offer(b"x"), 0);
        port.write(INTERRUPT_ENABLE, &[5]);
        wants.read().unwrap();
        assert_eq!(port.offer(b"x"), 1);
    }

    #[test]
    fn a_guest_that_polls_gets_its_input_too() {
        let Bench { mut port, wants, .. } = bench();
        assert_eq!(port.offer(b"x"), 0);
        let mut status = [0];
        for _ in 0..POLLS_OF_A_LISTENER {
            port.read(LINE_STATUS, &mut status);
        }
        wants.read().unwrap();
        assert_eq!(port.offer(b"x"), 1);
        port.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 1, 1);
        assert_eq!(receive(&mut port), b'x');
    }

    #[test]
    fn accesses_of_any_width_stay_inside() {
        let Bench { mut port, .. } = bench();
        for offset in 0..8 {
            for len in 0..=8 {
                port.write(offset, &vec![0xff; len]);
                port.read(offset, &mut vec![0; len]);
            }
        }
    }
}
