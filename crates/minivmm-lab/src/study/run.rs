//! The order of a run: which steps, how often, how long yet, and what is left when it is ended.
//!
//! Owns repetitions and the budget. The first repetition is always whole; what a quick run has no time
//! for are further ones.

use std::fmt;
use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::experiment::Experiment;
use super::figures::Record;
use super::machine::Machine;
use super::page::page;
use super::record::{Header, Journal, VERSION};
use super::report::{self, Report};
use super::steps::{self, Bench, Step};
use super::{EXPERIMENTS, by_id};
use crate::estimate::Clock;
use minivmm::files::{Output, output};

/// A full run repeats each step so often.
pub const ROUNDS: u32 = 5;
/// A quick one at most so often,
const QUICK_ROUNDS: u32 = 3;
/// and begins no repetition that would not end by then.
const QUICK_BUDGET: Duration = Duration::from_secs(8 * 60);
/// The documents' names.
pub const PAGE: &str = "study.html";
/// The same for programs.
pub const JSON: &str = "study.json";

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where everything goes.
    pub out: PathBuf,
    /// Smaller jobs, and few repetitions.
    pub quick: bool,
    /// So many repetitions.
    pub rounds: Option<u32>,
    /// These experiments alone; all where there are none.
    pub only: Vec<String>,
}

/// Runs what is asked for, as far as `stop` lets it, and leaves page and JSON.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Report> {
    let experiments = wanted(&options.only)?;
    fs::create_dir_all(&options.out).with_context(|| format!("cannot make {}", options.out.display()))?;
    let machine =
        Machine::look(&options.out).with_context(|| format!("cannot look at {}", options.out.display()))?;
    let header = Header {
        version: VERSION,
        quick: options.quick,
        experiments: experiments.iter().map(|experiment| experiment.id.to_owned()).collect(),
        machine: machine.identity(),
    };
    let mut journal = Journal::open(&options.out, &header)?;
    let bench = Bench::new(&options.out, options.quick, header.experiments.clone(), stop)?;
    let plan: Vec<&Step> = steps::of(&experiments);
    let rounds = options.rounds.unwrap_or(if options.quick { QUICK_ROUNDS } else { ROUNDS });
    let budget = (options.quick && options.rounds.is_none()).then_some(QUICK_BUDGET);
    measure(&bench, &plan, rounds, budget, &mut journal)?;
    let steps = journal.newest();
    let done = |round| plan.iter().all(|step| journal.has(step.name, round));
    let whole = (1..=rounds).take_while(|round| done(*round)).count();
    let run = report::Run {
        quick: options.quick,
        rounds: u32::try_from(whole).unwrap_or(rounds),
        complete: whole > 0 && !stop.load(Ordering::SeqCst),
    };
    let report = Report::of(&experiments, machine, steps, &run);
    output::replace(&Output::text("--out", options.out.join(JSON)), &report.to_json()?)?;
    output::replace(&Output::text("--out", options.out.join(PAGE)), &page(&report))?;
    Ok(report)
}

/// Refuses a name that no experiment has.
pub fn check_names(only: &[String]) -> Result<()> {
    if let Some(id) = only.iter().find(|id| by_id(id).is_none()) {
        let all: Vec<_> = EXPERIMENTS.iter().map(|experiment| experiment.id).collect();
        bail!("there is no experiment {id} (--only): there are {}", all.join(", "));
    }
    Ok(())
}

/// Whether any of these experiments, or of all where none is named, boots a guest.
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
    bench: &Bench<'_>,
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
            if bench.stop.load(Ordering::SeqCst) {
                return Ok(());
            }
            if journal.has(step.name, round) {
                progress.done(None);
                continue;
            }
            progress.begin(step.name, round, rounds);
            let record = one(bench, step, round);
            // What was ended in its middle is measured again.
            if bench.stop.load(Ordering::SeqCst) {
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

/// A step that fails is told as such; the others go on.
fn one(bench: &Bench<'_>, step: &Step, round: u32) -> Record {
    let begun = Instant::now();
    let mut record = Record::new(step.name, round);
    if let Err(error) = (step.run)(bench, &mut record) {
        record.error = Some(format!("the step \u{201c}{}\u{201d} has failed: {error:#}", step.name));
    }
    record.seconds = begun.elapsed().as_secs_f64();
    record
}

/// Steps and time left: a bar on a terminal, elsewhere a line a step. The time is what the steps that were
/// done now took; those that were done before say nothing of this hour.
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
            // Asked anew at each tick: what was estimated when a step began would stand still.
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

    fn done(&self, record: Option<&Record>) {
        self.bar.inc(1);
        let Some(record) = record else { return self.clock.skip() };
        self.clock.end();
        let told = record.error.as_deref().unwrap_or("done");
        let line = format!(
            "{}/{} {} (repetition {}): {told}, {:.1} s; {}",
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
