//! The host's files as a command names them: which names lead to the same file, who uses a file, and how a file
//! is opened for output.
//!
//! Owns identity (device and inode) and the search for foreign locks. Owns every creating, emptying and
//! replacing of a file in both binaries ([`output`]); `tests/tidy.rs` refuses `File::create` and its like
//! anywhere else. Knows nothing of guests: what a disk needs of its image belongs to `disk`.

pub mod host_use;
mod identity;
pub(crate) mod locks;
pub mod output;

pub use identity::{Device, FileId};
pub use output::{Content, Input, Inventory, Opened, Output, OutputRefused};
