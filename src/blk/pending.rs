//! Requests in flight, by a private number.
//!
//! Owns the numbers: a place in a table that is used again, and how often that place was used
//! before, so that a number is never valid twice (R8). No number comes from the guest.

/// Bits of a number that are the place: no queue has more entries (virtio 2.7).
const PLACE_BITS: u32 = 16;

/// What is in flight.
pub struct Pending<T> {
    places: Vec<Place<T>>,
    /// Places without a request, the last one left first: it is the warmest.
    free: Vec<usize>,
}

struct Place<T> {
    /// How often it was used.
    uses: u64,
    request: Option<T>,
}

impl<T> Pending<T> {
    /// A table of `count_max` places, all free: the only allocation.
    pub fn new(count_max: u16) -> Self {
        let place = |_| Place { uses: 0, request: None };
        Self {
            places: (0..count_max).map(place).collect(),
            free: (0..usize::from(count_max)).rev().collect(),
        }
    }

    /// Requests in flight.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Takes a request in; its number, or `None` when every place is taken.
    pub fn insert(&mut self, request: T) -> Option<u64> {
        let at = self.free.pop()?;
        let place = self.places.get_mut(at)?;
        place.request = Some(request);
        Some(place.uses << PLACE_BITS | at as u64)
    }

    /// Gives a request back; `None` if nothing of this number is in flight.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        let at = usize::try_from(id & ((1 << PLACE_BITS) - 1)).ok()?;
        let place = self.places.get_mut(at).filter(|place| place.uses == id >> PLACE_BITS)?;
        let request = place.request.take()?;
        place.uses += 1;
        self.free.push(at);
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_valid_once_although_its_place_is_used_again() {
        let mut pending = Pending::new(2);
        let mut old = Vec::new();
        for round in 0..1000 {
            let (a, b) = (pending.insert(round).unwrap(), pending.insert(-round).unwrap());
            assert_eq!((pending.len(), pending.insert(7)), (2, None));
            assert_eq!((pending.remove(b), pending.remove(a)), (Some(-round), Some(round)));
            old.extend([a, b]);
            assert!(old.iter().all(|&id| pending.remove(id).is_none()));
        }
        old.sort_unstable();
        old.dedup();
        assert_eq!(old.len(), 2000);
    }

    #[test]
    fn numbers_that_were_never_given_find_nothing() {
        let mut pending = Pending::new(4);
        let id = pending.insert(()).unwrap();
        for other in [id + 1, id + 4, id + (1 << PLACE_BITS), u64::MAX] {
            assert_eq!(pending.remove(other), None, "{other:#x}");
        }
        assert_eq!(pending.len(), 1);
    }
}
