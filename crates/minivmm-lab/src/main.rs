//! The binary minivmm-tools: the subcommands of minivmm that run no guest of their own. minivmm execs it, so
//! users know one program.
//!
//! Owns as little as minivmm's own `main.rs`: the choice of the tool, its signals and its exit status.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use minivmm::cli::ExitStatus;
use minivmm::cli::process::{self, WrongUsage, exit_with, print, report_outcome, say};
use minivmm::files::output;
use minivmm::hosts::{self, HostError};
use minivmm::signals::{Signals, Stop};
use minivmm_lab::bench::{self, BenchError};
use minivmm_lab::cli::{BenchArgs, CrashArgs, StudyArgs, Task};
use minivmm_lab::crash::campaign::CrashError;
use minivmm_lab::crash::log::WriteLog;
use minivmm_lab::crash::{campaign, list};
use minivmm_lab::{child, scratch_dir, study, top};

/// Time that a tool has to end in order after a signal. A VM that it has started gets 20 s of it.
const END_MAX: Duration = Duration::from_secs(30);

fn main() {
    // If minivmm has execed us, signals have been blocked since its start. A panic unwinds the stack of its
    // thread, which kills the children and removes the scratch files that belong to it.
    process::begin(Task::of_process, run, child::kill_all);
}

fn run(task: Option<Task>, signals: Signals) -> ExitStatus {
    // minivmm's options, including -v and -q, exclude a subcommand.
    process::start_logging(log::LevelFilter::Warn);
    let Some(task) = task else {
        let why = "minivmm-tools is for minivmm's own use: call minivmm with these arguments";
        return report_outcome(Err(anyhow::anyhow!(why)));
    };
    if let Err(error) = child::adopt_orphans() {
        log::debug!("cannot adopt what children leave behind: {error}");
    }
    if let Err(error) = check_names(&task) {
        return report_outcome(Err(WrongUsage(error).into()));
    }
    match host_of(&task) {
        Ok(None) => {}
        Ok(Some(mut command)) => {
            signals.release();
            return report_outcome(Err(hosts::replace(&mut command).into()));
        }
        Err(error) => return report_outcome(Err(error.into())),
    }
    let stop = if leaves_nothing(&task) {
        signals.release();
        Ok(Stop::default())
    } else {
        signals.into_stop(END_MAX, end_by_force).context("cannot start a thread")
    };
    let stop = match stop {
        Ok(stop) => stop,
        Err(error) => return report_outcome(Err(error)),
    };
    report_outcome(match task {
        Task::Log { log, json } => list_log(&log, json),
        Task::Top { observation } => show_observation(&observation, &stop),
        Task::Crash(args) => crash(*args, &stop),
        Task::Bench(args) => measure(*args, &stop),
        Task::Study(args) => run_study(args, &stop),
    })
}

/// Checks names on the command line that only the tools know.
fn check_names(task: &Task) -> Result<()> {
    match task {
        Task::Study(args) => study::run::check_names(&args.clone().options().only),
        Task::Bench(args) => Ok((**args).clone().options().check_names()?),
        _ => Ok(()),
    }
}

/// Returns the command that must replace this process if the tool's guests run in the emulated host; `None` if
/// they run here.
fn host_of(task: &Task) -> Result<Option<Command>, HostError> {
    match task {
        // If something is wrong with the files, `measure` reports it first.
        Task::Bench(args) if (**args).clone().options().files().check().is_empty() => {
            hosts::decide(&args.asked())
        }
        Task::Study(args) if study::run::boots_guests(&args.clone().options().only) => {
            hosts::decide(&args.asked())
        }
        _ => Ok(None),
    }
}

/// Returns `true` if a signal may simply kill the tool, because it has no children, no files and not the
/// terminal's screen.
fn leaves_nothing(task: &Task) -> bool {
    match task {
        Task::Log { .. } => true,
        Task::Top { .. } => !std::io::stdout().is_terminal(),
        _ => false,
    }
}

/// Kills the children and removes the scratch files of a tool that hangs, and exits.
fn end_by_force(signal: i32) {
    child::kill_all();
    scratch_dir::remove_all();
    say(format_args!(
        "minivmm: ended by signal {signal}, without a report: something did not end within {} s",
        END_MAX.as_secs()
    ));
    exit_with(ExitStatus::Signal(signal));
}

/// Returns the exit status for the signal that stopped the tool; `None` if no signal did.
fn stopped(stop: &Stop) -> Option<ExitStatus> {
    stop.signal().map(ExitStatus::Signal)
}

fn list_log(path: &Path, json: bool) -> Result<ExitStatus> {
    let log = WriteLog::open(path)?;
    print(&if json { list::to_json(&log)? } else { list::to_text(&log) })?;
    Ok(ExitStatus::Success)
}

fn show_observation(path: &Path, stop: &Stop) -> Result<ExitStatus> {
    top::run(path, stop.flag())?;
    Ok(stopped(stop).unwrap_or(ExitStatus::Success))
}

fn crash(args: CrashArgs, stop: &Stop) -> Result<ExitStatus> {
    let json = args.json;
    let options = args.options();
    let failed = |error: CrashError| match error.is_usage() {
        true => WrongUsage(error.into()).into(),
        false => anyhow::Error::from(error),
    };
    if let Some(out) = &options.write {
        print(&campaign::write_image(&options, out).map_err(failed)?)?;
        return Ok(ExitStatus::Success);
    }
    let report = campaign::run(&options, stop.flag()).map_err(failed)?;
    print(&if json { report.to_json()? } else { report.to_text() })?;
    Ok(match stopped(stop) {
        Some(status) => status,
        _ if report.failures.is_empty() => ExitStatus::Success,
        _ => ExitStatus::NotGood,
    })
}

fn run_study(args: StudyArgs, stop: &Stop) -> Result<ExitStatus> {
    let options = args.options();
    let report = study::run::run(&options, stop.flag())?;
    print(&format!("{}\n{}", report.to_text(), options.out.join(study::run::PAGE).display()))?;
    Ok(match (stopped(stop), report.failures().as_slice()) {
        (Some(status), _) => status,
        (None, []) => ExitStatus::Success,
        (None, [first, more @ ..]) => {
            let others = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
            bail!("{first}{others}: the study is not whole");
        }
    })
}

fn measure(args: BenchArgs, stop: &Stop) -> Result<ExitStatus> {
    let options = args.options();
    // A report that cannot be written must be an error now and not after hours of measuring.
    let files = options.files();
    let failed = || "cannot write the report (--json)";
    if let Some(refused) = files.check().into_iter().next() {
        return Err(refused.into());
    }
    // An older report stays until there is a new one.
    let json = options.report().map(|output| files.open_unchanged(&output)).transpose()?;
    let report = match bench::run::run(&options, stop.flag()) {
        Err(BenchError::Interrupted) => return Ok(stopped(stop).unwrap_or(ExitStatus::Failure)),
        Err(error) if error.is_usage() => return Err(WrongUsage(error.into()).into()),
        other => other?,
    };
    if let Some(opened) = json {
        let text = report.to_json()?;
        output::emptied(opened).and_then(|mut file| writeln!(file, "{text}")).with_context(failed)?;
    }
    if report.has_figures() {
        print(&bench::table::text(&report))?;
    }
    match (&report.error, stopped(stop)) {
        (Some(error), _) => bail!("{error}"),
        (None, Some(status)) => Ok(status),
        (None, None) => Ok(ExitStatus::Success),
    }
}
