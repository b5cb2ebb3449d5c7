//! What came out: figures by job, mode, competitor and round; boots; memory. And their arithmetic.

use serde::Serialize;

use crate::fio::Figures;
use crate::median::median;
use crate::memory::Beyond;
use crate::plan::{Booter, Competitor, Job, Mode};

/// A competitor at one job in one mode.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Its name.
    pub who: &'static str,
    /// Whether it is QEMU.
    #[serde(skip)]
    pub qemu: bool,
    /// A run each, in order; null where it failed.
    pub rounds: Vec<Option<Figures>>,
    /// Why runs failed, or why there was none.
    pub not_measured: Vec<String>,
}

impl Entry {
    /// The median of a figure over the rounds that it has.
    pub fn median(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<f64> {
        median(self.rounds.iter().flatten().filter_map(figure).collect())
    }

    /// The median rate.
    pub fn iops(&self) -> Option<f64> {
        self.median(|figures| Some(figures.iops))
    }
}

/// Everybody at one job in one mode.
#[derive(Debug, Serialize)]
pub struct Contest {
    /// The job's name.
    pub job: &'static str,
    /// Whether it is told in MiB/s.
    #[serde(skip)]
    pub large: bool,
    /// The cache mode.
    pub mode: &'static str,
    /// The mode, and what was in the host's page cache before each run.
    pub state: String,
    /// What a guest's fio was given besides what every job has.
    pub options: &'static [&'static str],
    /// Who ran.
    pub entries: Vec<Entry>,
}

impl Contest {
    /// Nothing has run yet.
    pub fn new(job: &Job, mode: &Mode, who: &[Competitor]) -> Self {
        let entry = |who: &Competitor| Entry {
            who: who.name,
            qemu: who.is_qemu(),
            rounds: Vec::new(),
            not_measured: Vec::new(),
        };
        let entries = who.iter().map(entry).collect();
        let (state, options) = (mode.title(), job.options);
        Self { job: job.name, large: job.large(), mode: mode.name, state, options, entries }
    }

    /// A competitor that has figures.
    pub fn entry(&self, who: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.who == who && entry.iops().is_some())
    }

    /// The QEMU with the best median: there is no choosing of a weak one.
    pub fn best_qemu(&self) -> Option<&Entry> {
        let rated = self.entries.iter().filter(|entry| entry.qemu).filter_map(|e| Some((e.iops()?, e)));
        rated.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, entry)| entry)
    }
}

/// One competitor's rate over another's.
#[derive(Debug, Clone, Copy)]
pub struct Ratio {
    /// Of the medians.
    pub of_medians: f64,
    /// The smallest of one round.
    pub least: f64,
    /// The largest of one round.
    pub most: f64,
}

impl Ratio {
    /// `a` over `b`, of I/Os a second.
    pub fn new(a: &Entry, b: &Entry) -> Option<Self> {
        let of_medians = a.iops()? / b.iops()?;
        let both = a.rounds.iter().zip(&b.rounds);
        let rounds: Vec<f64> = both.filter_map(|(a, b)| Some(a.as_ref()?.iops / b.as_ref()?.iops)).collect();
        let least = rounds.iter().copied().min_by(f64::total_cmp)?;
        let most = rounds.iter().copied().max_by(f64::total_cmp)?;
        Some(Self { of_medians, least, most })
    }
}

/// A VMM's memory after all jobs of a boot.
#[derive(Debug, Serialize)]
pub struct Loaded {
    /// The competitor.
    pub who: &'static str,
    /// The cache mode.
    pub mode: &'static str,
    /// A boot each.
    pub beyond_guest: Vec<Beyond>,
}

/// A VMM's boots to init.
#[derive(Debug, Serialize)]
pub struct Boots {
    /// Its name.
    pub who: &'static str,
    /// `-machine` of QEMU.
    pub machine: Option<&'static str>,
    /// From before the VMM's exec to init's mark, in seconds; a boot each.
    pub seconds_to_init: Vec<f64>,
    /// When init is there; a boot each.
    pub beyond_guest: Vec<Beyond>,
    /// Why boots failed, or why there was none.
    pub not_measured: Vec<String>,
}

impl Boots {
    /// None yet.
    pub fn new(booter: &Booter) -> Self {
        Self {
            who: booter.name,
            machine: booter.machine,
            seconds_to_init: Vec::new(),
            beyond_guest: Vec::new(),
            not_measured: Vec::new(),
        }
    }

    /// The median time.
    pub fn median(&self) -> Option<f64> {
        median(self.seconds_to_init.clone())
    }

    /// Whether it is a microvm of QEMU's.
    fn is_microvm(&self) -> bool {
        self.machine.is_some_and(|machine| machine.starts_with("microvm"))
    }
}

/// minivmm's median over that of the fastest microvm, whose name comes with it.
pub fn boot_ratio(boots: &[Boots]) -> Option<(f64, &'static str)> {
    let ours = boots.iter().find(|boots| boots.machine.is_none())?.median()?;
    let microvms = boots.iter().filter(|boots| boots.is_microvm());
    let (theirs, who) =
        microvms.filter_map(|b| Some((b.median()?, b.who))).min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some((ours / theirs, who))
}

/// The median of a figure of memory, in MiB.
pub fn mib(beyond: &[Beyond], figure: fn(&Beyond) -> u64) -> Option<f64> {
    median(beyond.iter().map(|beyond| figure(beyond) as f64 / 1024.0).collect())
}
