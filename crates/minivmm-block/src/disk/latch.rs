//! The first sync error, kept for the life of the process.
//!
//! A sync that succeeded is trusted only once every sync that overlapped it has been judged
//! ([`super::sync_ledger`], E7). Until then its queue holds the success ([`SyncLatch::open_now`]) and may block.
//! The thread that judges the last of the overlapping syncs rings that queue's doorbell
//! ([`SyncLatch::ring_when_settled`]).
//!
//! After a failed fdatasync Linux marks the lost pages clean, and the next fdatasync succeeds. A failed sync is
//! therefore never retried. From then on no FLUSH and no stable write of this disk is reported OK (E1, E2), in
//! every mode and on every queue.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::sync_ledger::{SyncLedger, SyncTicket};
use crate::doorbell;
use crate::sync::{AtomicI32, Mutex, MutexGuard, Ordering, unpoisoned};

/// The first sync error of one disk, and the syncs that nobody has judged yet.
#[derive(Debug, Default)]
pub struct SyncLatch {
    /// 0 until a sync has failed.
    errno: AtomicI32,
    syncs: Mutex<Syncs>,
    listener: Mutex<Listener>,
}

/// What is called at the first error; `None` if nobody wants to know.
#[derive(Default)]
struct Listener(Option<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Listener({})", self.0.is_some())
    }
}

#[derive(Debug, Default)]
struct Syncs {
    ledger: SyncLedger,
    /// The queues that hold a success and may block. Each has at most one entry.
    sleepers: Vec<Sleeper>,
}

/// A queue to wake once `horizon` is settled.
#[derive(Debug)]
struct Sleeper {
    horizon: SyncTicket,
    bell: Arc<EventFd>,
}

impl SyncLatch {
    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        unpoisoned(self.syncs.lock())
    }

    /// Enters a sync in the ledger. Call this just before it is handed to an engine.
    pub fn open(&self) -> SyncTicket {
        self.syncs().ledger.open()
    }

    /// Marks a sync as judged: its result has been checked, and latched if it was an error. Wakes the queues
    /// whose horizon this settles.
    pub fn judged(&self, ticket: SyncTicket) {
        let mut syncs = self.syncs();
        let Syncs { ledger, sleepers } = &mut *syncs;
        ledger.judge(ticket);
        sleepers.retain(|sleeper| {
            let is_settled = ledger.is_settled(sleeper.horizon);
            if is_settled {
                ring(&sleeper.bell);
            }
            !is_settled
        });
    }

    /// Arranges that `bell` is rung once, as soon as `horizon` is settled. Returns `false` if it is settled already;
    /// `bell` is then not rung.
    ///
    /// The check and the entry are one step under the lock, so that no sync is judged between them. A bell has
    /// one entry; this call replaces an earlier one.
    pub fn ring_when_settled(&self, horizon: SyncTicket, bell: &Arc<EventFd>) -> bool {
        let mut syncs = self.syncs();
        syncs.sleepers.retain(|sleeper| !Arc::ptr_eq(&sleeper.bell, bell));
        if syncs.ledger.is_settled(horizon) {
            return false;
        }
        syncs.sleepers.push(Sleeper { horizon, bell: Arc::clone(bell) });
        true
    }

    /// Returns the newest open sync, or `None` if there is nothing to wait for. A success that is reported now
    /// counts once that sync and all before it are judged.
    pub fn open_now(&self) -> Option<SyncTicket> {
        self.syncs().ledger.horizon()
    }

    /// Returns `true` if the sync `horizon` and all syncs opened before it are judged.
    pub fn is_settled(&self, horizon: SyncTicket) -> bool {
        self.syncs().ledger.is_settled(horizon)
    }

    /// Calls `listener` at the first error, before any request that it fails can complete; `None` ends that. An error
    /// that is latched already is not told.
    pub fn on_first_error(&self, listener: Option<Box<dyn Fn() + Send + Sync>>) {
        unpoisoned(self.listener.lock()).0 = listener;
    }

    /// Latches and logs `error` if it is the first; ignores later ones.
    pub fn set(&self, error: &io::Error) {
        let errno = error.raw_os_error().filter(|&errno| errno != 0).unwrap_or(libc::EIO);
        if self.errno.compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            log::error!(
                "disk: the host could not make data stable: {error}. It may be lost, so every FLUSH and every \
                 stable write fails from now on; find the cause and start again"
            );
            if let Some(listener) = &unpoisoned(self.listener.lock()).0 {
                listener();
            }
        }
    }

    /// Returns the first error as `Err`, or `Ok` if no sync has failed.
    pub fn check(&self) -> io::Result<()> {
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn ring(bell: &EventFd) {
    if let Err(error) = doorbell::ring(bell) {
        log::error!("disk: a queue that waits for another's sync cannot be woken: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell() -> Arc<EventFd> {
        Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn the_first_error_is_told_once_and_while_somebody_wants_to_know() {
        let told = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let count = Arc::clone(&told);
        let (latch, deaf) = (SyncLatch::default(), SyncLatch::default());
        for latch in [&latch, &deaf] {
            let count = Arc::clone(&count);
            latch.on_first_error(Some(Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            })));
        }
        deaf.on_first_error(None);
        for latch in [&latch, &latch, &deaf] {
            latch.set(&io::Error::from_raw_os_error(libc::ENOSPC));
        }
        assert_eq!(told.load(Ordering::SeqCst), 1);
        assert!(latch.check().is_err() && deaf.check().is_err());
    }

    #[test]
    fn a_sleeper_is_woken_once_when_the_last_that_it_waits_for_is_judged() {
        let latch = SyncLatch::default();
        let (first, second) = (latch.open(), latch.open());
        let (early, late) = (bell(), bell());
        assert!(latch.ring_when_settled(second, &late));
        assert!(latch.ring_when_settled(first, &early));
        // A second request for the same bell leaves one entry.
        assert!(latch.ring_when_settled(second, &late));
        latch.judged(second);
        assert!(early.read().is_err() && late.read().is_err(), "the older one is still open");
        let third = latch.open();
        latch.judged(first);
        assert_eq!((early.read().unwrap(), late.read().unwrap()), (1, 1));
        latch.judged(third);
        assert!(early.read().is_err() && late.read().is_err());
        assert!(!latch.ring_when_settled(third, &late), "settled before it is asked");
    }

    #[test]
    fn the_first_error_stays() {
        let latch = SyncLatch::default();
        assert!(latch.check().is_ok());
        latch.set(&io::Error::from_raw_os_error(libc::ENOSPC));
        latch.set(&io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(latch.check().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn an_error_without_a_number_is_kept_too() {
        let latch = SyncLatch::default();
        latch.set(&io::Error::other("?"));
        assert!(latch.check().is_err());
    }
}
