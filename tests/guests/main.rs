//! Guests with a Linux kernel, and the emulated host that runs them where this machine's KVM cannot.
//!
//! A module is a suite: `cargo test --test guests -- job::` runs one. All share the emulated hosts that one of them has
//! started (`minivmm_testkit::host`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

mod emuhost_run;
mod fsync_trap;
mod job;
mod kernel;
mod observe_guest;
mod ordinary;
mod pci_guest;
mod readme;
mod test_guest;
