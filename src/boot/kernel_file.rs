//! A kernel's file, and what a kernel needs of guest memory.
//!
//! Owns the checks of every offset in the file against its end, and of every place in memory against RAM. The
//! formats ([`super::bzimage`], [`super::elf`]) read through it.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Entry;
use crate::layout;
use crate::mem::Ram;

/// A kernel in guest memory.
pub struct Kernel {
    /// The entry point.
    pub entry: Entry,
    /// The first address after what the kernel uses before it has read its memory map.
    pub end: u64,
    /// The bytes of memory that the kernel itself takes, unpacked.
    pub bytes: u64,
    /// The first address that an initrd must not reach.
    pub initrd_limit: u64,
    /// The length of the longest command line in bytes, without the NUL.
    pub cmdline_bytes_max: usize,
    /// The setup header of a bzImage, which is passed back in the zero page.
    pub header: setup_header,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The host could not open or read the file.
    #[error("cannot read it")]
    Read(#[from] io::Error),
    /// It is not a supported kernel image, but this.
    #[error("it is {0}, neither a bzImage nor an ELF vmlinux for x86-64")]
    Format(&'static str),
    /// It is a kernel of a supported format that cannot be booted, or a broken one.
    #[error("{0}")]
    Unusable(String),
    /// The file ends before something that it claims to contain.
    #[error("the file is truncated: {what} lies beyond its end at {file_bytes} bytes")]
    Truncated {
        /// What should be there.
        what: &'static str,
        /// The length of the file in bytes.
        file_bytes: u64,
    },
    /// Guest memory has no room for it.
    #[error(
        "{what} needs guest memory {from:#x} to {to:#x}, which is not all there: give the guest more --memory"
    )]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// The first guest physical address that it needs.
        from: u64,
        /// The first guest physical address after it.
        to: u64,
    },
}

/// Opens a user's file without blocking, even if it is a FIFO that nobody writes to.
pub fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Describes a file that is not a regular file.
pub fn kind_of(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO or a pipe",
        () if kind.is_block_device() => "a block device",
        () if kind.is_char_device() => "a character device",
        () => "no regular file",
    }
}

/// A kernel's file, read at offsets that are checked against its end.
pub struct Image {
    file: File,
    len: u64,
}

impl Image {
    /// Opens the file, which must be a regular one.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let file = open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(KernelError::Format(kind_of(&metadata)));
        }
        Ok(Self { file, len: metadata.len() })
    }

    /// Returns the length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the `len` bytes at `offset`; `what` names them in errors.
    pub fn bytes(&self, offset: u64, len: usize, what: &'static str) -> Result<Vec<u8>, KernelError> {
        self.check(offset, len as u64, what)?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Reads `len` bytes at `offset` to guest address `to`; `what` names them in errors.
    pub fn copy(
        &self,
        offset: u64,
        len: u64,
        what: &'static str,
        ram: &Ram,
        to: u64,
    ) -> Result<(), KernelError> {
        self.check(offset, len, what)?;
        check_room(ram, what, to, len)?;
        // The host's kernel reads straight into guest RAM, without a copy in this process.
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))?;
        let room = || KernelError::NoRoom { what, from: to, to: to.saturating_add(len) };
        let len = usize::try_from(len).map_err(|_| room())?;
        ram.read_exact_volatile_from(GuestAddress(to), &mut file, len)
            .map_err(|error| KernelError::Read(io::Error::other(error)))?;
        Ok(())
    }

    fn check(&self, offset: u64, len: u64, what: &'static str) -> Result<(), KernelError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(KernelError::Truncated { what, file_bytes: self.len }),
        }
    }
}

/// Checks that guest memory at `base`, at or above 1 MiB and contiguous, has room for `len` bytes of `what`.
pub fn check_room(ram: &Ram, what: &'static str, base: u64, len: u64) -> Result<(), KernelError> {
    let to = base.checked_add(len).ok_or(KernelError::NoRoom { what, from: base, to: u64::MAX })?;
    if base < layout::HIGH_RAM {
        let why = format!("{what} wants guest memory at {base:#x}, and what is below 1 MiB is taken");
        return Err(KernelError::Unusable(why));
    }
    let fits = usize::try_from(len).is_ok_and(|len| ram.check_range(GuestAddress(base), len));
    if fits { Ok(()) } else { Err(KernelError::NoRoom { what, from: base, to }) }
}

/// Returns the end of RAM below the hole.
pub fn low_ram_end(ram: &Ram) -> u64 {
    ram.regions().first().map_or(0, |&(base, _, len)| base + len)
}
