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
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../common/loops.rs"]
mod loops;
mod machine;
mod observe;
#[path = "../common/pty.rs"]
mod pty;
mod refusals;
mod reports;
mod sandbox;
#[path = "../common/signalled.rs"]
mod signalled;
mod signals;
#[path = "../common/skips.rs"]
mod skips;
mod start;
mod stats;
mod syncs;
mod terminal;
#[path = "../common/tools.rs"]
mod tools;
mod vanished;
