//! Where minivmm's own two binaries lie: beside each other.
//!
//! Owns their names. Each starts the other by its path, never by a search.

use std::io;
use std::path::PathBuf;

/// The hypervisor.
pub const VMM: &str = "minivmm";
/// What runs no guest of its own, or runs guests as child processes.
pub const TOOLS: &str = "minivmm-tools";

/// The path of the binary of this name beside the one that runs.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}
