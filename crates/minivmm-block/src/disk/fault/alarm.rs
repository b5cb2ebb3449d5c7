//! A thread that rings a doorbell at a set time. It wakes an engine that waits for its doorbell when one of its
//! held operations is due, however the engine below waits.
//!
//! Owns the thread. It may ring once too often; every worker must bear a doorbell without a request.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::sync::unpoisoned;
use crate::threads::{ThreadKind, Threads};

/// The handle of the alarm's thread.
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

    /// Sleeps until the set time, rings, and repeats until dropped.
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
                    // If the counter is full, the doorbell has been rung already.
                    let _ = bell.write(1);
                    state.next = None;
                    state
                }
            };
        }
    }
}

impl Alarm {
    pub(super) fn start(threads: &dyn Threads) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("fault-delays".into());
        let thread = threads.spawn(ThreadKind::Delays, builder, Box::new(move || mine.run()))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Rings this doorbell at `at`. Replaces the time that was set before.
    pub(super) fn set(&self, at: Instant, doorbell: &Arc<EventFd>) {
        self.shared.lock().next = Some((at, Arc::clone(doorbell)));
        self.shared.changed.notify_one();
    }

    /// Cancels the alarm, because the doorbell goes away.
    pub(super) fn forget(&self) {
        self.shared.lock().next = None;
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // The thread returns nothing.
            let _ = thread.join();
        }
    }
}
