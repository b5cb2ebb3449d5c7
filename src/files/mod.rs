//! The host's files as a command names them: which are the same file, who uses one, and the one place that
//! opens a file for output.
//!
//! Owns identity (device and inode), foreign locks, and every creating, emptying and replacing of a file in
//! both binaries ([`output`]). `tests/tidy.rs` refuses `File::create` and its like anywhere else. Knows nothing
//! of guests: what a disk needs of its image is `disk`'s.

pub mod host_use;
mod identity;
pub mod locks;
pub mod output;

pub use identity::{Device, FileId};
pub use output::{Content, Input, Inventory, Opened, Output, OutputRefused};
