//! minivmm-tools: `top`, `log`, `crash`, `bench` and `study`, and the benchmark with guests.
//!
//! A module is a suite: `cargo test --test tools -- crash::` runs one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests may"
)]

mod bench;
mod bench_modes;
mod crash;
mod crash_examples;
mod crash_signals;
mod observe;
mod study;
