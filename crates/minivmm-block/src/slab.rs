//! Values under private numbers.
//!
//! Owns the numbering of what is in flight. A number is used once, so a late or invented completion finds
//! nothing. (It repeats only after its slot was used 2^32 times.) Memory is allocated only while the number of
//! values held at the same time still grows.

use std::marker::PhantomData;

/// The type of a slab's numbers, so that a number of one slab cannot be looked up in another.
pub trait Number: Copy {
    /// Wraps a number that a slab has made.
    fn from_u64(number: u64) -> Self;
    /// Returns the wrapped number.
    fn to_u64(self) -> u64;

    /// Returns the index of the value's slot, which is less than the largest number of values ever held at the
    /// same time.
    fn slot(self) -> usize {
        parts(self.to_u64()).0
    }
}

impl Number for u64 {
    fn from_u64(number: u64) -> Self {
        number
    }

    fn to_u64(self) -> u64 {
        self
    }
}

/// Defines a type that wraps a slab's number.
macro_rules! slab_number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $crate::slab::Number for $name {
            fn from_u64(number: u64) -> Self {
                Self(number)
            }

            fn to_u64(self) -> u64 {
                self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

pub(crate) use slab_number;

/// A set of values, each under a number of its own.
#[derive(Debug)]
pub struct Slab<N, T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    number: PhantomData<N>,
}

#[derive(Debug)]
struct Slot<T> {
    /// How often the slot was used: the upper half of the number. It wraps after 2^32 uses.
    turn: u32,
    value: Option<T>,
}

impl<N, T> Default for Slab<N, T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), number: PhantomData }
    }
}

/// Splits a number into slot and turn.
fn parts(number: u64) -> (usize, u32) {
    // Each half has 32 of the 64 bits.
    #[allow(clippy::cast_possible_truncation)]
    let (index, turn) = (number as u32, (number >> 32) as u32);
    (index as usize, turn)
}

impl<N: Number, T> Slab<N, T> {
    /// Returns how many values the slab holds.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Returns `true` if the slab holds no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores `value` and returns its number.
    #[inline(always)]
    pub fn insert(&mut self, value: T) -> N {
        let index = self.free.pop().unwrap_or_else(|| self.add_slot());
        let slot = &mut self.slots[index as usize];
        slot.value = Some(value);
        N::from_u64(u64::from(slot.turn) << 32 | u64::from(index))
    }

    #[cold]
    fn add_slot(&mut self) -> u32 {
        self.slots.push(Slot { turn: 0, value: None });
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
    }

    /// Returns the value under `number`, or `None` if the number was never given out or its value was removed.
    pub fn get_mut(&mut self, number: N) -> Option<&mut T> {
        let (index, turn) = parts(number.to_u64());
        let slot = self.slots.get_mut(index)?;
        if slot.turn == turn { slot.value.as_mut() } else { None }
    }

    /// Removes and returns the value under `number`, which is not given out again.
    #[inline(always)]
    pub fn remove(&mut self, number: N) -> Option<T> {
        let (index, turn) = parts(number.to_u64());
        let slot = self.slots.get_mut(index)?;
        if slot.turn != turn {
            return None;
        }
        let value = slot.value.take()?;
        slot.turn = slot.turn.wrapping_add(1);
        self.free.push(u32::try_from(index).unwrap_or(u32::MAX));
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_never_used_twice() {
        let mut slab = Slab::<u64, _>::default();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 'b'));
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn what_was_never_given_out_is_not_there() {
        let mut slab = Slab::<u64, u8>::default();
        assert_eq!(slab.remove(7), None);
        assert_eq!(slab.get_mut(u64::MAX), None);
        assert!(slab.is_empty());
    }

    #[test]
    fn slots_are_used_again() {
        let mut slab = Slab::<u64, _>::default();
        for round in 0..100 {
            let numbers = [slab.insert(round), slab.insert(round)];
            assert_eq!(numbers.map(|number| slab.remove(number)), [Some(round); 2]);
        }
        assert_eq!(slab.slots.len(), 2);
    }
}
