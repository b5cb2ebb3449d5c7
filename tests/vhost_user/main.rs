//! `minivmm export` as other programs see it: QEMU with Linux guests, firmware and boot loaders, and a driver crate that
//! nobody here wrote, all over vhost-user-blk.
//!
//! A module is a suite: `cargo test --test vhost_user -- killed::` runs one. QEMU emulates the guests' processor, so no
//! suite needs KVM. `MINIVMM_EXPORTER=qemu-storage-daemon` runs the same suites on QEMU's back end, which shows what is
//! the harness's fault; `MINIVMM_QEMU` names another emulator than the installed one. `MINIVMM_TRIALS` is how often the
//! suite `killed` kills each side; with more than a few, the other suites try every combination as well.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

mod daemon;
mod drivers;
mod filesystems;
mod firmware;
mod killed;
mod modes;
mod qemu;
mod reboot;
mod write_cache;

/// How often each side is killed: three times, unless `MINIVMM_TRIALS` says another number.
fn trials() -> u32 {
    std::env::var("MINIVMM_TRIALS").map_or(3, |count| count.parse().unwrap())
}

/// Whether every combination is to be tried (`make torture`).
fn is_torture() -> bool {
    trials() > 10
}
