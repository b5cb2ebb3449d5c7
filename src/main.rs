//! minivmm's binary: arguments in, a machine run, its exit status out.
//!
//! Owns the one place where an error is printed, once, with its chain of causes.

use std::io::Write;

use anyhow::{Context, Result};
use minivmm::cli::{Args, ExitStatus, Task};
use minivmm::disk::DiskOptions;
use minivmm::{check, explain, vmm};

fn main() {
    let args = Args::of_process();
    start_logging(args.log_level());
    let status = run(args).unwrap_or_else(|error| {
        // Whoever reads it may be gone; the status still says it.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitStatus::Failure
    });
    std::process::exit(status.code());
}

fn run(args: Args) -> Result<ExitStatus> {
    match args.into_task()? {
        Task::Run(config) => {
            let ending = vmm::run(&config)?;
            log::info!("the VM has ended: {ending:?}");
            Ok(ending.into())
        }
        Task::Check { json, quiet } => {
            let report = check::check();
            print(&match (json, quiet) {
                (true, _) => report.to_json()?,
                (_, true) => report.verdict.clone(),
                (_, false) => report.to_text(),
            })?;
            Ok(if report.linux_runs { ExitStatus::Success } else { ExitStatus::NoLinux })
        }
        Task::Explain { disks, json } => explain_disks(&disks, json),
    }
}

fn explain_disks(disks: &[DiskOptions], json: bool) -> Result<ExitStatus> {
    let explained = disks.iter().map(explain::explain).collect::<Result<Vec<_>, _>>()?;
    print(&if json { explain::to_json(&explained)? } else { explain::to_text(&explained) })?;
    Ok(ExitStatus::Success)
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
