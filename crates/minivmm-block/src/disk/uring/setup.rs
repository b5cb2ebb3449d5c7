//! The ring's set-up: what it needs of the kernel, and what it permits.
//!
//! Owns the errors of a ring that cannot be had. The ring is restricted before it is enabled: afterwards the
//! kernel refuses everything that is not listed in `restrict`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::register::Restriction;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use crate::mem::Ram;

/// Largest buffer that the kernel registers in one piece, in bytes.
const FIXED_MAX: u64 = 1 << 30;
/// The image's index in the ring's table of files.
pub(super) const IMAGE: Fixed = Fixed(0);
/// IORING_UNREGISTER_FILES.
const UNREGISTER_FILES: u8 = 3;
/// IOSQE_FIXED_FILE, the only flag that an entry of this ring may have.
const FIXED_FILE: u8 = 1;

/// Why the ring could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UringError {
    /// The host's kernel refused a call.
    #[error("{what}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The host's kernel is too old: it lacks the named feature.
    #[error("this kernel's io_uring lacks {0} (Linux 5.10 has it)")]
    Lacks(&'static str),
    /// Guest memory cannot be pinned.
    #[error(
        "{bytes} bytes of guest memory cannot be registered with io_uring: raise the limit of locked memory \
         (ulimit -l, in KiB), or use buffers=plain"
    )]
    Memory {
        /// The size of guest memory.
        bytes: u64,
        /// The error that the host reported.
        source: io::Error,
    },
}

pub(super) fn build(entries: u32) -> Result<IoUring, UringError> {
    let refused = |source| UringError::Refused { what: "io_uring_setup", source };
    // Try the best setup first: this thread takes completions when it asks for them, not in between.
    let mut best = IoUring::builder();
    best.setup_r_disabled().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    let mut plain = IoUring::builder();
    plain.setup_r_disabled();
    let ring = match best.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain.build(entries),
        other => other,
    }
    .map_err(refused)?;
    let features = ring.params();
    for (has, what) in [
        (features.is_feature_submit_stable(), "IORING_FEAT_SUBMIT_STABLE"),
        (features.is_feature_nodrop(), "IORING_FEAT_NODROP"),
        (features.is_feature_fast_poll(), "IORING_FEAT_FAST_POLL"),
    ] {
        if !has {
            return Err(UringError::Lacks(what));
        }
    }
    Ok(ring)
}

pub(super) fn register_file(ring: &IoUring, file: &File) -> Result<(), UringError> {
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .map_err(|source| UringError::Refused { what: "registering the image with io_uring", source })
}

/// Registers all of guest memory. Returns the address and length of each buffer, by index.
pub(super) fn register_memory(ring: &IoUring, ram: &Ram) -> Result<Vec<(u64, u64)>, UringError> {
    let mut buffers = Vec::new();
    for (_, host, bytes) in ram.regions() {
        let mut at = 0;
        while at < bytes {
            let len = (bytes - at).min(FIXED_MAX);
            buffers.push((host + at, len));
            at += len;
        }
    }
    let iovec = |&(at, len): &(u64, u64)| libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: usize::try_from(len).unwrap_or(usize::MAX),
    };
    let iovecs: Vec<_> = buffers.iter().map(iovec).collect();
    // SAFETY: the ranges are guest RAM. The kernel pins the pages, so they outlive even the mapping.
    unsafe { ring.submitter().register_buffers(&iovecs) }
        .map_err(|source| UringError::Memory { bytes: buffers.iter().map(|&(_, len)| len).sum(), source })?;
    Ok(buffers)
}

/// Restricts the ring to the operations, flags and registrations listed here.
pub(super) fn restrict(ring: &IoUring) -> Result<(), UringError> {
    let codes = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::ReadFixed::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::AsyncCancel::CODE,
        opcode::PollAdd::CODE,
    ];
    let mut allowed: Vec<_> = codes.into_iter().map(Restriction::sqe_op).collect();
    allowed.push(Restriction::sqe_flags_allowed(FIXED_FILE));
    allowed.push(Restriction::register_op(UNREGISTER_FILES));
    ring.submitter()
        .register_restrictions(&mut allowed)
        .map_err(|source| UringError::Refused { what: "restricting the ring", source })
}

#[cfg(test)]
mod tests {
    use io_uring::squeue;
    use io_uring::types::Fd;

    use super::*;

    #[test]
    fn the_ring_does_nothing_but_a_disks_io() {
        let Ok(mut ring) = build(8) else { return println!("skipped: no io_uring here") };
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        register_file(&ring, &file).unwrap();
        restrict(&ring).unwrap();
        ring.submitter().register_enable_rings().unwrap();
        let path = c"/";
        let entries = [
            opcode::Fsync::new(IMAGE).build(),
            opcode::Nop::new().build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Fsync::new(IMAGE).build().flags(squeue::Flags::IO_DRAIN),
        ];
        for (entry, expected) in entries.into_iter().zip([0, -libc::EACCES, -libc::EACCES, -libc::EACCES]) {
            // SAFETY: the entries point to nothing but `path`, which is a static string.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().map(|end| end.result()).collect::<Vec<_>>(), [expected]);
        }
        let refused = ring.submitter().register_files_update(0, &[other.as_raw_fd()]);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES), "nor takes another file");
    }
}
