//! The bare-metal guest (`guest-images/bare/guest.S`) under real KVM, through the real binary.
//!
//! Owns what only a running machine shows: both entries, one write, flush and read through the
//! virtio-mmio registers in every cache mode, the host's system calls behind them, and every way a
//! machine can end. Needs /dev/kvm, also one that cannot run Linux; without it each test says that
//! it is skipped. The guest's exit codes are told in its source.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bench;
mod console;
mod disk;
mod endings;
mod given;
mod hostile;
mod limits;
mod observe;
mod refusals;
mod reports;
mod sandbox;
mod signals;
mod start;
mod stats;
mod syncs;
mod terminal;
mod vanished;
