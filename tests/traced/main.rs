//! What minivmm asks of its host, seen from outside by strace and the kernel's tracepoints.
//!
//! A module is a suite: `cargo test --test traced -- audit::` runs one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may")]

mod audit;
mod explain;
