//! minivmm's binary: arguments in, a machine run, its exit status out.
//!
//! Owns the order: what went wrong is told in one place, once, with its chain of causes
//! (`cli::command`).

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use minivmm::cli::{Args, CrashArgs, ExitStatus, Task, command};
use minivmm::crash::log::WriteLog;
use minivmm::crash::{campaign, list};
use minivmm::disk::DiskOptions;
use minivmm::job::status::StatusFile;
use minivmm::observe::top;
use minivmm::vmm::{self, Ending};
use minivmm::{check, explain};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

fn main() {
    let args = Args::of_process();
    start_logging(args.log_level());
    std::process::exit(run(args).code());
}

fn run(args: Args) -> ExitStatus {
    let told = match args.task() {
        Task::Run => return run_guest(args),
        Task::Check { json, quiet } => run_check(json, quiet),
        Task::Explain { disks, json } => explain_disks(&disks, json),
        Task::Log { log, json } => list_log(&log, json),
        Task::Top { observation } => show_observation(&observation),
        Task::Crash(args) => crash(*args),
    };
    told.unwrap_or_else(|error| {
        // Whoever reads it may be gone; the status still says it.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitStatus::Failure
    })
}

fn run_guest(args: Args) -> ExitStatus {
    let (command, quiet) = args.command_args();
    let telling = command::Run::begin(command.name(), quiet);
    let file = match command.status_file().map(StatusFile::create).transpose() {
        Ok(file) => file,
        Err(error) => return telling.tell(&Err(format!("cannot make the status file: {error}")), None),
    };
    let outcome = run_vm(args).map_err(|error| format!("{error:#}"));
    telling.tell(&outcome, file)
}

fn run_vm(args: Args) -> Result<Ending> {
    Ok(vmm::run(&args.into_config()?)?)
}

fn run_check(json: bool, quiet: bool) -> Result<ExitStatus> {
    let report = check::check();
    print(&match (json, quiet) {
        (true, _) => report.to_json()?,
        (_, true) => report.verdict.clone(),
        (_, false) => report.to_text(),
    })?;
    Ok(if report.linux_runs { ExitStatus::Success } else { ExitStatus::NoLinux })
}

fn explain_disks(disks: &[DiskOptions], json: bool) -> Result<ExitStatus> {
    let explained = disks.iter().map(explain::explain).collect::<Result<Vec<_>, _>>()?;
    print(&if json { explain::to_json(&explained)? } else { explain::to_text(&explained) })?;
    Ok(ExitStatus::Success)
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

/// To standard output, all of it. A reader that has gone, as `head` does, is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

fn start_logging(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|buffer, record| {
            writeln!(buffer, "minivmm: {}: {}", record.level().as_str().to_lowercase(), record.args())
        })
        .init();
}
