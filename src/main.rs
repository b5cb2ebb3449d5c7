//! minivmm's binary: parses arguments, runs a machine and returns its exit status.
//!
//! Owns the order of these steps. An error is reported in one place, once, with its chain of causes
//! (`cli::command`). Subcommands that run no guest of their own live in minivmm-tools (`crates/minivmm-lab`) and
//! minivmm-export (`crates/minivmm-export`), which this binary execs. Without their code, a VMM uses a fifth less memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use minivmm::cli::command::{self, End};
use minivmm::cli::process::{self, exit_with, print, report_errors, report_outcome};
use minivmm::cli::{Args, ExitStatus, STATUS_FILE, Task};
use minivmm::files::{Inventory, Output};
use minivmm::hosts::{self, HostError};
use minivmm::job::status::StatusFile;
use minivmm::signals::Signals;
use minivmm::vmm::{self, Plan};
use minivmm::{explain, program};

fn main() {
    // Must come before the first thread, which watches the start.
    minivmm::sandbox::one_arena();
    process::begin(Args::of_process, run, || ());
}

fn run(args: Args, signals: Signals) -> ExitStatus {
    process::start_logging(args.log_level());
    match args.task() {
        Task::Run => {
            // `run_vm` reports errors of the named files, and reports them before any error of the host.
            let host = if args.files().check().is_empty() { hosts::decide(&args.asked()) } else { Ok(None) };
            if let Ok(Some(mut command)) = host {
                signals.release();
                return report_outcome(Err(hosts::replace(&mut command).into()));
            }
            return run_guest(args, &signals, host.err());
        }
        Task::Tool(binary) => return report_outcome(hand_over(binary)),
        // These commands leave nothing to clean up, so a signal may end them at once.
        Task::Check { .. } | Task::Explain { .. } => signals.release(),
    }
    match args.task() {
        Task::Check { json, quiet } => report_outcome(run_check(json, quiet)),
        Task::Explain { plan, json } => report_outcome(explain_disks(&plan, json)),
        _ => ExitStatus::Usage,
    }
}

/// Runs the guest on this machine, or reports the error in `host` if the host for it could not be provided.
fn run_guest(args: Args, signals: &Signals, host: Option<HostError>) -> ExitStatus {
    let (command, quiet) = args.command_args();
    let reporter = Arc::new(command::RunReporter::begin(command.name(), quiet));
    let early_reporter = Arc::clone(&reporter);
    // A signal during a start that hangs ends the process at once: no machine exists yet that needs an
    // orderly stop.
    let watched = signals.while_starting(move |signal| exit_with(early_reporter.tell(&End::signal(signal))));
    if let Err(error) = watched {
        return reporter.tell(&End::failed(format!("cannot start a thread: {error}")));
    }
    let files = args.files();
    match command.status_file().map(|path| open_status_file(path, &files)).transpose() {
        Ok(file) => reporter.keep_in(file),
        Err(error) => return reporter.tell(&End::failed(format!("{error:#}"))),
    }
    if let Some(error) = host {
        return reporter.tell(&End::failed(format!("{:#}", anyhow::Error::from(error))));
    }
    let panicked = "minivmm has panicked (see above); this is an error in minivmm";
    let end = catch_unwind(AssertUnwindSafe(|| run_vm(args, &files, signals)))
        .unwrap_or_else(|_| End::failed(panicked.to_owned()));
    signals.started();
    reporter.tell(&end)
}

fn open_status_file(path: &Path, files: &Inventory) -> Result<StatusFile> {
    let opened = files.open(&Output::text(STATUS_FILE, path))?;
    Ok(StatusFile::new(opened.file, path))
}

fn run_vm(args: Args, files: &Inventory, signals: &Signals) -> End {
    // Must come before any file is packed into an archive.
    if let Some(refused) = files.check().into_iter().next() {
        return End::failed(format!("{:#}", anyhow::Error::from(refused)));
    }
    let config = match args.into_config() {
        Ok(config) => config,
        Err(error) => return End::failed(format!("{:#}", anyhow::Error::from(error))),
    };
    let ended = vmm::run(&config, signals);
    End {
        outcome: ended.outcome.map_err(|error| format!("{:#}", anyhow::Error::from(error))),
        kernel_lines: ended.kernel_lines,
        lines_were_shown: ended.lines_were_shown,
    }
}

fn run_check(json: bool, quiet: bool) -> Result<ExitStatus> {
    let report = hosts::check();
    print(&match (json, quiet) {
        (true, _) => report.to_json()?,
        (_, true) => report.verdict.clone(),
        (_, false) => report.to_text(),
    })?;
    Ok(if report.linux_runs { ExitStatus::Success } else { ExitStatus::NoLinux })
}

/// Prints what each disk will do and reports everything that would make a run be refused, which also sets the
/// exit status.
fn explain_disks(plan: &Plan, json: bool) -> Result<ExitStatus> {
    plan.files.check_stdout()?;
    let mut refused: Vec<anyhow::Error> = plan.refusals().into_iter().map(Into::into).collect();
    let mut explained = Vec::new();
    for disk in &plan.disks {
        match explain::explain(&disk.config) {
            Ok(disk) => explained.push(disk),
            Err(error) => refused.push(error.into()),
        }
    }
    if !explained.is_empty() {
        print(&if json { explain::to_json(&explained)? } else { explain::to_text(&explained) })?;
    }
    let disks = explained.iter().flat_map(|disk| disk.refusals.iter().map(|why| (&disk.image, why)));
    let disks: Vec<_> = disks.map(|(image, why)| anyhow!("cannot use disk image {image}: {why}")).collect();
    Ok(report_errors(refused.into_iter().chain(disks)))
}

/// Replaces this process with another binary, which gets the same arguments.
fn hand_over(binary: &str) -> Result<ExitStatus> {
    let path = program::beside(binary).context("this program's own file is not known")?;
    let error = program::replace(&path, std::env::args_os().skip(1));
    let path = path.display();
    Err(error).with_context(|| {
        format!("cannot start {path}, which `make build` and `make install` put beside minivmm")
    })
}
