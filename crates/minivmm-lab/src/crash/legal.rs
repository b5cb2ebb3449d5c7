//! Determines which disks a loss of power may leave at one point of a log.
//!
//! Owns the rule. Everything that a flush has covered is on the disk, and so is each write that was stable by
//! itself. Each other write that completed after the last flush may be there or not, whole or torn between
//! sectors. If several writes touch the same sector, the last one that is there counts. A sector is never torn.
//!
//! A state has a name, from which it can be made again: `none`, `all`, `x1f` (if bit n is set, the nth
//! uncertain write is there) or `s5eed` (chosen at random with this seed). A `t` before `x` or `s` means that
//! writes are torn.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::str::FromStr;

use super::log::{Entry, WriteLog};
use minivmm::disk::fault::plan::mix;

/// Most pieces into which a write is torn. The pieces of a larger write are several sectors long.
const SLICES_MAX: u64 = 2048;

/// The name of one of the states that a point may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateName {
    /// Only what is stable is there.
    None,
    /// Everything that had completed is there.
    All,
    /// The writes whose bits are set are there.
    Mask {
        /// True if bits stand for pieces of writes.
        torn: bool,
        /// The lowest bit stands for the first write.
        bits: u64,
    },
    /// The writes that are there are chosen at random.
    Seeded {
        /// True if writes may be there in part.
        torn: bool,
        /// Seed of the random choice.
        seed: u64,
    },
}

/// A range of the disk that holds content of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Offset on the disk in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Index of the entry.
    pub entry: usize,
    /// Offset of the range in the content of the entry, in bytes.
    pub skip: u64,
}

/// The changes at one point that a loss of power may or may not leave on the disk.
#[derive(Debug)]
pub struct Pending<'a> {
    entries: &'a [Entry],
    /// Index of the first entry that is not certainly there. All entries before it are.
    pub settled: usize,
    writes: Vec<Write>,
    /// True if writes may be there in part.
    torn: bool,
}

/// A change that no flush has covered.
#[derive(Debug)]
struct Write {
    entry: usize,
    /// True if the write was stable when it completed.
    stable: bool,
    /// Size in bytes of the pieces into which the write can be torn.
    slice: u64,
    /// Number of these pieces; 1 if the write cannot be torn.
    slices: usize,
}

impl<'a> Pending<'a> {
    /// Returns the changes that are uncertain when the first `point` entries of the log have completed.
    pub fn at(log: &'a WriteLog, point: usize, torn: bool) -> Self {
        let entries = log.entries.get(..point).unwrap_or(&log.entries);
        // The flush covers what came before it. Data that the same entry writes is written after the flush.
        let settled = entries.iter().rposition(Entry::is_flush).unwrap_or(0);
        let sector = u64::from(log.sector_bytes);
        let open = entries.iter().enumerate().skip(settled).filter(|(_, entry)| entry.changes());
        let writes = open.map(|(number, entry)| Write::new(number, entry, sector, torn)).collect();
        Self { entries, settled, writes, torn }
    }

    /// Returns the number of things that may be there or not: writes, or their pieces if they can be torn.
    pub fn choices(&self) -> usize {
        self.free().map(|write| write.slices).sum()
    }

    /// Returns the names of the states, with the two extremes first. If there are at most `most` states, all
    /// are named. Otherwise random states follow without end. Several names may mean the same disk.
    pub fn names(&self, most: usize, seed: u64) -> Box<dyn Iterator<Item = StateName> + Send> {
        let (torn, choices) = (self.torn, self.choices());
        let extremes = [StateName::None, StateName::All];
        let count = u32::try_from(choices).ok().and_then(|choices| 1u64.checked_shl(choices));
        match count.filter(|&count| choices < 64 && count <= most as u64) {
            Some(1) => Box::new([StateName::All].into_iter()),
            Some(count) => {
                let others = (1..count - 1).map(move |bits| StateName::Mask { torn, bits });
                Box::new(extremes.into_iter().chain(others))
            }
            None => {
                let seed = mix(seed, self.entries.len() as u64);
                let others =
                    (0..).map(move |number| StateName::Seeded { torn, seed: mix(seed, number) >> 16 });
                Box::new(extremes.into_iter().chain(others))
            }
        }
    }

    /// Returns what the state has on the disk besides the settled entries: extents in the order of the disk
    /// that do not overlap. Returns `None` if there is no such state.
    pub fn extents(&self, name: StateName) -> Option<Vec<Extent>> {
        let chosen = self.chosen(name)?;
        let mut disk = BTreeMap::new();
        let mut rest = chosen.as_slice();
        // The last write to a sector counts, so it is placed first and the earlier ones fill the gaps.
        for write in self.writes.iter().rev() {
            let entry = self.entries.get(write.entry)?;
            if write.stable {
                write.lay(&mut disk, entry, &[true]);
            } else {
                let (earlier, own) = rest.split_at_checked(rest.len().checked_sub(write.slices)?)?;
                write.lay(&mut disk, entry, own);
                rest = earlier;
            }
        }
        Some(joined(disk))
    }

    /// Returns the entries that the state lacks at least in part.
    pub fn lost(&self, name: StateName) -> Vec<usize> {
        let chosen = self.chosen(name).unwrap_or_default();
        let mut rest = chosen.as_slice();
        let mut lost = Vec::new();
        for write in self.free() {
            let (own, later) = rest.split_at(write.slices.min(rest.len()));
            if own.contains(&false) {
                lost.push(write.entry);
            }
            rest = later;
        }
        lost
    }

    fn free(&self) -> impl Iterator<Item = &Write> {
        self.writes.iter().filter(|write| !write.stable)
    }

    /// Returns for each choice whether it is there; `None` if there is no such state.
    fn chosen(&self, name: StateName) -> Option<Vec<bool>> {
        let choices = self.choices();
        match name {
            StateName::None => Some(vec![false; choices]),
            StateName::All => Some(vec![true; choices]),
            StateName::Mask { bits, .. } => {
                let is_state = choices < 64 && bits >> choices == 0;
                is_state.then(|| (0..choices).map(|at| bits >> at & 1 == 1).collect())
            }
            StateName::Seeded { seed, .. } => Some(self.by_chance(&mut PseudoRandom::new(seed))),
        }
    }

    fn by_chance(&self, random: &mut PseudoRandom) -> Vec<bool> {
        let writes = self.free().count();
        let whole = some_of(writes, random);
        if !self.torn || writes == 0 {
            return whole;
        }
        let one = random.below(writes);
        let only_one = random.below(2) == 0;
        let mut chosen = Vec::new();
        for (at, (write, is_there)) in self.free().zip(whole).enumerate() {
            if at == one || !only_one && random.below(3) == 0 {
                chosen.extend(torn(write.slices, random));
            } else {
                chosen.extend(std::iter::repeat_n(is_there, write.slices));
            }
        }
        chosen
    }
}

/// Selects some of `count` things: about half, all but a few, a few, or a random share.
fn some_of(count: usize, random: &mut PseudoRandom) -> Vec<bool> {
    if count == 0 {
        return Vec::new();
    }
    match random.below(4) {
        0 => (0..count).map(|_| random.below(2) == 0).collect(),
        style @ (1 | 2) => {
            let mut some = vec![style == 1; count];
            for _ in 0..=random.below(3) {
                if let Some(it) = some.get_mut(random.below(count)) {
                    *it = style != 1;
                }
            }
            some
        }
        _ => {
            let percent = random.below(101);
            (0..count).map(|_| random.below(100) < percent).collect()
        }
    }
}

/// Selects pieces of a torn write: its beginning, its end, or any pieces.
fn torn(slices: usize, random: &mut PseudoRandom) -> Vec<bool> {
    let cut = random.below(slices + 1);
    match random.below(3) {
        0 => (0..slices).map(|at| at < cut).collect(),
        1 => (0..slices).map(|at| at >= cut).collect(),
        _ => (0..slices).map(|_| random.below(2) == 0).collect(),
    }
}

impl Write {
    fn new(number: usize, entry: &Entry, sector: u64, torn: bool) -> Self {
        let stable = entry.is_fua();
        let slice = match torn && !stable {
            true => entry.bytes.div_ceil(SLICES_MAX).next_multiple_of(sector),
            false => entry.bytes,
        };
        // The number is at most SLICES_MAX, because `slice` is large enough.
        let slices = usize::try_from(entry.bytes.div_ceil(slice.max(1))).unwrap_or(1);
        Self { entry: number, stable, slice, slices }
    }

    /// Places the pieces that are there, wherever no later write lies.
    fn lay(&self, disk: &mut BTreeMap<u64, Extent>, entry: &Entry, there: &[bool]) {
        let mut skip = 0;
        for run in there.chunk_by(|a, b| a == b) {
            let bytes = (run.len() as u64 * self.slice).min(entry.bytes - skip);
            if run.first() == Some(&true) {
                lay(disk, Extent { offset: entry.offset + skip, bytes, entry: self.entry, skip });
            }
            skip += bytes;
        }
    }
}

/// Places `new` wherever nothing lies yet.
fn lay(disk: &mut BTreeMap<u64, Extent>, new: Extent) {
    let end = new.offset + new.bytes;
    let before = disk.range(..=new.offset).next_back();
    let mut at = before.map_or(new.offset, |(_, there)| (there.offset + there.bytes).max(new.offset));
    let mut gaps = Vec::new();
    if at < end {
        for (_, there) in disk.range(at..end) {
            if there.offset > at {
                gaps.push((at, there.offset));
            }
            at = there.offset + there.bytes;
        }
    }
    if at < end {
        gaps.push((at, end));
    }
    for (from, to) in gaps {
        let skip = new.skip + (from - new.offset);
        disk.insert(from, Extent { offset: from, bytes: to - from, skip, ..new });
    }
}

/// Joins extents that continue one another.
fn joined(disk: BTreeMap<u64, Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for next in disk.into_values() {
        match joined.last_mut() {
            Some(last)
                if last.entry == next.entry
                    && last.offset + last.bytes == next.offset
                    && last.skip + last.bytes == next.skip =>
            {
                last.bytes += next.bytes;
            }
            _ => joined.push(next),
        }
    }
    joined
}

/// Returns a hash that tells different states of one log apart.
pub fn fingerprint(settled: usize, extents: &[Extent]) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, settled, extents).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// A generator of pseudorandom numbers. A seed gives the same numbers in every version, because names of states
/// contain seeds.
struct PseudoRandom {
    seed: u64,
    count: u64,
}

impl PseudoRandom {
    fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    /// Returns a number from 0 to `limit` - 1.
    fn below(&mut self, limit: usize) -> usize {
        self.count += 1;
        let wide = u128::from(mix(self.seed, self.count)) * limit as u128;
        // The high half of the product is less than `limit`.
        usize::try_from(wide >> 64).unwrap_or(0)
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = |torn: bool| if torn { "t" } else { "" };
        match *self {
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::Mask { torn, bits } => write!(f, "{}x{bits:x}", t(torn)),
            Self::Seeded { torn, seed } => write!(f, "{}s{seed:x}", t(torn)),
        }
    }
}

impl FromStr for StateName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (torn, rest) = text.strip_prefix('t').map_or((false, text), |rest| (true, rest));
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
        let mask = || rest.strip_prefix('x').and_then(number).map(|bits| Self::Mask { torn, bits });
        let seeded = || rest.strip_prefix('s').and_then(number).map(|seed| Self::Seeded { torn, seed });
        match text {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            _ => mask().or_else(seeded).ok_or_else(|| {
                "a state is none, all, or a name that a report has given, such as x5 or s1f0c".to_owned()
            }),
        }
    }
}

impl StateName {
    /// Returns `true` if the name is about pieces of writes.
    pub fn is_torn(self) -> bool {
        matches!(self, Self::Mask { torn: true, .. } | Self::Seeded { torn: true, .. })
    }
}
