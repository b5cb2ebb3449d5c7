//! The machine as a whole: it is built in order, run, and stopped in order.
//!
//! Owns the machine's configuration, the order of its life, and the ways in which it can end. The parts know
//! nothing of each other: this module binds eventfds to interrupt lines and addresses, and devices to buses.

mod build;
mod events;
mod hvc;
mod input;
mod job;
mod limits;
mod machine;
mod pace;
mod preflight;
mod running;
mod stop;
mod watch;
mod wiring;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::blk::DeviceError;
use crate::boot::BootError;
use crate::boot::cpu::CpuError;
use crate::bus::BusError;
use crate::devices::kernel_log::KernelLog;
use crate::disk_options::DiskOptions;
use crate::disks::end::StopError;
use crate::disks::report::{ObserveTarget, ReportError, StatsReport, StatsTarget};
use crate::disks::vanished::ImageFiles;
use crate::disks::{OpenError, SharedBytes};
use crate::files::{Inventory, OutputRefused};
use crate::job::Archive;
use crate::job::report::{CommandEnd, Incomplete};
use crate::kvm::KvmError;
use crate::kvm::failure::Failure;
use crate::mem::RamError;
use crate::observe::limit::{LimitError, MemoryLimit};
use crate::sandbox::{self, Role, SandboxEntry, SandboxError};
use crate::signals::Signals;
use crate::stats::ExitStats;
use crate::vcpu::Exits;
use crate::virtio::TransportChoice;
pub use job::Times;
pub use limits::BootTimeout;
use machine::Machine;
pub use preflight::Plan;
use running::RunningMachine;

/// Describes a machine and its guest.
#[derive(Debug)]
pub struct Config {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial RAM disk; `None` boots without one.
    pub initrd: Option<PathBuf>,
    /// The archive with the kernel's other modules, appended to the initial RAM disk. `None`: there is none.
    pub modules: Option<PathBuf>,
    /// The kernel command line.
    pub cmdline: String,
    /// The size of RAM in bytes.
    pub memory_bytes: u64,
    /// The number of CPUs.
    pub cpus: u8,
    /// The disks, in the order in which the guest sees them.
    pub disks: Vec<DiskOptions>,
    /// The transport of the virtio devices, unless a disk names its own.
    pub transport: TransportChoice,
    /// All files that the command line names, outputs included.
    pub files: Inventory,
    /// Where the serial port is connected.
    pub console: ConsoleTarget,
    /// `true` if a terminal on standard input also becomes the guest's hvc0, for an init that opens it.
    pub hvc: bool,
    /// How long the guest may run; `None` sets no limit.
    pub timeout: Option<Duration>,
    /// How long the guest's init may take to report, if there is a command.
    pub boot_timeout: BootTimeout,
    /// How long the stop may take if the host's disk hangs; see `--stop-timeout`. `None`: 60 s for CPUs and
    /// I/O in flight, no limit for the last fdatasync.
    pub stop_timeout: Option<Duration>,
    /// Where the statistics are written; `None` writes none at the end.
    pub stats: Option<StatsTarget>,
    /// Where the observation of the caches is written; `None` observes nothing.
    pub observe: Option<ObserveTarget>,
    /// Limit on the host memory of this process, in bytes; `None` sets no limit.
    pub host_memory_limit: Option<u64>,
    /// The archive of the command that is the guest's only job; `None` if there is no command.
    pub job: Option<Archive>,
    /// How much each thread gives up before the guest runs.
    pub sandbox: sandbox::Mode,
}

/// Where the serial port is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Its output goes to standard output, and its input comes from standard input.
    Stdio,
    /// Its output goes to standard error; it gets no input.
    Stderr,
    /// Its output is discarded.
    Off,
    /// Its output goes to a file, which is emptied first.
    File(PathBuf),
}

/// How a VM ended, if neither minivmm nor the host failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest reset.
    Reset,
    /// The guest panicked.
    GuestPanic,
    /// The guest wrote this value to the exit port.
    ExitPort(u8),
    /// The user typed Ctrl-A x.
    Quit,
    /// This signal arrived.
    Signal(i32),
    /// The time of `--timeout` elapsed.
    Timeout,
    /// The guest powered off or reset after its command ended.
    Command(CommandEnd, Times),
    /// The guest powered off or reset without reporting how its command ended.
    NoReport,
    /// The guest did not start its command, because some of the command's files did not arrive.
    Incomplete(Incomplete),
    /// The guest's init did not report within this time.
    BootTimeout(Duration),
}

/// The result of a finished run.
#[derive(Debug)]
pub struct Ended {
    /// How the VM ended, or why it failed.
    pub outcome: Result<Ending, VmmError>,
    /// The last lines that the guest's kernel printed, from the line that says what went wrong; without such
    /// a line, the last 40. `Some` after a panic, a failure of a CPU, an end without the command's report, or
    /// a timeout of a run with a command. `None` after every other end.
    pub kernel_lines: Option<Vec<String>>,
    /// `true` if these lines already appeared on this process's standard output or standard error.
    pub lines_were_shown: bool,
}

/// Why a VM could not be built, run or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's")]
pub enum VmmError {
    #[error(transparent)]
    Disk(#[from] OpenError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Stop(#[from] StopError),
    #[error(transparent)]
    SameDisk(#[from] SharedBytes),
    #[error("too many disks: {asked}, and at most {max} are possible")]
    TooManyDisks { asked: usize, max: usize },
    #[error(
        "too many virtio-mmio devices: {asked}, and there are interrupt lines for {max} (use transport=pci)"
    )]
    TooManyMmio { asked: usize, max: usize },
    #[error(transparent)]
    File(#[from] OutputRefused),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot apply --host-memory-limit")]
    Limit(#[from] LimitError),
    #[error("cannot write the command's {stream}, and some of it is lost")]
    Output { stream: &'static str, source: io::Error },
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("{0}")]
    Vcpu(Box<Failure>),
    #[error("the thread of CPU {0} panicked; this is an error in minivmm")]
    Panicked(u8),
}

/// Returns a function that wraps an error as [`VmmError::Host`], for use as `.map_err(host("..."))`.
fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> VmmError {
    move |source| VmmError::Host { what, source: source.into() }
}

/// Builds the machine, runs its guest until it ends, and stops the machine. The caller has already blocked
/// `signals`, so all threads inherit the mask. They stay blocked: a signal after the first one cannot
/// interrupt the stop.
pub fn run(config: &Config, signals: &Signals) -> Ended {
    let log = KernelLog::default();
    let outcome = run_logged(config, signals, &log);
    let is_told = match &outcome {
        Ok(Ending::GuestPanic | Ending::NoReport | Ending::Incomplete(_) | Ending::BootTimeout(_)) => true,
        Ok(Ending::Timeout) => config.job.is_some(),
        Err(VmmError::Vcpu(_)) => true,
        _ => false,
    };
    let lines_were_shown = matches!(config.console, ConsoleTarget::Stdio | ConsoleTarget::Stderr);
    Ended { outcome, kernel_lines: is_told.then(|| log.lines()), lines_were_shown }
}

fn run_logged(config: &Config, signals: &Signals, log: &KernelLog) -> Result<Ending, VmmError> {
    if let Some(refused) = Plan::of(config).refusals().into_iter().next() {
        return Err(refused);
    }
    register_signal_handler(SIGRTMIN(), on_kick).map_err(host("handle the signal that stops a CPU"))?;
    if let Some(limit) = config.host_memory_limit.filter(|limit| *limit <= config.memory_bytes) {
        log::warn!(
            "--host-memory-limit is {} MiB, and the guest's memory alone may grow to {} MiB: the host's kernel \
             may then kill minivmm",
            limit >> 20,
            config.memory_bytes >> 20
        );
    }
    let _limit = config.host_memory_limit.map(MemoryLimit::of_this_process).transpose()?;
    sandbox::arm(config.sandbox, &Role::OF_VM, sandbox::VM_SPARE_DESCRIPTORS)?;
    let entry = SandboxEntry::new(Role::Main);
    let mut machine = build::build(config, log)?;
    let open = |target| StatsReport::open(target, &config.files);
    let mut report = config.stats.as_ref().map(open).transpose()?;
    signals.started();
    let mut files = ImageFiles::watch(&machine.disks);
    let mut run = RunningMachine::new(&mut machine, signals, config)?;
    let ended = run
        .start(&mut machine, entry)
        .and_then(|()| run.supervise(&mut files, &machine, &mut || tell(report.as_mut(), &machine)));
    let stopped = run.stop(&machine);
    let observed = std::mem::replace(&mut run.observed, Ok(()));
    // The guest's last message may have reached us only when its device was stopped.
    let ended = ended.and_then(|ending| run.with_command(ending));
    let reported =
        report.as_mut().map_or(Ok(()), |report| report.write(&machine.disks, counted(&machine.exits)));
    let reported = match (reported, observed) {
        (Ok(()), observed) => observed.map_err(VmmError::from),
        (Err(error), observed) => Err(moreover(error.into(), observed.err())),
    };
    if let Err(StopError::Stuck { .. }) = stopped {
        // Dropping the devices would wait for their I/O, and that I/O is what hangs.
        std::mem::forget(machine);
    }
    match (ended, stopped) {
        (Ok(ending), Ok(())) => reported.map(|()| ending),
        (Ok(_), Err(error)) => Err(moreover(error.into(), reported.err())),
        (Err(error), stopped) => Err(moreover(moreover(error, stopped.err()), reported.err())),
    }
}

/// Writes the current statistics to where they go at the end, or to standard error if no target is
/// configured.
fn tell(report: Option<&mut StatsReport>, machine: &Machine) {
    let written = match report {
        Some(report) => report.write(&machine.disks, counted(&machine.exits)),
        None => StatsReport::Stderr.write(&machine.disks, counted(&machine.exits)),
    };
    if let Err(error) = written {
        // The VM goes on; writing the statistics at the end may succeed.
        log::error!(
            "{error}: {}",
            std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
        );
    }
}

/// Returns how often the CPUs have left KVM_RUN, for the statistics.
fn counted(exits: &Exits) -> ExitStats {
    let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    ExitStats {
        mmio_read: at(&exits.mmio_reads),
        mmio_write: at(&exits.mmio_writes),
        port_read: at(&exits.port_reads),
        port_write: at(&exits.port_writes),
        other: at(&exits.others),
    }
}

/// Returns the first error, which is the one that counts; an error that follows it is only logged.
fn moreover(error: VmmError, next: Option<impl std::fmt::Display>) -> VmmError {
    if let Some(next) = next {
        log::error!("moreover: {next}");
    }
    error
}

/// Does nothing: the signal's arrival alone interrupts KVM_RUN or a write of the console.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
