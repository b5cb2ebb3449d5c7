//! The arguments of `minivmm export`.
//!
//! Owns their names, their help, and which socket belongs to which disk: the first `--socket` or `--fd` to the first
//! `--disk`, and so on. What may stand before or instead of the subcommand is minivmm's own ([`minivmm::cli::Args`]).

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, ArgMatches, Args as _, Command, CommandFactory, FromArgMatches};
use minivmm::cli::{Answer, Args, values};
use minivmm::disk_options::{self, DiskOptions};
use minivmm::disks::DISKS_MAX;
use minivmm::disks::report::{ObserveTarget, StatsTarget};
use minivmm::files::{Input, Inventory, output};
use minivmm::{program, sandbox};
use minivmm_block::disk::writelog;

use crate::daemon::{Config, Exported};
use crate::socket::Place;

/// The name of the subcommand.
const EXPORT: &str = "export";

/// Serve disks to other VMMs over vhost-user: QEMU, cloud-hypervisor, libblkio
///
/// Each --disk has a --socket (or --fd) of its own, in the same order. A front end connects to it and finds the same
/// device that a guest of minivmm would, with the disk's cache mode, faults, write log and statistics. Ends at a
/// signal, in order: exit status 128+n, or 125 if data could not be made stable. See docs/reference/export.md for
/// each front end's command line and for what it must do for durability.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Disk image, with keys (repeatable)
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE]...", required = true, value_parser = values::disk(), long_help = disk_help())]
    disks: Vec<DiskOptions>,

    /// Listen on a UNIX socket at PATH for the disk's front end (repeatable, one for each disk)
    ///
    /// A socket on which nobody listens is replaced, anything else at PATH is not. It is removed at the end. Whoever
    /// may write to it may connect, which the umask decides: `umask 007` for a group.
    #[arg(long = "socket", value_name = "PATH")]
    sockets: Vec<PathBuf>,

    /// Use descriptor N, a listening UNIX socket, in place of a --socket (repeatable)
    #[arg(long = "fd", value_name = "N")]
    descriptors: Vec<RawFd>,

    /// Print what each --disk will do and what its front end must do, and serve nothing
    #[arg(long)]
    explain: bool,

    /// With --explain: print JSON
    #[arg(long, requires = "explain")]
    json: bool,

    /// At the end, report for each disk what was asked, done and at risk: on stderr, or as JSON to FILE
    ///
    /// SIGUSR1 makes the same report at any time. Latencies are measured only with this option.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    stats: Option<Option<PathBuf>>,

    /// Record in FILE, as CSV, what the host's cache holds of each disk; `minivmm top FILE` displays it
    #[arg(long, value_name = "FILE")]
    observe: Option<PathBuf>,

    /// With --observe: the time between two lines of a disk
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds, default_value = "0.5", requires = "observe")]
    observe_interval: Duration,

    /// At the end, wait at most this long for I/O in flight on the host, then fail [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds)]
    stop_timeout: Option<Duration>,

    /// Before a front end is served, give up every right that an export does not need: on, log, or off
    #[arg(long, value_name = "on|log|off", default_value = "on", value_parser = values::sandbox_mode(), hide_possible_values = true)]
    sandbox: sandbox::Mode,

    /// Log more (twice: much more)
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,

    /// Print only errors
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,

    /// The sockets and descriptors in the order of the command line.
    #[arg(skip)]
    places: Vec<Place>,
}

fn disk_help() -> String {
    format!(
        "Disk image, with keys (repeatable)\n\n{}\n\nqueues= is by default one for each of this host's CPUs, at most 4. \
         transport= and buffers=fixed are of no use here: the front end chooses the one, and its memory is not known \
         before it connects",
        disk_options::keys_help()
    )
}

impl ExportArgs {
    /// Parses the arguments of this process, as minivmm was called with them. `None` if they do not call `export`. The
    /// error is the answer if they are wrong or ask for help.
    pub fn of_process() -> Result<Option<Self>, Answer> {
        let words = std::env::args_os().skip(1);
        Self::parse(std::iter::once(OsString::from(program::VMM)).chain(words)).map_err(Answer::new)
    }

    fn parse(words: impl Iterator<Item = OsString>) -> Result<Option<Self>, clap::Error> {
        let mut whole = command();
        let matches = whole.try_get_matches_from_mut(words)?;
        let Some(found) = matches.subcommand_matches(EXPORT) else { return Ok(None) };
        let mut args = Self::from_arg_matches(found)?;
        args.places = places(found, &args);
        let export = whole.find_subcommand_mut(EXPORT);
        match (args.problem(), export) {
            (Some(why), Some(export)) => Err(export.error(ErrorKind::ArgumentConflict, why)),
            _ => Ok(Some(args)),
        }
    }

    /// Returns what clap cannot find wrong with the arguments.
    fn problem(&self) -> Option<String> {
        let (disks, sockets) = (self.disks.len(), self.places.len());
        if disks != sockets {
            return Some(format!(
                "{disks} --disk and {sockets} --socket or --fd: each disk needs one of its own"
            ));
        }
        if disks > DISKS_MAX {
            return Some(format!("{disks} disks, and at most {DISKS_MAX} are possible"));
        }
        let twice =
            |(at, place): (usize, &Place)| self.places.iter().take(at).any(|earlier| earlier == place);
        if let Some((_, place)) = self.places.iter().enumerate().find(|it| twice(*it)) {
            return Some(format!("two disks on {place}: give each a socket of its own"));
        }
        if self.disks.iter().any(|disk| disk.transport.is_some()) {
            return Some("transport= is the front end's choice: leave it out".to_owned());
        }
        if self.disks.iter().any(|disk| disk.config.fixed_buffers) {
            let why = "buffers=fixed registers guest memory at the start, which is not known before a front end connects";
            return Some(why.to_owned());
        }
        None
    }

    /// Returns `true` if the disks are only to be explained, and `true` for JSON.
    pub fn explains(&self) -> (bool, bool) {
        (self.explain, self.json)
    }

    /// Returns the log level.
    pub fn log_level(&self) -> log::LevelFilter {
        match (self.quiet || self.explain, self.verbose) {
            (true, _) => log::LevelFilter::Error,
            (false, 0) => log::LevelFilter::Warn,
            (false, 1) => log::LevelFilter::Info,
            (false, 2) => log::LevelFilter::Debug,
            (false, _) => log::LevelFilter::Trace,
        }
    }

    /// Returns what is to be exported.
    pub fn into_config(self) -> Config {
        let files = self.files();
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(255));
        let cpus = u8::try_from(cpus).unwrap_or(u8::MAX);
        let export = |(disk, place): (DiskOptions, Place)| {
            let config = disk.config.for_cpus(cpus);
            Exported { disk: DiskOptions { config, ..disk }, place }
        };
        Config {
            exports: self.disks.into_iter().zip(self.places).map(export).collect(),
            stats: self.stats.map(|file| file.map_or(StatsTarget::Stderr, StatsTarget::Json)),
            observe: self.observe.map(|path| ObserveTarget { path, interval: self.observe_interval }),
            stop_timeout: self.stop_timeout,
            sandbox: self.sandbox,
            files,
        }
    }

    fn files(&self) -> Inventory {
        let disk = |disk: &DiskOptions| Input { option: output::DISK, path: disk.config.path.clone() };
        let inputs = self.disks.iter().map(disk).collect();
        let mut outputs = Vec::new();
        if let Some(Some(path)) = &self.stats {
            outputs.extend(StatsTarget::Json(path.clone()).output());
        }
        if let Some(path) = &self.observe {
            let target = ObserveTarget { path: path.clone(), interval: self.observe_interval };
            outputs.push(target.output());
        }
        let logs = self.disks.iter().filter_map(|disk| disk.config.log_writes.as_deref());
        outputs.extend(logs.map(writelog::as_output));
        Inventory { inputs, outputs }
    }
}

/// Returns the sockets and descriptors in the order of the command line.
fn places(found: &ArgMatches, args: &ExportArgs) -> Vec<Place> {
    let indices = |name| found.indices_of(name).into_iter().flatten();
    let sockets = indices("sockets").zip(args.sockets.iter().cloned().map(Place::Path));
    let descriptors = indices("descriptors").zip(args.descriptors.iter().copied().map(Place::Descriptor));
    let mut places: Vec<(usize, Place)> = sockets.chain(descriptors).collect();
    places.sort_by_key(|(index, _)| *index);
    places.into_iter().map(|(_, place)| place).collect()
}

/// Returns minivmm's command line with the arguments of `export`.
pub fn command() -> Command {
    with_export(Args::command())
}

/// Adds the arguments of `export` to a command line that has the subcommand.
pub fn with_export(whole: Command) -> Command {
    whole.mut_subcommand(EXPORT, ExportArgs::augment_args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<ExportArgs, String> {
        let words = ["minivmm", "export"].into_iter().chain(line.split_whitespace()).map(OsString::from);
        ExportArgs::parse(words).map(Option::unwrap).map_err(|error| error.to_string())
    }

    #[test]
    fn the_arguments_are_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn sockets_and_descriptors_go_to_the_disks_in_their_order() {
        let args = parse("--disk a --socket /x --fd 7 --disk b --disk c --socket /y").unwrap();
        let places = [Place::Path("/x".into()), Place::Descriptor(7), Place::Path("/y".into())];
        assert_eq!(args.places, places);
        let config = args.into_config();
        let names: Vec<_> =
            config.exports.iter().map(|it| it.disk.config.path.display().to_string()).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, why) in [
            ("--disk a", "1 --disk and 0 --socket"),
            ("--socket /x", "--disk"),
            ("--disk a --disk b --socket /x", "2 --disk and 1 --socket"),
            ("--disk a --disk b --socket /x --socket /x", "two disks on /x"),
            ("--disk a,transport=pci --socket /x", "the front end's choice"),
            ("--disk a,buffers=fixed --socket /x", "not known before a front end connects"),
            ("--disk a --socket /x --json", "--explain"),
        ] {
            let said = parse(line).unwrap_err();
            assert!(said.contains(why), "{line}: {said}");
        }
    }
}
