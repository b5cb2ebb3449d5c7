//! Deliberate mistakes, one at a time, for the tests that must find them.
//!
//! Owns their list. Without the feature `mutants`, which only tests turn on, none of them is ever
//! on and the compiler removes every place that asks.

/// A mistake in the write path. Most of them are real defects of other VMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// FLUSH is acknowledged and nothing is done.
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
    /// A short write is complete.
    ShortWriteOk,
    /// A FLUSH is satisfied by a sync that was already running.
    FlushSharesEarlierSync,
    /// The sector's number is shifted without looking at what falls off.
    SectorWraps,
    /// A request is reported complete when its operation is submitted.
    StatusBeforeData,
    /// Requests inside a block are not refused but read, changed and written, without a lock.
    UnlockedRmw,
    /// FLUSH is `File::flush`, which does nothing in Rust.
    FileFlush,
    /// FLUSH is sync_file_range, which flushes no disk cache.
    SyncFileRange,
    /// FLUSH is BLKFLSBUF, which flushes no disk cache.
    BlkFlsBuf,
    /// FLUSH syncs another file.
    WrongDescriptor,
    /// A sync's success counts at once, though another one that was in flight with it, and to which
    /// the kernel told the error, has not been looked at yet.
    SuccessCountsAtOnce,
    /// A request joins a shared fdatasync that is running already.
    GroupTakesLatecomers,
    /// Those who share an fdatasync are completed when it starts.
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

    /// Turns one mistake on in this thread, or all off.
    pub fn turn_on(mutant: Option<Mutant>) {
        ON.with(|on| on.set(mutant));
    }

    /// Whether this mistake is to be made.
    pub fn is_on(mutant: Mutant) -> bool {
        ON.with(|on| on.get() == Some(mutant))
    }

    thread_local! {
        /// Writes counted, and the count at the last sync: what [`Mutant::GenerationSkip`] needs.
        static GENERATIONS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    }

    /// A write is complete.
    pub fn count_write() {
        GENERATIONS.with(|at| at.set((at.get().0 + 1, at.get().1)));
    }

    /// A sync has succeeded.
    pub fn count_sync() {
        GENERATIONS.with(|at| at.set((at.get().0, at.get().0)));
    }

    /// Whether that mutant would skip a sync now.
    pub fn skips_sync() -> bool {
        is_on(Mutant::GenerationSkip) && GENERATIONS.with(|at| at.get().0 == at.get().1)
    }
}

#[cfg(not(feature = "mutants"))]
mod switch {
    /// Never.
    #[inline]
    pub fn is_on(_: super::Mutant) -> bool {
        false
    }

    /// Nothing to count.
    #[inline]
    pub fn count_write() {}

    /// Nothing to count.
    #[inline]
    pub fn count_sync() {}

    /// Never.
    #[inline]
    pub fn skips_sync() -> bool {
        false
    }
}

pub use switch::*;
