//! Whether files here may be read and written with RWF_DONTCACHE, asked of the kernel itself.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::places;
use crate::skips::skip;

/// RWF_DONTCACHE of linux/fs.h (Linux 6.14).
const RWF_DONTCACHE: libc::c_int = 0x80;

/// Returns `true` if a file in `directory` takes the flag.
pub fn is_taken_in(directory: &Path) -> bool {
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(512).unwrap();
    is_taken_by(&file)
}

/// Returns `true` if this file takes the flag.
pub fn is_taken_by(file: &File) -> bool {
    let mut sector = [0_u8; 512];
    let iovec = libc::iovec { iov_base: sector.as_mut_ptr().cast(), iov_len: sector.len() };
    // SAFETY: the one iovec points to `sector`, which outlives the call.
    unsafe { libc::preadv2(file.as_raw_fd(), &raw const iovec, 1, 0, RWF_DONTCACHE) >= 0 }
}

/// Returns `true` if cache=dontcache can be had for files of the build tree, and says aloud if not.
pub fn is_here() -> bool {
    let is_here = is_taken_in(&places::tmp());
    if !is_here {
        skip("dontcache", "the build tree's file system has no RWF_DONTCACHE (ext4 since Linux 6.17)");
    }
    is_here
}

/// Returns the modes of this list that can be had for files of the build tree.
pub fn those_here<T: Clone>(modes: &[T], is_dontcache: impl Fn(&T) -> bool) -> Vec<T> {
    let is_here = !modes.iter().any(&is_dontcache) || is_here();
    modes.iter().filter(|mode| is_here || !is_dontcache(mode)).cloned().collect()
}
