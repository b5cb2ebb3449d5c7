//! The one thread of a console device: it waits for doorbells, for the host's ends and for orders.
//!
//! Owns the thread and the waiting; [`super::live`] does the work. The thread never waits only for the host's
//! ends, so it obeys an order at once even if a reader stalls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PortConfig;
use super::live::Live;
use super::window::{Window, WindowSize};
use crate::doorbell;
use crate::ratelimit::RateLimit;
use crate::sandbox::{Role, SandboxEntry};
use crate::virtio::Activation;
use crate::warn_limited;

/// A limit on turns after a stop, for a guest that goes on writing while its device is reset.
const LAST_TURNS_MAX: u32 = 64;

/// What the device orders its worker to do. If the channel closes, the worker ends.
enum Order {
    Start(Box<Activation>),
    /// The worker reports through the sender that it is done.
    StopQueue(u16, Sender<()>),
    Stop(Sender<()>),
}

/// The worker's thread no longer exists.
#[derive(Debug, thiserror::Error)]
#[error("the console's worker has ended")]
pub struct ConsoleGone;

/// The device's end.
pub struct ConsoleThread {
    orders: Option<Sender<Order>>,
    wake: Arc<EventFd>,
    window: Option<Arc<Window>>,
    thread: Option<JoinHandle<()>>,
}

impl ConsoleThread {
    /// Starts the thread, which waits for a driver. With a `size`, the only port is a terminal's.
    pub fn park(ports: Vec<PortConfig>, size: Option<WindowSize>) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let window = size.map(|size| Arc::new(Window::new(size, Arc::clone(&wake))));
        let (orders, received) = mpsc::channel();
        let mut worker = Worker {
            ports,
            orders: received,
            wake: Arc::clone(&wake),
            window: window.clone(),
            errors: RateLimit::for_guest_errors("console"),
            live: None,
        };
        let entry = SandboxEntry::new(Role::Console);
        let thread = std::thread::Builder::new().name("console".into()).spawn(move || {
            entry.enter();
            worker.work();
        })?;
        Ok(Self { orders: Some(orders), wake, window, thread: Some(thread) })
    }

    /// Returns the window of a terminal's device; `None` for other devices.
    pub fn window(&self) -> Option<Arc<Window>> {
        self.window.clone()
    }

    /// Hands the queues to the worker.
    pub fn start(&self, parts: Activation) -> Result<(), ConsoleGone> {
        self.order(Order::Start(Box::new(parts)))
    }

    /// Stops one queue. When this returns, the worker no longer uses the queue.
    pub fn stop_queue(&self, index: u16) {
        self.order_and_wait(|done| Order::StopQueue(index, done));
    }

    /// Stops the device. When this returns, the worker uses no queue and sends no notification.
    pub fn stop(&self) {
        self.order_and_wait(Order::Stop);
    }

    fn order(&self, order: Order) -> Result<(), ConsoleGone> {
        self.orders.as_ref().ok_or(ConsoleGone)?.send(order).map_err(|_| ConsoleGone)?;
        wake(&self.wake);
        Ok(())
    }

    /// A worker that has ended drops the channel without an answer, which also ends the wait.
    fn order_and_wait(&self, order: impl FnOnce(Sender<()>) -> Order) {
        let (done, is_done) = mpsc::channel();
        if self.order(order(done)).is_ok() {
            let _ = is_done.recv();
        }
    }
}

impl Drop for ConsoleThread {
    fn drop(&mut self) {
        self.orders = None;
        wake(&self.wake);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("console: the worker has panicked");
        }
    }
}

/// Wakes the worker. An eventfd whose counter is full wakes it as well.
fn wake(event: &EventFd) {
    if let Err(error) = doorbell::ring(event) {
        log::error!("console: the worker cannot be woken: {error}");
    }
}

struct Worker {
    ports: Vec<PortConfig>,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    window: Option<Arc<Window>>,
    /// Outlives drivers; otherwise a guest that resets the device again and again could log without limit
    /// (R18).
    errors: RateLimit,
    live: Option<Live>,
}

impl Worker {
    fn work(&mut self) {
        loop {
            let _ = self.wake.read();
            if !self.obey() {
                return;
            }
            let more = self.turn();
            if let Err(error) = self.wait(more) {
                log::error!("console: the worker cannot wait, and ends: {error}");
                self.live.iter().for_each(|live| live.interrupt().needs_reset());
                return;
            }
        }
    }

    /// Obeys all orders. Returns `false` if the worker is to end.
    fn obey(&mut self) -> bool {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Start(parts)) => {
                    self.live = Some(Live::new(*parts, &self.ports, self.window.clone()));
                    if let Some(window) = &self.window {
                        window.tell_again();
                    }
                }
                Ok(Order::StopQueue(index, done)) => {
                    if let Some(live) = &mut self.live {
                        live.stop_queue(index);
                    }
                    let _ = done.send(());
                }
                Ok(Order::Stop(done)) => {
                    // What a guest wrote before it died goes out, as far as that does not block.
                    let _ = (0..LAST_TURNS_MAX).any(|_| !self.turn());
                    self.live = None;
                    let _ = done.send(());
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Runs one round. Returns `true` if there may be more to do at once.
    fn turn(&mut self) -> bool {
        let Some(live) = &mut self.live else { return false };
        live.quieten();
        match live.turn(&mut self.ports, &mut self.errors) {
            Ok(more) => more,
            Err(error) => {
                warn_limited!(
                    self.errors,
                    "console: the driver has broken a queue: {error}; the device needs a reset"
                );
                live.interrupt().needs_reset();
                self.live = None;
                false
            }
        }
    }

    fn wait(&self, more: bool) -> io::Result<()> {
        let mut fds = vec![asked(self.wake.as_raw_fd(), false)];
        if let Some(live) = &self.live {
            fds.extend(live.doorbells().map(|fd| asked(fd, false)));
            fds.extend(live.waits_for(&self.ports).into_iter().map(|(fd, write)| asked(fd, write)));
        }
        let count = libc::nfds_t::try_from(fds.len()).map_err(io::Error::other)?;
        // SAFETY: the pointer and the count are those of one array.
        if unsafe { libc::poll(fds.as_mut_ptr(), count, if more { 0 } else { -1 }) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        Ok(())
    }
}

fn asked(fd: RawFd, write: bool) -> libc::pollfd {
    libc::pollfd { fd, events: if write { libc::POLLOUT } else { libc::POLLIN }, revents: 0 }
}
