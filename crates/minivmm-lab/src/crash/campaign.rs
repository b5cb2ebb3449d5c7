//! `minivmm crash`: makes the possible states and checks them, several at a time.
//!
//! Owns the order of the work, and what is kept of failures. [`super::plan`] chooses the states,
//! [`super::scratch`] makes their images, [`super::check`] judges an image and [`super::report`] prints the
//! result.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::check::{Check, CheckError, CheckOutcome, find_e2fsck};
use super::legal::StateName;
use super::log::{LogError, WriteLog};
use super::plan::{Breadth, Plan, Task, one};
use super::points::{At, NoPoint, points};
use super::report::{
    CrashReport, Failure, KEPT_MAX, checked_state, describe_point, lost_entries, repeat_command,
};
use super::scratch::{Base, ScratchError, Stage, default_place};
use crate::estimate::Rate;
use crate::scratch_dir::{ScratchDir, remove_abandoned};
use minivmm::files::{Input, Output, OutputRefused, output};
use minivmm::sync::unpoisoned;

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct CampaignOptions {
    /// The write log.
    pub log: PathBuf,
    /// The disk as it was when the log began.
    pub base: PathBuf,
    /// The points at which the power fails.
    pub at: Vec<At>,
    /// How many states are tried, and which.
    pub breadth: Breadth,
    /// Try only this state, at this point; `None` tries all that `at` and `breadth` select.
    pub repeat: Option<(usize, StateName)>,
    /// A shell command that checks an image; `None` chooses e2fsck if the base holds an ext4.
    pub check: Option<String>,
    /// Time limit for the check of one image.
    pub check_timeout: Duration,
    /// Number of checks that run at once; `None` for one per CPU.
    pub jobs: Option<usize>,
    /// Directory that receives the images of failures; `None` for LOG.failed.
    pub keep: Option<PathBuf>,
    /// Directory in which images are made; `None` for memory or the directory of temporary files.
    pub scratch: Option<PathBuf>,
    /// Only write the image to this file, without a check.
    pub write: Option<PathBuf>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's, or says it")]
pub enum CrashError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Point(#[from] NoPoint),
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error("entry {0} leaves no state {1}: repeat it with the log that the report was about")]
    NoState(usize, StateName),
    #[error(
        "{0} holds no ext4, so it needs a check of its own: --check 'COMMAND {{}}', where {{}} stands for the image \
         and status 0 means that it is good"
    )]
    NoCheck(String),
    #[error(
        "an ext4 is checked by e2fsck, which is not installed: install e2fsprogs, or give --check 'COMMAND {{}}'"
    )]
    NoE2fsck,
    #[error(
        "that is up to {0} images, and --write makes one: say where, --at ENTRY, and which, --lose all, \
         --lose nothing or --repeat ENTRY:STATE"
    )]
    NotOne(u64),
    #[error(transparent)]
    Output(#[from] OutputRefused),
    #[error("cannot make images in {place} (choose another place with --scratch)")]
    Place { place: String, source: io::Error },
    #[error("cannot keep the image of a failure in {place} (choose another place with --keep)")]
    Keep { place: String, source: io::Error },
}

impl CrashError {
    /// Returns `true` if other arguments would help with the same log and the same base.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Point(point) => *point != NoPoint::NothingChanges,
            Self::NoState(..) | Self::NoCheck(_) | Self::NotOne(_) => true,
            _ => false,
        }
    }
}

/// Writes the one image that the options select to `out`, and returns which one it is.
pub fn write_image(options: &CampaignOptions, out: &Path) -> Result<String, CrashError> {
    let log = WriteLog::open(&options.log)?;
    let base = Base::open(&options.base, &log)?;
    let mut plan = plan(options, &log)?;
    may_be_made(options, "--write", out, base.bytes)?;
    let at_most = plan.at_most();
    let (Some(task), None) = (plan.next(), plan.next()) else { return Err(CrashError::NotOne(at_most)) };
    let dir = scratch_directory(options, 2 * base.data_bytes)?;
    let mut stage = Stage::new(&log, &base, &dir.path().join("stage"))?;
    stage.advance(task.settled)?;
    stage.make(&task.extents, out)?;
    Ok(format!("{}: {}, state {}", out.display(), describe_point(&log, task.point), task.name))
}

/// Returns an error unless `out` may be written: it must be new or an older image of this disk, and neither the
/// base nor the log.
fn may_be_made(
    options: &CampaignOptions,
    option: &'static str,
    out: &Path,
    bytes: u64,
) -> Result<(), OutputRefused> {
    let input = |option, path: &Path| Input { option, path: path.to_owned() };
    let inputs = vec![input("--base", &options.base), input("the log", &options.log)];
    let out = Output { option, path: out.to_owned(), content: output::IMAGE };
    output::may_become_image(&out, inputs, bytes)
}

/// Checks every state that the options select. If `stop` is set, it ends early and reports what it has found.
pub fn run(options: &CampaignOptions, stop: &AtomicBool) -> Result<CrashReport, CrashError> {
    let log = WriteLog::open(&options.log)?;
    let base = Base::open(&options.base, &log)?;
    let check = choose_check(options, &base)?;
    let plan = plan(options, &log)?;
    let points = plan.points();
    let jobs = options.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let jobs = jobs.min(usize::try_from(plan.at_most()).unwrap_or(usize::MAX)).max(1);
    let log_bytes = log.entries.iter().filter(|it| it.data_at.is_some()).map(|it| it.bytes).sum::<u64>();
    let needed = (jobs as u64 * 2).saturating_mul(base.data_bytes.saturating_add(log_bytes));
    let scratch = scratch_directory(options, needed)?;
    let started = Instant::now();
    let shared = Shared {
        options,
        log: &log,
        base: &base,
        check: &check,
        scratch: scratch.path(),
        stop,
        bar: bar(plan.at_most()),
        points: AtomicUsize::new(points),
        plan: Mutex::new(plan),
        found: Mutex::new(Findings::default()),
        kept: AtomicUsize::new(0),
        ended: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        for number in 0..jobs {
            let shared = &shared;
            scope.spawn(move || shared.work(number));
        }
    });
    shared.bar.finish_and_clear();
    let found = unpoisoned(shared.found.into_inner());
    if let Some(error) = found.error {
        return Err(error);
    }
    let mut failures = found.failures;
    // Failures whose images are kept come first.
    failures.sort_by_key(|failure| (failure.image.is_none(), failure.entry, failure.state.to_string()));
    Ok(CrashReport {
        log: options.log.clone(),
        base: options.base.clone(),
        entries: log.entries.len(),
        check: check.to_string(),
        points,
        states: found.states,
        failures,
        interrupted: stop.load(Ordering::Relaxed),
        seconds: started.elapsed().as_secs_f64(),
        scratch: scratch.path().parent().unwrap_or(Path::new("/")).to_owned(),
        jobs,
    })
}

fn plan<'a>(options: &CampaignOptions, log: &'a WriteLog) -> Result<Plan<'a>, CrashError> {
    if let Some((point, name)) = options.repeat {
        let task = one(log, point, name).ok_or(CrashError::NoState(point, name))?;
        return Ok(Plan::of_one(log, task));
    }
    let points = points(&log.entries, &options.at, options.breadth.seed)?;
    Ok(Plan::new(log, points, options.breadth))
}

fn choose_check(options: &CampaignOptions, base: &Base) -> Result<Check, CrashError> {
    match &options.check {
        Some(command) => Ok(Check::Shell(command.clone())),
        None if !base.is_ext4() => Err(CrashError::NoCheck(options.base.display().to_string())),
        None => find_e2fsck().map(Check::Ext4).ok_or(CrashError::NoE2fsck),
    }
}

fn scratch_directory(options: &CampaignOptions, needed_bytes: u64) -> Result<ScratchDir, CrashError> {
    // Images that a killed run left behind may occupy memory that is needed now, wherever images are made this
    // time.
    for place in [Path::new("/dev/shm"), &std::env::temp_dir()] {
        remove_abandoned(place);
    }
    let place = options.scratch.clone().unwrap_or_else(|| default_place(needed_bytes));
    ScratchDir::new_in(&place, "crash")
        .map_err(|source| CrashError::Place { place: place.display().to_string(), source })
}

/// Returns a progress bar. It is visible only on a terminal.
fn bar(states: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(states), ProgressDrawTarget::stderr_with_hz(5));
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} states, {msg}, {left}");
    if let Ok(style) = style {
        let rate = Rate::begin();
        let left = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&rate.left(state.pos(), state.len().unwrap_or_default()));
        };
        bar.set_style(style.with_key("left", left));
    }
    // The estimate must be updated even while a check takes long.
    bar.enable_steady_tick(Duration::from_secs(1));
    bar.set_message("0 failed");
    bar
}

/// What the workers share.
struct Shared<'a> {
    options: &'a CampaignOptions,
    log: &'a WriteLog,
    base: &'a Base,
    check: &'a Check,
    scratch: &'a Path,
    stop: &'a AtomicBool,
    bar: ProgressBar,
    /// Number of points that were not yet reached.
    points: AtomicUsize,
    plan: Mutex<Plan<'a>>,
    found: Mutex<Findings>,
    /// Number of failures whose images were kept.
    kept: AtomicUsize,
    /// Set when a worker failed, so that the others end.
    ended: AtomicBool,
}

/// Makes the other workers end if its own worker panics.
struct EndsOthers<'a>(&'a AtomicBool);

impl Drop for EndsOthers<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Findings {
    states: u64,
    failures: Vec<Failure>,
    error: Option<CrashError>,
}

impl Shared<'_> {
    fn found(&self) -> MutexGuard<'_, Findings> {
        unpoisoned(self.found.lock())
    }

    fn work(&self, number: usize) {
        // Sets the flag if this worker panics.
        let _panicking = EndsOthers(&self.ended);
        if let Err(error) = self.work_on(number) {
            self.ended.store(true, Ordering::Relaxed);
            self.found().error.get_or_insert(error);
        }
    }

    fn work_on(&self, number: usize) -> Result<(), CrashError> {
        let dir = self.scratch.join(number.to_string());
        let place = || dir.display().to_string();
        std::fs::create_dir(&dir).map_err(|source| CrashError::Place { place: place(), source })?;
        let (image, output) = (dir.join("disk.img"), dir.join("output"));
        let mut stage = Stage::new(self.log, self.base, &dir.join("stage"))?;
        while !self.stop.load(Ordering::Relaxed) && !self.ended.load(Ordering::Relaxed) {
            let Some(task) = self.next_task() else { break };
            stage.advance(task.settled)?;
            stage.make(&task.extents, &image)?;
            let about = checked_state(self.log, &task);
            let limit = self.options.check_timeout;
            let failure = match self.check.run(&image, &about, &output, limit, &[self.stop, &self.ended])? {
                CheckOutcome::Interrupted => break,
                CheckOutcome::Good => None,
                CheckOutcome::Bad { why, output } => Some(self.failed(&stage, &task, why, output)?),
            };
            let mut found = self.found();
            found.states += 1;
            found.failures.extend(failure);
            self.bar.set_message(format!("{} failed", found.failures.len()));
            self.bar.inc(1);
        }
        Ok(())
    }

    fn next_task(&self) -> Option<Task> {
        let mut plan = unpoisoned(self.plan.lock());
        let (task, points) = (plan.next(), plan.points());
        if points != self.points.swap(points, Ordering::Relaxed) {
            // States of the previous point that were the same disk were skipped, so fewer are left than
            // estimated.
            self.bar.set_length(plan.given() + plan.at_most());
        }
        task
    }

    /// Records a failure. Keeps the image as it was before the check, because the check may have repaired it.
    fn failed(
        &self,
        stage: &Stage<'_>,
        task: &Task,
        why: String,
        said: String,
    ) -> Result<Failure, CrashError> {
        let mut image = None;
        if self.kept.fetch_add(1, Ordering::Relaxed) < KEPT_MAX {
            let place = self.options.keep.clone().unwrap_or_else(|| beside(&self.options.log));
            let path = place.join(format!("{}-{}.img", task.point, task.name));
            let failed = |source| CrashError::Keep { place: place.display().to_string(), source };
            std::fs::create_dir_all(&place).map_err(failed)?;
            may_be_made(self.options, "--keep", &path, self.base.bytes)?;
            stage.make(&task.extents, &path)?;
            output::replace(&Output::text("--keep", path.with_extension("txt")), &said)?;
            image = Some(path);
        }
        let lost = lost_entries(self.log, task);
        Ok(Failure {
            entry: task.point,
            state: task.name,
            lost,
            why,
            output: said,
            image,
            repeat: self.repeat(task),
        })
    }

    /// Returns the command line that tries this state again.
    fn repeat(&self, task: &Task) -> String {
        let CampaignOptions { log, base, check, check_timeout, .. } = self.options;
        repeat_command(log, base, check.as_deref(), *check_timeout, task)
    }
}

fn beside(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".failed");
    name.into()
}
