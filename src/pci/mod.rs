//! PCI, as much of it as a virtio device needs: one bus, configuration space, MSI-X.
//!
//! Owns the registers that every function has ([`config`]), the two ways to them ([`root`]), the places of the
//! functions' memory ([`memory`]) and interrupts by messages ([`msix`]). Knows nothing of virtio or KVM. How a
//! message reaches a CPU is behind [`msix::MessageSink`]; how a doorbell is caught is behind
//! [`memory::DoorbellSink`]. minivmm takes the firmware's place too: a function's memory is placed before the
//! guest begins, and the guest may move it.

pub mod config;
pub mod memory;
pub mod msix;
pub mod root;
