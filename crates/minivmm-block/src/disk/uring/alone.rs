//! Operations that are alone: the worker executes them itself, without the ring. *The ring* is io_uring's, here.
//!
//! Owns the choice for one queue. io_uring has every operation that blocks executed by a thread of the kernel (io-wq).
//! That thread must be woken, needs a CPU, and must wake the worker in the end. A worker that has nothing else in flight
//! loses nothing if it blocks itself, and saves all of that (`docs/reference/blocking-and-polling.md`). If other
//! requests are in flight, or come meanwhile, they would wait for the worker, so the operation goes to the ring.
//!
//! What the guest will do next is not known, so the last operations decide: after [`UNDISTURBED_MIN`] in a row that
//! were alone from begin to end, the next one is expected to be alone too.

use crate::disk::engine::{HostOp, OpToken};

/// After this many undisturbed operations in a row the worker executes the next one.
const UNDISTURBED_MIN: u32 = 4;

/// The operation that is kept back, and what the last ones have taught.
pub(super) struct Alone {
    /// The only operation in flight, for the worker to execute. The ring gets it if another one comes before.
    kept: Option<(OpToken, HostOp)>,
    /// Operations in the ring that block.
    in_ring: usize,
    /// Undisturbed operations in a row, at most [`UNDISTURBED_MIN`].
    undisturbed: u32,
    /// `true` if, since `in_ring` was last 0, an operation was submitted while another was in flight.
    disturbed: bool,
    /// `true` if requests came while the worker executed the last operation. Only one that does not block was delayed
    /// by it: one that blocks would have waited anyway.
    came_during_last: bool,
}

impl Default for Alone {
    /// A new queue counts as undisturbed, so a disk that only syncs never needs the ring.
    fn default() -> Self {
        Self {
            kept: None,
            in_ring: 0,
            undisturbed: UNDISTURBED_MIN,
            disturbed: false,
            came_during_last: false,
        }
    }
}

impl Alone {
    /// Records a submission: whether the operation blocks, and how many `others` the ring has. The count starts again
    /// if the operation comes beside one that blocks, blocks beside others, or was delayed by the last one.
    pub(super) fn record_submit(&mut self, blocks: bool, others: usize) {
        let has_company = self.in_ring > 0 || self.kept.is_some() || (blocks && others > 0);
        if has_company || (self.came_during_last && !blocks) {
            self.undisturbed = 0;
        }
        self.disturbed |= has_company;
    }

    /// Keeps back an operation that blocks, if it is expected to be alone; hands it back if not. Call it only while no
    /// operation is in the ring.
    pub(super) fn keep_back(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        if self.undisturbed < UNDISTURBED_MIN || self.kept.is_some() {
            return Err(op);
        }
        self.kept = Some((token, op));
        Ok(())
    }

    /// Takes the operation that was kept back.
    pub(super) fn take_kept(&mut self) -> Option<(OpToken, HostOp)> {
        self.kept.take()
    }

    /// Returns `true` if an operation is kept back.
    pub(super) fn has_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Returns the number of operations in the ring that block.
    pub(super) fn in_ring(&self) -> usize {
        self.in_ring
    }

    /// Records that the worker has executed an operation, and whether requests came meanwhile.
    pub(super) fn record_executed(&mut self, came: bool) {
        self.came_during_last = came;
        self.count_undisturbed();
    }

    /// Records that a wait begins. Requests that come from now on did not wait for the last operation.
    pub(super) fn record_wait(&mut self) {
        self.came_during_last = false;
    }

    /// Records that an operation that blocks goes to the ring.
    pub(super) fn record_ring_submit(&mut self) {
        self.in_ring += 1;
    }

    /// Records that the ring has completed an operation that blocks.
    pub(super) fn record_ring_completion(&mut self) {
        self.in_ring -= 1;
        if !self.disturbed {
            self.count_undisturbed();
        }
        self.disturbed &= self.in_ring > 0;
    }

    fn count_undisturbed(&mut self) {
        self.undisturbed = (self.undisturbed + 1).min(UNDISTURBED_MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_a_sync(alone: &mut Alone) -> bool {
        alone.record_submit(true, 0);
        let kept = alone.keep_back(OpToken(0), HostOp::Fdatasync).is_ok();
        assert_eq!(alone.take_kept().is_some(), kept);
        kept
    }

    fn by_ring(alone: &mut Alone, meanwhile: &[bool]) {
        alone.record_ring_submit();
        for &blocks in meanwhile {
            alone.record_submit(blocks, 1);
        }
        alone.record_ring_completion();
    }

    #[test]
    fn a_disk_that_only_syncs_never_uses_the_ring() {
        let mut alone = Alone::default();
        for _ in 0..10 {
            assert!(keeps_a_sync(&mut alone));
            alone.record_executed(false);
            alone.record_wait();
        }
    }

    #[test]
    fn a_read_that_comes_during_a_sync_sends_the_next_ones_to_the_ring() {
        let mut alone = Alone::default();
        assert!(keeps_a_sync(&mut alone));
        alone.record_executed(true);
        alone.record_submit(false, 0);
        alone.record_wait();
        for _ in 0..UNDISTURBED_MIN {
            assert!(!keeps_a_sync(&mut alone));
            by_ring(&mut alone, &[]);
        }
        assert!(keeps_a_sync(&mut alone), "after {UNDISTURBED_MIN} in a row that were alone");
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
            alone.record_executed(true);
        }
    }

    #[test]
    fn what_comes_after_the_end_disturbs_nobody() {
        let mut alone = Alone::default();
        for _ in 0..10 {
            assert!(keeps_a_sync(&mut alone));
            alone.record_executed(true);
            alone.record_wait();
            alone.record_submit(false, 0);
        }
    }

    #[test]
    fn a_sync_beside_reads_goes_to_the_ring() {
        let mut alone = Alone::default();
        alone.record_submit(true, 3);
        assert!(alone.keep_back(OpToken(0), HostOp::Fdatasync).is_err());
    }

    #[test]
    fn reads_alone_change_nothing() {
        let mut alone = Alone::default();
        for others in 0..10 {
            alone.record_submit(false, others);
        }
        assert!(keeps_a_sync(&mut alone));
    }
}
