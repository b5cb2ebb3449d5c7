//! virtio-mmio, virtio-pci and virtio-console without a machine around them.
//!
//! A module is a suite: `cargo test --test transports -- pci::` runs one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

mod console;
mod moves;
mod pci;
mod transport;
mod widths;
