//! The command line, and minivmm's exit status.
//!
//! Owns arguments, their help, exit statuses, and the search for the bundled test guest. The disk's keys are
//! `disk`'s, in the table from which their help is generated. Manual page and completions are generated from
//! the same definitions (`examples/manual.rs` of minivmm-lab).

pub mod command;
mod find_guest;
mod help;
mod holes;
mod inventory;
pub mod process;
pub mod size;
mod test_guest;
mod tool;
mod usage;
pub mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};

use crate::boot::cmdline;
use crate::disk_options::{self, DiskOptions};
use crate::disks::report::{ObserveTarget, StatsTarget};
use crate::hosts::{Asked, HostChoice};
use crate::job::{self, JobError};
use crate::program;
use crate::sandbox;
use crate::virtio::TransportChoice;
use crate::vmm::{Config, ConsoleTarget, Ending, Plan};
use command::{CommandArgs, ConsoleTaken};
use tool::Tool;

pub use find_guest::{GuestNotFound, ModulesNotFound};
pub use inventory::STATUS_FILE;
pub use usage::Answer;

/// A minimal KVM hypervisor whose virtio-blk can be trusted.
///
/// Boots a Linux kernel (without --kernel, the bundled test guest) with its console on this terminal
/// and each --disk as /dev/vda, /dev/vdb, ...
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
#[command(after_long_help = help::after(), after_help = "--help shows more: keys, examples, exit statuses.")]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    /// Kernel to boot: a bzImage, or an ELF vmlinux [default: the test guest's]
    ///
    /// A bzImage is entered by the 64-bit boot protocol, an ELF image by PVH if it has the PVH note,
    /// otherwise by the 64-bit boot protocol. The test guest (vmlinuz, initrd.cpio; `make guest` builds it)
    /// is looked for in $MINIVMM_GUEST, or else beside the binary and in guest-images/build. If its
    /// unpacked kernel, vmlinux, is beside vmlinuz and not older, vmlinux is booted.
    #[arg(long, value_name = "PATH", help_heading = help::GUEST)]
    kernel: Option<PathBuf>,

    /// Initial RAM disk, or `none` [default: the test guest's]
    #[arg(long, value_name = "PATH", help_heading = help::GUEST)]
    initrd: Option<PathBuf>,

    /// Add the rest of the kernel's modules, for `modprobe xfs` or just `mount`
    ///
    /// PATH is an archive with lib/modules/VERSION, which is appended to the initial RAM disk. Without PATH it is
    /// the modules.cpio that `make guest` built beside the kernel. The archive takes up guest memory.
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, help_heading = help::GUEST)]
    modules: Option<Option<PathBuf>>,

    /// Add to the kernel command line (repeatable)
    ///
    /// Words after ` -- ` are passed to the guest's init.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, help_heading = help::GUEST)]
    append: Vec<String>,

    /// Replace the kernel command line
    #[arg(long, value_name = "STRING", default_value = cmdline::DEFAULT, allow_hyphen_values = true, help_heading = help::GUEST)]
    cmdline: String,

    /// Guest memory: a number with K, M, G or T (512M, 4G); without a letter, bytes
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::memory, help_heading = help::MACHINE)]
    memory: u64,

    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = values::cpus, help_heading = help::MACHINE)]
    cpus: u8,

    /// How the guest reaches its virtio devices: pci, or mmio
    ///
    /// pci is virtio-pci with MSI-X, mmio is virtio-mmio. A disk's key `transport` overrides this for that disk.
    #[arg(long, value_name = "pci|mmio", default_value = "pci", value_parser = values::transport(), hide_possible_values = true, help_heading = help::MACHINE)]
    transport: TransportChoice,

    /// Disk image, with keys (repeatable: vda, vdb, ...)
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE]...", value_parser = values::disk(), long_help = disk_help(), help_heading = help::DISKS)]
    disks: Vec<DiskOptions>,

    /// Print what each --disk will do, and run nothing
    ///
    /// Prints open flags, features, the host's system calls for each request of each kind of driver,
    /// alignment, file system and the host's disks. Starts, writes, syncs and locks nothing.
    #[arg(long, requires = "disks", help_heading = help::DISKS)]
    explain: bool,

    /// With --explain: print JSON
    #[arg(long, requires = "explain", help_heading = help::DISKS)]
    json: bool,

    /// Kernel console, a 16550 (ttyS0): stdio, stderr, off, or file=PATH [default: stdio]
    ///
    /// On a terminal, Ctrl-A x ends the VM and Ctrl-A h lists the keys. Input that is not from a
    /// terminal is passed on unchanged.
    #[arg(long, value_name = "stdio|stderr|off|file=PATH", value_parser = values::console(), hide_possible_values = true, help_heading = help::RUNNING)]
    console: Option<ConsoleTarget>,

    /// End the VM after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds, help_heading = help::RUNNING)]
    timeout: Option<Duration>,

    /// At the end, wait at most this long for I/O in flight on the host, then fail [default: 60]
    ///
    /// Without a limit, a disk that hangs would hang minivmm. After 3 seconds minivmm prints what it waits for;
    /// past the limit it exits with status 125. The last fdatasync of an image may have much to write, so it is
    /// limited only if this option is given. Signals do not shorten the wait. Once minivmm has printed what it
    /// waits for, Ctrl-C on its terminal ends it.
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds, help_heading = help::RUNNING)]
    stop_timeout: Option<Duration>,

    /// At the end, report for each disk what was asked, done and at risk: on stderr, or as JSON to FILE
    ///
    /// Bytes at risk were acknowledged to the guest as written, and a crash of the host may still lose
    /// them. Latencies are measured only with this option. SIGUSR1 makes the same report at any time: on
    /// stderr, or by writing FILE anew.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    stats: Option<Option<PathBuf>>,

    /// Record in FILE, as CSV, where the data is: in the host's cache, the guest's cache, on the disk
    ///
    /// One line for each disk and interval (docs/observing.md); `minivmm top FILE` displays it. The guest's
    /// own view is included only if the guest is the test guest.
    #[arg(long, value_name = "FILE")]
    observe: Option<PathBuf>,

    /// With --observe: the time between two lines of a disk
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds, default_value = "0.5", requires = "observe")]
    observe_interval: Duration,

    /// Limit the host memory that minivmm, its guest and its page cache use together
    ///
    /// minivmm makes a cgroup v2 of its own for this, which needs permission.
    #[arg(long, value_name = "SIZE", value_parser = size::memory, help_heading = help::MACHINE)]
    host_memory_limit: Option<u64>,

    /// Before the guest runs, give up every right that a VMM does not need: on, log, or off
    ///
    /// on: minivmm can open no path and start no program, and each thread may make only the system calls on its
    /// list. Any other call is named, and ends minivmm with status 125. log: such a call is named and allowed.
    /// docs/security.md lists each thread's calls, and the reasons.
    #[arg(long, value_name = "on|log|off", default_value = "on", value_parser = values::sandbox_mode(), hide_possible_values = true, help_heading = help::MACHINE)]
    sandbox: sandbox::Mode,

    /// Log more (twice: much more)
    #[arg(short, long, action = ArgAction::Count, help_heading = help::RUNNING)]
    verbose: u8,

    /// Where a Linux guest runs: auto, direct, or emulated [default: here, if KVM can run Linux]
    ///
    /// auto: on this machine if its KVM runs Linux, otherwise in the emulated host (docs/hosts.md). The emulated host is
    /// many times slower, and copies files back at the end. direct: here, whatever KVM can do. emulated: in the
    /// emulated host. Without this option, if KVM cannot run Linux here, minivmm prints the command to use and exits.
    #[arg(long, value_name = "auto|direct|emulated", value_parser = values::host(), hide_possible_values = true, help_heading = help::RUNNING)]
    host: Option<HostChoice>,

    /// Print only errors
    #[arg(short, long, conflicts_with = "verbose", help_heading = help::RUNNING)]
    quiet: bool,

    #[command(flatten)]
    job: CommandArgs,
}

/// What minivmm does besides running a guest.
#[derive(Debug, Subcommand)]
enum Command {
    /// Check whether this machine can run Linux guests, and say what to do if not
    ///
    /// Examines /dev/kvm and runs guests of a few instructions, for less than a second. Exit status:
    /// 0 if Linux guests run, 1 if they do not.
    Check {
        /// Print JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,

        /// Print only the verdict, in one line
        #[arg(short, long)]
        quiet: bool,
    },
    #[command(flatten)]
    Tool(Tool),
}

/// What the user asked minivmm to do.
#[derive(Debug)]
pub enum Task {
    /// Run a guest.
    Run,
    /// Check this machine.
    Check {
        /// `true` for JSON.
        json: bool,
        /// `true` to print only the verdict.
        quiet: bool,
    },
    /// Hand over to the binary of this name, which parses the arguments.
    Tool(&'static str),
    /// Explain the disks of a machine.
    Explain {
        /// The machine's disks and files.
        plan: Plan,
        /// `true` for JSON.
        json: bool,
    },
}

fn disk_help() -> String {
    format!("Disk image, with keys (repeatable: vda, vdb, ...)\n\n{}", disk_options::keys_help())
}

/// Returns the disks, with the defaults that depend on the machine. A run and `--explain` both use this
/// function.
fn disks(asked: &[DiskOptions], cpus: u8) -> Vec<DiskOptions> {
    let of_machine =
        |disk: &DiskOptions| DiskOptions { config: disk.config.clone().for_cpus(cpus), ..disk.clone() };
    asked.iter().map(of_machine).collect()
}

/// Why the machine that the arguments describe cannot be configured.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's")]
pub enum ConfigError {
    #[error(transparent)]
    Guest(#[from] GuestNotFound),
    #[error(transparent)]
    Modules(#[from] ModulesNotFound),
    #[error(transparent)]
    Console(#[from] ConsoleTaken),
    #[error(transparent)]
    Job(#[from] JobError),
}

impl Args {
    /// Parses the arguments of this process. The error is the answer if they are wrong or ask for help.
    pub fn of_process() -> Result<Self, Answer> {
        let words = std::env::args_os();
        let args = match tool::called(words.skip(1)) {
            Some(name) => Self::try_parse_from([program::VMM, &name]),
            None => Self::try_parse(),
        };
        let args = args.map_err(Answer::new)?;
        if args.command.is_none()
            && !args.job.is_given()
            && std::env::args_os().next_back().is_some_and(|it| it == "--")
        {
            let why = "there is no COMMAND after --: minivmm [OPTIONS] -- COMMAND";
            return Err(Answer::new(Self::command().error(ErrorKind::MissingRequiredArgument, why)));
        }
        let conflict = |why: &dyn std::fmt::Display| {
            Err(Answer::new(Self::command().error(ErrorKind::ArgumentConflict, why)))
        };
        if let Err(taken) = args.job.console(args.console.clone(), false) {
            return conflict(&taken);
        }
        if args.job.is_given() && args.initrd.as_deref().is_some_and(|path| path.as_os_str() == "none") {
            return conflict(
                &"a COMMAND is run by the initrd's init: --initrd none cannot be used with a COMMAND",
            );
        }
        if let Some(why) = args.unbootable_root() {
            return conflict(&why);
        }
        Ok(args)
    }

    /// Returns the task that the arguments ask for.
    pub fn task(&self) -> Task {
        match &self.command {
            &Some(Command::Check { json, quiet }) => Task::Check { json, quiet },
            Some(Command::Tool(tool)) => Task::Tool(tool.binary()),
            None if self.explain => Task::Explain { plan: self.plan(), json: self.json },
            None => Task::Run,
        }
    }

    /// Returns the arguments about a command, and `true` if only errors are to be printed.
    pub fn command_args(&self) -> (&CommandArgs, bool) {
        (&self.job, self.quiet)
    }

    /// Returns the log level.
    pub fn log_level(&self) -> log::LevelFilter {
        if self.explain {
            // Log lines of the trial runs would say nothing new about the host.
            return log::LevelFilter::Error;
        }
        match (self.quiet, self.verbose) {
            (true, _) => log::LevelFilter::Error,
            (false, 0) => log::LevelFilter::Warn,
            (false, 1) => log::LevelFilter::Info,
            (false, 2) => log::LevelFilter::Debug,
            (false, _) => log::LevelFilter::Trace,
        }
    }

    /// Returns `true` if any device of the machine is behind PCI. The console device of a command or an
    /// observation counts.
    fn uses_pci(&self) -> bool {
        let is_pci = |disk: &DiskOptions| disk.transport.unwrap_or(self.transport) == TransportChoice::Pci;
        let console = self.job.is_given() || self.observe.is_some();
        self.transport == TransportChoice::Pci && console || self.disks.iter().any(is_pci)
    }

    /// Returns what decides where the guest runs.
    pub fn asked(&self) -> Asked<'_> {
        Asked {
            choice: self.host.unwrap_or_default(),
            kernel: self.kernel.as_deref(),
            memory_mib: self.memory >> 20,
            more: find_guest::named_as_arguments(self.kernel.is_none(), self.initrd.is_none()),
        }
    }

    /// Returns the machine that the arguments describe, with the test guest for what was not given.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        self.job.warn_of_holes(&self.disks);
        let pci = self.uses_pci();
        let files = self.files();
        let initrd_given = self.initrd.is_some();
        let bundled = self.kernel.is_none() && !initrd_given;
        let hvc = self.wants_hvc(bundled);
        let for_terminal = self.terminal_cmdline(bundled);
        let (kernel, initrd) = match (self.kernel, self.initrd) {
            (Some(kernel), Some(initrd)) => (kernel, initrd),
            (kernel, initrd) => {
                let found = find_guest::find(kernel.is_none(), initrd.is_none())?;
                (kernel.unwrap_or(found.kernel), initrd.unwrap_or(found.initrd))
            }
        };
        let no_initrd = initrd_given && initrd.as_os_str() == "none";
        let console = self.job.console(self.console, self.verbose > 0)?;
        // A command line given by the user stays unchanged.
        let base = match self.job.is_given() && self.cmdline == cmdline::DEFAULT {
            true => cmdline::for_command(self.verbose > 0, pci),
            false => for_terminal,
        };
        let base = match self.observe.is_some() && self.cmdline == cmdline::DEFAULT {
            true => cmdline::append(&base, cmdline::OBSERVE),
            false => base,
        };
        let modules = test_guest::modules(self.modules, &kernel)?;
        Ok(Config {
            kernel,
            modules,
            hvc,
            initrd: (!no_initrd).then_some(initrd),
            cmdline: self.append.iter().fold(base, |line, more| cmdline::append(&line, more)),
            memory_bytes: self.memory,
            cpus: self.cpus,
            disks: disks(&self.disks, self.cpus),
            transport: self.transport,
            files,
            console,
            timeout: self.timeout,
            boot_timeout: self.job.boot_timeout(),
            stop_timeout: self.stop_timeout,
            stats: self.stats.map(|file| file.map_or(StatsTarget::Stderr, StatsTarget::Json)),
            observe: self.observe.map(|path| ObserveTarget { path, interval: self.observe_interval }),
            host_memory_limit: self.host_memory_limit,
            sandbox: self.sandbox,
            job: self.job.into_job().map(|job| job::archive(&job)).transpose()?,
        })
    }
}

/// minivmm's exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// The guest powered off or reset, or the user ended the VM with Ctrl-A x.
    Success,
    /// The command line is wrong. (For most errors clap supplies the message.)
    Usage,
    /// The guest panicked.
    GuestPanic,
    /// minivmm or the host failed.
    Failure,
    /// The time of --timeout elapsed.
    Timeout,
    /// A signal ended the VM.
    Signal(i32),
    /// A guest wrote this value to the exit port.
    ExitPort(u8),
    /// `check`: Linux guests do not run here.
    NoLinux,
    /// `crash`: some of the disks failed their check.
    NotGood,
    /// The guest's command ended; this is the exit status for it.
    Command(i32),
}

impl ExitStatus {
    /// Returns the number.
    pub fn code(self) -> i32 {
        match self {
            Self::Success => 0,
            Self::Usage => 2,
            Self::NoLinux | Self::NotGood => 1,
            Self::GuestPanic => 124,
            Self::Failure => 125,
            Self::Timeout => 126,
            Self::Signal(signal) => 128 + signal,
            Self::Command(status) => status,
            Self::ExitPort(value) => (i32::from(value) << 1 | 1) & 0xff,
        }
    }
}

impl From<Ending> for ExitStatus {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::PowerOff | Ending::Reset | Ending::Quit => Self::Success,
            Ending::GuestPanic => Self::GuestPanic,
            Ending::ExitPort(value) => Self::ExitPort(value),
            Ending::Signal(signal) => Self::Signal(signal),
            Ending::Timeout => Self::Timeout,
            Ending::Command(end, _) => Self::Command(end.exit_status()),
            Ending::NoReport | Ending::Incomplete(_) | Ending::BootTimeout(_) => Self::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_is_appended_goes_behind_what_is_there() {
        let line = |args: &[&str]| {
            let base = ["minivmm", "--kernel", "k", "--initrd", "none"];
            let args = Args::try_parse_from(base.iter().chain(args)).unwrap();
            args.into_config().unwrap().cmdline
        };
        assert_eq!(line(&[]), cmdline::DEFAULT);
        assert_eq!(line(&["--append", "a -- i", "--append", "b"]), format!("{} a b -- i", cmdline::DEFAULT));
        assert_eq!(line(&["--cmdline", "x", "--append", "-- i"]), "x -- i");
    }

    #[test]
    fn no_initrd_is_said_by_its_name_and_a_file_of_that_name_by_its_path() {
        let initrd = |path: &str| {
            let args = Args::try_parse_from(["minivmm", "--kernel", "k", "--initrd", path]).unwrap();
            args.into_config().unwrap().initrd
        };
        assert_eq!(initrd("none"), None);
        assert_eq!(initrd("./none"), Some("./none".into()));
    }

    #[test]
    fn each_status_has_its_number() {
        for (ending, code) in [
            (Ending::PowerOff, 0),
            (Ending::Reset, 0),
            (Ending::Quit, 0),
            (Ending::GuestPanic, 124),
            (Ending::Timeout, 126),
            (Ending::Signal(15), 143),
            (Ending::ExitPort(0), 1),
            (Ending::ExitPort(0x10), 33),
            (Ending::ExitPort(0xff), 255),
        ] {
            assert_eq!(ExitStatus::from(ending).code(), code, "{ending:?}");
        }
        assert_eq!((ExitStatus::Usage.code(), ExitStatus::Failure.code()), (2, 125));
    }
}
