//! The bytes of an input, taken as choices.
//!
//! Owns the way from bytes to small numbers; where there are none left every choice is the first one, so
//! each input has an end.

use arbitrary::Unstructured;

/// An input that is being taken apart.
pub struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self(Unstructured::new(data))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        self.0.arbitrary().unwrap_or(0)
    }

    pub fn u32(&mut self) -> u32 {
        self.0.arbitrary().unwrap_or(0)
    }

    pub fn u64(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or(0)
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of 0 to `count` - 1, of one byte.
    pub fn below(&mut self, count: usize) -> usize {
        usize::from(self.u8()) % count
    }

    /// Once in so many.
    pub fn once_in(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// At most `max` bytes, fewer where there are no more.
    pub fn bytes(&mut self, max: usize) -> &'a [u8] {
        let count = usize::from(self.u8()).min(max).min(self.0.len());
        self.0.bytes(count).unwrap_or_default()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.0.bytes(self.0.len()).unwrap_or_default()
    }

    /// A number that often is near an edge.
    pub fn edgy(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::from(self.u8()),
            1 => u64::from(self.u16()),
            2 => u64::from(self.u32()),
            3 => self.u64(),
            4 => u64::MAX - u64::from(self.u8()),
            5 => (1 << self.below(64)) - u64::from(self.u8() & 1),
            6 => u64::from(u32::MAX) - u64::from(self.u8() & 3),
            _ => (1 << 55) + u64::from(self.u8()),
        }
    }
}
