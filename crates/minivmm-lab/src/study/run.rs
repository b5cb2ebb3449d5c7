//! The course of a run: which steps are run, how often, how much time is left, and what is written at the end.
//!
//! Owns the repetitions and the time budget. The first repetition is always complete. A quick run omits later
//! repetitions if time is short.

use std::fmt;
use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::experiment::Experiment;
use super::figures::StepRecord;
use super::machine::StudyMachine;
use super::page::page;
use super::record::{Header, Journal, VERSION};
use super::report::{self, StudyReport};
use super::steps::{self, Step, StepContext};
use super::{EXPERIMENTS, by_id};
use crate::estimate::Clock;
use minivmm::files::{Output, output};

/// Number of repetitions of a full run.
pub const ROUNDS: u32 = 5;
/// Most repetitions of a quick run.
const QUICK_ROUNDS: u32 = 3;
/// A quick run begins no repetition that would probably end after this time.
const QUICK_BUDGET: Duration = Duration::from_secs(8 * 60);
/// Name of the HTML page.
pub const PAGE: &str = "study.html";
/// Name of the JSON document.
pub const JSON: &str = "study.json";

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct StudyOptions {
    /// Directory that receives all files.
    pub out: PathBuf,
    /// True for smaller jobs and fewer repetitions.
    pub quick: bool,
    /// Number of repetitions; `None` for the default.
    pub rounds: Option<u32>,
    /// Ids of the experiments to run; empty for all.
    pub only: Vec<String>,
}

/// Runs the experiments until they are done or `stop` is set, and writes the page and the JSON.
pub fn run(options: &StudyOptions, stop: &AtomicBool) -> Result<StudyReport> {
    let experiments = wanted(&options.only)?;
    fs::create_dir_all(&options.out).with_context(|| format!("cannot make {}", options.out.display()))?;
    let machine = StudyMachine::look(&options.out)
        .with_context(|| format!("cannot look at {}", options.out.display()))?;
    let header = Header {
        version: VERSION,
        quick: options.quick,
        experiments: experiments.iter().map(|experiment| experiment.id.to_owned()).collect(),
        machine: machine.identity(),
    };
    let mut journal = Journal::open(&options.out, &header)?;
    let context =
        StepContext::new(&options.out, options.quick, header.experiments.clone(), &machine.host, stop)?;
    let plan: Vec<&Step> = steps::of(&experiments);
    let rounds = options.rounds.unwrap_or(if options.quick { QUICK_ROUNDS } else { ROUNDS });
    let budget = (options.quick && options.rounds.is_none()).then_some(QUICK_BUDGET);
    measure(&context, &plan, rounds, budget, &mut journal)?;
    let steps = journal.newest();
    let done = |round| plan.iter().all(|step| journal.has(step.name, round));
    let whole = (1..=rounds).take_while(|round| done(*round)).count();
    let run = report::RunSummary {
        quick: options.quick,
        rounds: u32::try_from(whole).unwrap_or(rounds),
        complete: whole > 0 && !stop.load(Ordering::SeqCst),
    };
    let report = StudyReport::of(&experiments, machine, steps, &run);
    output::replace(&Output::text("--out", options.out.join(JSON)), &report.to_json()?)?;
    output::replace(&Output::text("--out", options.out.join(PAGE)), &page(&report))?;
    Ok(report)
}

/// Returns an error if a name is not the id of an experiment.
pub fn check_names(only: &[String]) -> Result<()> {
    if let Some(id) = only.iter().find(|id| by_id(id).is_none()) {
        let all: Vec<_> = EXPERIMENTS.iter().map(|experiment| experiment.id).collect();
        bail!("there is no experiment {id} (--only): there are {}", all.join(", "));
    }
    Ok(())
}

/// Returns `true` if one of these experiments boots a guest. An empty list stands for all experiments.
pub fn boots_guests(only: &[String]) -> bool {
    wanted(only).is_ok_and(|experiments| steps::of(&experiments).iter().any(|step| step.boots))
}

fn wanted(only: &[String]) -> Result<Vec<&'static Experiment>> {
    check_names(only)?;
    let is_wanted = |experiment: &&&Experiment| {
        only.is_empty() || only.iter().any(|id| id.eq_ignore_ascii_case(experiment.id))
    };
    Ok(EXPERIMENTS.iter().filter(is_wanted).copied().collect())
}

fn measure(
    context: &StepContext<'_>,
    plan: &[&Step],
    rounds: u32,
    budget: Option<Duration>,
    journal: &mut Journal,
) -> Result<()> {
    let begun = Instant::now();
    let progress = Progress::new(plan, rounds);
    for round in 1..=rounds {
        let round_begun = Instant::now();
        for step in plan {
            if context.stop.load(Ordering::SeqCst) {
                return Ok(());
            }
            if journal.has(step.name, round) {
                progress.done(None);
                continue;
            }
            progress.begin(step.name, round, rounds);
            let record = run_step(context, step, round);
            // The step was interrupted, so its figures are not recorded and it is measured again.
            if context.stop.load(Ordering::SeqCst) {
                return Ok(());
            }
            progress.done(Some(&record));
            journal.add(record)?;
        }
        let next = begun.elapsed() + round_begun.elapsed();
        if budget.is_some_and(|budget| next > budget) {
            break;
        }
    }
    progress.end();
    Ok(())
}

/// Runs one step. An error is stored in its record, so that the other steps still run.
fn run_step(context: &StepContext<'_>, step: &Step, round: u32) -> StepRecord {
    let begun = Instant::now();
    let mut record = StepRecord::new(step.name, round);
    if let Err(error) = (step.run)(context, &mut record) {
        record.error = Some(format!("the step \u{201c}{}\u{201d} has failed: {error:#}", step.name));
    }
    record.seconds = begun.elapsed().as_secs_f64();
    record
}

/// Shows the number of steps and the time left, as a bar on a terminal and as one line per step elsewhere. The
/// estimate uses only the steps that this process ran, because the recorded ones may have run under other load.
struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    clock: Clock,
}

impl Progress {
    fn new(plan: &[&Step], rounds: u32) -> Self {
        let names = (0..rounds).flat_map(|_| plan.iter().map(|step| step.name.to_owned()));
        let (clock, steps) = (Clock::new(names), plan.len() as u64 * u64::from(rounds));
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} steps, {left}: {msg}") {
            let clock = clock.clone();
            // The estimate is computed at each tick; otherwise it would not change while a step runs.
            let left = move |_: &ProgressState, out: &mut dyn fmt::Write| {
                let _ = out.write_str(&clock.left());
            };
            bar.set_style(style.with_key("left", left));
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, is_terminal, clock }
    }

    fn begin(&self, step: &str, round: u32, rounds: u32) {
        self.clock.begin();
        self.bar.set_message(format!("{step}, repetition {round} of at most {rounds}"));
    }

    fn done(&self, record: Option<&StepRecord>) {
        self.bar.inc(1);
        let Some(record) = record else { return self.clock.skip() };
        self.clock.end();
        let result = record.error.as_deref().unwrap_or("done");
        let line = format!(
            "{}/{} {} (repetition {}): {result}, {:.1} s; {}",
            self.bar.position(),
            self.bar.length().unwrap_or_default(),
            record.step,
            record.round,
            record.seconds,
            self.clock.left(),
        );
        if !self.is_terminal {
            eprintln!("{line}");
        } else if record.error.is_some() {
            self.bar.println(line);
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
