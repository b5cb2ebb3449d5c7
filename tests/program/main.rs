//! minivmm as a program on its host: options, files, block devices, other users, the sandbox.
//!
//! A module is a suite: `cargo test --test program -- cli::` runs one. Its tests start other processes, of which each holds
//! what this one has open and locked for a moment: a test that looks whether a lock is gone belongs to `device`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "tests may"
)]

mod check;
mod cli;
mod device;
mod dontcache;
mod host_files;
mod hosts;
mod sandbox;
