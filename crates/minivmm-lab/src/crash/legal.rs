//! Which disks a loss of power may leave at one point of a log.
//!
//! Owns the rule. What a flush has spoken for is there. Of what ended after it each write may be there
//! or not, whole, or torn at its sectors; a write that was stable by itself is there. Of several to
//! the same sector the last one that is there counts. A sector is never torn itself.
//!
//! A state has a name, from which it can be made again without anything else: `none`, `all`, `x1f` (bit n:
//! the nth that may be there is), `s5eed` (by chance, from this number); with `t` before it, torn.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::str::FromStr;

use super::log::{Entry, WriteLog};
use minivmm::disk::fault::plan::mix;

/// A write is torn at no more places than this; a larger one in pieces of several sectors.
const SLICES_MAX: u64 = 2048;

/// One of the states that a point may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateName {
    /// Only what is stable.
    None,
    /// All that had ended.
    All,
    /// Those whose bits are set.
    Mask {
        /// Bits stand for sectors, not for writes.
        torn: bool,
        /// The first write is the lowest bit.
        bits: u64,
    },
    /// By chance.
    Seeded {
        /// Writes may be there in part.
        torn: bool,
        /// Where chance begins.
        seed: u64,
    },
}

/// So much of an entry's content lies there on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// On the disk, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub bytes: u64,
    /// Whose content.
    pub entry: usize,
    /// From which byte of it on.
    pub skip: u64,
}

/// What a loss of power at one point leaves to chance.
#[derive(Debug)]
pub struct Pending<'a> {
    entries: &'a [Entry],
    /// All entries before this one are there.
    pub settled: usize,
    writes: Vec<Write>,
    /// Whether writes can be there in part.
    torn: bool,
}

/// A change that no flush has spoken for.
#[derive(Debug)]
struct Write {
    entry: usize,
    /// It was stable when it ended.
    stable: bool,
    /// It can be torn at multiples of this, in bytes.
    slice: u64,
    /// Into so many.
    slices: usize,
}

impl<'a> Pending<'a> {
    /// When so many entries of the log had ended.
    pub fn at(log: &'a WriteLog, point: usize, torn: bool) -> Self {
        let entries = log.entries.get(..point).unwrap_or(&log.entries);
        // What comes with a flush is written behind it.
        let settled = entries.iter().rposition(Entry::is_flush).unwrap_or(0);
        let sector = u64::from(log.sector_bytes);
        let open = entries.iter().enumerate().skip(settled).filter(|(_, entry)| entry.changes());
        let writes = open.map(|(number, entry)| Write::new(number, entry, sector, torn)).collect();
        Self { entries, settled, writes, torn }
    }

    /// How many things may be there or not: writes, or, where they can be torn, pieces of them.
    pub fn choices(&self) -> usize {
        self.free().map(|write| write.slices).sum()
    }

    /// The names of its states, the extreme ones first: all there are, if that is no more than `most`;
    /// else without end, by chance. Some may be the same disk.
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

    /// What lies on the disk in that state besides what is settled: extents that do not overlap, in the
    /// order of the disk. `None` where there is no such state.
    pub fn extents(&self, name: StateName) -> Option<Vec<Extent>> {
        let chosen = self.chosen(name)?;
        let mut disk = BTreeMap::new();
        let mut rest = chosen.as_slice();
        // The last one that is there counts.
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

    /// Entries of which something is not there in that state.
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

    /// For each choice whether it is there.
    fn chosen(&self, name: StateName) -> Option<Vec<bool>> {
        let choices = self.choices();
        match name {
            StateName::None => Some(vec![false; choices]),
            StateName::All => Some(vec![true; choices]),
            StateName::Mask { bits, .. } => {
                let is_state = choices < 64 && bits >> choices == 0;
                is_state.then(|| (0..choices).map(|at| bits >> at & 1 == 1).collect())
            }
            StateName::Seeded { seed, .. } => Some(self.by_chance(&mut Chance::new(seed))),
        }
    }

    fn by_chance(&self, chance: &mut Chance) -> Vec<bool> {
        let writes = self.free().count();
        let whole = some_of(writes, chance);
        if !self.torn || writes == 0 {
            return whole;
        }
        let one = chance.below(writes);
        let only_one = chance.below(2) == 0;
        let mut chosen = Vec::new();
        for (at, (write, is_there)) in self.free().zip(whole).enumerate() {
            if at == one || !only_one && chance.below(3) == 0 {
                chosen.extend(torn(write.slices, chance));
            } else {
                chosen.extend(std::iter::repeat_n(is_there, write.slices));
            }
        }
        chosen
    }
}

/// Some of so many: about half, all but a few, a few, or about as many as chance says.
fn some_of(count: usize, chance: &mut Chance) -> Vec<bool> {
    if count == 0 {
        return Vec::new();
    }
    match chance.below(4) {
        0 => (0..count).map(|_| chance.below(2) == 0).collect(),
        style @ (1 | 2) => {
            let mut some = vec![style == 1; count];
            for _ in 0..=chance.below(3) {
                if let Some(it) = some.get_mut(chance.below(count)) {
                    *it = style != 1;
                }
            }
            some
        }
        _ => {
            let percent = chance.below(101);
            (0..count).map(|_| chance.below(100) < percent).collect()
        }
    }
}

/// A beginning of it, an end of it, or pieces.
fn torn(slices: usize, chance: &mut Chance) -> Vec<bool> {
    let cut = chance.below(slices + 1);
    match chance.below(3) {
        0 => (0..slices).map(|at| at < cut).collect(),
        1 => (0..slices).map(|at| at >= cut).collect(),
        _ => (0..slices).map(|_| chance.below(2) == 0).collect(),
    }
}

impl Write {
    fn new(number: usize, entry: &Entry, sector: u64, torn: bool) -> Self {
        let stable = entry.is_fua();
        let slice = match torn && !stable {
            true => entry.bytes.div_ceil(SLICES_MAX).next_multiple_of(sector),
            false => entry.bytes,
        };
        // At most SLICES_MAX.
        let slices = usize::try_from(entry.bytes.div_ceil(slice.max(1))).unwrap_or(1);
        Self { entry: number, stable, slice, slices }
    }

    /// Puts the pieces that are there below what lies there already.
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

/// Puts `new` where nothing lies yet.
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

/// Extents that go on from one another are one.
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

/// What tells states of one log apart.
pub fn fingerprint(settled: usize, extents: &[Extent]) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, settled, extents).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Numbers that look like chance; the same ones from the same beginning, in every version.
struct Chance {
    seed: u64,
    count: u64,
}

impl Chance {
    fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    /// One of 0 to `limit` - 1.
    fn below(&mut self, limit: usize) -> usize {
        self.count += 1;
        let wide = u128::from(mix(self.seed, self.count)) * limit as u128;
        // Less than `limit`.
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
    /// Whether it is about parts of writes.
    pub fn is_torn(self) -> bool {
        matches!(self, Self::Mask { torn: true, .. } | Self::Seeded { torn: true, .. })
    }
}
