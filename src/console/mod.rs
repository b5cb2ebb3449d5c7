//! virtio-console with several ports (virtio 5.3): streams of bytes between host and guest.
//!
//! Owns the device that a transport sees: features, configuration space, activation, reset. One thread
//! ([`worker`]) moves the bytes of all ports. [`control`] interprets control messages, and [`stream`] has the
//! host's ends. The content of the streams is not interpreted.
//!
//! There are two kinds of device. The first has MULTIPORT and named ports. Its port 0 is never announced: a
//! driver without MULTIPORT takes port 0 for its console, and what such a driver writes is discarded. The
//! second kind has only port 0, without MULTIPORT. Linux makes it hvc0, a terminal, whose size ([`window`])
//! is in configuration space.

pub mod control;
pub mod live;
pub mod stream;
pub mod window;
pub mod worker;

use std::io;
use std::sync::Arc;

use crate::virtio::{ActivateError, Activation, VirtioDevice, feature};
use stream::{Sink, Source};
use window::{Window, WindowSize};
use worker::ConsoleThread;

/// Device ID of a console (virtio 5.3.1).
const DEVICE_ID: u32 = 3;
/// VIRTIO_CONSOLE_F_MULTIPORT.
pub const MULTIPORT: u64 = 1 << 1;

/// Descriptors of a port's queues. Linux queues 32 KiB per chain for output and a page per chain for input.
/// The size thus bounds what a stalled reader costs a guest: 2 MiB.
const PORT_QUEUE_SIZE: u16 = 64;
/// Descriptors of the control queues.
const CONTROL_QUEUE_SIZE: u16 = 32;

/// The queue of the control messages to the driver (virtio 5.3.2).
pub const CONTROL_RX: u16 = 2;
/// The queue of the control messages from the driver (virtio 5.3.2).
pub const CONTROL_TX: u16 = 3;

/// Returns the queue that carries bytes to the driver for port `id`.
pub fn rx_queue(id: u16) -> u16 {
    match id {
        0 => 0,
        id => 2 * id + 2,
    }
}

/// Returns the queue that carries bytes from the driver for port `id`.
pub fn tx_queue(id: u16) -> u16 {
    rx_queue(id) + 1
}

/// The configuration of one port.
pub struct PortConfig {
    /// The name that the guest sees in /sys/class/virtio-ports/vportNpM/name.
    pub name: &'static str,
    /// The source of the guest's input; with `None` its input is at its end at once.
    pub source: Option<Source>,
    /// The destination of the guest's output; with `None` it is discarded.
    pub sink: Option<Sink>,
    /// `true` if output on this port must wait until all output that the guest wrote to other ports before it
    /// has gone out. A message on such a port tells that the rest is complete.
    pub after_others: bool,
}

/// A virtio-console device.
pub struct ConsoleDevice {
    queue_sizes: Vec<u16>,
    /// The maximum number of ports, port 0 included; 0 for a device without MULTIPORT.
    ports_max: u32,
    /// `Some` for a terminal's device.
    window: Option<Arc<Window>>,
    worker: ConsoleThread,
}

impl ConsoleDevice {
    /// Creates the device and its parked worker. The ports get the ids 1, 2, ... in their order.
    pub fn new(ports: Vec<PortConfig>) -> io::Result<Self> {
        let mut queue_sizes = vec![PORT_QUEUE_SIZE, PORT_QUEUE_SIZE, CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE];
        queue_sizes.resize(queue_sizes.len() + 2 * ports.len(), PORT_QUEUE_SIZE);
        let ports_max = u32::try_from(ports.len() + 1).map_err(io::Error::other)?;
        Ok(Self { queue_sizes, ports_max, window: None, worker: ConsoleThread::park(ports, None)? })
    }

    /// Creates a device with only one port, a terminal, and returns it with the window whose size it shows.
    pub fn terminal(source: Source, sink: Sink, size: WindowSize) -> io::Result<(Self, Arc<Window>)> {
        let port = PortConfig { name: "", source: Some(source), sink: Some(sink), after_others: false };
        let worker = ConsoleThread::park(vec![port], Some(size))?;
        let window = worker.window().ok_or(io::ErrorKind::NotFound)?;
        let queue_sizes = vec![PORT_QUEUE_SIZE, PORT_QUEUE_SIZE];
        Ok((Self { queue_sizes, ports_max: 0, window: Some(Arc::clone(&window)), worker }, window))
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let own = if self.window.is_some() { window::SIZE } else { MULTIPORT };
        feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | own
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Reads struct virtio_console_config (virtio 5.3.4). Fields of features that are not offered read 0.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        if let Some(window) = &self.window {
            space[..4].copy_from_slice(&window.config());
        }
        space[4..8].copy_from_slice(&self.ports_max.to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        for (to, from) in data.iter_mut().zip(&space[from..]) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn negotiated(&mut self, _: u64) {}

    fn activate(&mut self, parts: Activation) -> Result<(), ActivateError> {
        self.worker.start(parts).map_err(|_| ActivateError::Worker(0))
    }

    fn stop_queue(&mut self, index: u16) {
        self.worker.stop_queue(index);
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}
