//! The initial RAM disk: read from its file, as high in RAM below 4 GiB as the kernel allows.
//!
//! Owns its place only; what is in it is the guest's business.

use std::fs::File;
use std::io;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::kernel::{self, Kernel};
use crate::mem::Ram;

/// Where the initrd lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// First guest physical address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why an initrd cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The host does not let us read it.
    #[error("cannot read it")]
    Read(#[from] io::Error),
    /// RAM could not be filled from it.
    #[error("cannot read it into guest memory: it has become shorter while it was read, or {0}")]
    Load(String),
    /// No file, or one without content.
    #[error("it is not a regular file, or is empty")]
    Empty,
    /// No place.
    #[error(
        "its {len} bytes do not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give the \
         guest more --memory"
    )]
    NoRoom {
        /// Its length.
        len: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where RAM, or what the kernel can reach, ends.
        limit: u64,
    },
}

/// Archives begin at multiples of it: the kernel finds them at 4, tools write them at 512.
const TAIL_ALIGN: u64 = 512;

/// Reads the file at `path` into `ram`, and puts `tail` behind it.
pub fn load(ram: &Ram, path: &Path, tail: &[u8], kernel: &Kernel) -> Result<Initrd, InitrdError> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(InitrdError::Empty);
    }
    let limit = kernel::low_ram_end(ram).min(kernel.initrd_limit);
    let tail_at = if tail.is_empty() { metadata.len() } else { metadata.len().next_multiple_of(TAIL_ALIGN) };
    let initrd = place(tail_at.saturating_add(tail.len() as u64), kernel.end, limit)?;
    let len = usize::try_from(metadata.len()).map_err(|_| InitrdError::Empty)?;
    let failed = |error: vm_memory::GuestMemoryError| InitrdError::Load(error.to_string());
    ram.read_exact_volatile_from(GuestAddress(initrd.base), &mut file, len).map_err(failed)?;
    // RAM is zero between the two, which the kernel passes over.
    ram.write_slice(tail, GuestAddress(initrd.base + tail_at)).map_err(failed)?;
    Ok(initrd)
}

const PAGE: u64 = 0x1000;

/// The highest page-aligned place for `len` bytes between `kernel_end` and `limit`.
fn place(len: u64, kernel_end: u64, limit: u64) -> Result<Initrd, InitrdError> {
    let base = limit.checked_sub(len).map(|base| base / PAGE * PAGE);
    match base {
        Some(base) if base >= kernel_end => Ok(Initrd { base, len }),
        _ => Err(InitrdError::NoRoom { len, kernel_end, limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lies_on_the_highest_page_and_never_on_the_kernel() {
        assert_eq!(place(1, 0x100_0000, 0x800_0000).unwrap().base, 0x7ff_f000);
        assert_eq!(place(0x1000, 0x100_0000, 0x7fff_ffff).unwrap().base, 0x7fff_e000);
        assert_eq!(place(0x1000, 0x7ff_f000, 0x800_0000).unwrap().base, 0x7ff_f000);
        assert!(place(0x1001, 0x7ff_f000, 0x800_0000).is_err());
        assert!(place(u64::MAX, 0, 0x800_0000).is_err());
    }
}
