//! The initial RAM disk and what is appended to it, loaded as high in RAM below 4 GiB as the kernel allows.
//!
//! Owns its address, and how it gets there: the host's kernel reads each file straight into guest memory. Its
//! content is the guest's business.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::kernel_file::{self, Kernel};
use super::need::{Need, TooLittle};
use super::tail::{Piece, Tail};
use crate::layout;
use crate::mem::Ram;

/// Where the initrd is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// The first guest physical address.
    pub base: u64,
    /// The length in bytes.
    pub len: u64,
}

/// Why an initrd cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The host could not open or read the file.
    #[error("cannot read it")]
    Read(#[from] io::Error),
    /// The file could not be read into RAM.
    #[error("cannot read it into guest memory: it became shorter while it was read, or {0}")]
    Load(String),
    /// It is not a regular file, but this.
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    /// The file is empty.
    #[error("it is empty")]
    Empty,
    /// A file to be appended could not be read.
    #[error("cannot add {path}")]
    Added {
        /// The file.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// The guest has too little memory to unpack it.
    #[error(transparent)]
    TooLittle(#[from] TooLittle),
    /// The initrd does not fit, whatever the size of the memory.
    #[error(
        "it has {len} bytes with what is added, and this kernel takes {max} at most, because all of it has to lie \
         between its own end and {limit:#x}: bring large files on a disk (--disk FILE,readonly)"
    )]
    OutOfReach {
        /// Its length in bytes.
        len: u64,
        /// The largest length in bytes that would fit.
        max: u64,
        /// The end of RAM below the hole, or of what the kernel can reach.
        limit: u64,
    },
    /// The initrd does not fit into this guest's memory.
    #[error(
        "its {len} bytes do not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give the \
         guest more --memory"
    )]
    NoRoom {
        /// Its length in bytes.
        len: u64,
        /// The end of the kernel.
        kernel_end: u64,
        /// The end of RAM, or of what the kernel can reach.
        limit: u64,
    },
}

/// The alignment of an appended archive: the kernel requires 4, tools write archives at 512.
const TAIL_ALIGN: u64 = 512;
/// The magic number at the start of an uncompressed cpio archive.
const CPIO_MAGIC: &[u8] = b"070701";

/// Reads the file at `path` into `ram`, and appends `tail`.
pub fn load(
    ram: &Ram,
    path: &Path,
    tail: &Tail<'_>,
    kernel: &Kernel,
    cmdline: &str,
) -> Result<Initrd, InitrdError> {
    let mut file = kernel_file::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(InitrdError::Kind(kernel_file::kind_of(&metadata)));
    }
    if metadata.len() == 0 {
        return Err(InitrdError::Empty);
    }
    let tail_bytes = tail.total_bytes();
    let tail_at = if tail_bytes == 0 { metadata.len() } else { metadata.len().next_multiple_of(TAIL_ALIGN) };
    let total = tail_at.saturating_add(tail_bytes);
    check_reach(total, kernel)?;
    if tail_bytes > 0 {
        need_of(&file, metadata.len(), tail, kernel.bytes, cmdline)?.check(ram.size_bytes())?;
    }
    let limit = kernel_file::low_ram_end(ram).min(kernel.initrd_limit);
    let initrd = place(total, kernel.end, limit)?;
    let len = usize::try_from(metadata.len()).map_err(|_| InitrdError::Empty)?;
    ram.read_exact_volatile_from(GuestAddress(initrd.base), &mut file, len)
        .map_err(|error| InitrdError::Load(error.to_string()))?;
    // RAM between the two is zero, which the kernel skips.
    write_tail(ram, tail, initrd.base + tail_at)?;
    Ok(initrd)
}

/// Returns what a kernel of `kernel_bytes` needs to unpack the file at `path` and `tail`. `None` if there is
/// no such file.
pub fn need(path: &Path, tail: &Tail<'_>, kernel_bytes: u64, cmdline: &str) -> Option<Need> {
    let file = kernel_file::open(path).ok()?;
    let metadata = file.metadata().ok().filter(Metadata::is_file)?;
    need_of(&file, metadata.len(), tail, kernel_bytes, cmdline).ok()
}

fn need_of(file: &File, len: u64, tail: &Tail<'_>, kernel_bytes: u64, cmdline: &str) -> io::Result<Need> {
    let mut start = [0; CPIO_MAGIC.len()];
    let packed = file.read_at(&mut start, 0)? < start.len() || start != *CPIO_MAGIC;
    Ok(Need::new(kernel_bytes, (len, packed), tail, cmdline))
}

/// Writes the pieces one after another, from guest address `at` on.
fn write_tail(ram: &Ram, tail: &Tail<'_>, mut at: u64) -> Result<(), InitrdError> {
    for piece in &tail.pieces {
        match *piece {
            Piece::Bytes(bytes) => {
                ram.write_slice(bytes, GuestAddress(at))
                    .map_err(|error| InitrdError::Load(error.to_string()))?;
                at += bytes.len() as u64;
            }
            Piece::File(path, len) => {
                copy_file(ram, path, len, at)
                    .map_err(|source| InitrdError::Added { path: path.into(), source })?;
                at += len;
            }
        }
    }
    Ok(())
}

/// Reads a file, which must still have the length that was planned for.
fn copy_file(ram: &Ram, path: &Path, len: u64, at: u64) -> io::Result<()> {
    let mut file: File = kernel_file::open(path)?;
    let found = file.metadata()?;
    let changed = || io::Error::other("it has changed its length since it was looked at");
    if !found.is_file() || found.len() != len {
        return Err(changed());
    }
    let count = usize::try_from(len).map_err(io::Error::other)?;
    ram.read_exact_volatile_from(GuestAddress(at), &mut file, count).map_err(|error| match error {
        vm_memory::GuestMemoryError::IOError(error) if error.kind() != io::ErrorKind::UnexpectedEof => error,
        _ => changed(),
    })
}

/// Checks that a guest with enough memory could have `total` bytes where the kernel accepts an initrd.
fn check_reach(total: u64, kernel: &Kernel) -> Result<(), InitrdError> {
    let limit = layout::RAM_HOLE.min(kernel.initrd_limit);
    let max = limit.saturating_sub(kernel.end) / PAGE * PAGE;
    if total > max { Err(InitrdError::OutOfReach { len: total, max, limit }) } else { Ok(()) }
}

const PAGE: u64 = 0x1000;

/// Returns the highest page-aligned place for `len` bytes between `kernel_end` and `limit`.
fn place(len: u64, kernel_end: u64, limit: u64) -> Result<Initrd, InitrdError> {
    let base = limit.checked_sub(len).map(|base| base / PAGE * PAGE);
    match base {
        Some(base) if base >= kernel_end => Ok(Initrd { base, len }),
        _ => Err(InitrdError::NoRoom { len, kernel_end, limit }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::Entry;
    use super::*;
    use crate::layout::{MIB, ram_regions};
    use crate::mem;

    fn kernel() -> Kernel {
        Kernel {
            entry: Entry::Long64 { rip: 0x10_0200 },
            end: 2 * MIB,
            bytes: MIB,
            initrd_limit: 0x8000_0000,
            cmdline_bytes_max: 2047,
            header: Default::default(),
        }
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn it_lies_on_the_highest_page_and_never_on_the_kernel() {
        assert_eq!(place(1, 0x100_0000, 0x800_0000).unwrap().base, 0x7ff_f000);
        assert_eq!(place(0x1000, 0x100_0000, 0x7fff_ffff).unwrap().base, 0x7fff_e000);
        assert_eq!(place(0x1000, 0x7ff_f000, 0x800_0000).unwrap().base, 0x7ff_f000);
        assert!(place(0x1001, 0x7ff_f000, 0x800_0000).is_err());
        assert!(place(u64::MAX, 0, 0x800_0000).is_err());
    }

    #[test]
    fn pieces_lie_behind_the_file_in_their_order() {
        let ram = mem::map_ram(&ram_regions(64 * MIB)).unwrap();
        let (initrd, added) = (file(b"070701 first"), file(&[7; 10_000]));
        let pieces = vec![Piece::Bytes(b"head"), Piece::File(added.path(), 10_000), Piece::Bytes(b"end")];
        let tail = Tail { pieces, unpacked_bytes: 12_288 };
        let placed = load(&ram, initrd.path(), &tail, &kernel(), "").unwrap();
        assert_eq!(placed.len, 512 + tail.total_bytes());
        let mut bytes = vec![0; 512 + 10_007];
        mem::read_bytes(&ram, placed.base, &mut bytes).unwrap();
        assert!(bytes.starts_with(b"070701 first\0"));
        assert!(bytes[512..].starts_with(b"head\x07") && bytes.ends_with(b"\x07end"));
    }

    #[test]
    fn a_file_that_changes_between_plan_and_boot_is_named() {
        let ram = mem::map_ram(&ram_regions(64 * MIB)).unwrap();
        let (initrd, added) = (file(b"070701"), file(b"abc"));
        for len in [2, 4] {
            let tail = Tail { pieces: vec![Piece::File(added.path(), len)], unpacked_bytes: 0 };
            let error = load(&ram, initrd.path(), &tail, &kernel(), "").unwrap_err();
            let InitrdError::Added { path, source } = error else { panic!("{error}") };
            assert!(path == added.path() && source.to_string().contains("changed"), "{source}");
        }
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_read() {
        let ram = mem::map_ram(&ram_regions(64 * MIB)).unwrap();
        let large = file(b"070701");
        large.as_file().set_len(5 << 30).unwrap();
        let error = load(&ram, large.path(), &Tail::default(), &kernel(), "").unwrap_err();
        assert!(matches!(error, InitrdError::OutOfReach { .. }), "{error}");
        assert!(error.to_string().contains("--disk"), "{error}");
        let (initrd, nowhere) = (file(b"070701"), Path::new("/no/such/file"));
        let tail = Tail { pieces: vec![Piece::File(nowhere, 40 * MIB)], unpacked_bytes: 40 * MIB };
        let error = load(&ram, initrd.path(), &tail, &kernel(), "").unwrap_err();
        assert!(error.to_string().contains("needs --memory"), "{error}");
    }
}
