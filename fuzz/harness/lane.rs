//! One live queue as its driver may see it: what was made available, what came back, and what the
//! device was allowed to write meanwhile.
//!
//! Owns the properties of a queue. What an entry of the available ring leads to is looked at before the
//! device runs, as often as the device may look itself; so an entry can have several versions.

use std::collections::BTreeMap;
use std::ops::Range;

use minivmm::virtio::queue::QueueConfig;

use super::memory::{Memory, is_ram};
use super::walk::{self, Chain, F_EVENT_IDX, Walked};

const NO_INTERRUPT: u16 = 1;

/// Which lengths a device may report for a chain.
pub type Lengths = fn(&Memory, &Chain) -> Vec<u64>;

pub struct Lane {
    pub config: QueueConfig,
    features: u64,
    lengths: Lengths,
    /// Chains that came back.
    used: u64,
    /// Entries of the available ring that were ever seen.
    seen: u64,
    /// By their place in the sequence of all that were made available.
    waiting: BTreeMap<u64, Vec<(Chain, Vec<u64>)>>,
    /// The ring may be declared broken.
    pub may_break: bool,
    /// Indices went astray, by the driver's doing: what is available is a matter of opinion.
    pub astray: bool,
    /// What is granted holds what is read: rings, tables, chains.
    pub wild: bool,
    /// What is granted holds headers: lengths are a matter of opinion.
    blurred: bool,
    granted: Vec<Range<u64>>,
    /// Indirect tables of what is granted.
    tables: Vec<Range<u64>>,
    told: u64,
}

impl Lane {
    /// A queue whose driver has just come; `told` counts the notifications until now.
    pub fn new(memory: &Memory, config: QueueConfig, features: u64, told: u64, lengths: Lengths) -> Self {
        // A used ring that does not begin at 0 is one that its driver cannot follow.
        let wild = memory.u16(config.used + 2) != Some(0);
        Self {
            config,
            features,
            lengths,
            used: 0,
            seen: 0,
            waiting: BTreeMap::new(),
            may_break: false,
            astray: false,
            wild,
            blurred: false,
            granted: Vec::new(),
            tables: Vec::new(),
            told,
        }
    }

    fn size(&self) -> u64 {
        u64::from(self.config.size)
    }

    /// Chains that the device owes.
    pub fn owed(&self) -> usize {
        self.waiting.len()
    }

    /// The parts of the queue.
    pub fn parts(&self) -> [Range<u64>; 3] {
        let QueueConfig { descriptors, available, used, .. } = self.config;
        [
            descriptors..descriptors + 16 * self.size(),
            available..available + 6 + 2 * self.size(),
            used..used + 6 + 8 * self.size(),
        ]
    }

    /// Before the device runs: what it may take, and what it may write therefore.
    pub fn grant(&mut self, memory: &Memory) {
        if self.astray {
            return self.grant_any(memory);
        }
        let Some(idx) = memory.u16(self.config.available + 2) else { return };
        let used = (self.used & 0xffff) as u16;
        let ahead = u64::from(idx.wrapping_sub(used));
        if ahead > 2 * self.size() {
            return self.go_astray(memory);
        }
        if ahead > self.size() {
            // More than the ring has, if nothing of it is in flight.
            self.may_break = true;
        }
        if self.seen > self.used + ahead {
            // It has taken back what it had made available.
            return self.go_astray(memory);
        }
        for place in self.used..self.used + ahead {
            if place < self.seen && !self.waiting.contains_key(&place) {
                // It came back, before others that were made available earlier.
                continue;
            }
            let at = self.config.available + 4 + 2 * (place % self.size());
            let Some(head) = memory.u16(at) else { return };
            match walk::walk(memory, &self.config, self.features, head) {
                Walked::Broken => {
                    self.may_break = true;
                    self.waiting.entry(place).or_default();
                }
                Walked::Chain(chain) => self.grant_chain(memory, place, chain),
            }
        }
        self.seen = self.seen.max(self.used + ahead);
    }

    /// From now on any entry of the available ring may be taken.
    fn go_astray(&mut self, memory: &Memory) {
        (self.may_break, self.astray) = (true, true);
        self.grant_any(memory);
    }

    fn grant_any(&mut self, memory: &Memory) {
        for slot in 0..self.size() {
            if let Some(head) = memory.u16(self.config.available + 4 + 2 * slot)
                && let Walked::Chain(chain) = walk::walk(memory, &self.config, self.features, head)
            {
                self.grant_bytes(&chain);
            }
        }
    }

    fn grant_bytes(&mut self, chain: &Chain) {
        for &(addr, len) in &chain.writable {
            // What reaches beyond RAM is granted as far as it does not.
            let range = addr..addr.saturating_add(len.into());
            if !self.granted.contains(&range) {
                self.granted.push(range);
            }
        }
        for &(addr, len) in &chain.tables {
            self.tables.push(addr..addr + u64::from(len));
        }
    }

    fn grant_chain(&mut self, memory: &Memory, place: u64, chain: Chain) {
        if chain.status().is_none_or(|status| !is_ram(status, 1)) {
            self.may_break = true;
        }
        let lengths = (self.lengths)(memory, &chain);
        let versions = self.waiting.entry(place).or_default();
        if versions.last().is_some_and(|(last, known)| *last == chain && *known == lengths) {
            return;
        }
        versions.push((chain.clone(), lengths));
        self.grant_bytes(&chain);
    }

    /// Whether what is granted here is what some queue reads.
    pub fn look_for_wildness(&mut self, parts: &[Range<u64>]) {
        let touches = |granted: &[Range<u64>], from: u64, to: u64| {
            granted.iter().any(|range| range.start < to && from < range.end)
        };
        self.wild |= parts.iter().any(|part| touches(&self.granted, part.start, part.end));
        self.wild |= self.tables.iter().any(|table| touches(&self.granted, table.start, table.end));
        for (chain, _) in self.waiting.values().flatten() {
            for &(addr, len) in &chain.readable {
                self.blurred |= touches(&self.granted, addr, addr.saturating_add(len.into()));
            }
        }
    }

    /// Whether the device may write these bytes.
    pub fn allows(&self, changed: &Range<u64>) -> bool {
        let [_, _, used] = self.parts();
        if used.start <= changed.start && changed.end <= used.end {
            return true;
        }
        // A run of changed bytes may lie in several of them.
        let mut at = changed.start;
        while at < changed.end {
            let within = self.granted.iter().filter(|range| range.contains(&at)).map(|range| range.end).max();
            match within {
                Some(end) => at = end,
                None => return false,
            }
        }
        true
    }

    /// The driver has written there; if that is the device's part of the queue, all is lost.
    pub fn touch(&mut self, touched: &[Range<u64>]) {
        let [_, _, used] = self.parts();
        self.wild |= touched.iter().any(|range| range.start < used.end && used.start < range.end);
    }

    /// Other lanes' grants overlap what is read here.
    pub fn blur(&mut self) {
        self.blurred = true;
    }

    /// After the device has run: what came back. `told` counts notifications.
    pub fn collect(&mut self, memory: &Memory, told: u64) {
        let before = std::mem::replace(&mut self.told, told);
        if self.wild {
            return;
        }
        let Some(idx) = memory.u16(self.config.used + 2) else { return };
        let old = (self.used & 0xffff) as u16;
        let new = u64::from(idx.wrapping_sub(old));
        if self.astray {
            self.used += new;
            return;
        }
        assert!(
            new <= self.waiting.len() as u64,
            "{new} chains came back, and only {} were made available",
            self.waiting.len()
        );
        if new > self.size() {
            // The driver has more outstanding than there are entries: the older ones are gone.
            self.astray = true;
            self.used += new;
            return;
        }
        for _ in 0..new {
            let at = self.config.used + 4 + 8 * (self.used % self.size());
            let entry = memory.get(at, 8).expect("a used ring in RAM");
            let head = u32::from_le_bytes(entry[..4].try_into().unwrap());
            let len = u32::from_le_bytes(entry[4..].try_into().unwrap());
            self.take_back(head, len);
            self.used += 1;
        }
        if new > 0 && self.must_tell(memory, old, idx) {
            assert!(told > before, "Q8: the driver was not told of {old} to {idx}");
        }
        if self.waiting.is_empty() {
            self.granted.clear();
            self.tables.clear();
            self.blurred = false;
        }
    }

    fn take_back(&mut self, head: u32, len: u32) {
        let is_it = |(chain, lengths): &(Chain, Vec<u64>)| {
            let fits = if self.blurred {
                u64::from(len) <= chain.writable_bytes()
            } else {
                lengths.contains(&len.into())
            };
            u32::from(chain.head) == head && fits
        };
        // The one that is in the least doubt.
        let fitting = self.waiting.iter().filter(|(_, versions)| versions.iter().any(is_it));
        let found = fitting.min_by_key(|(_, versions)| versions.len());
        let Some((place, is_certain)) = found.map(|(place, versions)| (*place, versions.len() == 1)) else {
            panic!("used: head {head} with {len} bytes came back; waiting are {:?}", self.waiting);
        };
        self.waiting.remove(&place);
        // It may have been another one with the same head.
        self.blurred |= !is_certain;
    }

    fn must_tell(&self, memory: &Memory, old: u16, new: u16) -> bool {
        let size = self.size();
        if self.features & F_EVENT_IDX == 0 {
            return memory.u16(self.config.available).is_some_and(|flags| flags & NO_INTERRUPT == 0);
        }
        let event = memory.u16(self.config.available + 4 + 2 * size);
        event.is_some_and(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Nothing is in flight any more, the doorbell was rung, and the queue is not broken.
    pub fn check_complete(&self) {
        if !self.wild && !self.astray {
            let owed: Vec<_> = self.waiting.values().collect();
            assert!(owed.is_empty(), "never completed: {owed:?}, of a queue {:x?}", self.config);
        }
    }
}
