//! Hosts that are killed while guests write, and hours of load with faults.
//!
//! A module is a suite: `cargo test --test endurance -- soak::` runs one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

mod killed;
mod soak;
