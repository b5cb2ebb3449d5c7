//! minivmm's binary: arguments in, a machine run, its exit status out.
//!
//! Owns the one place where an error is printed, once, with its chain of causes.

use std::io::Write;

use anyhow::Result;
use clap::Parser;
use minivmm::cli::{Args, ExitStatus};
use minivmm::vmm;

fn main() {
    let args = Args::parse();
    start_logging(args.log_level());
    let status = run(args).unwrap_or_else(|error| {
        // Whoever reads it may be gone; the status still says it.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitStatus::Failure
    });
    std::process::exit(status.code());
}

fn run(args: Args) -> Result<ExitStatus> {
    let ending = vmm::run(&args.into_config()?)?;
    log::info!("the VM has ended: {ending:?}");
    Ok(ending.into())
}

fn start_logging(level: log::LevelFilter) {
    env_logger::Builder::new()
        .filter_level(level)
        .format(|buffer, record| {
            writeln!(buffer, "minivmm: {}: {}", record.level().as_str().to_lowercase(), record.args())
        })
        .init();
}
