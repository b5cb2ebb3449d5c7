//! An access of any width and start, cut into the registers that it touches.
//!
//! Owns the rule for registers of several bytes. A read of part of a register returns those bytes. A write to
//! part of a register is combined with the rest of its present value, as byte enables do on a real bus.

use std::ops::Range;

use super::Outcome;

/// The part of an access that falls into one register of at most four bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lane {
    /// Offset of the register.
    pub register: u64,
    /// The bytes of the register that are accessed.
    bytes: Range<usize>,
    /// The position of these bytes in the access.
    data: Range<usize>,
    /// `true` if the access covers the whole register.
    is_whole: bool,
}

impl Lane {
    /// Returns `true` if the access covers the whole register, so that its present value does not matter.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Copies the accessed bytes of a register whose value is `value` into `data`, the access.
    pub fn fill(&self, value: u32, data: &mut [u8]) {
        if let (Some(to), Some(from)) =
            (data.get_mut(self.data.clone()), value.to_le_bytes().get(self.bytes.clone()))
        {
            to.copy_from_slice(from);
        }
    }

    /// Returns the register's new value after `data`, the access, is written to it; `old` is its present value.
    pub fn merge(&self, old: u32, data: &[u8]) -> u32 {
        let mut value = if self.is_whole { [0; 4] } else { old.to_le_bytes() };
        if let (Some(to), Some(from)) = (value.get_mut(self.bytes.clone()), data.get(self.data.clone())) {
            to.copy_from_slice(from);
        }
        u32::from_le_bytes(value)
    }
}

/// Returns the lanes of `len` bytes from `offset` on, in order.
///
/// `locate` returns the register that a byte belongs to: its offset and its width, from 1 to 4. There are no
/// lanes beyond the last address.
pub fn lanes(offset: u64, len: usize, locate: impl Fn(u64) -> (u64, usize)) -> impl Iterator<Item = Lane> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = offset.checked_add(done as u64)?;
        let (register, width) = locate(at);
        let first = usize::try_from(at.wrapping_sub(register)).unwrap_or(0);
        let count = width.saturating_sub(first).clamp(1, len - done);
        let data = done..done + count;
        done += count;
        Some(Lane { register, bytes: first..first + count, data, is_whole: first == 0 && count == width })
    })
}

/// Locates registers of four bytes each, one after the other, for [`lanes`].
pub fn words(offset: u64) -> (u64, usize) {
    (offset & !3, 4)
}

/// Hands a write to registers of one byte each: `write` gets each register's offset and value. After an outcome
/// other than [`Outcome::Continue`] the remaining bytes are dropped.
pub fn each_byte(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8) -> Outcome) -> Outcome {
    (offset..)
        .zip(data)
        .map(|(register, value)| write(register, *value))
        .find(|outcome| *outcome != Outcome::Continue)
        .unwrap_or(Outcome::Continue)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registers of four, two, one and one bytes, repeated.
    fn mixed(offset: u64) -> (u64, usize) {
        match offset & 7 {
            0..4 => (offset & !3, 4),
            4 | 5 => (offset & !1, 2),
            _ => (offset, 1),
        }
    }

    fn index(offset: u64) -> usize {
        usize::try_from(offset).unwrap()
    }

    #[test]
    fn every_access_is_the_same_as_its_bytes() {
        for locate in [words as fn(u64) -> (u64, usize), mixed] {
            for offset in 0..16_u64 {
                for len in 0..=8_usize {
                    let mut memory: Vec<u8> = (0..32).collect();
                    let mut expected = memory.clone();
                    let written: Vec<u8> = (0xa0..).take(len).collect();
                    for (to, from) in expected[index(offset)..].iter_mut().zip(&written) {
                        *to = *from;
                    }
                    let value = |memory: &[u8], register: u64| {
                        let mut bytes = [0; 4];
                        let (at, width) = (index(register), locate(register).1);
                        bytes[..width].copy_from_slice(&memory[at..at + width]);
                        u32::from_le_bytes(bytes)
                    };
                    let mut touched = Vec::new();
                    for lane in lanes(offset, len, locate) {
                        let (at, width) = (index(lane.register), locate(lane.register).1);
                        let new = lane.merge(value(&memory, lane.register), &written);
                        memory[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
                        touched.push(lane.register);
                    }
                    assert_eq!(memory, expected, "{offset} {len}");
                    let mut once = touched.clone();
                    once.dedup();
                    assert_eq!(touched, once, "each register once");
                    let mut read = vec![0; len];
                    for lane in lanes(offset, len, locate) {
                        lane.fill(value(&memory, lane.register), &mut read);
                    }
                    assert_eq!(read, written);
                }
            }
        }
    }

    #[test]
    fn a_whole_register_does_not_need_its_old_value() {
        let all: Vec<Lane> = lanes(2, 8, words).collect();
        assert_eq!(all.iter().map(Lane::is_whole).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(all[1].merge(u32::MAX, &[0; 8]), 0);
    }
}
