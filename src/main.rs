//! minivmm's binary: arguments in, a machine run, its exit status out.
//!
//! Owns the order: what went wrong is told in one place, once, with its chain of causes
//! (`cli::command`). What runs no guest of its own is minivmm-tools' (`tools.rs`), to which it is handed
//! over: a VMM that has none of it in its memory is smaller by a fifth.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use minivmm::cli::command::{self, End};
use minivmm::cli::process::{print, start_logging, told};
use minivmm::cli::{Args, ExitStatus, STATUS_FILE, Task};
use minivmm::disk::DiskOptions;
use minivmm::files::{Inventory, Output};
use minivmm::job::status::StatusFile;
use minivmm::vmm;
use minivmm::{check, explain, program};

fn main() {
    let args = Args::of_process();
    start_logging(args.log_level());
    std::process::exit(run(args).code());
}

fn run(args: Args) -> ExitStatus {
    match args.task() {
        Task::Run => run_guest(args),
        Task::Check { json, quiet } => told(run_check(json, quiet)),
        Task::Explain { disks, json } => told(explain_disks(&disks, json)),
        Task::Log { .. } | Task::Top { .. } | Task::Crash(_) | Task::Bench(_) | Task::Study(_) => {
            told(hand_over())
        }
    }
}

fn run_guest(args: Args) -> ExitStatus {
    let (command, quiet) = args.command_args();
    let telling = command::Run::begin(command.name(), quiet);
    let files = args.files();
    let file = match command.status_file().map(|path| open_status_file(path, &files)).transpose() {
        Ok(file) => file,
        Err(error) => return telling.tell(&End::failed(format!("{error:#}")), None),
    };
    telling.tell(&run_vm(args, &files), file)
}

fn open_status_file(path: &Path, files: &Inventory) -> Result<StatusFile> {
    let opened = files.open(&Output::text(STATUS_FILE, path))?;
    Ok(StatusFile::new(opened.file))
}

fn run_vm(args: Args, files: &Inventory) -> End {
    // Before a file is emptied, made or packed.
    if let Some(refused) = files.check().into_iter().next() {
        return End::failed(format!("{:#}", anyhow::Error::from(refused)));
    }
    let config = match args.into_config() {
        Ok(config) => config,
        Err(error) => return End::failed(format!("{:#}", anyhow::Error::from(error))),
    };
    let ended = vmm::run(&config);
    End {
        outcome: ended.outcome.map_err(|error| format!("{:#}", anyhow::Error::from(error))),
        kernel_lines: ended.kernel_lines,
        lines_were_shown: ended.lines_were_shown,
    }
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

/// The other binary, in the place of this one, with the same arguments.
fn hand_over() -> Result<ExitStatus> {
    let tools = program::beside(program::TOOLS).context("this program's own file is not known")?;
    let error = Command::new(&tools).args(std::env::args_os().skip(1)).exec();
    let path = tools.display();
    Err(error).with_context(|| {
        format!("cannot start {path}, which `make build` and `make install` put beside minivmm")
    })
}
