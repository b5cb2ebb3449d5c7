//! Everything that was measured, and what follows from it.
//!
//! Owns the schema of `--json` and its version (docs/reference/bench-json.md). Fields may be added under the same
//! version; whoever removes one or changes what it means raises it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::jobs::Job;
use super::prepare::Prepared;
use super::warn::Warning;
use super::who::{Competitor, HOST};
use super::{Options, table};
use crate::lab::extents::Layout;
use crate::lab::fio::{Latency, Summary};
use crate::lab::host::Meaning;
use crate::lab::{Host, Outcome, Ratio, Spread};
use minivmm::observe::Residency;

/// The version of the schema.
pub const SCHEMA_VERSION: u32 = 1;

/// All of a bench.
#[derive(Debug, Serialize)]
pub struct Report {
    schema: &'static str,
    version: u32,
    /// The machine.
    pub host: Host,
    /// Which of its figures mean something.
    pub meaning: Meaning,
    /// The image.
    pub image: ImageFigures,
    /// What was the same for all.
    pub protocol: Protocol,
    /// The jobs, in order.
    pub jobs: Vec<JobFigures>,
    /// Which figures cannot be a disk's, and why.
    pub warnings: Vec<Warning>,
    /// How it ended.
    pub ended: Ended,
    /// What failed.
    pub error: Option<String>,
    /// From the first run to the last.
    pub seconds: f64,
}

/// How a bench ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// All runs are there.
    Whole,
    /// The user has stopped it.
    Interrupted,
    /// Something failed.
    Failed,
}

/// The image.
#[derive(Debug, Serialize)]
pub struct ImageFigures {
    /// As given.
    #[serde(serialize_with = "minivmm::text::path_as_text")]
    pub path: PathBuf,
    /// How it lies.
    #[serde(flatten)]
    pub layout: Layout,
}

/// What was the same for all runs.
#[derive(Debug, Serialize)]
pub struct Protocol {
    /// How often everything was to run.
    pub rounds: usize,
    /// `drop` or `warm`: the host's cache of the image before each run.
    pub host_cache: &'static str,
    /// The guest's memory.
    pub guest_memory_bytes: u64,
    /// Its CPUs.
    pub guest_cpus: u8,
    /// Keys of the disk besides the mode.
    pub disk_keys: Vec<String>,
}

/// One job by everybody.
#[derive(Debug, Serialize)]
pub struct JobFigures {
    /// Its name.
    pub name: String,
    /// fio's options, without what the protocol adds.
    pub options: BTreeMap<String, String>,
    /// In a line.
    #[serde(skip)]
    pub in_words: String,
    /// Whether it writes.
    pub writes: bool,
    /// Whether each of its writes, or every some, are made stable.
    pub syncs: bool,
    /// Who ran it.
    pub competitors: Vec<Competing>,
}

/// One who ran a job.
#[derive(Debug, Serialize)]
pub struct Competing {
    /// The mode, or `host` with what is other than in the job.
    pub name: String,
    /// The cache mode of a guest's disk.
    pub mode: Option<&'static str>,
    /// Whether that is with O_DIRECT.
    #[serde(skip)]
    pub direct: bool,
    /// Whether a write of it can wait in a cache of the host's for a sync.
    #[serde(skip)]
    pub waits_in_host: bool,
    /// Of a guest: who runs the job on the host with the same promise.
    pub peer: Option<String>,
    /// A run each.
    pub rounds: Vec<Run>,
    /// Over the rounds.
    pub figures: Option<Figures>,
    /// I/Os a second over the host's at the very same job.
    pub over_host: Option<Ratio>,
    /// The same over the peer's.
    pub over_peer: Option<Ratio>,
}

/// Over all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// I/Os a second, the last sync in their time.
    pub iops: Spread,
    /// Megabytes (10^6) a second.
    pub mb_s: Spread,
    /// Of each kind of request that there was.
    pub latencies: Vec<Latencies>,
}

/// How long one kind of request took, over all rounds, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latencies {
    /// "read", "write" or "sync".
    pub of: &'static str,
    /// Half are faster.
    pub p50_us: Spread,
    /// One in a hundred is slower.
    pub p99_us: Spread,
    /// One in a thousand is slower.
    pub p999_us: Spread,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// Its round, from 0.
    pub round: usize,
    /// From the start to the end, a guest's boot included.
    pub seconds: f64,
    /// What fio says.
    pub fio: Summary,
    /// What the caches did.
    pub observed: Option<Observed>,
    /// Of a guest: the device's own figures (`disks[0]` of docs/statistics.md).
    pub device: Option<Value>,
}

/// What the caches did in a run.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Observed {
    /// Of the image in the host's cache when guest or fio started.
    pub host_cached_bytes_before: Option<f64>,
    /// When the job had ended.
    pub host_cached_bytes_after: Option<f64>,
    /// Of those, newer than the disk, or on their way there.
    pub host_dirty_bytes_after: Option<f64>,
    /// Of the bytes that were read of the image, the share that the host had in its cache.
    pub host_hit_share: Option<f64>,
    /// Of a guest: of the bytes that fio read, the share that never reached the device: the guest had them.
    pub guest_hit_share: Option<f64>,
    /// Of the bytes that fio wrote, the share that never reached the device: overwritten in the guest's cache.
    pub guest_absorbed_share: Option<f64>,
    /// FLUSHes that reached the device.
    pub flushes: Option<u64>,
    /// FLUSHes of those that were acknowledged and not done (unsafe).
    pub flushes_ignored: Option<u64>,
    /// FLUSHes of the host's disk for each of the guest's.
    pub flush_amplification: Option<f64>,
}

impl Observed {
    /// Of a guest's run.
    pub fn of(outcome: &Outcome, fio: &Summary) -> Self {
        let (first, last) = (outcome.rows_of("vda").next(), outcome.rows_of("vda").next_back());
        let end = |column: &str| last.and_then(|row| row.number(column));
        let disk = &outcome.stats["disks"][0];
        let missing = |fio: Option<u64>, device: &Value| {
            let (fio, device) = (fio.filter(|&bytes| bytes > 0)? as f64, device.as_f64()?);
            Some((1.0 - device / fio).max(0.0))
        };
        let dirty = end("host_dirty_bytes");
        Self {
            host_cached_bytes_before: first.and_then(|row| row.number("host_cached_bytes")),
            host_cached_bytes_after: end("host_cached_bytes"),
            host_dirty_bytes_after: dirty.map(|dirty| dirty + end("host_writeback_bytes").unwrap_or(0.0)),
            host_hit_share: end("host_hit_share"),
            guest_hit_share: missing(fio.read.as_ref().map(|side| side.bytes), &disk["bytes"]["read"]),
            guest_absorbed_share: missing(fio.write.as_ref().map(|side| side.bytes), &disk["bytes"]["write"]),
            flushes: disk["requests"]["flush"].as_u64(),
            flushes_ignored: disk["durability"]["flushes_ignored"].as_u64(),
            flush_amplification: end("flush_amplification"),
        }
    }
}

impl Observed {
    /// Of a run on the host, of whose reads so many bytes had to come from a disk.
    pub fn on_host(
        before: Option<Residency>,
        after: Option<Residency>,
        fio: &Summary,
        disk_read_bytes: u64,
    ) -> Self {
        let dirty = |found: Residency| {
            Some(found.bytes(found.dirty?.saturating_add(found.writeback.unwrap_or(0))) as f64)
        };
        let hits = fio.read.as_ref().map(|side| (1.0 - disk_read_bytes as f64 / side.bytes as f64).max(0.0));
        Self {
            host_cached_bytes_before: before.map(|found| found.cached_bytes() as f64),
            host_cached_bytes_after: after.map(|found| found.cached_bytes() as f64),
            host_dirty_bytes_after: after.and_then(dirty),
            host_hit_share: hits,
            ..Self::default()
        }
    }
}

impl JobFigures {
    /// Nothing has run yet.
    pub fn new(job: &Job, who: &[Competitor]) -> Self {
        Self {
            name: job.name.clone(),
            options: job.options().iter().cloned().collect(),
            in_words: job.in_words(),
            writes: job.writes(),
            syncs: job.syncs(),
            competitors: who.iter().map(Competing::new).collect(),
        }
    }
}

impl Competing {
    fn new(who: &Competitor) -> Self {
        Self {
            name: who.name.clone(),
            mode: who.mode.map(|mode| mode.name),
            direct: who.mode.is_some_and(|mode| mode.direct),
            waits_in_host: who.mode.is_some_and(|mode| !mode.direct && mode.write_cache),
            peer: who.peer.clone(),
            rounds: Vec::new(),
            figures: None,
            over_host: None,
            over_peer: None,
        }
    }

    /// What was observed, over its rounds, where it was.
    pub fn observed(&self, figure: impl Fn(&Observed) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|run| figure(run.observed.as_ref()?)))
    }

    fn over(&self, other: &[Run]) -> Option<Ratio> {
        let pair = |run: &Run| {
            let theirs = other.iter().find(|theirs| theirs.round == run.round)?;
            Some((run.fio.iops(), theirs.fio.iops()))
        };
        Ratio::of(self.rounds.iter().filter_map(pair))
    }
}

/// Of one kind of request.
type Which = fn(&Summary) -> Option<Latency>;

impl Figures {
    fn of(rounds: &[Run]) -> Option<Self> {
        let kinds: [(&'static str, Which); 3] = [
            ("read", |fio| fio.read.as_ref()?.latency),
            ("write", |fio| fio.write.as_ref()?.latency),
            ("sync", |fio| fio.syncs.as_ref()?.latency),
        ];
        let latencies = kinds.into_iter().filter_map(|(of, which)| {
            let spread = |figure: fn(Latency) -> f64| {
                Spread::of(rounds.iter().filter_map(|run| which(&run.fio).map(figure)))
            };
            Some(Latencies {
                of,
                p50_us: spread(|latency| latency.p50_us)?,
                p99_us: spread(|latency| latency.p99_us)?,
                p999_us: spread(|latency| latency.p999_us)?,
            })
        });
        Some(Self {
            iops: Spread::of(rounds.iter().map(|run| run.fio.iops()))?,
            mb_s: Spread::of(rounds.iter().map(|run| run.fio.mb_s()))?,
            latencies: latencies.collect(),
        })
    }
}

impl Report {
    /// Nothing has run yet.
    pub fn new(options: &Options, prepared: &Prepared, jobs: impl Iterator<Item = JobFigures>) -> Self {
        Self {
            schema: "minivmm-bench",
            version: SCHEMA_VERSION,
            meaning: prepared.host.figures_that_mean_something(),
            host: prepared.host.clone(),
            image: ImageFigures { path: options.disk.path.clone(), layout: prepared.layout.clone() },
            protocol: Protocol {
                rounds: options.rounds,
                host_cache: options.host_cache.name(),
                guest_memory_bytes: options.memory_bytes,
                guest_cpus: options.cpus,
                disk_keys: options.keys.clone(),
            },
            jobs: jobs.collect(),
            warnings: Vec::new(),
            ended: Ended::Whole,
            error: None,
            seconds: 0.0,
        }
    }

    /// A run by the competitor of this place at the job of that place.
    pub fn add(&mut self, job: usize, place: usize, run: Run) {
        if let Some(who) = self.jobs.get_mut(job).and_then(|job| job.competitors.get_mut(place)) {
            who.rounds.push(run);
        }
    }

    /// What follows from the runs.
    pub fn conclude(&mut self) {
        for job in &mut self.jobs {
            let runs: Vec<(String, Vec<Run>)> =
                job.competitors.iter().map(|who| (who.name.clone(), who.rounds.clone())).collect();
            let of = |name: &str| runs.iter().find(|(who, _)| who == name).map_or(&[][..], |(_, runs)| runs);
            for who in &mut job.competitors {
                who.rounds.sort_by_key(|run| run.round);
                who.figures = Figures::of(&who.rounds);
                if let Some(peer) = &who.peer {
                    (who.over_host, who.over_peer) = (who.over(of(HOST)), who.over(of(peer)));
                }
            }
        }
    }

    /// Whether anything was measured.
    pub fn has_figures(&self) -> bool {
        self.jobs.iter().any(|job| job.competitors.iter().any(|who| !who.rounds.is_empty()))
    }

    /// As JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// As a table, and what is to be said of it.
    pub fn to_text(&self) -> String {
        table::text(self)
    }
}
