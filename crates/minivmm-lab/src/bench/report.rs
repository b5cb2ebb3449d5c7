//! Everything that was measured, and what follows from it.
//!
//! Owns the schema of `--json` and its version (docs/reference/bench-json.md). Fields may be added under the
//! same version. Removing a field or changing its meaning requires a new version.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::BenchOptions;
use super::jobs::Job;
use super::prepare::Prepared;
use super::warning::Warning;
use super::who::{Competitor, HOST};
use crate::measuring::extents::Layout;
use crate::measuring::fio::{Latency, Summary};
use crate::measuring::host::MeaningfulFigures;
use crate::measuring::{BootOutcome, Distribution, Host, Ratio};
use minivmm::observe::Residency;

/// The version of the schema.
pub const SCHEMA_VERSION: u32 = 1;

/// The result of a bench.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    schema: &'static str,
    version: u32,
    /// The machine.
    pub host: Host,
    /// Which figures of this machine are meaningful.
    pub meaning: MeaningfulFigures,
    /// The image.
    pub image: ImageFigures,
    /// The settings that were the same for all runs.
    pub protocol: Protocol,
    /// The jobs, in order.
    pub jobs: Vec<JobFigures>,
    /// The figures that cannot be those of a disk, and why.
    pub warnings: Vec<Warning>,
    /// How the bench ended.
    pub ended: BenchEnd,
    /// The error that ended the bench; `None` if there was none.
    pub error: Option<String>,
    /// Time from the first run to the end of the last.
    pub seconds: f64,
}

/// How a bench ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchEnd {
    /// All runs were made.
    Whole,
    /// The user interrupted it.
    Interrupted,
    /// An error ended it.
    Failed,
}

/// The image that was measured.
#[derive(Debug, Serialize)]
pub struct ImageFigures {
    /// The path as the user gave it.
    #[serde(serialize_with = "minivmm::text::path_as_text")]
    pub path: PathBuf,
    /// How the image is laid out on the disk.
    #[serde(flatten)]
    pub layout: Layout,
}

/// The settings that were the same for all runs.
#[derive(Debug, Serialize)]
pub struct Protocol {
    /// Number of rounds that were planned.
    pub rounds: usize,
    /// `drop` or `warm`: what the host's page cache held of the image before each run.
    pub host_cache: &'static str,
    /// Memory of the guest.
    pub guest_memory_bytes: u64,
    /// Number of CPUs of the guest.
    pub guest_cpus: u8,
    /// Keys of the disk besides the cache mode.
    pub disk_keys: Vec<String>,
}

/// The figures of one job.
#[derive(Debug, Serialize)]
pub struct JobFigures {
    /// Name of the job.
    pub name: String,
    /// The options of fio, without those that the protocol adds.
    pub options: BTreeMap<String, String>,
    /// The job as one line for people.
    #[serde(skip)]
    pub in_words: String,
    /// True if the job writes.
    pub writes: bool,
    /// True if the job makes its own writes stable, each of them or every few.
    pub syncs: bool,
    /// Everybody who ran the job.
    pub competitors: Vec<CompetitorFigures>,
}

/// The figures of one competitor: a guest in one mode, or the host.
#[derive(Debug, Serialize)]
pub struct CompetitorFigures {
    /// The cache mode; or `host` and the options that differ from the job.
    pub name: String,
    /// Cache mode of the guest's disk; `None` for the host.
    pub mode: Option<&'static str>,
    /// True if that mode uses O_DIRECT.
    #[serde(skip)]
    pub direct: bool,
    /// True if a write can wait in a cache of the host until a sync.
    #[serde(skip)]
    pub waits_in_host: bool,
    /// For a guest, the name of the host's competitor that gives the same promise.
    pub peer: Option<String>,
    /// One run per round.
    pub rounds: Vec<JobRun>,
    /// The figures over all rounds; `None` if there was no run.
    pub figures: Option<Figures>,
    /// IOPS relative to the host's at the same job.
    pub over_host: Option<Ratio>,
    /// IOPS relative to the peer's.
    pub over_peer: Option<Ratio>,
}

/// Figures over all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// I/Os per second. The time includes the last sync.
    pub iops: Distribution,
    /// Megabytes (10^6 bytes) per second.
    pub mb_s: Distribution,
    /// Latencies of each kind of request that occurred.
    pub latencies: Vec<Latencies>,
}

/// Latency of one kind of request over all rounds, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latencies {
    /// "read", "write" or "sync".
    pub of: &'static str,
    /// The median.
    pub p50_us: Distribution,
    /// The 99th percentile.
    pub p99_us: Distribution,
    /// The 99.9th percentile.
    pub p999_us: Distribution,
}

/// One run of a job.
#[derive(Debug, Clone, Serialize)]
pub struct JobRun {
    /// Number of the round, from 0.
    pub round: usize,
    /// Duration of the run. That of a guest includes its boot.
    pub seconds: f64,
    /// What fio reported.
    pub fio: Summary,
    /// What the caches did; `None` if it was not observed.
    pub observed: Option<Observed>,
    /// For a guest, the statistics of the device (`disks[0]` of docs/statistics.md).
    pub device: Option<Value>,
}

/// What the caches did during a run.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Observed {
    /// Bytes of the image in the host's page cache when the guest or fio started.
    pub host_cached_bytes_before: Option<f64>,
    /// Bytes of the image in the host's page cache when the job had ended.
    pub host_cached_bytes_after: Option<f64>,
    /// Bytes of those that were dirty or under writeback.
    pub host_dirty_bytes_after: Option<f64>,
    /// Share of the bytes read from the image that the host's page cache supplied.
    pub host_hit_share: Option<f64>,
    /// For a guest, the share of the bytes read by fio that never reached the device, because the guest had
    /// them cached.
    pub guest_hit_share: Option<f64>,
    /// For a guest, the share of the bytes written by fio that never reached the device, because they were
    /// overwritten in the guest's cache.
    pub guest_absorbed_share: Option<f64>,
    /// Number of FLUSHes that reached the device.
    pub flushes: Option<u64>,
    /// Number of FLUSHes that were acknowledged but not carried out (mode unsafe).
    pub flushes_ignored: Option<u64>,
    /// Number of FLUSHes of the host's disk per FLUSH of the guest.
    pub flush_amplification: Option<f64>,
}

impl Observed {
    /// Returns what was observed during a guest's run.
    pub fn of(outcome: &BootOutcome, fio: &Summary) -> Self {
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
    /// Returns what was observed during a run on the host. `disk_read_bytes` is what its reads took from a
    /// disk.
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
    /// Creates the figures of a job that has not run yet.
    pub fn new(job: &Job, who: &[Competitor]) -> Self {
        Self {
            name: job.name.clone(),
            options: job.options().iter().cloned().collect(),
            in_words: job.in_words(),
            writes: job.writes(),
            syncs: job.syncs(),
            competitors: who.iter().map(CompetitorFigures::new).collect(),
        }
    }
}

impl CompetitorFigures {
    fn new(who: &Competitor) -> Self {
        Self {
            name: who.name.clone(),
            mode: who.mode.map(|mode| mode.name),
            direct: who.mode.is_some_and(|mode| mode.direct),
            // With RWF_DONTCACHE the host begins to write back at once.
            waits_in_host: who.mode.is_some_and(|mode| !mode.direct && !mode.drop_behind && mode.write_cache),
            peer: who.peer.clone(),
            rounds: Vec::new(),
            figures: None,
            over_host: None,
            over_peer: None,
        }
    }

    /// Returns one observed figure over the rounds that have it.
    pub fn observed(&self, figure: impl Fn(&Observed) -> Option<f64>) -> Option<Distribution> {
        Distribution::of(self.rounds.iter().filter_map(|run| figure(run.observed.as_ref()?)))
    }

    fn over(&self, other: &[JobRun]) -> Option<Ratio> {
        let pair = |run: &JobRun| {
            let theirs = other.iter().find(|theirs| theirs.round == run.round)?;
            Some((run.fio.iops(), theirs.fio.iops()))
        };
        Ratio::of(self.rounds.iter().filter_map(pair))
    }
}

/// Selects the latency of one kind of request.
type LatencyOf = fn(&Summary) -> Option<Latency>;

impl Figures {
    fn of(rounds: &[JobRun]) -> Option<Self> {
        let kinds: [(&'static str, LatencyOf); 3] = [
            ("read", |fio| fio.read.as_ref()?.latency),
            ("write", |fio| fio.write.as_ref()?.latency),
            ("sync", |fio| fio.syncs.as_ref()?.latency),
        ];
        let latencies = kinds.into_iter().filter_map(|(of, which)| {
            let distribution = |figure: fn(Latency) -> f64| {
                Distribution::of(rounds.iter().filter_map(|run| which(&run.fio).map(figure)))
            };
            Some(Latencies {
                of,
                p50_us: distribution(|latency| latency.p50_us)?,
                p99_us: distribution(|latency| latency.p99_us)?,
                p999_us: distribution(|latency| latency.p999_us)?,
            })
        });
        Some(Self {
            iops: Distribution::of(rounds.iter().map(|run| run.fio.iops()))?,
            mb_s: Distribution::of(rounds.iter().map(|run| run.fio.mb_s()))?,
            latencies: latencies.collect(),
        })
    }
}

impl BenchReport {
    /// Creates a report without runs.
    pub fn new(options: &BenchOptions, prepared: &Prepared, jobs: impl Iterator<Item = JobFigures>) -> Self {
        Self {
            schema: "minivmm-bench",
            version: SCHEMA_VERSION,
            meaning: prepared.host.meaningful_figures(),
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
            ended: BenchEnd::Whole,
            error: None,
            seconds: 0.0,
        }
    }

    /// Adds a run of the competitor with index `place` at the job with index `job`.
    pub fn add(&mut self, job: usize, place: usize, run: JobRun) {
        if let Some(who) = self.jobs.get_mut(job).and_then(|job| job.competitors.get_mut(place)) {
            who.rounds.push(run);
        }
    }

    /// Computes the figures and ratios from the runs.
    pub fn conclude(&mut self) {
        for job in &mut self.jobs {
            let runs: Vec<(String, Vec<JobRun>)> =
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

    /// Returns `true` if anything was measured.
    pub fn has_figures(&self) -> bool {
        self.jobs.iter().any(|job| job.competitors.iter().any(|who| !who.rounds.is_empty()))
    }

    /// Returns the report as JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }
}
