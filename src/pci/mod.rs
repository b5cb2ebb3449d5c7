//! PCI, as much of it as a virtio device needs: one bus, configuration space, MSI-X.
//!
//! Owns the registers that every function has ([`config`]), the two ways to them ([`root`]) and
//! interrupts by messages ([`msix`]). Knows nothing of virtio or KVM: how a message reaches a CPU is
//! behind [`msix::MessageSink`]. We are the firmware too: a function's memory is where we have placed
//! it, and stays there; a guest that writes another address into its base address register has
//! switched it off until the old one is back.

pub mod config;
pub mod msix;
pub mod root;
