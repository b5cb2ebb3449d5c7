//! What several test files share: a driver of our own for the device, and engines that misbehave.
//!
//! The driver writes registers and rings byte by byte, so it can also write wrong ones.
#![allow(dead_code, reason = "each test file uses its part")]

#[path = "../../crates/minivmm-block/tests/common/desc.rs"]
pub mod desc;
pub mod driver;
pub mod engines;
pub mod images;
pub mod loops;
pub mod over_pci;
pub mod skips;
pub mod turns;
