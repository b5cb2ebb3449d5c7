//! A vCPU's shared page (struct kvm_run), mapped a second time beside kvm-ioctls' own mapping.
//!
//! Owns the two things that kvm-ioctls gives no access to. One is `immediate_exit`, set by another thread.
//! The other is the details of an exit: the width of a port access, the words of an internal error. Fields
//! are read and written through raw pointers, because KVM and the vCPU's thread change the page too.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_13 as InternalWords};
use kvm_ioctls::VcpuFd;

/// The mapped page; it is unmapped when this value is dropped.
pub struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for RunPage {}
// SAFETY: shared access is by volatile reads and writes of single fields; see each.
unsafe impl Sync for RunPage {}

/// KVM's details of an internal error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// The kind of the error (KVM_INTERNAL_ERROR_*).
    pub suberror: u32,
    /// Additional words; their meaning depends on the kind.
    pub data: Vec<u64>,
}

impl RunPage {
    /// Maps the page of `vcpu`.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: this is a new mapping at an address that the kernel chooses. The first part of a vCPU's
        // mapping is struct kvm_run, whatever the size of the whole (KVM API, 4.5).
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page: page.cast() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes KVM_RUN return at once: the next call, or together with a signal the present one.
    pub fn set_immediate_exit(&self) {
        // SAFETY: the field is inside our mapping. It is one byte that KVM only reads, and it is meant to be
        // written by another thread (KVM API, 5).
        unsafe { (&raw mut (*self.page.as_ptr()).immediate_exit).write_volatile(1) };
    }

    /// Returns the width in bytes of one access, after KVM_EXIT_IO.
    pub fn port_width(&self) -> usize {
        // SAFETY: the field is inside our mapping, and any bits make an integer. KVM writes the union before
        // KVM_RUN returns, and not again until the next KVM_RUN, which only this thread calls.
        let width = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(width).max(1)
    }

    /// Returns the details, after KVM_EXIT_INTERNAL_ERROR.
    pub fn internal_error(&self) -> InternalError {
        // SAFETY: as in `port_width`; the structure consists of plain integers.
        let words: InternalWords =
            unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        let count = usize::try_from(words.ndata).unwrap_or(usize::MAX).min(words.data.len());
        InternalError { suberror: words.suberror, data: words.data.iter().copied().take(count).collect() }
    }
}

const _: () = assert!(offset_of!(kvm_run, immediate_exit) == 1);

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and unmapped only here.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
