//! minivmm-tools' binary: what minivmm does besides running a guest of its own. minivmm itself hands over
//! to it, so users know one program.
//!
//! Owns as little as `main.rs`: which tool it is, its signals, its exit status.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use minivmm::bench::{self, BenchError};
use minivmm::cli::process::{print, start_logging, told};
use minivmm::cli::{Args, BenchArgs, CrashArgs, ExitStatus, StudyArgs, Task};
use minivmm::crash::log::WriteLog;
use minivmm::crash::{campaign, list};
use minivmm::files::output;
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
        Task::Bench(args) => measure(*args),
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
    let signals = Signals::taken()?;
    let report = campaign::run(&options, &signals.stop)?;
    print(&if json { report.to_json()? } else { report.to_text() })?;
    Ok(match signals.status() {
        Some(status) => status,
        _ if report.failures.is_empty() => ExitStatus::Success,
        _ => ExitStatus::NotGood,
    })
}

fn run_study(args: StudyArgs) -> Result<ExitStatus> {
    let signals = Signals::taken()?;
    let options = args.options();
    let report = study::run::run(&options, &signals.stop)?;
    print(&format!("{}\n{}", report.to_text(), options.out.join(study::run::PAGE).display()))?;
    Ok(signals.status().unwrap_or(ExitStatus::Success))
}

fn measure(args: BenchArgs) -> Result<ExitStatus> {
    let options = args.options();
    // What cannot be written is an error before the hour that it takes.
    let files = options.files();
    let failed = || "cannot write the report (--json)";
    if let Some(refused) = files.check().into_iter().next() {
        return Err(refused.into());
    }
    // An older report stays until there is a new one.
    let json = options.report().map(|output| files.open_unchanged(&output)).transpose()?;
    let signals = Signals::taken()?;
    let report = match bench::run::run(&options, &signals.stop) {
        Err(BenchError::Interrupted) => return Ok(signals.status().unwrap_or(ExitStatus::Failure)),
        other => other?,
    };
    if let Some(opened) = json {
        let text = report.to_json()?;
        output::emptied(opened).and_then(|mut file| writeln!(file, "{text}")).with_context(failed)?;
    }
    if report.has_figures() {
        print(&report.to_text())?;
    }
    match (&report.error, signals.status()) {
        (Some(error), _) => bail!("{error}"),
        (None, Some(status)) => Ok(status),
        (None, None) => Ok(ExitStatus::Success),
    }
}

/// The signals that stop a tool, which then tells what it has.
struct Signals {
    stop: Arc<AtomicBool>,
    last: Arc<AtomicUsize>,
}

impl Signals {
    /// From here on they are ours. A second one ends us at once.
    fn taken() -> Result<Self> {
        let (stop, last) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for number in [SIGHUP, SIGINT, SIGTERM] {
            let value = usize::try_from(number).unwrap_or_default();
            flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&stop))?;
            flag::register(number, Arc::clone(&stop))?;
            flag::register_usize(number, Arc::clone(&last), value)?;
        }
        Ok(Self { stop, last })
    }

    /// The status that says which came, if one did.
    fn status(&self) -> Option<ExitStatus> {
        let signal = i32::try_from(self.last.load(Ordering::SeqCst)).unwrap_or_default();
        (signal > 0).then_some(ExitStatus::Signal(signal))
    }
}
