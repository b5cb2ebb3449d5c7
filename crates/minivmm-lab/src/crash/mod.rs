//! Reads write logs, and tries the disks that a loss of power could have left.
//!
//! [`log`] reads what `log-writes=`, the kernel's dm-log-writes and QEMU's blklogwrites record, and [`list`]
//! prints it (`minivmm log`). [`points`] determines where the power may fail, [`legal`] which disks that may
//! leave, and [`plan`] which of them are tried. [`scratch`] makes their images, [`check`] judges each,
//! [`campaign`] runs all of this (`minivmm crash`) and [`report`] prints the result.
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
