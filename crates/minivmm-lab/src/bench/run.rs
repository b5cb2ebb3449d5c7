//! The runs of a bench: in every round each competitor runs each job in turn.
//!
//! Owns the order, and the state of the host's page cache before each run. A guest is booted for each single
//! job, so that its counters are those of the job. While the host runs a job, the image is locked as a VM would
//! lock it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::jobs::{Job, JobError};
use super::prepare::{self, PrepareError, WriteProgress};
use super::report::{BenchEnd, BenchReport, JobFigures, JobRun, Observed};
use super::who::{Competitor, competitors};
use super::{BenchOptions, warn};
use crate::estimate::{Clock, Rate};
use crate::measuring::fio::{self, FioError, Summary};
use crate::measuring::{Boot, BootError, BootOutcome, DiskSpec, EndCause, boot, image};
use crate::scratch_dir::ScratchDir;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::{DiskConfig, Image};
use minivmm::files::output;
use minivmm::observe::Residency;

/// Path of the job file in the guest.
const GUEST_FILE: &str = "/tmp/bench.fio";
/// Path of the disk in the guest.
const GUEST_DISK: &str = "/dev/vda";

/// Why a bench ended early. The report contains what was measured before.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it, or is its source's")]
pub enum BenchError {
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(
        "Linux guests do not run here ({0}); in minivmm's source tree, `make bench-modes` uses an emulated host instead"
    )]
    NoLinux(String),
    #[error("the guest did not run {job} in cache={mode} (status {status}): {said}")]
    Guest { job: String, mode: &'static str, status: i32, said: String },
    #[error("the guest had not ended {job} in cache={mode} after {seconds} s")]
    Late { job: String, mode: &'static str, seconds: u64 },
    #[error("{job} by {who}")]
    Fio { job: String, who: String, source: FioError },
    #[error(transparent)]
    Settle(#[from] image::SettleError),
    #[error("the image cannot be locked while the host works on it")]
    Lock(#[from] minivmm::disk::ImageError),
    #[error("cannot keep fio's job file in a temporary directory ($TMPDIR, else /tmp)")]
    Files(#[from] std::io::Error),
    #[error("stopped")]
    Interrupted,
}

impl BenchError {
    /// Returns `true` if other arguments would help with the same job file.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Prepare(PrepareError::Job(JobError::Unknown { .. })))
    }
}

/// Runs the bench. An error before the first run is returned; a later one is in the report.
pub fn run(options: &BenchOptions, stop: &AtomicBool) -> Result<BenchReport, BenchError> {
    if let Some(verdict) = boot::why_no_linux(stop)? {
        return Err(BenchError::NoLinux(verdict));
    }
    let bar = bar();
    let prepared = prepare::prepare(options, &mut |step| writing(&bar, options, step), stop);
    bar.finish_and_clear();
    let prepared = match prepared {
        Err(PrepareError::Image(image::ImageError::Interrupted(_))) => return Err(BenchError::Interrupted),
        other => other?,
    };
    let started = Instant::now();
    let plan: Vec<(Job, Vec<Competitor>)> =
        prepared.jobs.iter().map(|job| (job.clone(), competitors(job, &prepared.modes))).collect();
    let mut report =
        BenchReport::new(options, &prepared, plan.iter().map(|(job, who)| JobFigures::new(job, who)));
    let ended = rounds(options, &plan, &mut report, stop);
    report.ended = match &ended {
        Ok(()) => BenchEnd::Whole,
        Err(BenchError::Interrupted) => BenchEnd::Interrupted,
        Err(_) => BenchEnd::Failed,
    };
    report.error = ended.err().filter(|_| report.ended == BenchEnd::Failed).map(|error| chain(&error));
    report.seconds = started.elapsed().as_secs_f64();
    report.conclude();
    report.warnings = warn::all(options, &prepared, &report);
    Ok(report)
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// Returns the indices of all competitors in their order in this round. Neighbours in time are compared, and
/// alternating the direction keeps any one of them from always being first.
fn places(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |step| if round.is_multiple_of(2) { step } else { count - 1 - step })
}

/// Returns the names of the runs of a round, in order.
fn order(plan: &[(Job, Vec<Competitor>)], round: usize) -> Vec<String> {
    let of = |(job, who): &(Job, Vec<Competitor>)| {
        let names = places(who.len(), round).filter_map(|place| who.get(place));
        names.map(|who| format!("{} by {}", job.name, who.name)).collect::<Vec<_>>()
    };
    plan.iter().flat_map(of).collect()
}

fn rounds(
    options: &BenchOptions,
    plan: &[(Job, Vec<Competitor>)],
    report: &mut BenchReport,
    stop: &AtomicBool,
) -> Result<(), BenchError> {
    let steps = options.rounds * plan.iter().map(|(_, who)| who.len()).sum::<usize>();
    let bar = bar();
    let clock = Clock::new((0..options.rounds).flat_map(|round| order(plan, round)));
    let shown = clock.clone();
    begin(&bar, steps as u64, "{bar:30} {pos}/{len} {msg}, {left}", move |_, _| shown.left());
    let mut outcome = Ok(());
    'all: for round in 0..options.rounds {
        for (at, (job, who)) in plan.iter().enumerate() {
            for place in places(who.len(), round) {
                let Some(competitor) = who.get(place) else { continue };
                bar.set_message(format!(
                    "round {} of {}, {} by {}",
                    round + 1,
                    options.rounds,
                    job.name,
                    competitor.name
                ));
                clock.begin();
                let measured = measure(options, competitor, stop);
                clock.end();
                match measured {
                    Ok(run) => report.add(at, place, JobRun { round, ..run }),
                    Err(error) => {
                        outcome =
                            Err(if stop.load(Ordering::Relaxed) { BenchError::Interrupted } else { error });
                        break 'all;
                    }
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    outcome
}

fn measure(options: &BenchOptions, competitor: &Competitor, stop: &AtomicBool) -> Result<JobRun, BenchError> {
    match competitor.mode {
        Some(mode) => in_guest(options, &competitor.job, mode, stop),
        None => on_host(options, competitor, stop),
    }
}

fn in_guest(
    options: &BenchOptions,
    job: &Job,
    mode: &'static CachePolicy,
    stop: &AtomicBool,
) -> Result<JobRun, BenchError> {
    let dir = ScratchDir::new("bench")?;
    let file = dir.path().join("bench.fio");
    output::write_anew(&file, job.file(GUEST_DISK))?;
    let mut disk = DiskSpec::new(&options.disk.path, mode);
    disk.host_cache = options.host_cache;
    disk.keys.clone_from(&options.keys);
    if !job.writes() {
        disk.keys.push("readonly=on".into());
    }
    let readonly = if job.writes() { "" } else { "--readonly " };
    let script = format!("cd /tmp && fio {readonly}--output-format=json {GUEST_FILE}\n");
    let mut boot = Boot::new(vec![disk], script);
    (boot.memory_bytes, boot.cpus) = (options.memory_bytes, options.cpus);
    boot.files = vec![(file, GUEST_FILE.into())];
    boot.timeout = Duration::from_secs(job.seconds_max());
    let outcome = boot.run(stop)?;
    let summary = guests_summary(job, mode, &outcome)?;
    let observed = Observed::of(&outcome, &summary);
    let device = outcome.stats["disks"][0].clone();
    Ok(JobRun {
        round: 0,
        seconds: outcome.seconds,
        fio: summary,
        observed: Some(observed),
        device: Some(device),
    })
}

fn guests_summary(
    job: &Job,
    mode: &'static CachePolicy,
    outcome: &BootOutcome,
) -> Result<Summary, BenchError> {
    let name = || job.name.clone();
    match outcome.cause {
        EndCause::Interrupted => return Err(BenchError::Interrupted),
        EndCause::Late => {
            return Err(BenchError::Late { job: name(), mode: mode.name, seconds: job.seconds_max() });
        }
        EndCause::ByItself => {}
    }
    if outcome.status != 0 {
        let said = format!("{}\n{}", outcome.stderr.trim(), outcome.stdout.trim());
        let said: String = said.trim().chars().take(1000).collect();
        return Err(BenchError::Guest { job: name(), mode: mode.name, status: outcome.status, said });
    }
    first(fio::parse(&outcome.stdout), job, &format!("cache={}", mode.name))
}

fn first(answer: Result<Vec<Summary>, FioError>, job: &Job, who: &str) -> Result<Summary, BenchError> {
    let none = || FioError::Answer { why: "it has no job".into(), answer: String::new() };
    let answer = answer.and_then(|summaries| summaries.into_iter().next().ok_or_else(none));
    answer.map_err(|source| failed(job, who, source))
}

fn failed(job: &Job, who: &str, source: FioError) -> BenchError {
    BenchError::Fio { job: job.name.clone(), who: who.to_owned(), source }
}

fn on_host(options: &BenchOptions, competitor: &Competitor, stop: &AtomicBool) -> Result<JobRun, BenchError> {
    let job = &competitor.job;
    // The open image locks out every VM, and fails if a VM has it locked.
    let buffered = CachePolicy::by_name("writeback").unwrap_or(options.disk.cache);
    let disk = DiskConfig {
        cache: buffered,
        readonly: !job.writes(),
        force_raw: true,
        ..DiskConfig::new(&options.disk.path)
    };
    let locked = Image::open(&disk)?;
    let before = image::settle(&options.disk.path, options.host_cache)?;
    let dir = ScratchDir::new("bench")?;
    // The link gives the image a name without characters that are special to fio.
    let (link, file) = (dir.path().join("image"), dir.path().join("bench.fio"));
    std::os::unix::fs::symlink(std::path::absolute(&options.disk.path)?, &link)?;
    output::write_anew(&file, job.file(&link.display().to_string()))?;
    let mut arguments = vec![file.display().to_string()];
    if !job.writes() {
        arguments.insert(0, "--readonly".into());
    }
    let started = Instant::now();
    let limit = Duration::from_secs(job.seconds_max());
    let (summaries, disk_read_bytes) = match fio::on_host_counted(&arguments, limit, stop) {
        Err(FioError::Interrupted) => return Err(BenchError::Interrupted),
        Err(source) => return Err(failed(job, &competitor.name, source)),
        Ok(counted) => counted,
    };
    let seconds = started.elapsed().as_secs_f64();
    let summary = first(Ok(summaries), job, &competitor.name)?;
    let after = Residency::of(locked.file().descriptor()).ok();
    let observed = Observed::on_host(before, after, &summary, disk_read_bytes);
    Ok(JobRun { round: 0, seconds, fio: summary, observed: Some(observed), device: None })
}

/// Returns a progress bar. It is visible only on a terminal.
fn bar() -> ProgressBar {
    ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(5))
}

/// Starts the bar once the amount of work is known. `left` gets the amounts done and in total, and returns the
/// time left in words. It is called at each tick, so that the estimate changes while a step runs.
fn begin(
    bar: &ProgressBar,
    length: u64,
    template: &str,
    left: impl Fn(u64, u64) -> String + Clone + Send + Sync + 'static,
) {
    let draw_left = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = out.write_str(&left(state.pos(), state.len().unwrap_or_default()));
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.with_key("left", draw_left));
    }
    bar.set_length(length);
    bar.enable_steady_tick(Duration::from_secs(1));
}

fn writing(bar: &ProgressBar, options: &BenchOptions, step: WriteProgress) {
    match step {
        WriteProgress::Total(bytes) => {
            let rate = Rate::begin();
            let left = move |done, total| rate.left(done, total);
            begin(bar, bytes, "{bar:30} {bytes}/{total_bytes} {msg}, {left}", left);
            bar.set_message(format!("written to {}", options.disk.path.display()));
        }
        WriteProgress::Added(bytes) => bar.inc(bytes),
    }
}
