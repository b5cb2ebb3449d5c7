//! The device between DRIVER_OK and reset: pops chains, moves bytes, returns chains.
//!
//! Owns the rings and the chain in progress of each port. Flow control is by chains. Output stays in the
//! guest's own buffers until the host's end has taken it. Input stays with the host until the guest has
//! supplied a buffer. Nothing is stored here except one chain per queue. A turn never blocks. This module
//! needs no thread of its own.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::control::{Control, MESSAGE_BYTES};
use super::stream::Moved;
use super::window::Window;
use super::{CONTROL_RX, CONTROL_TX, MULTIPORT, PortConfig, rx_queue, tx_queue};
use crate::mem::{self, Iov, OutsideRam, Ram};
use crate::ratelimit::RateLimit;
use crate::virtio::queue::{Chain, ChainFault, Ring, RingError};
use crate::virtio::{Activation, EnabledQueue, Interrupt};
use crate::warn_limited;

/// Why a chain that could be followed transfers no bytes.
#[derive(Debug, thiserror::Error)]
enum BadChain {
    #[error(transparent)]
    Fault(#[from] ChainFault),
    #[error(transparent)]
    Outside(#[from] OutsideRam),
    #[error("{0} bytes are too few")]
    Short(u64),
}

/// A chain that has been popped and not yet returned.
struct Held {
    head: u16,
    iov: Iov,
    /// The number of its bytes that have been transferred.
    done: u64,
}

/// One queue.
struct Lane {
    queue: EnabledQueue,
}

impl Lane {
    /// Pops the next chain. If there is none, enables the doorbell and returns `None`.
    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let ring: &mut Ring = &mut self.queue.ring;
        loop {
            if let Some(chain) = ring.pop()? {
                return Ok(Some(chain));
            }
            if !ring.enable_doorbell() {
                return Ok(None);
            }
        }
    }

    /// Returns a chain. The driver sees it at the end of the turn.
    fn push(&mut self, head: u16, written: u64) -> Result<(), RingError> {
        // A chain has at most 2^32 bytes; reporting fewer is allowed (virtio 2.7.8.2).
        self.queue.ring.push_used(head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn notify(&mut self, interrupt: &dyn Interrupt) {
        if self.queue.ring.publish() {
            interrupt.queue(self.queue.index);
        }
    }
}

/// Returns the memory of a chain: what the driver has filled or, if `writable`, what the device may fill.
fn bytes_of(ram: &Ram, chain: &Chain, writable: bool) -> Result<Iov, BadChain> {
    match chain.fault {
        Some(fault) => Err(fault.into()),
        None => Ok(Iov::new(ram, if writable { &chain.writable } else { &chain.readable })?),
    }
}

/// The state of a port. It belongs to the driver and is dropped at reset.
#[derive(Default)]
struct Place {
    input: Option<Held>,
    output: Option<Held>,
    /// `true` if the host's end must be waited for before it is tried again.
    source_later: bool,
    sink_later: bool,
}

/// A device with an active driver.
pub struct Live {
    ram: Ram,
    interrupt: Arc<dyn Interrupt>,
    /// The queues by index; `None` for those that are not enabled or were stopped.
    lanes: Vec<Option<Lane>>,
    control: Control,
    places: Vec<Place>,
    multiport: bool,
    /// `Some` for a terminal's device, whose only port has the id 0.
    window: Option<Arc<Window>>,
}

impl Live {
    /// Starts a device with these ports, or a terminal's, for a driver that has set DRIVER_OK.
    pub fn new(parts: Activation, ports: &[PortConfig], window: Option<Arc<Window>>) -> Self {
        let Activation { ram, features, queues, interrupt } = parts;
        let count = usize::from(CONTROL_TX) + 1 + 2 * ports.len();
        let mut lanes: Vec<Option<Lane>> = (0..count).map(|_| None).collect();
        for queue in queues {
            if let Some(lane) = lanes.get_mut(usize::from(queue.index)) {
                *lane = Some(Lane { queue });
            }
        }
        let mut control = Control::new(ports.iter().map(|port| port.name));
        for (at, port) in ports.iter().enumerate() {
            // Ends that an earlier driver has seen closed are closed for this driver too.
            let input_ended = port.source.as_ref().is_some_and(|source| source.fd().is_none());
            let output_ended = port.sink.as_ref().is_some_and(|sink| sink.fd().is_none());
            if input_ended || output_ended {
                control.close(at);
            }
        }
        let places = ports.iter().map(|_| Place::default()).collect();
        Self { ram, interrupt, lanes, control, places, multiport: features & MULTIPORT != 0, window }
    }

    /// Returns the id of the port at this index of the list. There are far fewer ports than ids.
    fn id_of(&self, at: usize) -> u16 {
        let first = usize::from(self.window.is_none());
        u16::try_from(first + at).unwrap_or(u16::MAX / 2 - 2)
    }

    /// Returns `true` if port `at` takes input, because a program in the guest has it open. A terminal's
    /// driver does not report that: Linux keeps what arrives before a program opens hvc0.
    fn takes_input(&self, at: usize) -> bool {
        self.window.is_some() || self.control.is_guest_open(at)
    }

    /// Stops a queue that the driver has taken back.
    pub fn stop_queue(&mut self, index: u16) {
        if let Some(lane) = self.lanes.get_mut(usize::from(index)) {
            *lane = None;
        }
        for at in 0..self.places.len() {
            let id = self.id_of(at);
            let Some(place) = self.places.get_mut(at) else { continue };
            if index == rx_queue(id) {
                place.input = None;
            }
            if index == tx_queue(id) {
                place.output = None;
            }
        }
    }

    /// Returns the interrupt, through which a driver that broke its ring is told only that the device needs a
    /// reset.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// Returns the doorbells of all queues.
    pub fn doorbells(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.lanes.iter().flatten().map(|lane| lane.queue.doorbell.as_raw_fd())
    }

    /// Clears all doorbells. One that was not rung reports an error, which is ignored.
    pub fn quieten(&self) {
        for lane in self.lanes.iter().flatten() {
            let _ = lane.queue.doorbell.read();
        }
    }

    /// Returns the host's ends to wait for: (descriptor, `true` to wait for writing).
    pub fn waits_for(&self, ports: &[PortConfig]) -> Vec<(RawFd, bool)> {
        let mut fds = Vec::new();
        for (at, (place, port)) in self.places.iter().zip(ports).enumerate() {
            let reads = place.source_later && place.input.is_some() && self.takes_input(at);
            fds.extend(port.source.as_ref().filter(|_| reads).and_then(|s| s.fd()).map(|fd| (fd, false)));
            let writes = place.sink_later && place.output.is_some();
            fds.extend(port.sink.as_ref().filter(|_| writes).and_then(|s| s.fd()).map(|fd| (fd, true)));
        }
        fds
    }

    /// Runs one round over all queues. Returns `true` if there may be more to do at once. Each queue has a
    /// budget, so that a flood on one queue does not delay the others (R17).
    pub fn turn(&mut self, ports: &mut [PortConfig], errors: &mut RateLimit) -> Result<bool, RingError> {
        let result = self.move_all(ports, errors);
        if self.window.as_ref().is_some_and(|window| window.take_change()) {
            self.interrupt.config();
        }
        // The driver is notified even of what was returned before a ring broke.
        for lane in self.lanes.iter_mut().flatten() {
            lane.notify(&*self.interrupt);
        }
        result
    }

    fn move_all(&mut self, ports: &mut [PortConfig], errors: &mut RateLimit) -> Result<bool, RingError> {
        let mut more = self.take_messages(errors)?;
        if self.window.is_none() {
            more |= !self.discard(tx_queue(0))?;
        }
        // A chain that must go after the others is popped first: what was written before it is then visible
        // to the others' turns.
        for (at, port) in ports.iter().enumerate().filter(|(_, port)| port.after_others) {
            self.next_output(at, port.sink.is_some(), errors)?;
        }
        let mut drained = true;
        for (at, port) in ports.iter_mut().enumerate().filter(|(_, port)| !port.after_others) {
            let (idle, again) = self.move_output(at, port, errors)?;
            drained &= idle;
            more |= again;
        }
        for (at, port) in ports.iter_mut().enumerate().filter(|(_, port)| drained && port.after_others) {
            more |= self.move_one(at, port)?;
        }
        for (at, port) in ports.iter_mut().enumerate() {
            more |= self.move_input(at, port, errors)?;
        }
        self.send_messages(errors)?;
        Ok(more)
    }

    /// Takes the driver's control messages.
    fn take_messages(&mut self, errors: &mut RateLimit) -> Result<bool, RingError> {
        let Some(Some(lane)) = self.lanes.get_mut(usize::from(CONTROL_TX)) else { return Ok(false) };
        lane.queue.ring.disable_doorbell();
        for _ in 0..lane.queue.ring.size() {
            let Some(chain) = lane.pop()? else { return Ok(false) };
            match read_message(&self.ram, &chain) {
                Ok(message) if self.multiport => self.control.take(message),
                Ok(_) => {}
                Err(why) => warn_limited!(errors, "console: control message: {why}"),
            }
            lane.push(chain.head, 0)?;
        }
        Ok(true)
    }

    /// Sends control messages to the driver, as far as it has supplied buffers.
    fn send_messages(&mut self, errors: &mut RateLimit) -> Result<(), RingError> {
        let Some(Some(lane)) = self.lanes.get_mut(usize::from(CONTROL_RX)) else { return Ok(()) };
        for _ in 0..lane.queue.ring.size() {
            if !self.control.has_due() {
                return Ok(());
            }
            let Some(chain) = lane.pop()? else { return Ok(()) };
            let room = bytes_of(&self.ram, &chain, true).map(|iov| iov.bytes());
            let Some(message) = self.control.next_due() else { return Ok(()) };
            let written = match room {
                Ok(room) if room >= message.len() as u64 => {
                    mem::scatter(&self.ram, &chain.writable, &message)
                        .map(|bytes| bytes as u64)
                        .map_err(BadChain::from)
                }
                Ok(room) => Err(BadChain::Short(room)),
                Err(why) => Err(why),
            };
            let written = written.unwrap_or_else(|why| {
                warn_limited!(errors, "console: a buffer for a control message: {why}; the message is lost");
                0
            });
            lane.push(chain.head, written)?;
        }
        Ok(())
    }

    /// Discards a queue's output. Returns `true` if the queue is empty.
    fn discard(&mut self, queue: u16) -> Result<bool, RingError> {
        let Some(Some(lane)) = self.lanes.get_mut(usize::from(queue)) else { return Ok(true) };
        lane.queue.ring.disable_doorbell();
        for _ in 0..lane.queue.ring.size() {
            let Some(chain) = lane.pop()? else { return Ok(true) };
            lane.push(chain.head, 0)?;
        }
        Ok(false)
    }

    /// Pops the next output chain that has bytes, unless one is held. Returns `true` if one is held now.
    fn next_output(&mut self, at: usize, has_sink: bool, errors: &mut RateLimit) -> Result<bool, RingError> {
        let queue = usize::from(tx_queue(self.id_of(at)));
        let Some(place) = self.places.get_mut(at) else { return Ok(false) };
        if place.output.is_some() {
            return Ok(true);
        }
        let Some(Some(lane)) = self.lanes.get_mut(queue) else { return Ok(false) };
        for _ in 0..lane.queue.ring.size() {
            let Some(chain) = lane.pop()? else { return Ok(false) };
            match bytes_of(&self.ram, &chain, false) {
                Ok(iov) if iov.bytes() > 0 && has_sink => {
                    if let Some(window) = &self.window {
                        window.note_output();
                    }
                    place.output = Some(Held { head: chain.head, iov, done: 0 });
                    place.sink_later = false;
                    return Ok(true);
                }
                Ok(_) => {}
                Err(why) => warn_limited!(errors, "console: port {}: output: {why}", at + 1),
            }
            lane.push(chain.head, 0)?;
        }
        Ok(false)
    }

    /// Moves a port's output. Returns whether all output that the guest supplied has been moved, and whether
    /// there may be more to move at once.
    fn move_output(
        &mut self,
        at: usize,
        port: &mut PortConfig,
        errors: &mut RateLimit,
    ) -> Result<(bool, bool), RingError> {
        let queue = usize::from(tx_queue(self.id_of(at)));
        let budget = match self.lanes.get_mut(queue) {
            Some(Some(lane)) => {
                lane.queue.ring.disable_doorbell();
                lane.queue.ring.size()
            }
            _ => return Ok((true, false)),
        };
        for _ in 0..budget {
            if !self.next_output(at, port.sink.is_some(), errors)? {
                return Ok((true, false));
            }
            if !self.move_one(at, port)? {
                return Ok((false, false));
            }
        }
        Ok((false, true))
    }

    /// Moves a part of the held output chain. Returns `true` if the host's end may take more at once.
    fn move_one(&mut self, at: usize, port: &mut PortConfig) -> Result<bool, RingError> {
        let queue = usize::from(tx_queue(self.id_of(at)));
        let Some(place) = self.places.get_mut(at) else { return Ok(false) };
        let (Some(held), Some(sink)) = (&mut place.output, &mut port.sink) else { return Ok(false) };
        match sink.write(&held.iov, held.done) {
            Moved::Bytes(count) => held.done += count,
            Moved::Later => {
                place.sink_later = true;
                return Ok(false);
            }
            Moved::End => {
                // Nobody takes the output any more. The guest is told, and may stop writing.
                held.done = held.iov.bytes();
                self.control.close(at);
            }
        }
        place.sink_later = false;
        if held.done >= held.iov.bytes() {
            let head = held.head;
            place.output = None;
            if let Some(Some(lane)) = self.lanes.get_mut(queue) {
                lane.push(head, 0)?;
            }
        }
        Ok(true)
    }

    /// Fills the guest's buffers with input while a program there has the port open; Linux discards what
    /// arrives before. Returns `true` if there may be more to move at once.
    fn move_input(
        &mut self,
        at: usize,
        port: &mut PortConfig,
        errors: &mut RateLimit,
    ) -> Result<bool, RingError> {
        let queue = usize::from(rx_queue(self.id_of(at)));
        if !self.takes_input(at) {
            return Ok(false);
        }
        let (Some(place), Some(source)) = (self.places.get_mut(at), &mut port.source) else {
            return Ok(false);
        };
        let Some(Some(lane)) = self.lanes.get_mut(queue) else { return Ok(false) };
        for _ in 0..lane.queue.ring.size() {
            if source.fd().is_none() {
                self.control.close(at);
                return Ok(false);
            }
            if place.input.is_none() {
                let Some(chain) = lane.pop()? else { return Ok(false) };
                match bytes_of(&self.ram, &chain, true) {
                    Ok(iov) if iov.bytes() > 0 => {
                        place.input = Some(Held { head: chain.head, iov, done: 0 });
                    }
                    Ok(_) => lane.push(chain.head, 0)?,
                    Err(why) => {
                        warn_limited!(errors, "console: port {}: a buffer for input: {why}", at + 1);
                        lane.push(chain.head, 0)?;
                    }
                }
            }
            let Some(held) = &place.input else { continue };
            match source.read(&held.iov) {
                Moved::Bytes(count) => {
                    lane.push(held.head, count)?;
                    place.input = None;
                }
                Moved::Later => {
                    place.source_later = true;
                    return Ok(false);
                }
                // The buffer stays held until reset: the guest learns of the end by PORT_OPEN.
                Moved::End => {}
            }
        }
        Ok(true)
    }
}

fn read_message(ram: &Ram, chain: &Chain) -> Result<[u8; MESSAGE_BYTES], BadChain> {
    if let Some(fault) = chain.fault {
        return Err(fault.into());
    }
    let mut message = [0; MESSAGE_BYTES];
    let filled = mem::gather(ram, &chain.readable, &mut message)?;
    match filled {
        MESSAGE_BYTES => Ok(message),
        short => Err(BadChain::Short(short as u64)),
    }
}
