//! A thread that rings a doorbell at a time: an engine that waits for its doorbell wakes up for what it
//! holds, whatever the engine below waits with.
//!
//! Owns the thread. A ring too many is a doorbell without a request, which every worker must bear.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Role, Ticket};
use crate::sync::unpoisoned;

/// One thread's clock.
pub(super) struct Alarm {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: Option<(Instant, Arc<EventFd>)>,
    ends: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }

    /// Sleeps, rings, sleeps.
    fn run(&self) {
        let mut state = self.lock();
        while !state.ends {
            let now = Instant::now();
            state = match &state.next {
                None => unpoisoned(self.changed.wait(state)),
                Some((at, _)) if *at > now => {
                    let left = *at - now;
                    unpoisoned(self.changed.wait_timeout(state, left)).0
                }
                Some((_, bell)) => {
                    // A counter that is full has been rung.
                    let _ = bell.write(1);
                    state.next = None;
                    state
                }
            };
        }
    }
}

impl Alarm {
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        let ticket = Ticket::new(Role::Delays);
        let thread = std::thread::Builder::new().name("fault-delays".into()).spawn(move || {
            ticket.enter();
            mine.run();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Rings this doorbell then, and at no other time.
    pub(super) fn set(&self, at: Instant, doorbell: &Arc<EventFd>) {
        self.shared.lock().next = Some((at, Arc::clone(doorbell)));
        self.shared.changed.notify_one();
    }

    /// The doorbell goes away.
    pub(super) fn forget(&self) {
        self.shared.lock().next = None;
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}
