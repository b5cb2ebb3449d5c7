//! One host image: open flags, locking, geometry, alignment, cache policy, engines, the first sync
//! error, counters, latencies, bytes at risk.
//!
//! Knows nothing of virtio or KVM. [`disk_queue::DiskQueue`] is the only state machine between requests and
//! host operations, and it is the same above every [`engine::Engine`]. [`cache`] says what a cache mode means.
//! [`image`] is the open file that the queues of a disk share.

pub mod blocking;
pub mod cache;
pub mod choice;
pub mod config;
mod contents;
pub mod counters;
pub mod disk_queue;
pub mod engine;
mod erase;
pub mod fault;
mod flight;
mod format;
pub mod geometry;
pub mod image;
pub mod latch;
pub mod latency;
mod lock;
pub mod monitor;
pub mod op;
pub mod problem;
pub mod queue_stats;
pub mod stable;
pub mod sync_ledger;
pub mod times;
mod transfer;
pub mod uring;
pub mod writelog;

pub use config::{ConfigError, DiskConfig};
pub use image::{Image, ImageError};
