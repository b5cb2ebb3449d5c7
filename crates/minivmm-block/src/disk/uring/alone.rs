//! Operations that are alone: the worker makes them itself, without the ring.
//!
//! Owns the choice for one queue. io_uring gives every operation that blocks to a thread of the kernel (io-wq). That
//! thread must be woken, needs a CPU, and must wake the worker in the end. A worker that has nothing else in flight
//! loses nothing if it blocks itself, and saves all of that (`docs/reference/blocking-and-polling.md`). If other requests are in
//! flight, or come meanwhile, they would wait for it, so the ring keeps it.
//!
//! What the guest will do next is not known, so the last operations decide: after [`QUIET`] in a row that were
//! alone from begin to end, the next one is expected to be alone too.

use crate::disk::engine::{HostOp, OpToken};

/// Undisturbed operations in a row after which the worker makes the next one itself.
const QUIET: u32 = 4;

/// The operation that is kept back, and what the last ones have taught.
pub(super) struct Alone {
    /// The only operation in flight, for the worker to make. The ring gets it if another one comes before.
    kept: Option<(OpToken, HostOp)>,
    /// Operations in the ring that block.
    in_ring: usize,
    /// Undisturbed operations in a row, at most [`QUIET`].
    quiet: u32,
    /// `true` if something came since `in_ring` was 0.
    disturbed: bool,
    /// `true` if requests came while the worker made the last operation. Whether that disturbed anybody is seen when
    /// they are submitted: a sync that comes during a sync has to wait for it anyway.
    came: bool,
}

impl Default for Alone {
    /// A queue begins quiet, so that a disk that does nothing but syncs has the short way at once.
    fn default() -> Self {
        Self { kept: None, in_ring: 0, quiet: QUIET, disturbed: false, came: false }
    }
}

impl Alone {
    /// Records that an operation is submitted while `others` are in the ring.
    pub(super) fn comes(&mut self, blocks: bool, others: usize) {
        let has_company = self.in_ring > 0 || self.kept.is_some() || (blocks && others > 0);
        if has_company || (self.came && !blocks) {
            self.quiet = 0;
        }
        self.disturbed |= has_company;
    }

    /// Keeps back an operation that blocks, if it is expected to be alone; hands it back if not. The ring is empty.
    pub(super) fn keep(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        if self.quiet < QUIET || self.kept.is_some() {
            return Err(op);
        }
        self.kept = Some((token, op));
        Ok(())
    }

    /// Takes the operation that was kept back.
    pub(super) fn take(&mut self) -> Option<(OpToken, HostOp)> {
        self.kept.take()
    }

    /// Returns `true` if an operation is kept back.
    pub(super) fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// Returns the number of operations in the ring that block.
    pub(super) fn in_ring(&self) -> usize {
        self.in_ring
    }

    /// Records that the worker has made an operation, and whether requests came meanwhile.
    pub(super) fn made(&mut self, came: bool) {
        self.came = came;
        self.quiet = (self.quiet + 1).min(QUIET);
    }

    /// Records that a wait begins: what comes from now on has come after the end of the last operation.
    pub(super) fn waits(&mut self) {
        self.came = false;
    }

    /// Records that an operation that blocks goes to the ring.
    pub(super) fn enters_ring(&mut self) {
        self.in_ring += 1;
    }

    /// Records that an operation that blocks has left the ring.
    pub(super) fn leaves_ring(&mut self) {
        self.in_ring -= 1;
        if !self.disturbed {
            self.quiet = (self.quiet + 1).min(QUIET);
        }
        self.disturbed &= self.in_ring > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_a_sync(alone: &mut Alone) -> bool {
        alone.comes(true, 0);
        let kept = alone.keep(OpToken(0), HostOp::Fdatasync).is_ok();
        assert_eq!(alone.take().is_some(), kept);
        kept
    }

    fn by_ring(alone: &mut Alone, meanwhile: &[bool]) {
        alone.enters_ring();
        for &blocks in meanwhile {
            alone.comes(blocks, 1);
        }
        alone.leaves_ring();
    }

    #[test]
    fn a_disk_that_only_syncs_never_uses_the_ring() {
        let mut alone = Alone::default();
        for _ in 0..10 {
            assert!(keeps_a_sync(&mut alone));
            alone.made(false);
            alone.waits();
        }
    }

    #[test]
    fn a_read_that_comes_during_a_sync_sends_the_next_ones_to_the_ring() {
        let mut alone = Alone::default();
        assert!(keeps_a_sync(&mut alone));
        alone.made(true);
        alone.comes(false, 0);
        alone.waits();
        for _ in 0..QUIET {
            assert!(!keeps_a_sync(&mut alone));
            by_ring(&mut alone, &[]);
        }
        assert!(keeps_a_sync(&mut alone), "after {QUIET} in a row that were alone");
    }

    #[test]
    fn company_in_the_ring_is_company_each_time() {
        let mut alone = Alone::default();
        by_ring(&mut alone, &[false]);
        for _ in 0..20 {
            assert!(!keeps_a_sync(&mut alone));
            by_ring(&mut alone, &[false, false]);
        }
    }

    #[test]
    fn a_sync_that_comes_during_a_sync_disturbs_nobody() {
        let mut alone = Alone::default();
        for _ in 0..10 {
            assert!(keeps_a_sync(&mut alone));
            alone.made(true);
        }
    }

    #[test]
    fn what_comes_after_the_end_disturbs_nobody() {
        let mut alone = Alone::default();
        for _ in 0..10 {
            assert!(keeps_a_sync(&mut alone));
            alone.made(true);
            alone.waits();
            alone.comes(false, 0);
        }
    }

    #[test]
    fn a_sync_beside_reads_goes_to_the_ring() {
        let mut alone = Alone::default();
        alone.comes(true, 3);
        assert!(alone.keep(OpToken(0), HostOp::Fdatasync).is_err());
    }

    #[test]
    fn reads_alone_change_nothing() {
        let mut alone = Alone::default();
        for others in 0..10 {
            alone.comes(false, others);
        }
        assert!(keeps_a_sync(&mut alone));
    }
}
