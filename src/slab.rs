//! Values under private numbers.
//!
//! Owns the numbering of what is in flight: a number is never used twice, so that a late or invented
//! answer finds nothing, and no memory is allocated once as many were held at the same time as ever
//! will be.

/// A set of values, each under a number of its own.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    /// How often the slot was used: the upper half of the number.
    turn: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

/// Slot and turn of a number.
fn parts(number: u64) -> (usize, u32) {
    // The halves of 64 bits are 32 bits each.
    #[allow(clippy::cast_possible_truncation)]
    let (index, turn) = (number as u32, (number >> 32) as u32);
    (index as usize, turn)
}

/// The place of a number's value: below the most values that there were at the same time.
pub fn slot(number: u64) -> usize {
    parts(number).0
}

impl<T> Slab<T> {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keeps `value`; its number.
    pub fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { turn: 0, value: None });
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let slot = &mut self.slots[index as usize];
        slot.value = Some(value);
        u64::from(slot.turn) << 32 | u64::from(index)
    }

    /// All values.
    pub fn into_values(self) -> impl Iterator<Item = T> {
        self.slots.into_iter().filter_map(|slot| slot.value)
    }

    /// The value under `number`.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let (index, turn) = parts(number);
        let slot = self.slots.get_mut(index)?;
        if slot.turn == turn { slot.value.as_mut() } else { None }
    }

    /// Takes the value under `number` out; the number means nothing from now on.
    pub fn remove(&mut self, number: u64) -> Option<T> {
        let (index, turn) = parts(number);
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
        let mut slab = Slab::default();
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
        let mut slab = Slab::<u8>::default();
        assert_eq!(slab.remove(7), None);
        assert_eq!(slab.get_mut(u64::MAX), None);
        assert!(slab.is_empty());
    }

    #[test]
    fn slots_are_used_again() {
        let mut slab = Slab::default();
        for round in 0..100 {
            let numbers = [slab.insert(round), slab.insert(round)];
            assert_eq!(numbers.map(|number| slab.remove(number)), [Some(round); 2]);
        }
        assert_eq!(slab.slots.len(), 2);
    }
}
