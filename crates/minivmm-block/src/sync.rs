//! The primitives through which workers, vCPUs and the guest reach what they share: std's own.
//!
//! Owns the seam that tests of interleavings need, and the handling of a poisoned lock. With the feature
//! `observed`, which only tests turn on, each type is a wrapper that tells the thread's observer what is about
//! to happen (`sync/observed.rs`). Without it, these are std's types under std's names.

#[cfg(feature = "observed")]
pub mod observed;
#[cfg(feature = "observed")]
pub use observed::{AtomicBool, AtomicI32, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Mutex, fence};

#[cfg(not(feature = "observed"))]
pub use std::sync::Mutex;
pub use std::sync::MutexGuard;
pub use std::sync::atomic::Ordering;
#[cfg(not(feature = "observed"))]
pub use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};

/// Returns the guard of a lock that a panic may have poisoned, for `lock`, `read`, `write` and a condition
/// variable's `wait`.
///
/// No code here panics between two changes that belong together, so what a poisoned lock guards is whole.
/// Draining a queue or ending a VM in order is worth more than a second panic.
pub fn unpoisoned<T>(result: std::sync::LockResult<T>) -> T {
    result.unwrap_or_else(std::sync::PoisonError::into_inner)
}
