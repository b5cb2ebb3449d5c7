//! Deliberate mistakes, one at a time, for the tests that must find them.
//!
//! Owns their list. Only tests enable the feature `mutants`. Without it, no mistake is ever on, and the
//! compiler removes every place that asks.

/// A mistake in the write path. Most are real defects of other VMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// FLUSH is acknowledged but not carried out.
    FlushDoesNothing,
    /// A stable write is synced before its data is written.
    SyncBeforeWrite,
    /// A sync is skipped when no write was counted since the last one, and writes are counted too
    /// late (QEMU's `file` node).
    GenerationSkip,
    /// A failed fdatasync is acknowledged as if it had worked.
    SyncErrorAcked,
    /// A failed fdatasync fails one request and is then forgotten.
    SyncErrorForgotten,
    /// The guest's `writeback` byte has no effect.
    ToggleIgnored,
    /// A driver without FLUSH gets volatile writes.
    NoFlushIsWriteback,
    /// A reset leaves `writeback` as the last driver set it.
    ResetKeepsWriteback,
    /// WRITE_ZEROES is not synced where writes are.
    ZeroesUnsynced,
    /// A direct mode without a write cache syncs nothing.
    DirectsyncWithoutSync,
    /// A short write counts as complete.
    ShortWriteOk,
    /// A FLUSH is satisfied by a sync that was already running.
    FlushSharesEarlierSync,
    /// The sector number is shifted without checking for overflow.
    SectorWraps,
    /// A request completes when its operation is submitted.
    StatusBeforeData,
    /// Requests smaller than a block are not refused, but done by read-modify-write without a lock.
    UnlockedRmw,
    /// FLUSH is `File::flush`, which does nothing in Rust.
    FileFlush,
    /// FLUSH is sync_file_range, which flushes no disk cache.
    SyncFileRange,
    /// FLUSH is BLKFLSBUF, which flushes no disk cache.
    BlkFlsBuf,
    /// FLUSH syncs another file.
    WrongDescriptor,
    /// A sync's success counts at once. But the kernel may have reported the error to an overlapping sync,
    /// whose result has not been checked yet.
    SuccessCountsAtOnce,
    /// A request joins a shared fdatasync that is running already.
    GroupTakesLatecomers,
    /// Requests that share an fdatasync complete when it starts.
    GroupDoneAtStart,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 22] = [
        Mutant::FlushDoesNothing,
        Mutant::SyncBeforeWrite,
        Mutant::GenerationSkip,
        Mutant::SyncErrorAcked,
        Mutant::SyncErrorForgotten,
        Mutant::ToggleIgnored,
        Mutant::NoFlushIsWriteback,
        Mutant::ResetKeepsWriteback,
        Mutant::ZeroesUnsynced,
        Mutant::DirectsyncWithoutSync,
        Mutant::ShortWriteOk,
        Mutant::FlushSharesEarlierSync,
        Mutant::SectorWraps,
        Mutant::StatusBeforeData,
        Mutant::UnlockedRmw,
        Mutant::FileFlush,
        Mutant::SyncFileRange,
        Mutant::BlkFlsBuf,
        Mutant::WrongDescriptor,
        Mutant::SuccessCountsAtOnce,
        Mutant::GroupTakesLatecomers,
        Mutant::GroupDoneAtStart,
    ];
}

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Turns on one mistake in this thread, or turns all off.
    pub fn turn_on(mutant: Option<Mutant>) {
        ON.with(|on| on.set(mutant));
    }

    /// Returns `true` if this mistake is to be made.
    pub fn is_on(mutant: Mutant) -> bool {
        ON.with(|on| on.get() == Some(mutant))
    }

    thread_local! {
        /// (Writes counted, count at the last sync), as [`Mutant::GenerationSkip`] needs them.
        static GENERATIONS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    }

    /// Counts a completed write.
    pub fn count_write() {
        GENERATIONS.with(|at| at.set((at.get().0 + 1, at.get().1)));
    }

    /// Records that a sync has succeeded.
    pub fn count_sync() {
        GENERATIONS.with(|at| at.set((at.get().0, at.get().0)));
    }

    /// Returns `true` if [`Mutant::GenerationSkip`] would skip a sync now.
    pub fn skips_sync() -> bool {
        is_on(Mutant::GenerationSkip) && GENERATIONS.with(|at| at.get().0 == at.get().1)
    }
}

#[cfg(not(feature = "mutants"))]
mod switch {
    /// Returns `false`: no mistake is ever on without the feature.
    #[inline]
    pub fn is_on(_: super::Mutant) -> bool {
        false
    }

    /// Does nothing: there is nothing to count.
    #[inline]
    pub fn count_write() {}

    /// Does nothing: there is nothing to count.
    #[inline]
    pub fn count_sync() {}

    /// Returns `false`: no sync is ever skipped.
    #[inline]
    pub fn skips_sync() -> bool {
        false
    }
}

pub use switch::*;
