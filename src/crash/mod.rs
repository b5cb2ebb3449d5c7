//! Write logs read again, and the disks that a loss of power could have left of them.
//!
//! [`log`] reads what `log-writes=`, the kernel's dm-log-writes and QEMU's blklogwrites have recorded
//! (`minivmm log`).
//!
//! Knows nothing of guests or KVM.

pub mod list;
pub mod log;
