//! Guest memory, and pieces of it that the host's kernel may read and write.
//!
//! Owns the one place where a guest address becomes a host pointer. No Rust reference ever points
//! into guest RAM: bytes are copied in and out (`vm_memory::Bytes`), or an [`Iov`] is handed to a
//! system call, because the guest may change any byte at any time (R12, R13).

use std::io;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

/// Guest RAM. Clones share the mapping, and the mapping lives until the last clone goes.
pub type Ram = GuestMemoryMmap<()>;

/// A guest range is not wholly inside one region of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest address {addr:#x}, {len:#x} bytes, is not in RAM")]
pub struct OutsideRam {
    /// First guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host refused the mapping.
    #[error("cannot map {bytes} bytes of guest memory (is --memory larger than this host allows?)")]
    Map {
        /// Size of the region in bytes.
        bytes: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The regions are not in order or overlap.
    #[error("the regions of guest memory do not fit together: {0}")]
    Regions(String),
}

/// Maps guest RAM: private, anonymous, NORESERVE, DONTFORK (O_DIRECT and fork do not mix, open(2))
/// and HUGEPAGE, in the given regions of (guest address, bytes).
pub fn map_ram(regions: &[(u64, u64)]) -> Result<Ram, RamError> {
    let mut mapped = Vec::with_capacity(regions.len());
    for &(base, bytes) in regions {
        mapped.push(map_region(base, bytes)?);
    }
    Ram::from_regions(mapped).map_err(|e| RamError::Regions(e.to_string()))
}

fn map_region(base: u64, bytes: u64) -> Result<GuestRegionMmap<()>, RamError> {
    let failed = |source| RamError::Map { bytes, source };
    let len = usize::try_from(bytes).map_err(|e| failed(io::Error::other(e)))?;
    let region = MmapRegion::build(
        None,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    )
    .map_err(|e| failed(io::Error::other(e)))?;
    for (advice, needed) in [(libc::MADV_DONTFORK, true), (libc::MADV_HUGEPAGE, false)] {
        // SAFETY: the range is exactly the mapping made above, which `region` keeps alive.
        let result = unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
        if result != 0 && needed {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    GuestRegionMmap::new(region, GuestAddress(base))
        .ok_or_else(|| RamError::Regions(format!("{base:#x} + {bytes:#x} wraps")))
}

/// A guest physical range, as found in a descriptor: an allegation until an [`Iov`] is made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Memory that the host's kernel may read or write, as an `iovec` array.
///
/// It owns what it points to (a clone of the RAM, or an aligned buffer), so whoever holds it may
/// hand it to the kernel until the operation ends. There is no way to get a slice out of one.
#[derive(Clone)]
pub struct Iov {
    pieces: Vec<libc::iovec>,
    bytes: u64,
    _keep: Keep,
}

#[derive(Clone)]
enum Keep {
    Ram(#[allow(dead_code, reason = "held so that the mapping outlives the pointers")] Ram),
    Buffer(
        #[allow(dead_code, reason = "held so that the buffer outlives the pointers")]
        std::sync::Arc<AlignedBuffer>,
    ),
}

// SAFETY: the pointers lead to guest RAM or to an aligned buffer, both owned through `_keep` and
// both shared memory by nature; only system calls and the copy functions below, which use raw
// pointers, touch it.
unsafe impl Send for Iov {}

impl std::fmt::Debug for Iov {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Iov({} pieces, {} bytes)", self.pieces.len(), self.bytes)
    }
}

impl Iov {
    /// Checks every segment once against `ram` (R3) and keeps them as host ranges. Empty segments
    /// are left out (R4).
    pub fn new(ram: &Ram, segments: &[Segment]) -> Result<Self, OutsideRam> {
        let mut pieces = Vec::with_capacity(segments.len());
        let mut bytes = 0;
        for segment in segments.iter().filter(|segment| segment.len > 0) {
            let outside = OutsideRam { addr: segment.addr, len: u64::from(segment.len) };
            let len = segment.len as usize;
            // `get_slice` answers only for ranges inside one region: never across the hole.
            let slice = ram.get_slice(GuestAddress(segment.addr), len).map_err(|_| outside)?;
            pieces.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
            bytes += outside.len;
        }
        Ok(Self { pieces, bytes, _keep: Keep::Ram(ram.clone()) })
    }

    /// The whole of an aligned buffer's first `len` bytes.
    pub fn from_buffer(buffer: &std::sync::Arc<AlignedBuffer>, len: usize) -> Self {
        let len = len.min(buffer.len());
        Self {
            pieces: vec![libc::iovec { iov_base: buffer.ptr.cast(), iov_len: len }],
            bytes: len as u64,
            _keep: Keep::Buffer(std::sync::Arc::clone(buffer)),
        }
    }

    /// All bytes together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The array for `preadv`, `pwritev`.
    pub fn as_iovecs(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// Whether every piece begins on a multiple of `memory_align` and is a multiple of `len_align`
    /// long, in bytes: O_DIRECT wants it of each iovec, not only of the total.
    pub fn is_aligned(&self, memory_align: u32, len_align: u32) -> bool {
        self.pieces.iter().all(|piece| {
            (piece.iov_base as usize).is_multiple_of(memory_align as usize)
                && piece.iov_len.is_multiple_of(len_align as usize)
        })
    }

    /// The part from `skip`, at most `len` bytes of it and at most `pieces_max` pieces.
    pub fn part(&self, skip: u64, len: u64, pieces_max: usize) -> Self {
        let mut skip = skip;
        let mut left = len;
        let mut pieces = Vec::new();
        for piece in &self.pieces {
            let piece_len = piece.iov_len as u64;
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            if left == 0 || pieces.len() == pieces_max {
                break;
            }
            let take = (piece_len - skip).min(left);
            pieces.push(libc::iovec {
                iov_base: piece
                    .iov_base
                    .cast::<u8>()
                    .wrapping_add(usize::try_from(skip).unwrap_or(usize::MAX))
                    .cast(),
                iov_len: usize::try_from(take).unwrap_or(usize::MAX),
            });
            skip = 0;
            left -= take;
        }
        Self { pieces, bytes: len - left, _keep: self._keep.clone() }
    }

    /// Copies from here into `to`, up to the shorter of the two; the number of bytes.
    pub fn copy_to(&self, to: &Iov) -> u64 {
        let mut source = Cursor::new(&self.pieces);
        let mut target = Cursor::new(&to.pieces);
        let mut copied = 0;
        while let (Some((from, from_len)), Some((into, into_len))) = (source.rest(), target.rest()) {
            let count = from_len.min(into_len);
            // SAFETY: both ranges were checked when their `Iov` was made and are owned by it.
            // They may be guest RAM that changes meanwhile, or even overlap: `copy` is a memmove
            // on raw pointers, and whatever bytes the guest races with are its own.
            unsafe { std::ptr::copy(from.cast_const(), into, count) };
            source.advance(count);
            target.advance(count);
            copied += count as u64;
        }
        copied
    }
}

/// Walks the bytes of an iovec array.
struct Cursor<'a> {
    pieces: &'a [libc::iovec],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(pieces: &'a [libc::iovec]) -> Self {
        Self { pieces, at: 0 }
    }

    fn rest(&mut self) -> Option<(*mut u8, usize)> {
        while let [first, others @ ..] = self.pieces {
            if self.at < first.iov_len {
                return Some((first.iov_base.cast::<u8>().wrapping_add(self.at), first.iov_len - self.at));
            }
            self.pieces = others;
            self.at = 0;
        }
        None
    }

    fn advance(&mut self, count: usize) {
        self.at += count;
    }
}

/// Zeroed host memory on a given alignment, for bounces and for zeroes.
pub struct AlignedBuffer {
    ptr: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: a plain owned allocation, reached only through raw pointers in system calls and copies;
// the disk's state machine, its only user, is on one thread at a time.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; there is no method that reads or writes through a shared reference.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` bytes (at least 1) on a multiple of `align` (a power of two), all zero: what a guest
    /// gets out of a bounce can never be another request's data (CVE-2024-8612).
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = std::alloc::Layout::from_size_align(len.max(1), align).map_err(io::Error::other)?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Self { ptr, layout })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Never: a buffer has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed only here.
        unsafe { std::alloc::dealloc(self.ptr, self.layout) };
    }
}

/// Copies `data` to guest address `addr`.
pub fn write_bytes(ram: &Ram, addr: u64, data: &[u8]) -> Result<(), OutsideRam> {
    ram.write_slice(data, GuestAddress(addr)).map_err(|_| OutsideRam { addr, len: data.len() as u64 })
}

/// Copies `data.len()` bytes from guest address `addr`.
pub fn read_bytes(ram: &Ram, addr: u64, data: &mut [u8]) -> Result<(), OutsideRam> {
    let len = data.len() as u64;
    ram.read_slice(data, GuestAddress(addr)).map_err(|_| OutsideRam { addr, len })
}

/// The regions of RAM as (guest address, host address, bytes), for KVM's memory slots.
pub fn regions(ram: &Ram) -> Vec<(u64, u64, u64)> {
    ram.iter()
        .map(|region| {
            let host = region.as_ptr() as u64;
            (region.start_addr().0, host, region.len())
        })
        .collect()
}
