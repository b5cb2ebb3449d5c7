//! The device without a machine around it: requests, rings, the disk below and its engines.
//!
//! A module is a suite, `cargo test --test device -- blk::` runs one. Each reaches the device through its registers and
//! rings, or a part of it by its functions; none needs KVM or root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests may"
)]

mod alone;
mod batches;
mod blk;
mod disk;
mod disk_queue;
mod drivers;
mod engine_choice;
mod engine_faults;
mod fault;
mod kicked;
mod log;
mod malformed;
mod memory;
mod monitor;
mod queues;
mod reset;
mod rings;
mod statistics;

/// Whoever starts a process takes it, and whoever looks whether an image is locked no more: until it executes its
/// program, a child holds all that its parent has open, and its locks.
static FORKS: std::sync::Mutex<()> = std::sync::Mutex::new(());
