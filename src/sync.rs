//! The primitives through which workers, vCPUs and the guest reach what they share: std's own.
//!
//! Owns the seam that tests of interleavings need, and nothing else. With the feature `observed`, which
//! only tests turn on, each type is a wrapper that tells an observer of the thread what is about to
//! happen ([`observed`]). Without it, these are std's types under std's names.

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
