//! MSI-X: a table of messages, one per vector, each masked or not (PCI Local Bus 3.0, 6.8.2).
//!
//! Owns masks and pending bits, exactly: a masked vector remembers that it was signalled, and sends once when
//! it is unmasked. How a message reaches a CPU is behind [`MessageSink`].

use std::io;

use crate::bus::lanes::{lanes, words};
use crate::ratelimit::RateLimit;
use crate::warn_limited;

/// Size in bytes of an entry of the table.
pub const ENTRY_BYTES: u64 = 16;
/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Message control: the whole function is masked.
pub const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: messages are in use.
pub const ENABLE: u16 = 1 << 15;
/// Vector control: the vector is masked.
const VECTOR_MASK: u32 = 1;

/// A write to memory that interrupts a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    /// The address, which is one of the local APICs'.
    pub address: u64,
    /// The value that is written.
    pub data: u32,
}

/// Delivers messages to the guest's CPUs: KVM's routes and irqfds; in tests, a list.
pub trait MessageSink: Send {
    /// Makes `vector` send `message` from now on.
    fn route(&mut self, vector: u16, message: Message) -> io::Result<()>;
    /// Sends the message of `vector`.
    fn send(&self, vector: u16) -> io::Result<()>;
}

/// The registers of one vector.
#[derive(Debug, Clone, Copy)]
struct Entry {
    message: Message,
    masked: bool,
    pending: bool,
    /// The message that the sink was told last; `None` if that failed or never happened.
    routed: Option<Message>,
}

/// The vectors of one function.
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
    sink: Box<dyn MessageSink>,
    errors: RateLimit,
}

impl Msix {
    /// Creates `vectors` vectors, all masked. Messages are not in use.
    pub fn new(vectors: u16, sink: Box<dyn MessageSink>) -> Self {
        let fresh = Entry { message: Message::default(), masked: true, pending: false, routed: None };
        Self {
            entries: vec![fresh; usize::from(vectors)],
            enabled: false,
            masked: false,
            sink,
            errors: RateLimit::for_guest_errors("pci"),
        }
    }

    /// Returns the number of vectors.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    /// Returns `true` if messages are in use.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Takes over what the guest has written to message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & ENABLE != 0;
        self.masked = control & FUNCTION_MASK != 0;
        for vector in 0..self.vectors() {
            self.settle(vector);
        }
    }

    /// Signals a vector: sends its message, or marks it pending while it is masked. Does nothing if messages
    /// are not in use.
    pub fn signal(&mut self, vector: u16) {
        if let Some(entry) = self.entries.get_mut(usize::from(vector)).filter(|_| self.enabled) {
            entry.pending = true;
            self.settle(vector);
        }
    }

    /// Clears all pending bits: nothing is sent after a device's reset (virtio 2.4.1).
    pub fn forget_pending(&mut self) {
        for entry in &mut self.entries {
            entry.pending = false;
        }
    }

    /// Reads the table with any width.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for lane in lanes(offset, data.len(), words) {
            lane.fill(self.read_register(lane.register), data);
        }
    }

    /// Writes the table with any width.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        for lane in lanes(offset, data.len(), words) {
            let value = lane.merge(self.read_register(lane.register), data);
            self.write_register(lane.register, value);
        }
        let last = offset.saturating_add(data.len() as u64).saturating_sub(1);
        for vector in offset / ENTRY_BYTES..=last / ENTRY_BYTES {
            if let Ok(vector) = u16::try_from(vector) {
                self.settle(vector);
            }
        }
    }

    /// Reads the pending bits, one per vector.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, to) in data.iter_mut().enumerate() {
            let byte = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(at);
            let first = byte.saturating_mul(8);
            let bits = self.entries.iter().skip(first).take(8).enumerate();
            *to = bits.fold(0, |byte, (bit, entry)| byte | u8::from(entry.pending) << bit);
        }
    }

    /// Sends the message of `vector` if it is pending and nothing masks it. The sink is told the message before
    /// it is sent for the first time.
    fn settle(&mut self, vector: u16) {
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else { return };
        if !self.enabled || self.masked || entry.masked {
            return;
        }
        let mut result = Ok(());
        if entry.routed != Some(entry.message) {
            result = self.sink.route(vector, entry.message);
            entry.routed = result.is_ok().then_some(entry.message);
        }
        if result.is_ok() && std::mem::take(&mut entry.pending) {
            result = self.sink.send(vector);
        }
        if let Err(error) = result {
            warn_limited!(self.errors, "pci: the message of vector {vector} cannot be sent: {error}");
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Some(entry) = entry_of(offset).and_then(|at| self.entries.get(at)) else { return 0 };
        match offset % ENTRY_BYTES {
            0 => low(entry.message.address),
            4 => low(entry.message.address >> 32),
            8 => entry.message.data,
            _ => u32::from(entry.masked),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let Some(entry) = entry_of(offset).and_then(|at| self.entries.get_mut(at)) else { return };
        let address = &mut entry.message.address;
        match offset % ENTRY_BYTES {
            // The lowest two bits are always 0.
            0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
            4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.message.data = value,
            _ => entry.masked = value & VECTOR_MASK != 0,
        }
    }
}

fn entry_of(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY_BYTES).ok()
}

fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Default, Clone)]
    struct Heard(Arc<Mutex<Vec<(u16, Message)>>>, Vec<Message>, bool);

    impl MessageSink for Heard {
        fn route(&mut self, vector: u16, message: Message) -> io::Result<()> {
            if self.2 {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            self.1.resize(8, Message::default());
            self.1[usize::from(vector)] = message;
            Ok(())
        }
        fn send(&self, vector: u16) -> io::Result<()> {
            self.0.lock().unwrap().push((vector, self.1[usize::from(vector)]));
            Ok(())
        }
    }

    fn msix() -> (Msix, Heard) {
        let heard = Heard::default();
        (Msix::new(3, Box::new(heard.clone())), heard)
    }

    fn take(heard: &Heard) -> Vec<(u16, Message)> {
        std::mem::take(&mut heard.0.lock().unwrap())
    }

    fn program(msix: &mut Msix, vector: u64, message: Message, mask: u32) {
        let at = vector * ENTRY_BYTES;
        msix.write_table(at, &message.address.to_le_bytes());
        msix.write_table(at + 8, &message.data.to_le_bytes());
        msix.write_table(at + 12, &mask.to_le_bytes());
    }

    const ONE: Message = Message { address: 0xfee0_1000, data: 0x41 };
    const TWO: Message = Message { address: 0xfee0_2000, data: 0x42 };

    #[test]
    fn a_vector_sends_what_the_table_says() {
        let (mut msix, heard) = msix();
        program(&mut msix, 1, ONE, 0);
        msix.signal(1);
        assert_eq!(take(&heard), [], "messages are not in use");
        msix.set_control(ENABLE);
        assert_eq!(take(&heard), [], "and nothing was remembered meanwhile");
        msix.signal(1);
        msix.signal(1);
        assert_eq!(take(&heard), [(1, ONE), (1, ONE)]);
        msix.signal(3);
        assert_eq!(take(&heard), [], "no such vector");
    }

    #[test]
    fn a_masked_vector_remembers_and_sends_once_when_it_is_unmasked() {
        let (mut msix, heard) = msix();
        msix.set_control(ENABLE);
        program(&mut msix, 0, ONE, 1);
        msix.signal(0);
        msix.signal(0);
        msix.signal(2);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!((take(&heard).len(), pending), (0, [0b101, 0, 0, 0, 0, 0, 0, 0]));
        program(&mut msix, 0, TWO, 0);
        assert_eq!(take(&heard), [(0, TWO)], "once, and the new message");
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b100);
    }

    #[test]
    fn the_mask_of_the_function_holds_all_of_them() {
        let (mut msix, heard) = msix();
        program(&mut msix, 0, ONE, 0);
        program(&mut msix, 1, TWO, 0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.signal(0);
        msix.signal(1);
        assert_eq!(take(&heard), []);
        msix.set_control(ENABLE);
        assert_eq!(take(&heard), [(0, ONE), (1, TWO)]);
    }

    /// What may happen to one vector.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Act {
        Signal,
        VectorMask(bool),
        Control { enable: bool, mask: bool },
        Message(Message),
        Forget,
    }

    const ACTS: [Act; 9] = [
        Act::Signal,
        Act::VectorMask(true),
        Act::VectorMask(false),
        Act::Control { enable: true, mask: false },
        Act::Control { enable: true, mask: true },
        Act::Control { enable: false, mask: false },
        Act::Message(ONE),
        Act::Message(TWO),
        Act::Forget,
    ];

    /// PCI 3.0, 6.8.2.6 in a few words: a signal stays pending until it is sent, however often it is masked. It
    /// is sent once, as soon as nothing masks it.
    #[derive(Default)]
    struct Model {
        enabled: bool,
        masks: (bool, bool),
        message: Message,
        pending: bool,
    }

    impl Model {
        fn act(&mut self, act: Act) -> Option<Message> {
            match act {
                Act::Signal => self.pending |= self.enabled,
                Act::VectorMask(mask) => self.masks.0 = mask,
                Act::Control { enable, mask } => (self.enabled, self.masks.1) = (enable, mask),
                Act::Message(message) => self.message = message,
                Act::Forget => self.pending = false,
            }
            let sends = self.enabled && self.masks == (false, false) && std::mem::take(&mut self.pending);
            sends.then_some(self.message)
        }
    }

    #[test]
    fn over_every_order_of_signals_and_masks_a_pending_bit_is_lost_by_nothing_but_its_message() {
        const STEPS: u32 = 5;
        let acts = u32::try_from(ACTS.len()).unwrap();
        for number in 0..acts.pow(STEPS) {
            let (mut msix, heard) = msix();
            let mut model = Model { masks: (true, false), ..Model::default() };
            let mut so_far = Vec::new();
            // Begin with a function that is enabled, so that a short sequence reaches the interesting states.
            let steps = (0..STEPS).map(|step| ACTS[(number / acts.pow(step) % acts) as usize]);
            for act in [ACTS[3]].into_iter().chain(steps) {
                so_far.push(act);
                match act {
                    Act::Signal => msix.signal(1),
                    Act::VectorMask(mask) => {
                        msix.write_table(ENTRY_BYTES + 12, &u32::from(mask).to_le_bytes());
                    }
                    Act::Control { enable, mask } => {
                        let control = [(enable, ENABLE), (mask, FUNCTION_MASK)];
                        msix.set_control(control.iter().filter(|bit| bit.0).map(|bit| bit.1).sum());
                    }
                    Act::Message(Message { address, data }) => {
                        let mask = u64::from(model.masks.0) << 32;
                        msix.write_table(ENTRY_BYTES, &address.to_le_bytes());
                        msix.write_table(ENTRY_BYTES + 8, &(u64::from(data) | mask).to_le_bytes());
                    }
                    Act::Forget => msix.forget_pending(),
                }
                let sent: Vec<_> = model.act(act).map(|message| (1, message)).into_iter().collect();
                let mut pending = [0];
                msix.read_pending(0, &mut pending);
                assert_eq!((take(&heard), pending), (sent, [u8::from(model.pending) << 1]), "{so_far:?}");
            }
        }
    }

    #[test]
    fn nothing_that_was_remembered_is_sent_after_a_reset() {
        let (mut msix, heard) = msix();
        msix.set_control(ENABLE);
        msix.signal(0);
        msix.forget_pending();
        program(&mut msix, 0, ONE, 0);
        assert_eq!(take(&heard), []);
    }

    #[test]
    fn the_table_is_read_back_and_there_is_nothing_beyond_it() {
        let (mut msix, _) = msix();
        program(&mut msix, 2, ONE, 1);
        let mut data = [0xff; 8];
        msix.read_table(32, &mut data);
        assert_eq!(u64::from_le_bytes(data), ONE.address);
        msix.read_table(40, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1_0000_0041);
        for (offset, len) in [(48, 4), (49, 8), (u64::MAX - 3, 4), (u64::MAX, 8)] {
            let mut data = vec![0xff; len];
            msix.write_table(offset, &data);
            msix.read_table(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {len}");
        }
        msix.read_table(32, &mut data);
        assert_eq!(u64::from_le_bytes(data), ONE.address);
        msix.read_pending(u64::MAX - 7, &mut data);
    }

    #[test]
    fn a_write_of_any_width_has_its_effect_on_every_entry_that_it_touches() {
        // The mask bit of vector 0 is in byte 12; each of these writes clears it.
        for (offset, len) in [(12, 1), (12, 2), (11, 2), (12, 4), (12, 8), (8, 8), (9, 4), (5, 8)] {
            let (mut msix, heard) = msix();
            msix.set_control(ENABLE);
            program(&mut msix, 0, Message { address: 0, data: 0 }, 1);
            msix.signal(0);
            msix.write_table(offset, &vec![0; len]);
            assert_eq!(take(&heard).len(), 1, "{len} bytes at {offset}");
        }
        // A write that reaches into the next entry takes effect on both.
        let (mut msix, heard) = msix();
        msix.set_control(ENABLE);
        program(&mut msix, 1, Message { address: 0, data: 7 }, 0);
        msix.signal(0);
        msix.write_table(12, &[0, 0, 0, 0, 0x08, 0x10, 0, 0]);
        msix.signal(1);
        assert_eq!(take(&heard), [(0, Message::default()), (1, Message { address: 0x1008, data: 7 })]);
    }

    #[test]
    fn a_message_that_cannot_be_routed_is_kept_for_the_next_try() {
        let heard = Heard::default();
        let mut msix = Msix::new(1, Box::new(Heard(Arc::clone(&heard.0), Vec::new(), true)));
        msix.set_control(ENABLE);
        program(&mut msix, 0, ONE, 0);
        msix.signal(0);
        let mut pending = [0];
        msix.read_pending(0, &mut pending);
        assert_eq!((take(&heard), pending), (Vec::new(), [1]));
    }
}
