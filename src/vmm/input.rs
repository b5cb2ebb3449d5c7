//! The guest's input: from standard input to the serial port, and the keys that minivmm itself handles.
//!
//! Owns the flow control. Bytes for which the guest has no room wait here, in a bounded buffer. While that
//! buffer is full, a stream is not read. A terminal is read all the same, because Ctrl-A x must end even a
//! guest that takes no input; its excess bytes are dropped.

use std::collections::VecDeque;
use std::io;

use crate::terminal::Input;

/// Ctrl-A.
const ESCAPE: u8 = 0x01;
/// The maximum number of bytes that wait for a guest.
const WAITING_BYTES_MAX: usize = 4096;
/// The text that Ctrl-A h prints.
const KEYS: &str = "\nCtrl-A x  end the VM\nCtrl-A h  show these keys\nCtrl-A Ctrl-A  send Ctrl-A\n";

/// What the user asked minivmm to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    Nothing,
    /// End the VM.
    Quit,
}

/// The path of input from standard input to the guest.
#[derive(Debug)]
pub struct Console {
    keys: bool,
    escaped: bool,
    at_end: bool,
    waiting: VecDeque<u8>,
}

impl Console {
    /// Creates the path for a standard input of this `kind`. `None`, and a terminal in the background, give
    /// no input.
    pub fn new(kind: Option<Input>) -> Self {
        let at_end = !matches!(kind, Some(Input::Terminal | Input::Stream));
        let keys = kind == Some(Input::Terminal);
        Self { keys, escaped: false, at_end, waiting: VecDeque::new() }
    }

    /// Returns `true` if standard input is to be read.
    pub fn wants_to_read(&self) -> bool {
        !self.at_end && (self.keys || self.waiting.len() < WAITING_BYTES_MAX)
    }

    /// Returns `true` if bytes wait for the guest.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes the result of a read of standard input. End of file or an error ends the input, never the guest.
    pub fn take_read(&mut self, result: io::Result<&[u8]>) -> Wish {
        match result {
            Ok([]) => self.at_end = true,
            Ok(bytes) => return self.take(bytes),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                log::info!("standard input ends: {error}");
                self.at_end = true;
            }
        }
        Wish::Nothing
    }

    fn take(&mut self, bytes: &[u8]) -> Wish {
        for &byte in bytes {
            if std::mem::take(&mut self.escaped) {
                match byte {
                    b'x' | b'X' => return Wish::Quit,
                    b'h' | b'H' | b'?' => eprint!("{KEYS}"),
                    ESCAPE => self.push(ESCAPE),
                    _ => {}
                }
            } else if self.keys && byte == ESCAPE {
                self.escaped = true;
            } else {
                self.push(byte);
            }
        }
        Wish::Nothing
    }

    fn push(&mut self, byte: u8) {
        // A stream is read only while there is room; a terminal is always read, so its excess is dropped.
        if !self.keys || self.waiting.len() < WAITING_BYTES_MAX {
            self.waiting.push_back(byte);
        }
    }

    /// Hands waiting bytes to `offer`, which returns how many it took.
    pub fn hand_over(&mut self, mut offer: impl FnMut(&[u8]) -> usize) {
        while self.has_waiting() {
            let bytes = self.waiting.make_contiguous();
            let taken = offer(bytes).min(bytes.len());
            if taken == 0 {
                return;
            }
            self.waiting.drain(..taken);
        }
    }
}

/// The maximum size of one read, in bytes.
pub const READ_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn all(console: &mut Console) -> Vec<u8> {
        let mut taken: Vec<u8> = Vec::new();
        console.hand_over(|bytes| {
            taken.extend(bytes);
            bytes.len()
        });
        taken
    }

    #[test]
    fn keys_are_ours_on_a_terminal_only() {
        for (kind, typed, passed, wish) in [
            (Input::Terminal, &b"a\x01\x01b\x01hc\x01zd"[..], &b"a\x01bcd"[..], Wish::Nothing),
            (Input::Terminal, b"a\x01xb", b"a", Wish::Quit),
            (Input::Stream, b"a\x01xb", b"a\x01xb", Wish::Nothing),
        ] {
            let mut console = Console::new(Some(kind));
            assert_eq!(console.take_read(Ok(typed)), wish);
            assert_eq!(all(&mut console), passed);
        }
        // The two bytes of a key sequence may arrive in two reads.
        let mut console = Console::new(Some(Input::Terminal));
        assert_eq!(console.take_read(Ok(b"\x01")), Wish::Nothing);
        assert_eq!(console.take_read(Ok(b"x")), Wish::Quit);
    }

    #[test]
    fn a_stream_waits_and_a_terminal_drops_when_the_guest_takes_nothing() {
        let mut stream = Console::new(Some(Input::Stream));
        let mut terminal = Console::new(Some(Input::Terminal));
        let mut reads = 0;
        while stream.wants_to_read() {
            stream.take_read(Ok(&[b'x'; READ_BYTES_MAX]));
            terminal.take_read(Ok(&[b'x'; READ_BYTES_MAX]));
            reads += 1;
        }
        assert_eq!(stream.waiting.len(), reads * READ_BYTES_MAX);
        assert!(terminal.wants_to_read());
        terminal.take_read(Ok(&[b'x'; 10_000]));
        assert_eq!(terminal.waiting.len(), WAITING_BYTES_MAX);
        assert_eq!(terminal.take_read(Ok(b"\x01x")), Wish::Quit);
    }

    #[test]
    fn the_end_of_input_is_not_asked_for_again() {
        for end in [Ok(&[][..]), Err(io::Error::from_raw_os_error(libc::EIO))] {
            let mut console = Console::new(Some(Input::Stream));
            console.take_read(end);
            assert!(!console.wants_to_read());
        }
        assert!(!Console::new(None).wants_to_read());
        assert!(!Console::new(Some(Input::Background)).wants_to_read());
    }

    #[test]
    fn what_the_guest_has_no_room_for_stays_in_order() {
        let mut console = Console::new(Some(Input::Stream));
        console.take_read(Ok(b"abcdef"));
        let mut room = 4;
        let mut taken: Vec<u8> = Vec::new();
        console.hand_over(|bytes| {
            let count = room.min(bytes.len()).min(3);
            room -= count;
            taken.extend(&bytes[..count]);
            count
        });
        assert_eq!(taken, b"abcd");
        assert_eq!(all(&mut console), b"ef");
    }
}
