//! Where minivmm's own two binaries lie: beside each other.
//!
//! Owns their names, and the way of one into the other's place. Each starts the other by its path, never by a search.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The hypervisor.
pub const VMM: &str = "minivmm";
/// What runs no guest of its own, or runs guests as child processes.
pub const TOOLS: &str = "minivmm-tools";

/// The path of the binary of this name beside the one that runs.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// Puts `program` into the place of this process, with these arguments after its name; returns only what kept it from
/// that. Signals that are blocked stay blocked and wait (`std`'s exec lets them kill first).
pub fn replace(program: &Path, arguments: impl Iterator<Item = OsString>) -> io::Error {
    let all: Result<Vec<CString>, _> = std::iter::once(program.as_os_str().to_owned())
        .chain(arguments)
        .map(|word| CString::new(word.into_vec()))
        .collect();
    let Ok(words) = all else { return io::ErrorKind::InvalidInput.into() };
    let Some(path) = words.first() else { return io::ErrorKind::InvalidInput.into() };
    let mut pointers: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the strings end with a null byte, their list with a null pointer, and both live until the call returns.
    unsafe { libc::execv(path.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}
