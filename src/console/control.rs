//! Control messages (virtio 5.3.6.2): what the driver has said of its ports, and what it has yet
//! to be told.
//!
//! Owns that state. What is to be told is kept as facts about ports, not as a list of messages, so
//! a driver that repeats itself costs no memory (R23). Pure.

/// Bytes of struct virtio_console_control.
pub const MESSAGE_BYTES: usize = 8;

/// Events.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What the driver and we know of one port.
#[derive(Debug)]
struct PortState {
    name: &'static str,
    /// PORT_ADD is to be sent.
    add: bool,
    /// PORT_OPEN is to be sent, with this value.
    open: Option<bool>,
    /// PORT_NAME is to be sent.
    name_due: bool,
    /// The driver has the port set up.
    ready: bool,
    /// A program in the guest has it open.
    guest_open: bool,
    /// Our end is open.
    host_open: bool,
}

/// All announced ports; the first is port 1.
#[derive(Debug)]
pub struct Control {
    ports: Vec<PortState>,
}

impl Control {
    /// Ports of these names, of which the driver knows nothing yet.
    pub fn new(names: impl Iterator<Item = &'static str>) -> Self {
        let port = |name| PortState {
            name,
            add: false,
            open: None,
            name_due: false,
            ready: false,
            guest_open: false,
            host_open: true,
        };
        Self { ports: names.map(port).collect() }
    }

    /// Takes a message of the driver; an unknown event, or a port that does not exist, is ignored.
    pub fn take(&mut self, message: [u8; MESSAGE_BYTES]) {
        let [a, b, c, d, e, f, g, h] = message;
        let id = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        if event == event::DEVICE_READY && value == 1 {
            for port in self.ports.iter_mut().filter(|port| !port.ready) {
                port.add = true;
            }
            return;
        }
        let at = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        let Some(port) = at.and_then(|at| self.ports.get_mut(at)) else { return };
        match event {
            event::PORT_READY if value == 1 => {
                port.ready = true;
                // The name comes last: a program that finds the port by its name finds it open.
                port.open = Some(port.host_open);
                port.name_due = true;
            }
            event::PORT_OPEN => port.guest_open = value != 0,
            _ => {}
        }
    }

    /// Whether a program in the guest has port `at` (from 0) open.
    pub fn is_guest_open(&self, at: usize) -> bool {
        self.ports.get(at).is_some_and(|port| port.guest_open)
    }

    /// Our end of port `at` is closed: the end of the guest's input, or nobody takes its output.
    pub fn close(&mut self, at: usize) {
        if let Some(port) = self.ports.get_mut(at)
            && std::mem::take(&mut port.host_open)
            && port.ready
        {
            port.open = Some(false);
        }
    }

    /// Whether the driver is to be told something.
    pub fn has_due(&self) -> bool {
        self.ports.iter().any(|port| port.add || port.open.is_some() || port.name_due)
    }

    /// The next message for the driver.
    pub fn next_due(&mut self) -> Option<Vec<u8>> {
        for (id, port) in (1u32..).zip(&mut self.ports) {
            if std::mem::take(&mut port.add) {
                return Some(message(id, event::PORT_ADD, 0, ""));
            }
            if let Some(open) = port.open.take() {
                return Some(message(id, event::PORT_OPEN, u16::from(open), ""));
            }
            if std::mem::take(&mut port.name_due) {
                return Some(message(id, event::PORT_NAME, 1, port.name));
            }
        }
        None
    }
}

fn message(id: u32, event: u16, value: u16, rest: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MESSAGE_BYTES + rest.len());
    bytes.extend(id.to_le_bytes());
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(rest.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(id: u32, event: u16, value: u16) -> [u8; MESSAGE_BYTES] {
        message(id, event, value, "").try_into().unwrap()
    }

    #[test]
    fn a_driver_that_repeats_itself_is_told_everything_once_more_and_no_more() {
        let mut control = Control::new(["one", "two"].into_iter());
        for _ in 0..1000 {
            control.take(said(0, event::DEVICE_READY, 1));
        }
        assert_eq!(control.next_due(), Some(message(1, event::PORT_ADD, 0, "")));
        assert_eq!(control.next_due(), Some(message(2, event::PORT_ADD, 0, "")));
        assert_eq!(control.next_due(), None);
        for _ in 0..1000 {
            control.take(said(2, event::PORT_READY, 1));
        }
        assert_eq!(control.next_due(), Some(message(2, event::PORT_OPEN, 1, "")));
        assert_eq!(control.next_due(), Some(message(2, event::PORT_NAME, 1, "two")));
        assert!(!control.has_due());
    }

    #[test]
    fn a_closed_end_is_told_when_the_port_is_ready() {
        let mut control = Control::new(["one"].into_iter());
        control.close(0);
        control.close(7);
        assert_eq!(control.next_due(), None);
        control.take(said(1, event::PORT_READY, 1));
        assert_eq!(control.next_due(), Some(message(1, event::PORT_OPEN, 0, "")));
    }

    #[test]
    fn strange_messages_change_nothing() {
        let mut control = Control::new(["one"].into_iter());
        for (id, event, value) in
            [(0, 3, 1), (0, 6, 1), (2, 6, 1), (u32::MAX, 6, 1), (1, 99, 1), (1, 1, 1), (0, 0, 0), (1, 3, 0)]
        {
            control.take(said(id, event, value));
        }
        assert!(!control.has_due() && !control.is_guest_open(0));
    }
}
