//! Write logs read again, and the disks that a loss of power could have left of them.
//!
//! [`log`] reads what `log-writes=`, the kernel's dm-log-writes and QEMU's blklogwrites have recorded
//! (`minivmm log`, [`list`]). [`points`] says where the power may fail, [`legal`] which disks that may leave,
//! [`plan`] which of them are tried; [`scratch`] makes them, [`check`] judges each, [`campaign`] does all of that
//! (`minivmm crash`), [`report`] tells it.
//!
//! Knows nothing of guests or KVM.

pub mod campaign;
pub mod check;
pub mod legal;
pub mod list;
pub mod log;
pub mod plan;
pub mod points;
pub mod report;
pub mod scratch;
