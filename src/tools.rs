//! minivmm-tools' binary: what minivmm does besides running a guest of its own. minivmm itself hands over
//! to it, so users know one program.
//!
//! Owns as little as `main.rs`: which tool it is, its signals, its exit status.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, bail};
use minivmm::cli::process::{print, start_logging, told};
use minivmm::cli::{Args, CrashArgs, ExitStatus, StudyArgs, Task};
use minivmm::crash::log::WriteLog;
use minivmm::crash::{campaign, list};
use minivmm::observe::top;
use minivmm::study;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

fn main() {
    let args = Args::of_process();
    start_logging(args.log_level());
    std::process::exit(told(run(&args)).code());
}

fn run(args: &Args) -> Result<ExitStatus> {
    match args.task() {
        Task::Log { log, json } => list_log(&log, json),
        Task::Top { observation } => show_observation(&observation),
        Task::Crash(args) => crash(*args),
        Task::Study(args) => run_study(args),
        Task::Run | Task::Check { .. } | Task::Explain { .. } => {
            bail!("that is minivmm's: give it these arguments")
        }
    }
}

fn list_log(path: &Path, json: bool) -> Result<ExitStatus> {
    let log = WriteLog::open(path)?;
    print(&if json { list::to_json(&log)? } else { list::to_text(&log) })?;
    Ok(ExitStatus::Success)
}

fn show_observation(path: &Path) -> Result<ExitStatus> {
    top::run(path)?;
    Ok(ExitStatus::Success)
}

fn crash(args: CrashArgs) -> Result<ExitStatus> {
    let json = args.json;
    let options = args.options();
    if let Some(out) = &options.write {
        print(&campaign::write_image(&options, out)?)?;
        return Ok(ExitStatus::Success);
    }
    let (stop, signal) = stop_on_signals()?;
    let report = campaign::run(&options, &stop)?;
    print(&if json { report.to_json()? } else { report.to_text() })?;
    Ok(match caught(&signal) {
        Some(signal) => signal,
        None if report.failures.is_empty() => ExitStatus::Success,
        None => ExitStatus::NotGood,
    })
}

fn run_study(args: StudyArgs) -> Result<ExitStatus> {
    let (stop, signal) = stop_on_signals()?;
    let options = args.options();
    let report = study::run::run(&options, &stop)?;
    print(&format!("{}\n{}", report.to_text(), options.out.join(study::run::PAGE).display()))?;
    Ok(caught(&signal).unwrap_or(ExitStatus::Success))
}

/// What a signal sets, and which one it was. A second one ends the process at once.
fn stop_on_signals() -> Result<(Arc<AtomicBool>, Arc<AtomicUsize>)> {
    let (stop, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    for number in [SIGHUP, SIGINT, SIGTERM] {
        let value = usize::try_from(number).unwrap_or_default();
        flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&stop))?;
        flag::register(number, Arc::clone(&stop))?;
        flag::register_usize(number, Arc::clone(&signal), value)?;
    }
    Ok((stop, signal))
}

fn caught(signal: &AtomicUsize) -> Option<ExitStatus> {
    let signal = i32::try_from(signal.load(Ordering::SeqCst)).ok()?;
    (signal > 0).then_some(ExitStatus::Signal(signal))
}
