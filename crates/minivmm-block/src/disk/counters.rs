//! Counters of what one disk has done: requests as the guest made them, operations as the host got
//! them. No decision depends on a counter. In particular, no sync is skipped because of one.

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
            /// Adds the current values of `other`.
            pub(super) fn add(&self, other: &Self) {
                $(self.$name.fetch_add(other.$name.load(Ordering::Relaxed), Ordering::Relaxed);)+
            }

            /// Returns every counter's name and value, in the order of their definition.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)+]
            }
        }
    };
}

/// The system call that a host operation is counted under.
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
    /// Returns the kind of `op`.
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
    /// Reads that the guest requested.
    reads,
    /// Bytes that these reads asked for.
    read_bytes,
    /// Writes that the guest requested.
    writes,
    /// Bytes that these writes asked for.
    write_bytes,
    /// FLUSHes that the guest requested.
    flushes,
    /// DISCARDs that the guest requested.
    discards,
    /// Bytes in all ranges of these DISCARDs.
    discard_bytes,
    /// WRITE_ZEROES that the guest requested.
    write_zeroes,
    /// Bytes in all ranges of these WRITE_ZEROES.
    write_zeroes_bytes,
    /// Requests that completed with an error, and failed syncs that followed a switch to writethrough.
    errors,
    /// FLUSHes that completed without a sync (cache=unsafe).
    flushes_ignored,
    /// Shared fdatasyncs: each may serve several FLUSHes and stable writes of a queue.
    shared_syncs,
    /// Reads by the host: calls of preadv, or entries of the ring.
    preadvs,
    /// Writes without RWF_DSYNC: calls of pwritev, or entries of the ring.
    pwritevs,
    /// Writes with RWF_DSYNC: calls of pwritev2, or entries of the ring.
    pwritevs_dsync,
    /// fdatasyncs, except those at the start: calls, or entries of the ring.
    fdatasyncs,
    /// fallocates: calls, or entries of the ring.
    fallocates,
    /// Calls of io_uring_enter. Each hands a batch of operations to the kernel and may wait.
    io_uring_enters,
    /// Operations that block and that a worker executed itself, because nothing else was in flight.
    blocking_by_worker,
    /// Operations that block and that the ring gave to a thread of the kernel.
    blocking_by_kernel_thread,
    /// Transfers through a bounce buffer.
    bounces,
    /// Transfers that were continued after a short count.
    continued,
    /// Operations that `fault=` made fail.
    faults_failed,
    /// Operations that `fault=` delayed.
    faults_delayed,
    /// Transfers that `fault=` cut short.
    faults_shortened,
    /// Writes that `fault=` tore.
    faults_torn,
    /// Operations that `fault=` reported as done without doing them.
    faults_lost,
}

impl Counters {
    /// Adds one to `counter`.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the counter of operations of this kind.
    pub fn of(&self, kind: HostKind) -> &AtomicU64 {
        match kind {
            HostKind::Read => &self.preadvs,
            HostKind::Write => &self.pwritevs,
            HostKind::DsyncWrite => &self.pwritevs_dsync,
            HostKind::Fdatasync => &self.fdatasyncs,
            HostKind::Fallocate => &self.fallocates,
        }
    }

    /// Returns all counters that are not 0, in one line.
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
