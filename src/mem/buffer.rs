//! Host memory for bounces and zeroes.
//!
//! Owns aligned buffers and their reuse. Whatever is handed out holds zeroes or what the taker has
//! put in, never bytes of an earlier request (CVE-2024-8612).

use std::alloc::Layout;
use std::io;
use std::sync::Arc;

use super::Iov;

/// Zeroed host memory on a given alignment, for bounces and for zeroes.
pub struct AlignedBuffer {
    pub(super) ptr: *mut u8,
    layout: Layout,
}

// SAFETY: a plain owned allocation, reached only through raw pointers in system calls and copies.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; there is no method that reads or writes through a shared reference.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` bytes (at least 1) on a multiple of `align` (a power of two), all zero: what a guest
    /// gets out of a bounce can never be another request's data (CVE-2024-8612).
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.max(1), align).map_err(io::Error::other)?;
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

/// Buffers of one size and alignment that are used again.
///
/// There is no giving back that could come too early or be forgotten: the pool keeps a handle to
/// each buffer, and one is free when nobody else has any, that is, when the last [`Iov`] over it is
/// gone, the copies that an engine holds included.
pub struct BufferPool {
    buffers: Vec<Arc<AlignedBuffer>>,
    /// Where to look first: behind the one taken last, which is the likeliest to be free.
    next: usize,
    buffer_bytes: usize,
    align: usize,
    buffers_max: usize,
}

impl BufferPool {
    /// A pool of at most `buffers_max` buffers of `buffer_bytes` bytes on multiples of `align`. None
    /// is allocated before it is needed.
    pub fn new(buffer_bytes: usize, align: usize, buffers_max: usize) -> Self {
        Self { buffers: Vec::new(), next: 0, buffer_bytes, align, buffers_max }
    }

    /// `len` bytes of zeroes. What is longer than the pool's buffers, or too much at once, gets memory
    /// of its own, which goes with its last user.
    pub fn take_zeroed(&mut self, len: usize) -> io::Result<Iov> {
        let buffer = match self.take(len)? {
            Taken::Fresh(buffer) => buffer,
            Taken::Used(at) => {
                if let Some(buffer) = self.buffers.get_mut(at).and_then(Arc::get_mut) {
                    buffer.clear(len);
                }
                self.handle(at)?
            }
        };
        Ok(Iov::from_buffer(&buffer, len))
    }

    /// As many bytes as `from` has, with what it has: nothing of a former use is left to clear.
    pub fn take_copy(&mut self, from: &Iov) -> io::Result<Iov> {
        let len = usize::try_from(from.bytes()).map_err(io::Error::other)?;
        let buffer = match self.take(len)? {
            Taken::Fresh(buffer) => buffer,
            Taken::Used(at) => self.handle(at)?,
        };
        let copy = Iov::from_buffer(&buffer, len);
        from.copy_to(&copy);
        Ok(copy)
    }

    /// Buffers that the pool keeps, in use or not.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether it keeps none.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    fn take(&mut self, len: usize) -> io::Result<Taken> {
        if len > self.buffer_bytes {
            return AlignedBuffer::new(len, self.align).map(|buffer| Taken::Fresh(Arc::new(buffer)));
        }
        let count = self.buffers.len();
        let free = (self.next..count).chain(0..self.next.min(count)).find(|&at| {
            // Unique also means that what others did with it is over before we do anything.
            self.buffers.get_mut(at).is_some_and(|buffer| Arc::get_mut(buffer).is_some())
        });
        if let Some(at) = free {
            self.next = at + 1;
            return Ok(Taken::Used(at));
        }
        let keeps = count < self.buffers_max;
        let bytes = if keeps { self.buffer_bytes } else { len };
        let buffer = Arc::new(AlignedBuffer::new(bytes, self.align)?);
        if keeps {
            self.buffers.push(Arc::clone(&buffer));
            self.next = 0;
        }
        Ok(Taken::Fresh(buffer))
    }

    fn handle(&self, at: usize) -> io::Result<Arc<AlignedBuffer>> {
        self.buffers.get(at).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A buffer that nobody else uses.
enum Taken {
    /// Just allocated, all zero.
    Fresh(Arc<AlignedBuffer>),
    /// The pool's at this place, with old bytes in it.
    Used(usize),
}
