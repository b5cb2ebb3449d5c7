//! The binary minivmm-export: minivmm's subcommand `export`. minivmm execs it, so users know one program.
//!
//! Owns as little as minivmm's own `main.rs`: the signals, and what the exit status says.

use anyhow::Result;
use minivmm::cli::ExitStatus;
use minivmm::cli::process::{self, exit_with, print, report_errors, report_outcome, say};
use minivmm::signals::Signals;
use minivmm_export::cli::ExportArgs;
use minivmm_export::{daemon, explain};

fn main() {
    // Must come before the first thread.
    minivmm::sandbox::one_arena();
    process::begin(ExportArgs::of_process, run, || ());
}

fn run(args: Option<ExportArgs>, signals: Signals) -> ExitStatus {
    let level = args.as_ref().map_or(log::LevelFilter::Warn, ExportArgs::log_level);
    process::start_logging(level);
    let Some(args) = args else {
        let why = "minivmm-export is for minivmm's own use: call minivmm with these arguments";
        return report_outcome(Err(anyhow::anyhow!(why)));
    };
    let (explains, json) = args.explains();
    let config = args.into_config();
    if explains {
        signals.release();
        return report_outcome(explain_disks(&config, json));
    }
    report_outcome(export(&config, &signals))
}

fn export(config: &daemon::Config, signals: &Signals) -> Result<ExitStatus> {
    // A signal during a start that hangs ends the process at once: no disk is exported yet.
    signals.while_starting(|signal| {
        say(format_args!("minivmm: ended by signal {signal} before anything was exported"));
        exit_with(ExitStatus::Signal(signal))
    })?;
    let ended = daemon::run(config, signals);
    signals.started();
    Ok(ended.map(ExitStatus::Signal)?)
}

/// Prints what each disk will do and what its front end must do. Reports everything for which nothing would be
/// exported, which also sets the exit status.
fn explain_disks(config: &daemon::Config, json: bool) -> Result<ExitStatus> {
    config.files.check_stdout()?;
    let (explained, refused) = explain::explain(config);
    if !explained.is_empty() {
        print(&if json { explain::to_json(&explained)? } else { explain::to_text(&explained) })?;
    }
    Ok(report_errors(refused.into_iter()))
}
