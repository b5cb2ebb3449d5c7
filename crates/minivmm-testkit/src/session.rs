//! A script at a terminal of its own, on the machine where guests run: what it shows, and keys for it.

use std::io::{Read, Write};
use std::process::Child;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use crate::host::Place;

/// A script at a terminal, and what it has shown there.
pub struct Session {
    /// The process at the terminal.
    pub child: Child,
    output: Receiver<Vec<u8>>,
    /// What it has shown so far.
    pub shown: String,
}

impl Session {
    /// Starts the script there.
    pub fn start(place: &Place, script: &str) -> Self {
        // A terminal that nobody sits at begins without echo, lines and signals.
        let mut child = place.on_terminal(&format!("stty sane erase '^?'\n{script}"));
        let mut stdout = child.stdout.take().unwrap();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
                let _ = sender.send(bytes[..count].to_vec());
            }
        });
        Self { child, output, shown: String::new() }
    }

    /// Waits until this was shown.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        while !self.shown.contains(text) {
            let Ok(bytes) = self.output.recv_timeout(Duration::from_secs(200)) else {
                panic!("{text:?} has not come: {:?}", self.shown);
            };
            self.shown += &String::from_utf8_lossy(&bytes);
        }
    }

    /// Types these keys.
    pub fn type_keys(&mut self, keys: &str) {
        let keyboard = self.child.stdin.as_mut().unwrap();
        keyboard.write_all(keys.as_bytes()).and_then(|()| keyboard.flush()).unwrap();
    }
}
