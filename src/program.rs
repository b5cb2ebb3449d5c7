//! The paths of minivmm's binaries, which lie beside each other, and how one replaces itself by the other.
//!
//! Owns their names, and the exec of one by the other. Each starts the other by its path, never by a search.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The hypervisor.
pub const VMM: &str = "minivmm";
/// The binary for commands that run no guest, or run guests as child processes.
pub const TOOLS: &str = "minivmm-tools";
/// The binary for disks that other VMMs use.
pub const EXPORT: &str = "minivmm-export";

/// Returns the path of the binary with this name beside the running one.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// Replaces this process by `program`, with these arguments after its name. Returns only if that failed, with
/// the error. Blocked signals stay blocked and pending; `std`'s exec would let them kill first.
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
