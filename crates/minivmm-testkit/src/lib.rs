//! What the tests and benchmarks of minivmm share: a driver of their own for the device, engines that misbehave, the
//! machines that guests run on, and what a test needs of its host.
//!
//! The driver writes registers and rings byte by byte, so it can also write wrong ones. Expected values are written
//! from the specification, never taken from the code under test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "only tests use it, and a test that cannot go on has failed"
)]

pub mod alone;
pub mod console_rig;
pub mod cpio;
pub mod desc;
pub mod dontcache;
pub mod driver;
pub mod engines;
pub mod eye;
pub mod front_end;
pub mod hands;
pub mod host;
pub mod images;
pub mod loops;
pub mod machine;
pub mod over_pci;
pub mod patched;
pub mod places;
pub mod pty;
pub mod records;
pub mod session;
pub mod signalled;
pub mod skips;
pub mod tools;
pub mod turns;
