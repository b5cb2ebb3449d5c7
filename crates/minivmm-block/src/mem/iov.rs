//! Memory for the host's kernel, as an `iovec` array.
//!
//! Owns the arrays and their reuse: once a thread has warmed up, making an [`Iov`], taking a part of one and
//! cloning it allocate nothing.

use std::cell::RefCell;
use std::sync::Arc;

use super::{AlignedBuffer, OutsideRam, Ram, Segment, copy};

/// Arrays that a thread keeps for its next requests: as many as a queue has in flight.
const SPARE_ARRAYS_MAX: usize = 256;
/// The longest array that is kept, in pieces (IOV_MAX; the longest chain of the longest queue).
const SPARE_PIECES_MAX: usize = 1024;

/// Memory that the host's kernel may read or write, as an `iovec` array.
///
/// An `Iov` owns what it points to: a clone of the RAM, or an aligned buffer. So whoever holds it may hand it
/// to the kernel until the operation ends. There is no way to get a slice out of one. The array does not move
/// when its `Iov` does, and clones share it.
#[derive(Clone)]
pub struct Iov {
    pieces: Pieces,
    bytes: u64,
    keep: Keep,
}

#[derive(Clone)]
enum Keep {
    Ram(#[allow(dead_code, reason = "held so that the mapping outlives the pointers")] Ram),
    Buffer(#[allow(dead_code, reason = "held so that the buffer outlives the pointers")] Arc<AlignedBuffer>),
}

impl std::fmt::Debug for Iov {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Iov({} pieces, {} bytes)", self.as_iovecs().len(), self.bytes)
    }
}

impl Iov {
    /// Checks every segment once against `ram` (R3) and keeps them as host ranges. Empty segments are left out
    /// (R4).
    #[inline(always)]
    pub fn new(ram: &Ram, segments: &[Segment]) -> Result<Self, OutsideRam> {
        // What a guest with huge pages sends.
        if let &[Segment { addr, len }] = segments
            && len > 0
        {
            let piece = Piece::new(ram.host(addr, len as usize)?, len as usize);
            return Ok(Self {
                pieces: Pieces::One(piece),
                bytes: u64::from(len),
                keep: Keep::Ram(ram.clone()),
            });
        }
        Self::of_many(ram, segments)
    }

    fn of_many(ram: &Ram, segments: &[Segment]) -> Result<Self, OutsideRam> {
        let keep = Keep::Ram(ram.clone());
        let mut pieces = Pieces::NONE;
        let mut bytes = 0;
        for segment in segments.iter().filter(|segment| segment.len > 0) {
            let len = segment.len as usize;
            pieces.push(ram.host(segment.addr, len)?, len);
            bytes += u64::from(segment.len);
        }
        Ok(Self { pieces, bytes, keep })
    }

    /// Makes an `Iov` of the first `len` bytes of `buffer`, or of all of it if it is shorter.
    pub fn from_buffer(buffer: &Arc<AlignedBuffer>, len: usize) -> Self {
        let len = len.min(buffer.len());
        let mut pieces = Pieces::NONE;
        pieces.push(buffer.ptr, len);
        Self { pieces, bytes: len as u64, keep: Keep::Buffer(Arc::clone(buffer)) }
    }

    /// Returns the total length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the array for `preadv` and `pwritev`.
    pub fn as_iovecs(&self) -> &[libc::iovec] {
        self.pieces.as_slice()
    }

    /// Returns `true` if every piece begins on a multiple of `memory_align` and its length is a multiple of
    /// `len_align`, in bytes, which are powers of two. O_DIRECT demands it of each iovec, not only of the total.
    #[inline(always)]
    pub fn is_aligned(&self, memory_align: u32, len_align: u32) -> bool {
        debug_assert!(memory_align.is_power_of_two() && len_align.is_power_of_two());
        let (memory, len) = (memory_align as usize - 1, len_align as usize - 1);
        // A division would take longer than all the rest.
        self.as_iovecs().iter().all(|piece| piece.iov_base.addr() & memory == 0 && piece.iov_len & len == 0)
    }

    /// Returns the part from byte `skip` on, limited to `len` bytes and `pieces_max` pieces.
    #[inline(always)]
    pub fn part(&self, skip: u64, len: u64, pieces_max: usize) -> Self {
        if skip == 0 && len >= self.bytes && self.as_iovecs().len() <= pieces_max {
            return self.clone();
        }
        self.cut(skip, len, pieces_max)
    }

    #[cold]
    fn cut(&self, skip: u64, len: u64, pieces_max: usize) -> Self {
        let mut skip = skip;
        let mut left = len;
        let mut pieces = Pieces::NONE;
        let mut count = 0;
        for piece in self.as_iovecs() {
            let piece_len = piece.iov_len as u64;
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            if left == 0 || count == pieces_max {
                break;
            }
            let take = (piece_len - skip).min(left);
            let from = piece.iov_base.cast::<u8>();
            pieces.push(
                from.wrapping_add(usize::try_from(skip).unwrap_or(usize::MAX)),
                usize::try_from(take).unwrap_or(usize::MAX),
            );
            count += 1;
            skip = 0;
            left -= take;
        }
        Self { pieces, bytes: len - left, keep: self.keep.clone() }
    }

    /// Copies from this memory into `to`, up to the shorter of the two. Returns the number of bytes copied.
    pub fn copy_to(&self, to: &Iov) -> u64 {
        let mut source = Cursor::new(self.as_iovecs());
        let mut target = Cursor::new(to.as_iovecs());
        let mut copied = 0;
        while let (Some((from, from_len)), Some((into, into_len))) = (source.rest(), target.rest()) {
            let count = from_len.min(into_len);
            // SAFETY: both ranges were checked when their `Iov` was made and are owned by it; no
            // reference to them exists. They may be guest RAM that changes meanwhile, or overlap:
            // `copy` is made for that, and whatever bytes the guest races with are its own.
            unsafe { copy::copy(from, into, count) };
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

/// The pieces of an [`Iov`]. Most have one, which is kept in place. Its address then changes when the `Iov` moves, so an
/// entry of a ring must not point to it.
#[derive(Clone)]
enum Pieces {
    One(Piece),
    Many(Shared),
}

#[derive(Clone, Copy)]
struct Piece(libc::iovec);

// SAFETY: the pointer leads to guest RAM or to an aligned buffer, both owned by the `Iov` that the piece belongs to and
// both shared memory by nature; only system calls and `copy` touch it.
unsafe impl Send for Piece {}
// SAFETY: as above; through a shared piece only the pointer itself is read.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(ptr: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: ptr.cast(), iov_len: len })
    }
}

impl Pieces {
    const NONE: Self = Self::Many(Shared(None));

    fn push(&mut self, ptr: *mut u8, len: usize) {
        let piece = Piece::new(ptr, len);
        match self {
            Self::Many(Shared(None)) => *self = Self::One(piece),
            &mut Self::One(first) => {
                let mut array = Shared::take();
                array.push(first);
                array.push(piece);
                *self = Self::Many(array);
            }
            Self::Many(array) => array.push(piece),
        }
    }

    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Self::One(piece) => std::slice::from_ref(&piece.0),
            Self::Many(Shared(array)) => array.as_ref().map_or(&[], |array| &array.0),
        }
    }
}

/// A shared array of pieces. When its last holder drops it, the thread keeps the array for its next request.
#[derive(Clone)]
struct Shared(
    /// `None` in an `Iov` without pieces, and while it is dropped.
    Option<Arc<Array>>,
);

struct Array(Vec<libc::iovec>);

// SAFETY: the pointers lead to guest RAM or to an aligned buffer, both owned by the `Iov` that the
// array belongs to and both shared memory by nature; only system calls and `copy` touch them.
unsafe impl Send for Array {}
// SAFETY: as above; through a shared array only the pointers themselves are read.
unsafe impl Sync for Array {}

thread_local! {
    /// Arrays that nobody holds any more. They are empty but keep their capacity.
    static SPARE: RefCell<Vec<Arc<Array>>> = const { RefCell::new(Vec::new()) };
}

impl Shared {
    /// Returns an empty array that nobody else holds.
    fn take() -> Self {
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten();
        Self(Some(spare.unwrap_or_else(|| Arc::new(Array(Vec::with_capacity(1))))))
    }

    /// Adds a piece. The array must not be shared yet.
    fn push(&mut self, piece: Piece) {
        let own = self.0.as_mut().and_then(Arc::get_mut);
        debug_assert!(own.is_some(), "pieces are added only to a new array, which nobody shares yet");
        if let Some(array) = own {
            array.0.push(piece.0);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Some(mut array) = self.0.take() else { return };
        let Some(own) = Arc::get_mut(&mut array) else { return };
        own.0.clear();
        if own.0.capacity() <= SPARE_PIECES_MAX {
            // When the thread exits, the list may be gone already; then the array is freed.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < SPARE_ARRAYS_MAX {
                    spare.push(array);
                }
            });
        }
    }
}
