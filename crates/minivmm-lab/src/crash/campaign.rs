//! `minivmm crash`: states made and checked, side by side.
//!
//! Owns the order of the work and what is kept of failures. Which states there are is
//! [`super::plan`]'s, how an image comes about [`super::scratch`]'s, how it is judged
//! [`super::check`]'s, how all that is told [`super::report`]'s.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::check::{Check, CheckError, Verdict, find_e2fsck};
use super::legal::StateName;
use super::log::{LogError, WriteLog};
use super::plan::{Breadth, Plan, Task, one};
use super::points::{At, NoPoint, points};
use super::report::{Failure, Report, Told};
use super::scratch::{Base, ScratchError, Stage, default_place};
use crate::estimate::Rate;
use crate::scratch_dir::{ScratchDir, remove_abandoned};
use minivmm::files::{Input, Output, OutputRefused, output};
use minivmm::sync::unpoisoned;

/// Images of so many failures are kept, the first ones.
pub const KEPT_MAX: usize = 16;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// The write log.
    pub log: PathBuf,
    /// The disk as it was when the log began.
    pub base: PathBuf,
    /// Where the power fails.
    pub at: Vec<At>,
    /// How many states, and which.
    pub breadth: Breadth,
    /// This state alone.
    pub repeat: Option<(usize, StateName)>,
    /// A command of the shell; by default what suits the base.
    pub check: Option<String>,
    /// For one image.
    pub check_timeout: Duration,
    /// Checks side by side; by default one a CPU.
    pub jobs: Option<usize>,
    /// Where images of failures go; by default LOG.failed.
    pub keep: Option<PathBuf>,
    /// Where images are made; by default in memory, or where temporary files are.
    pub scratch: Option<PathBuf>,
    /// Only write the image there.
    pub write: Option<PathBuf>,
}

/// Why there is no answer.
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
        "{0} holds no ext4, so how to check it must be said: --check 'COMMAND {{}}', where {{}} stands for the image \
         and status 0 says that it is good"
    )]
    NoCheck(String),
    #[error(
        "an ext4 is checked by e2fsck, which is not there: install e2fsprogs, or give --check 'COMMAND {{}}'"
    )]
    NoE2fsck,
    #[error(
        "that is up to {0} images, and --write makes one: say where, --at ENTRY, and which, --lose all, \
         --lose nothing or --repeat ENTRY:STATE"
    )]
    NotOne(u64),
    #[error(transparent)]
    Output(#[from] OutputRefused),
    #[error("cannot make images in {place} (--scratch says where)")]
    Place { place: String, source: io::Error },
    #[error("cannot keep the image of a failure in {place} (--keep says where)")]
    Keep { place: String, source: io::Error },
}

impl CrashError {
    /// Whether other arguments would help, for the same log and the same base.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Point(point) => *point != NoPoint::NothingChanges,
            Self::NoState(..) | Self::NoCheck(_) | Self::NotOne(_) => true,
            _ => false,
        }
    }
}

/// Makes the one image that is meant at `out`, and tells which it is.
pub fn write_image(options: &Options, out: &Path) -> Result<String, CrashError> {
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
    Ok(format!("{}: {}, state {}", out.display(), Told::point(&log, task.point), task.name))
}

/// An older image of this disk may be replaced, and nothing else; never the base or the log.
fn may_be_made(options: &Options, option: &'static str, out: &Path, bytes: u64) -> Result<(), OutputRefused> {
    let input = |option, path: &Path| Input { option, path: path.to_owned() };
    let inputs = vec![input("--base", &options.base), input("the log", &options.log)];
    let out = Output { option, path: out.to_owned(), content: output::IMAGE };
    output::may_become_image(&out, inputs, bytes)
}

/// Tries all that is asked for. Ends early, with what it has found, when `stop` is set.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Report, CrashError> {
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
        found: Mutex::new(Found::default()),
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
    // Those first whose images are kept.
    failures.sort_by_key(|failure| (failure.image.is_none(), failure.entry, failure.state.to_string()));
    Ok(Report {
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

fn plan<'a>(options: &Options, log: &'a WriteLog) -> Result<Plan<'a>, CrashError> {
    if let Some((point, name)) = options.repeat {
        let task = one(log, point, name).ok_or(CrashError::NoState(point, name))?;
        return Ok(Plan::of_one(log, task));
    }
    let points = points(&log.entries, &options.at, options.breadth.seed)?;
    Ok(Plan::new(log, points, options.breadth))
}

fn choose_check(options: &Options, base: &Base) -> Result<Check, CrashError> {
    match &options.check {
        Some(command) => Ok(Check::Shell(command.clone())),
        None if !base.is_ext4() => Err(CrashError::NoCheck(options.base.display().to_string())),
        None => find_e2fsck().map(Check::Ext4).ok_or(CrashError::NoE2fsck),
    }
}

fn scratch_directory(options: &Options, needed_bytes: u64) -> Result<ScratchDir, CrashError> {
    // What a killed run has left may be in the way in memory, wherever the images are made this time.
    for place in [Path::new("/dev/shm"), &std::env::temp_dir()] {
        remove_abandoned(place);
    }
    let place = options.scratch.clone().unwrap_or_else(|| default_place(needed_bytes));
    ScratchDir::new_in(&place, "crash")
        .map_err(|source| CrashError::Place { place: place.display().to_string(), source })
}

/// On a terminal; elsewhere nothing.
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
    // A check that takes long shows, too.
    bar.enable_steady_tick(Duration::from_secs(1));
    bar.set_message("0 failed");
    bar
}

/// What the workers have in common.
struct Shared<'a> {
    options: &'a Options,
    log: &'a WriteLog,
    base: &'a Base,
    check: &'a Check,
    scratch: &'a Path,
    stop: &'a AtomicBool,
    bar: ProgressBar,
    /// Those that are left.
    points: AtomicUsize,
    plan: Mutex<Plan<'a>>,
    found: Mutex<Found>,
    /// Images of failures that are kept.
    kept: AtomicUsize,
    /// One of us has given up.
    ended: AtomicBool,
}

/// Tells the other workers to end when its own panics.
struct EndsOthers<'a>(&'a AtomicBool);

impl Drop for EndsOthers<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Found {
    states: u64,
    failures: Vec<Failure>,
    error: Option<CrashError>,
}

impl Shared<'_> {
    fn found(&self) -> MutexGuard<'_, Found> {
        unpoisoned(self.found.lock())
    }

    fn work(&self, number: usize) {
        // One that panics ends the others, too.
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
            let about = Told::about(self.log, &task);
            let limit = self.options.check_timeout;
            let failure = match self.check.run(&image, &about, &output, limit, &[self.stop, &self.ended])? {
                Verdict::Interrupted => break,
                Verdict::Good => None,
                Verdict::Bad { why, output } => Some(self.failed(&stage, &task, why, output)?),
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
            // Some states of the point before were the same disk: fewer are left than it seemed.
            self.bar.set_length(plan.given() + plan.at_most());
        }
        task
    }

    /// The image as it was before the check, which may have repaired it, and what the check said.
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
        let lost = Told::lost(self.log, task);
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

    /// The command line that tries this state again.
    fn repeat(&self, task: &Task) -> String {
        let Options { log, base, check, check_timeout, .. } = self.options;
        Told::repeat(log, base, check.as_deref(), *check_timeout, task)
    }
}

fn beside(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".failed");
    name.into()
}
