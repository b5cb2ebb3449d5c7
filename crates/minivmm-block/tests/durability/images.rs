//! Whole images as a power failure may leave them: all of them where few sectors are pending, seeded
//! samples beyond; each is judged as whoever boots from it would, by what was acknowledged.
//!
//! A second opinion on the floors. `promise.rs` narrows down sets, a sector at a time; here an image is
//! read from its first sector to its last, against a log of acknowledgements that is kept apart, by
//! comparing times. Both must always say the same, of good images and of bad ones.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::promise::{Change, Promises};
use super::storage::{FOREIGN, SECTORS, Storage, Tag, name};

/// An image: what each sector holds.
type Image = [Tag; SECTORS];

/// Up to so many pending sectors, with two contents each, every image is looked at.
const PENDING_MAX: usize = 10;
const ENUMERATED_MAX: usize = 1 << PENDING_MAX;
/// Beyond, so many.
const SAMPLES: usize = 32;
/// Images that may be bad, for the verdicts to agree on.
const DOUBTFUL: usize = 8;
/// Of so many steps one is looked at: a step changes little, and images are many.
const SHARE: u64 = 16;

/// Moments with something pending at which every image was looked at; moments with samples; images.
pub static ENUMERATED: AtomicU64 = AtomicU64::new(0);
pub static SAMPLED: AtomicU64 = AtomicU64::new(0);
pub static JUDGED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread's runs judged by whole images alone, at every step, without I1 for each sector: to
/// see that they are not blind.
pub fn judge_alone(alone: bool) {
    ALONE.with(|cell| cell.set(alone));
}

/// Whether they are.
pub fn are_alone() -> bool {
    ALONE.with(Cell::get)
}

/// What the driver was told, in its order.
enum Acknowledged {
    /// This change, which had to be stable by then.
    Stable(usize),
    /// A FLUSH, submitted then.
    Flush(u64),
}

pub struct Images {
    log: Vec<Acknowledged>,
    steps: u64,
    dice: u64,
}

impl Images {
    pub fn new(dice: u64) -> Self {
        Self { log: Vec::new(), steps: dice % SHARE, dice: dice | 1 }
    }

    pub fn stable(&mut self, change: usize) {
        self.log.push(Acknowledged::Stable(change));
    }

    pub fn flushed(&mut self, submitted: u64) {
        self.log.push(Acknowledged::Flush(submitted));
    }

    /// One of the numbers below `limit`; dice of our own, so that looking changes no run.
    fn roll(&mut self, limit: usize) -> usize {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        usize::try_from(self.dice % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }

    /// Judges images of this moment, now and then.
    pub fn look(&mut self, storage: &Storage, promises: &Promises) -> Result<(), String> {
        self.steps += 1;
        if !are_alone() && !self.steps.is_multiple_of(SHARE) {
            return Ok(());
        }
        let choices: Vec<Vec<Tag>> = (0..SECTORS).map(|sector| distinct(storage, sector)).collect();
        let judge = Judge::new(&self.log, promises.changes());
        let mut judged = 0;
        for image in self.images(&choices) {
            judged += 1;
            judge
                .judge(&image)
                .map_err(|why| format!("I1: a crash now may leave a whole image where {why}"))?;
        }
        JUDGED.fetch_add(judged, Ordering::Relaxed);
        if are_alone() { Ok(()) } else { self.compare_verdicts(&choices, &judge, promises) }
    }

    fn images(&mut self, choices: &[Vec<Tag>]) -> Vec<Image> {
        let pending = choices.iter().filter(|tags| tags.len() > 1).count();
        let count = choices.iter().try_fold(1_usize, |product, tags| product.checked_mul(tags.len()));
        match count {
            Some(count) if pending <= PENDING_MAX && count <= ENUMERATED_MAX => {
                ENUMERATED.fetch_add(u64::from(pending > 0), Ordering::Relaxed);
                (0..count).map(|number| numbered(choices, number)).collect()
            }
            _ => {
                SAMPLED.fetch_add(1, Ordering::Relaxed);
                // Both ends are always among them: nothing that could be lost is there, and all of it.
                let ends = [|tags: &Vec<Tag>| tags.first().copied(), |tags: &Vec<Tag>| tags.last().copied()];
                let ends = ends.map(|end| std::array::from_fn(|sector| end(&choices[sector]).unwrap()));
                (0..SAMPLES).map(|_| self.sample(choices)).chain(ends).collect()
            }
        }
    }

    fn sample(&mut self, choices: &[Vec<Tag>]) -> Image {
        std::array::from_fn(|sector| choices[sector][self.roll(choices[sector].len())])
    }

    /// A sector of a good image gets anything that was ever written to it, or what nobody wrote: it is
    /// bad by the whole image's verdict where it is by the sector's, and only there.
    fn compare_verdicts(
        &mut self,
        choices: &[Vec<Tag>],
        judge: &Judge<'_>,
        promises: &Promises,
    ) -> Result<(), String> {
        for _ in 0..DOUBTFUL {
            let sector = self.roll(SECTORS);
            let of_sector = promises.changes().iter().filter(|change| covers(change, sector));
            let tags: Vec<Tag> = of_sector.map(|change| change.tag).chain([FOREIGN]).collect();
            let tag = tags[self.roll(tags.len())];
            let mut image = self.sample(choices);
            image[sector] = tag;
            let by_sector = promises.legal_after_crash(sector).contains(&tag);
            let by_image = judge.judge(&image);
            if by_sector != by_image.is_ok() {
                let found = name(tag);
                return Err(format!(
                    "the images: sector {sector} with {found} is legal by its own set: {by_sector}; by the whole \
                     image: {by_image:?}"
                ));
            }
        }
        Ok(())
    }
}

fn covers(change: &Change, sector: usize) -> bool {
    (change.from..change.to).contains(&sector)
}

/// What the host may leave in a sector, the oldest first.
fn distinct(storage: &Storage, sector: usize) -> Vec<Tag> {
    let mut tags = storage.legal_after_crash(sector);
    let mut seen = Vec::new();
    tags.retain(|tag| {
        let is_new = !seen.contains(tag);
        seen.push(*tag);
        is_new
    });
    tags
}

/// The image of that number, below the product of the numbers of choices.
fn numbered(choices: &[Vec<Tag>], number: usize) -> Image {
    let mut rest = number;
    std::array::from_fn(|sector| {
        let tags = &choices[sector];
        let tag = tags[rest % tags.len()];
        rest /= tags.len();
        tag
    })
}

/// The acknowledgements of one moment, ready to be held against images.
struct Judge<'a> {
    /// Changes that must be there, or something that is no older.
    demanded: Vec<&'a Change>,
    /// Until when the newest version of this content in this sector was in flight.
    newest: HashMap<(usize, Tag), u64>,
}

impl<'a> Judge<'a> {
    fn new(log: &[Acknowledged], changes: &'a [Change]) -> Self {
        let last_flush = |at: &Acknowledged| if let Acknowledged::Flush(at) = at { *at } else { 0 };
        let flushed = log.iter().map(last_flush).max().unwrap_or_default();
        let stable = |index: usize| log.iter().any(|at| matches!(at, Acknowledged::Stable(i) if *i == index));
        let is_demanded = |index: usize, change: &Change| {
            let before_flush = change.completed.is_some_and(|at| at < flushed);
            change.ok && !change.is_advice && (before_flush || stable(index))
        };
        let demanded = (0..).zip(changes).filter(|&(index, change)| is_demanded(index, change));
        let mut newest = HashMap::new();
        for change in changes {
            let until = change.completed.unwrap_or(u64::MAX);
            for sector in change.from..change.to.min(SECTORS) {
                let known = newest.entry((sector, change.tag)).or_insert(until);
                *known = until.max(*known);
            }
        }
        Self { demanded: demanded.map(|(_, change)| change).collect(), newest }
    }

    /// What is wrong with an image, if anything.
    fn judge(&self, image: &Image) -> Result<(), String> {
        let mut until = [0; SECTORS];
        for (sector, tag) in image.iter().enumerate() {
            until[sector] = *self
                .newest
                .get(&(sector, *tag))
                .ok_or_else(|| format!("sector {sector} holds {}, never written there", name(*tag)))?;
        }
        for change in &self.demanded {
            for sector in change.from..change.to.min(SECTORS) {
                if until[sector] < change.submitted {
                    return Err(format!(
                        "sector {sector} holds {}, older than {}, which was acknowledged as stable",
                        name(image[sector]),
                        name(change.tag)
                    ));
                }
            }
        }
        Ok(())
    }
}
