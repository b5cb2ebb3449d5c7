//! The first sync error, kept for the life of the process.
//!
//! The kernel tells an error of writeback once: to one fdatasync, or stable write, while others that
//! were in flight with it succeed. So a success counts only when every sync that was open at its
//! end has been judged too; until then it is held ([`SyncLatch::open_now`]), and the queue that holds
//! it may sleep: the judge of the last of them rings for it ([`SyncLatch::ring_when_settled`], E7).
//!
//! After a failed fdatasync the kernel has marked the lost pages clean, and the next one succeeds: so
//! an error is never retried, and from then on no FLUSH and no stable write of this disk is reported
//! OK (E1, E2), in every mode and on every queue.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::doorbell;
use crate::sync::{AtomicI32, Mutex, MutexGuard, Ordering, unpoisoned};

/// Remembers the first sync error of one disk, and which syncs nobody has judged yet.
#[derive(Debug, Default)]
pub struct SyncLatch {
    errno: AtomicI32,
    syncs: Mutex<Syncs>,
}

#[derive(Debug, Default)]
struct Syncs {
    opened: u64,
    /// In the order of their numbers.
    open: Vec<u64>,
    /// Queues that hold a success and sleep, one place each.
    sleepers: Vec<Sleeper>,
}

/// Who is to be woken, and when.
#[derive(Debug)]
struct Sleeper {
    horizon: u64,
    bell: Arc<EventFd>,
}

impl Syncs {
    fn is_settled(&self, horizon: u64) -> bool {
        self.open.first().is_none_or(|&oldest| oldest > horizon)
    }
}

/// A sync that an engine has, or whose result nobody has looked at.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
pub struct Ticket(u64);

impl SyncLatch {
    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        unpoisoned(self.syncs.lock())
    }

    /// A sync is about to be handed to an engine.
    pub fn open(&self) -> Ticket {
        let mut syncs = self.syncs();
        syncs.opened += 1;
        let number = syncs.opened;
        syncs.open.push(number);
        Ticket(number)
    }

    /// Its result has been looked at, and latched if it was an error. Wakes whom this settles.
    pub fn judged(&self, Ticket(number): Ticket) {
        let mut syncs = self.syncs();
        syncs.open.retain(|&other| other != number);
        let Syncs { open, sleepers, .. } = &mut *syncs;
        sleepers.retain(|sleeper| {
            let waits_on = open.first().is_some_and(|&oldest| oldest <= sleeper.horizon);
            if !waits_on {
                ring(&sleeper.bell);
            }
            waits_on
        });
    }

    /// Rings `bell` once, as soon as `horizon` is settled. `false` if it is by now, and nothing will
    /// ring. Looked at and kept in one step, so that no judgement comes between. A bell has one place:
    /// what was asked for it before is forgotten.
    pub fn ring_when_settled(&self, Ticket(horizon): Ticket, bell: &Arc<EventFd>) -> bool {
        let mut syncs = self.syncs();
        syncs.sleepers.retain(|sleeper| !Arc::ptr_eq(&sleeper.bell, bell));
        if syncs.is_settled(horizon) {
            return false;
        }
        syncs.sleepers.push(Sleeper { horizon, bell: Arc::clone(bell) });
        true
    }

    /// The newest sync that is open now: a success that ends now counts once it and all before it
    /// are judged. `None` if there is nothing to wait for.
    pub fn open_now(&self) -> Option<Ticket> {
        self.syncs().open.last().copied().map(Ticket)
    }

    /// Whether this sync and all that were opened before it are judged.
    pub fn is_settled(&self, Ticket(number): Ticket) -> bool {
        self.syncs().is_settled(number)
    }

    /// Keeps `error` if it is the first; logs that one.
    pub fn set(&self, error: &io::Error) {
        let errno = error.raw_os_error().filter(|&errno| errno != 0).unwrap_or(libc::EIO);
        if self.errno.compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            log::error!(
                "disk: the host could not make data stable: {error}. It may be lost, so every FLUSH and every \
                 stable write fails from now on; find the cause and start again"
            );
        }
    }

    /// `Err` with the first error, if there was one.
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
    fn a_sleeper_is_woken_once_when_the_last_that_it_waits_for_is_judged() {
        let latch = SyncLatch::default();
        let (first, second) = (latch.open(), latch.open());
        let (early, late) = (bell(), bell());
        assert!(latch.ring_when_settled(second, &late));
        assert!(latch.ring_when_settled(first, &early));
        // Asked again, it still has one place.
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

    /// Shows E7.
    #[test]
    fn a_success_is_settled_when_all_syncs_that_were_open_are_judged() {
        let latch = SyncLatch::default();
        assert_eq!(latch.open_now(), None);
        let (first, second) = (latch.open(), latch.open());
        latch.judged(second);
        let horizon = latch.open_now().unwrap();
        let _later = latch.open();
        assert!(!latch.is_settled(horizon));
        latch.judged(first);
        assert!(latch.is_settled(horizon), "what was opened later does not matter");
    }

    #[test]
    fn a_success_waits_for_the_newest_sync_that_was_open_and_for_each_before_it() {
        for judged_first in 0..3 {
            let latch = SyncLatch::default();
            let syncs = [latch.open(), latch.open(), latch.open()];
            let horizon = latch.open_now().unwrap();
            assert_eq!(horizon, syncs[2]);
            for step in 0..3 {
                assert!(!latch.is_settled(horizon), "{step} of 3 are judged, from number {judged_first} on");
                latch.judged(syncs[(judged_first + step) % 3]);
            }
            assert!(latch.is_settled(horizon));
        }
    }

    #[test]
    fn an_error_without_a_number_is_kept_too() {
        let latch = SyncLatch::default();
        latch.set(&io::Error::other("?"));
        assert!(latch.check().is_err());
    }
}
