//! What one disk has done, counted: requests as the guest made them, operations as the host got
//! them. No decision ever depends on a counter; above all, none skips a sync.

use std::sync::atomic::{AtomicU64, Ordering};

use super::engine::HostOp;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counts since the start of the process.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)+
        }

        impl Counters {
            /// Adds those of `other`, as they are now.
            pub(super) fn add(&self, other: &Self) {
                $(self.$name.fetch_add(other.$name.load(Ordering::Relaxed), Ordering::Relaxed);)+
            }

            /// Every counter's name and value, in the order of their definition.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)+]
            }
        }
    };
}

/// Operations that the host's kernel is asked for by the same call.
#[derive(Debug, Clone, Copy)]
pub enum HostKind {
    /// preadv.
    Read,
    /// pwritev.
    Write,
    /// pwritev2 with RWF_DSYNC.
    DsyncWrite,
    /// fdatasync.
    Fdatasync,
    /// fallocate.
    Fallocate,
}

impl HostKind {
    /// That of an operation.
    pub fn of(op: &HostOp) -> Self {
        match op {
            HostOp::Readv { .. } => HostKind::Read,
            HostOp::Writev { dsync: false, .. } => HostKind::Write,
            HostOp::Writev { dsync: true, .. } => HostKind::DsyncWrite,
            HostOp::Fdatasync => HostKind::Fdatasync,
            HostOp::PunchHole { .. } | HostOp::ZeroRange { .. } => HostKind::Fallocate,
        }
    }
}

counters! {
    /// Reads that the guest asked for.
    reads,
    /// Bytes of them.
    read_bytes,
    /// Writes that the guest asked for.
    writes,
    /// Bytes of them.
    write_bytes,
    /// FLUSHes that the guest asked for.
    flushes,
    /// DISCARDs that the guest asked for.
    discards,
    /// Bytes of all their ranges.
    discard_bytes,
    /// WRITE_ZEROES that the guest asked for.
    write_zeroes,
    /// Bytes of all their ranges.
    write_zeroes_bytes,
    /// Requests that were answered with an error.
    errors,
    /// FLUSHes that were answered without a sync (unsafe).
    flushes_ignored,
    /// Fdatasyncs that a queue's FLUSHes and stable writes share.
    shared_syncs,
    /// Reads: calls of preadv, or entries of the ring.
    preadvs,
    /// Writes without RWF_DSYNC: calls of pwritev, or entries of the ring.
    pwritevs,
    /// Writes with RWF_DSYNC: calls of pwritev2, or entries of the ring.
    pwritevs_dsync,
    /// fdatasyncs, without those of the start: calls, or entries of the ring.
    fdatasyncs,
    /// Calls of fallocate, or entries of the ring.
    fallocates,
    /// Calls of io_uring_enter: each hands a batch of operations to the kernel and waits.
    io_uring_enters,
    /// Transfers through a private buffer.
    bounces,
    /// Transfers that were continued after a short count.
    continued,
    /// Operations failed on purpose.
    faults_failed,
    /// Operations held on purpose.
    faults_delayed,
    /// Transfers cut short on purpose.
    faults_shortened,
    /// Writes torn on purpose.
    faults_torn,
    /// Operations answered without being done, on purpose.
    faults_lost,
}

impl Counters {
    /// One more.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The counter of such operations.
    pub fn of(&self, kind: HostKind) -> &AtomicU64 {
        match kind {
            HostKind::Read => &self.preadvs,
            HostKind::Write => &self.pwritevs,
            HostKind::DsyncWrite => &self.pwritevs_dsync,
            HostKind::Fdatasync => &self.fdatasyncs,
            HostKind::Fallocate => &self.fallocates,
        }
    }

    /// All that is not 0, in one line.
    pub fn summary(&self) -> String {
        let parts: Vec<_> = self
            .snapshot()
            .into_iter()
            .filter(|&(_, value)| value > 0)
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        if parts.is_empty() { "no requests".to_owned() } else { parts.join(", ") }
    }
}
