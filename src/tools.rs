//! minivmm-tools' binary: what minivmm does besides running a guest of its own. minivmm itself hands over
//! to it, so users know one program.
//!
//! Owns as little as `main.rs`: which tool it is, its signals, its exit status.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, bail};
use minivmm::cli::process::{print, start_logging, told};
use minivmm::cli::{Args, CrashArgs, ExitStatus, Task};
use minivmm::crash::log::WriteLog;
use minivmm::crash::{campaign, list};
use minivmm::observe::top;
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
    // A second signal ends it at once.
    let (stop, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    for number in [SIGHUP, SIGINT, SIGTERM] {
        let value = usize::try_from(number).unwrap_or_default();
        flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&stop))?;
        flag::register(number, Arc::clone(&stop))?;
        flag::register_usize(number, Arc::clone(&signal), value)?;
    }
    let report = campaign::run(&options, &stop)?;
    print(&if json { report.to_json()? } else { report.to_text() })?;
    Ok(match i32::try_from(signal.load(Ordering::SeqCst)) {
        Ok(signal) if signal > 0 => ExitStatus::Signal(signal),
        _ if report.failures.is_empty() => ExitStatus::Success,
        _ => ExitStatus::NotGood,
    })
}
