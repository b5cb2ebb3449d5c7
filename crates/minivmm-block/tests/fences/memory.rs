//! Two models of the memory that a device and its driver share.
//!
//! Each place has one writer, which is how virtio lays its rings out. So the stores to a place have one
//! order, that of its writer's program.

use std::sync::atomic::Ordering;

/// The places of the rings, by number.
pub type Place = usize;

/// Device and driver.
pub const SIDES: usize = 2;

/// Which model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// x86-64: a store goes into a buffer of its side, which is written to memory in order, at any later
    /// time. A load finds the newest store in its own buffer, else memory's. A fence empties the buffer.
    Tso,
    /// C11 without consume and without out-of-thin-air values, in the operational form with views: a load
    /// may find any store that is not older than what its side has already seen, there or through an
    /// acquire. Weaker than x86-64, and than Arm.
    C11,
}

/// How far into the stores of each place a side has seen.
type View = Vec<usize>;

fn join(to: &mut View, from: &View) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from.max(to);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Store {
    value: u64,
    /// What a load that acquires sees with it.
    view: View,
}

/// One side's views (C11), and its buffer (TSO).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Side {
    view: View,
    /// What a fence will make of the relaxed loads so far.
    acquired: View,
    /// What a relaxed store passes on since the last fence.
    released: View,
    buffer: Vec<(Place, u64)>,
}

/// The memory, and what either side has seen of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Memory {
    kind: Kind,
    /// Of each place, the oldest first.
    stores: Vec<Vec<Store>>,
    sides: Vec<Side>,
    /// What the fences so far have seen.
    fences: View,
}

fn acquires(order: Ordering) -> bool {
    matches!(order, Ordering::Acquire | Ordering::AcqRel | Ordering::SeqCst)
}

fn releases(order: Ordering) -> bool {
    matches!(order, Ordering::Release | Ordering::AcqRel | Ordering::SeqCst)
}

impl Memory {
    /// So many places, all zero.
    pub fn new(kind: Kind, places: usize) -> Self {
        let nothing = vec![0; places];
        let side = Side {
            view: nothing.clone(),
            acquired: nothing.clone(),
            released: nothing.clone(),
            buffer: Vec::new(),
        };
        let first = Store { value: 0, view: nothing.clone() };
        Self { kind, stores: vec![vec![first]; places], sides: vec![side; SIDES], fences: nothing }
    }

    /// The values that a load may find, each once; the newest first.
    pub fn loads(&self, side: usize, place: Place) -> Vec<u64> {
        let stores = &self.stores[place];
        if self.kind == Kind::Tso {
            let own = self.sides[side].buffer.iter().rev().find(|&&(other, _)| other == place);
            return vec![own.map_or(stores[stores.len() - 1].value, |&(_, value)| value)];
        }
        stores[self.sides[side].view[place]..].iter().rev().map(|store| store.value).collect()
    }

    /// A load finds the value of this number.
    pub fn load(&mut self, side: usize, place: Place, order: Ordering, number: usize) -> u64 {
        let value = self.loads(side, place)[number];
        if self.kind == Kind::C11 {
            let at = self.stores[place].len() - 1 - number;
            let store = self.stores[place][at].view.clone();
            let side = &mut self.sides[side];
            side.view[place] = at;
            side.acquired[place] = side.acquired[place].max(at);
            join(&mut side.acquired, &store);
            if acquires(order) {
                join(&mut side.view, &store);
            }
        }
        value
    }

    pub fn store(&mut self, side: usize, place: Place, value: u64, order: Ordering) {
        if self.kind == Kind::Tso {
            self.sides[side].buffer.push((place, value));
            return;
        }
        let at = self.stores[place].len();
        let side = &mut self.sides[side];
        side.view[place] = at;
        side.acquired[place] = at;
        let mut view = if releases(order) { side.view.clone() } else { side.released.clone() };
        view[place] = at;
        self.stores[place].push(Store { value, view });
    }

    /// A fence of all loads and stores.
    pub fn fence(&mut self, side: usize) {
        while self.write_buffer(side) {}
        let side = &mut self.sides[side];
        let acquired = side.acquired.clone();
        join(&mut side.view, &acquired);
        join(&mut side.view, &self.fences);
        self.fences.clone_from(&side.view);
        side.released.clone_from(&side.view);
    }

    /// Where the oldest store of a side's buffer goes, if it has one.
    pub fn buffered(&self, side: usize) -> Option<Place> {
        self.sides[side].buffer.first().map(|&(place, _)| place)
    }

    /// The oldest store of a side's buffer reaches memory; whether there was one.
    pub fn write_buffer(&mut self, side: usize) -> bool {
        if self.sides[side].buffer.is_empty() {
            return false;
        }
        let (place, value) = self.sides[side].buffer.remove(0);
        let view = vec![0; self.stores.len()];
        // Of what memory holds, only the newest can be found.
        self.stores[place] = vec![Store { value, view }];
        true
    }

    /// One side has rung for the other, which now wakes by it: a system call or an exit of the CPU on both
    /// ends, which orders as release and acquire do. What a bell carries is what its ringer had seen.
    pub fn bell(&mut self, ringer: usize) -> Bell {
        while self.kind == Kind::Tso && self.write_buffer(ringer) {}
        Bell(self.sides[ringer].view.clone())
    }

    /// The side that was rung for wakes.
    pub fn wake(&mut self, side: usize, bell: &Bell) {
        let side = &mut self.sides[side];
        join(&mut side.view, &bell.0);
        join(&mut side.acquired, &bell.0);
    }
}

/// What a doorbell or an interrupt carries.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bell(View);

impl Bell {
    /// Rung twice before anybody wakes: once.
    pub fn join(&mut self, other: &Bell) {
        join(&mut self.0, &other.0);
    }
}
