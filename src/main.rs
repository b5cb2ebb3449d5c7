//! minivmm's binary: arguments in, a machine run, its exit status out.
//!
//! Owns the order: what went wrong is told in one place, once, with its chain of causes
//! (`cli::command`).

use std::io::Write;

use anyhow::Result;
use minivmm::cli::{Args, ExitStatus, command};
use minivmm::job::status::StatusFile;
use minivmm::vmm::{self, Ending};

fn main() {
    let args = Args::of_process();
    start_logging(args.log_level());
    std::process::exit(run(args).code());
}

fn run(args: Args) -> ExitStatus {
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
    let ending = vmm::run(&args.into_config()?)?;
    log::info!("the VM has ended: {ending:?}");
    Ok(ending)
}

fn start_logging(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|buffer, record| {
            writeln!(buffer, "minivmm: {}: {}", record.level().as_str().to_lowercase(), record.args())
        })
        .init();
}
