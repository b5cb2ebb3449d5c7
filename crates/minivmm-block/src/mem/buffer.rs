//! Host memory for bounces and zeroes.
//!
//! Owns aligned buffers and their reuse. A buffer that is handed out holds zeroes or what the taker has put in,
//! never bytes of an earlier request (CVE-2024-8612).

use std::alloc::Layout;
use std::io;
use std::sync::Arc;

use super::Iov;

/// Zeroed host memory with a given alignment, for bounces and for zeroes.
pub struct AlignedBuffer {
    pub(super) ptr: *mut u8,
    layout: Layout,
}

// SAFETY: a plain owned allocation, reached only through raw pointers in system calls and copies.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; there is no method that reads or writes through a shared reference.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Allocates `len` zeroed bytes (at least 1) on a multiple of `align` (a power of two).
    ///
    /// Because of the zeroes, what a guest gets out of a bounce can never be another request's data
    /// (CVE-2024-8612).
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.max(1), align).map_err(io::Error::other)?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Self { ptr, layout })
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Returns `false`: a buffer has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Zeroes the first `len` bytes.
    fn clear(&mut self, len: usize) {
        // SAFETY: inside the allocation, which `&mut self` says nobody else uses.
        unsafe { self.ptr.write_bytes(0, len.min(self.len())) };
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed only here.
        unsafe { std::alloc::dealloc(self.ptr, self.layout) };
    }
}

/// A pool of reusable buffers of one size and alignment.
///
/// Buffers are not given back explicitly, which could be done too early or be forgotten. The pool keeps a
/// handle to each buffer, and a buffer is free when nobody else holds one. That is so once the last [`Iov`]
/// over it is dropped, the copies that an engine holds included.
pub struct BufferPool {
    buffers: Vec<Arc<AlignedBuffer>>,
    /// Where to search first: after the buffer taken last, where a free one is likeliest.
    next: usize,
    buffer_bytes: usize,
    align: usize,
    buffers_max: usize,
}

impl BufferPool {
    /// Creates a pool of at most `buffers_max` buffers of `buffer_bytes` bytes on multiples of `align`. A
    /// buffer is allocated only when it is needed.
    pub fn new(buffer_bytes: usize, align: usize, buffers_max: usize) -> Self {
        Self { buffers: Vec::new(), next: 0, buffer_bytes, align, buffers_max }
    }

    /// Returns `len` bytes of zeroes. A request longer than the pool's buffers, or beyond their number, gets
    /// memory of its own, which is freed with its last user.
    pub fn take_zeroed(&mut self, len: usize) -> io::Result<Iov> {
        let buffer = match self.take(len)? {
            FreeBuffer::Fresh(buffer) => buffer,
            FreeBuffer::Used(at) => {
                if let Some(buffer) = self.buffers.get_mut(at).and_then(Arc::get_mut) {
                    buffer.clear(len);
                }
                self.handle(at)?
            }
        };
        Ok(Iov::from_buffer(&buffer, len))
    }

    /// Returns a copy of `from`. The copy covers the whole length, so no bytes of a former use need clearing.
    pub fn take_copy(&mut self, from: &Iov) -> io::Result<Iov> {
        let len = usize::try_from(from.bytes()).map_err(io::Error::other)?;
        let buffer = match self.take(len)? {
            FreeBuffer::Fresh(buffer) => buffer,
            FreeBuffer::Used(at) => self.handle(at)?,
        };
        let copy = Iov::from_buffer(&buffer, len);
        from.copy_to(&copy);
        Ok(copy)
    }

    /// Returns the number of buffers that the pool keeps, in use or not.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Returns `true` if the pool keeps no buffer.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    fn take(&mut self, len: usize) -> io::Result<FreeBuffer> {
        if len > self.buffer_bytes {
            return AlignedBuffer::new(len, self.align).map(|buffer| FreeBuffer::Fresh(Arc::new(buffer)));
        }
        let count = self.buffers.len();
        let free = (self.next..count).chain(0..self.next.min(count)).find(|&at| {
            // Being the only holder also means that all accesses by former holders happened before ours.
            self.buffers.get_mut(at).is_some_and(|buffer| Arc::get_mut(buffer).is_some())
        });
        if let Some(at) = free {
            self.next = at + 1;
            return Ok(FreeBuffer::Used(at));
        }
        let keeps = count < self.buffers_max;
        let bytes = if keeps { self.buffer_bytes } else { len };
        let buffer = Arc::new(AlignedBuffer::new(bytes, self.align)?);
        if keeps {
            self.buffers.push(Arc::clone(&buffer));
            self.next = 0;
        }
        Ok(FreeBuffer::Fresh(buffer))
    }

    fn handle(&self, at: usize) -> io::Result<Arc<AlignedBuffer>> {
        self.buffers.get(at).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A buffer that nobody else uses.
enum FreeBuffer {
    /// Just allocated, all zero.
    Fresh(Arc<AlignedBuffer>),
    /// The pool's buffer at this index, with old bytes in it.
    Used(usize),
}
