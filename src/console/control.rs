//! Control messages (virtio 5.3.6.2): what the driver has said of its ports, and what it must still be told.
//!
//! Owns that state. Pending messages are kept as facts about ports, not as a list, so a driver that repeats
//! itself costs no memory (R23). Pure.

/// The size of struct virtio_console_control in bytes.
pub const MESSAGE_BYTES: usize = 8;

/// Event numbers.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What the driver and the device know of one port.
#[derive(Debug)]
struct PortState {
    name: &'static str,
    /// `true` if PORT_ADD is to be sent.
    add: bool,
    /// The value with which PORT_OPEN is to be sent; `None` if it is not to be sent.
    open: Option<bool>,
    /// `true` if PORT_NAME is to be sent.
    name_due: bool,
    /// `true` once the driver has set up the port.
    ready: bool,
    /// `true` if a program in the guest has the port open.
    guest_open: bool,
    /// `true` while the host's end is open.
    host_open: bool,
}

/// All announced ports; the first is port 1.
#[derive(Debug)]
pub struct Control {
    ports: Vec<PortState>,
}

impl Control {
    /// Creates ports with these names, of which the driver knows nothing yet.
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

    /// Takes a message from the driver. Unknown events and ports that do not exist are ignored.
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
                // The name is sent last: a program that finds the port by its name then finds it open.
                port.open = Some(port.host_open);
                port.name_due = true;
            }
            event::PORT_OPEN => port.guest_open = value != 0,
            _ => {}
        }
    }

    /// Returns `true` if a program in the guest has port `at` (from 0) open.
    pub fn is_guest_open(&self, at: usize) -> bool {
        self.ports.get(at).is_some_and(|port| port.guest_open)
    }

    /// Closes the host's end of port `at`: the guest's input is at its end, or nobody takes its output any
    /// more.
    pub fn close(&mut self, at: usize) {
        if let Some(port) = self.ports.get_mut(at)
            && std::mem::take(&mut port.host_open)
            && port.ready
        {
            port.open = Some(false);
        }
    }

    /// Returns `true` if there is a message to send to the driver.
    pub fn has_due(&self) -> bool {
        self.ports.iter().any(|port| port.add || port.open.is_some() || port.name_due)
    }

    /// Returns the next message for the driver, or `None`.
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
