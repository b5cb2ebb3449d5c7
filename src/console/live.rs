//! The device between DRIVER_OK and reset: chains popped, bytes moved, chains returned.
//!
//! Owns the rings and the chain that each port is at. Flow control is where the chains are: output
//! stays in the guest's own buffers until the host's end has taken it, input stays with the host
//! until the guest has given a buffer; nothing is stored here but one chain a queue. A turn never
//! waits. It needs no thread of its own.

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

/// Why a chain that could be followed carries no bytes.
#[derive(Debug, thiserror::Error)]
enum BadChain {
    #[error(transparent)]
    Fault(#[from] ChainFault),
    #[error(transparent)]
    Outside(#[from] OutsideRam),
    #[error("{0} bytes are too few")]
    Short(u64),
}

/// A chain that has been popped and is not yet returned.
struct Held {
    head: u16,
    iov: Iov,
    /// Bytes of it that have gone.
    done: u64,
}

/// One queue.
struct Lane {
    queue: EnabledQueue,
}

impl Lane {
    /// The next chain. With none, the doorbell is asked for.
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

    /// Returns a chain; the driver sees it at the end of the turn.
    fn push(&mut self, head: u16, written: u64) -> Result<(), RingError> {
        // A chain has at most 2^32 bytes; saying less is allowed (virtio 2.7.8.2).
        self.queue.ring.push_used(head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn notify(&mut self, interrupt: &dyn Interrupt) {
        if self.queue.ring.publish() {
            interrupt.queue(self.queue.index);
        }
    }
}

/// The bytes of a chain: what the driver has filled, or what the device may fill.
fn bytes_of(ram: &Ram, chain: &Chain, writable: bool) -> Result<Iov, BadChain> {
    match chain.fault {
        Some(fault) => Err(fault.into()),
        None => Ok(Iov::new(ram, if writable { &chain.writable } else { &chain.readable })?),
    }
}

/// Where a port stands. It is the driver's: at reset it goes.
#[derive(Default)]
struct Place {
    input: Option<Held>,
    output: Option<Held>,
    /// The host's end is to be waited for before it is tried again.
    source_later: bool,
    sink_later: bool,
}

/// A driver at work.
pub struct Live {
    ram: Ram,
    interrupt: Arc<dyn Interrupt>,
    /// By index; those that are not enabled, or were stopped, are none.
    lanes: Vec<Option<Lane>>,
    control: Control,
    places: Vec<Place>,
    multiport: bool,
    /// Of a terminal's device, whose only port has the id 0.
    window: Option<Arc<Window>>,
}

impl Live {
    /// A driver has come for a device of these ports, or for a terminal's.
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
            // Ends that a former driver has seen closed are closed for this one too.
            let input_ended = port.source.as_ref().is_some_and(|source| source.fd().is_none());
            let output_ended = port.sink.as_ref().is_some_and(|sink| sink.fd().is_none());
            if input_ended || output_ended {
                control.close(at);
            }
        }
        let places = ports.iter().map(|_| Place::default()).collect();
        Self { ram, interrupt, lanes, control, places, multiport: features & MULTIPORT != 0, window }
    }

    /// The id of the port at this place of the list; there are fewer ports than ids by far.
    fn id_of(&self, at: usize) -> u16 {
        let first = usize::from(self.window.is_none());
        u16::try_from(first + at).unwrap_or(u16::MAX / 2 - 2)
    }

    /// Whether a program in the guest may read port `at`. A terminal's driver does not tell: Linux keeps
    /// what comes before somebody opens hvc0.
    fn takes_input(&self, at: usize) -> bool {
        self.window.is_some() || self.control.is_guest_open(at)
    }

    /// The driver has taken this queue back.
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

    /// What the driver is still to be told where the ring breaks: nothing but that it needs a reset.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// The doorbells of all queues.
    pub fn doorbells(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.lanes.iter().flatten().map(|lane| lane.queue.doorbell.as_raw_fd())
    }

    /// Takes back what rang. A doorbell that did not ring says so, which is no error.
    pub fn quieten(&self) {
        for lane in self.lanes.iter().flatten() {
            let _ = lane.queue.doorbell.read();
        }
    }

    /// The host's ends that are waited for: (descriptor, for writing).
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

    /// One round over everything; whether there may be more to do at once. Each queue has a budget,
    /// so that a flood on one does not keep the others waiting (R17).
    pub fn turn(&mut self, ports: &mut [PortConfig], errors: &mut RateLimit) -> Result<bool, RingError> {
        let result = self.move_all(ports, errors);
        if self.window.as_ref().is_some_and(|window| window.take_change()) {
            self.interrupt.config();
        }
        // Of what was returned before a ring broke, the driver is told all the same.
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
        // A chain that must go after others is popped first: what was written before it is then
        // seen by the others' turns.
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

    /// The driver's control messages.
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

    /// Control messages for the driver, as far as it has given buffers.
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

    /// Throws a queue's output away; whether it is empty.
    fn discard(&mut self, queue: u16) -> Result<bool, RingError> {
        let Some(Some(lane)) = self.lanes.get_mut(usize::from(queue)) else { return Ok(true) };
        lane.queue.ring.disable_doorbell();
        for _ in 0..lane.queue.ring.size() {
            let Some(chain) = lane.pop()? else { return Ok(true) };
            lane.push(chain.head, 0)?;
        }
        Ok(false)
    }

    /// Pops the next chain of output that has bytes, unless one is held; whether one is held now.
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

    /// Moves a port's output: whether all that the guest has given is gone, and whether there may be
    /// more to move at once.
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

    /// Moves some of the output chain that is held; whether the host's end may take more at once.
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
                // Nobody takes it any more; the guest is told, and may stop writing.
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

    /// Fills the guest's buffers with input, while a program there has the port open: Linux throws
    /// away what comes before. Whether there may be more at once.
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
                // The buffer stays held until reset: the guest sees the end by PORT_OPEN.
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
