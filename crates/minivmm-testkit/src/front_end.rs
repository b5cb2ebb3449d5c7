//! A front end for vhost-user-blk back ends that nobody here wrote: the crate virtio-driver, with memory for its
//! requests.
//!
//! Owns the connection, one buffer for each request in flight, and the wait for completions. What a request is, and what
//! its ring looks like, is the crate's.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapMut;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

/// What the driver accepts of what the back end offers.
const FEATURES: u64 = VirtioFeatureFlags::VERSION_1.bits()
    | VirtioFeatureFlags::RING_EVENT_IDX.bits()
    | VirtioBlkFeatureFlags::FLUSH.bits()
    | VirtioBlkFeatureFlags::MQ.bits()
    | VirtioBlkFeatureFlags::RO.bits()
    | VirtioBlkFeatureFlags::DISCARD.bits()
    | VirtioBlkFeatureFlags::WRITE_ZEROES.bits();

/// A connection to a back end.
pub struct FrontEnd {
    /// Its queues.
    pub queues: Vec<Queue>,
    transport: Box<VirtioBlkTransport>,
}

/// One queue and the buffers of its requests. It can move to a thread of its own.
pub struct Queue {
    driver: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    buffers: MmapMut,
    buffer_bytes: usize,
}

/// One request, on the buffer of its slot where it has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Reads `bytes` bytes at this offset.
    Read {
        /// Where, in bytes.
        at: u64,
        /// How many.
        bytes: usize,
    },
    /// Writes `bytes` bytes at this offset.
    Write {
        /// Where, in bytes.
        at: u64,
        /// How many.
        bytes: usize,
    },
    /// Makes stable what has completed.
    Flush,
    /// Gives blocks back.
    Discard {
        /// Where, in bytes.
        at: u64,
        /// How many.
        bytes: u64,
    },
    /// Makes blocks read as zeroes.
    WriteZeroes {
        /// Where, in bytes.
        at: u64,
        /// How many.
        bytes: u64,
        /// Whether their space may be given back.
        unmap: bool,
    },
}

impl FrontEnd {
    /// Connects to the back end at `socket` with `queues` queues of `size` entries; each has `slots` buffers of
    /// `buffer_bytes` bytes.
    ///
    /// # Errors
    ///
    /// What the crate reports: no back end there, one without the features that it needs, one that refuses a message.
    pub fn connect(
        socket: &Path,
        queues: usize,
        size: u16,
        (slots, buffer_bytes): (usize, usize),
    ) -> io::Result<Self> {
        let connected = reach(socket.to_str().ok_or(ErrorKind::InvalidInput)?)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(connected);
        let mut mapped = Vec::new();
        for _ in 0..queues {
            let (file, buffers) = shared(slots * buffer_bytes)?;
            transport.map_mem_region(buffers.as_ptr() as usize, buffers.len(), file.as_raw_fd(), 0)?;
            mapped.push(buffers);
        }
        let drivers = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, size)?;
        let queue = |(index, (mut driver, buffers)): (usize, (VirtioBlkQueue<'static, usize>, _))| {
            // The crate begins without.
            driver.set_used_notif_enabled(true);
            Queue {
                driver,
                notifier: transport.get_submission_notifier(index),
                completed: transport.get_completion_fd(index),
                buffers,
                buffer_bytes,
            }
        };
        let queues = drivers.into_iter().zip(mapped).enumerate().map(queue).collect();
        Ok(Self { queues, transport })
    }

    /// Returns the device's configuration space.
    ///
    /// # Errors
    ///
    /// The back end's refusal.
    pub fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// Whether the device has said that it cannot be written.
    pub fn is_readonly(&self) -> bool {
        self.transport.get_features() & VirtioBlkFeatureFlags::RO.bits() != 0
    }
}

/// Connects. A back end whose socket is there may listen an instant later.
fn reach(path: &str) -> io::Result<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>> {
    for _ in 0..100 {
        match VhostUser::new(path, FEATURES) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::thread::sleep(Duration::from_millis(10));
            }
            reached => return reached,
        }
    }
    VhostUser::new(path, FEATURES)
}

/// Memory that a back end can map.
fn shared(bytes: usize) -> io::Result<(File, MmapMut)> {
    // SAFETY: the name is a string that ends with a NUL.
    let fd = unsafe { libc::memfd_create(c"buffers".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64)?;
    // SAFETY: the file has no name, and the back end, which has it too, writes only what a request lets it write.
    let mapped = unsafe { MmapMut::map_mut(&file) }?;
    Ok((file, mapped))
}

impl Queue {
    /// Sets whether the device tells of completions, as it does at first. A front end that spins does without.
    pub fn set_notified(&mut self, notified: bool) {
        self.driver.set_used_notif_enabled(notified);
    }

    /// The buffer of a slot. A request on it must have completed.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        let begin = slot * self.buffer_bytes;
        &mut self.buffers[begin..begin + self.buffer_bytes]
    }

    /// Puts a request into the ring. The device learns of it by [`Queue::notify`].
    ///
    /// # Errors
    ///
    /// A full ring; an offset within a sector.
    pub fn submit(&mut self, slot: usize, request: Request) -> io::Result<()> {
        let data = self.buffer(slot).as_mut_ptr();
        match request {
            // SAFETY: the buffers live as long as the queue, `bytes` of the slot's are checked below, and the slot's
            // user waits for the completion before it touches them.
            Request::Read { at, bytes } => unsafe {
                assert!(bytes <= self.buffer_bytes);
                self.driver.read_raw(at, data, bytes, slot)
            },
            // SAFETY: as for a read.
            Request::Write { at, bytes } => unsafe {
                assert!(bytes <= self.buffer_bytes);
                self.driver.write_raw(at, data, bytes, slot)
            },
            Request::Flush => self.driver.flush(slot),
            Request::Discard { at, bytes } => self.driver.discard(at, bytes, slot),
            Request::WriteZeroes { at, bytes, unmap } => self.driver.write_zeroes(at, bytes, unmap, slot),
        }
    }

    /// Tells the device of what was submitted, where it wants to be told; whether it did.
    ///
    /// # Errors
    ///
    /// The eventfd's.
    pub fn notify(&mut self) -> io::Result<bool> {
        let needed = self.driver.avail_notif_needed();
        if needed {
            self.notifier.notify()?;
        }
        Ok(needed)
    }

    /// Adds what has completed to `completed`: slots, and 0 or a negative errno.
    pub fn take(&mut self, completed: &mut Vec<(usize, i32)>) {
        completed.extend(self.driver.completions().map(|completion| (completion.context, completion.ret)));
    }

    /// Sleeps until the device tells of completions. Returns at once where some are there.
    ///
    /// # Errors
    ///
    /// `TimedOut`, when nothing has completed for so long.
    pub fn wait(&mut self, patience: Duration) -> io::Result<()> {
        if self.driver.completions().has_next() {
            return Ok(());
        }
        let mut asked = libc::pollfd { fd: self.completed.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let patience = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one structure, as said.
        match unsafe { libc::poll(&raw mut asked, 1, patience) } {
            1 => self.completed.read().map(drop),
            0 => Err(ErrorKind::TimedOut.into()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Does one request, on slot 0, and waits for it: 0 or a negative errno.
    ///
    /// # Errors
    ///
    /// As of the steps.
    pub fn run(&mut self, request: Request, patience: Duration) -> io::Result<i32> {
        self.submit(0, request)?;
        self.notify()?;
        let mut completed = Vec::new();
        loop {
            self.take(&mut completed);
            if let Some((_, result)) = completed.first() {
                return Ok(*result);
            }
            self.wait(patience)?;
        }
    }
}
