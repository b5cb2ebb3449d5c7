//! The machine as a whole: built in order, run, stopped in order.
//!
//! Owns what a machine is asked for, the order of its life, and how it can end. The parts know nothing of each
//! other: here eventfds are bound to lines and addresses, and devices to buses.

mod build;
mod events;
mod hvc;
mod input;
mod job;
mod limits;
mod pace;
mod preflight;
mod running;
mod stop;
mod vanished;
mod watch;
mod wiring;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::blk::DeviceError;
use crate::boot::BootError;
use crate::boot::cpu::CpuError;
use crate::bus::BusError;
use crate::devices::kernel_log::KernelLog;
use crate::disk::{DiskOptions, ImageError, TransportChoice};
use crate::files::{Inventory, OutputRefused};
use crate::job::Archive;
use crate::job::report::{CommandEnd, Incomplete};
use crate::kvm::KvmError;
use crate::kvm::failure::Failure;
use crate::mem::RamError;
use crate::observe::control::ControlError;
use crate::observe::limit::{LimitError, MemoryLimit};
use crate::sandbox::{self, Role, SandboxError, Ticket};
use crate::signals::Signals;
use build::Machine;
pub use job::Times;
pub use limits::BootTimeout;
pub use preflight::Plan;
use running::Run;
use stop::StopError;
use vanished::ImageFiles;

/// What machine, with what guest.
#[derive(Debug)]
pub struct Config {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The archive with the kernel's other modules, put behind the initial RAM disk.
    pub modules: Option<PathBuf>,
    /// The kernel's parameters.
    pub cmdline: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How many CPUs.
    pub cpus: u8,
    /// The disks, in order.
    pub disks: Vec<DiskOptions>,
    /// How the guest reaches its virtio devices, where a disk does not say otherwise.
    pub transport: TransportChoice,
    /// All files that the command names, among them its outputs.
    pub files: Inventory,
    /// Where the serial port leads.
    pub console: ConsoleTarget,
    /// A terminal on standard input is the guest's hvc0 too, for an init that opens it.
    pub hvc: bool,
    /// How long the guest may run.
    pub timeout: Option<Duration>,
    /// How long the guest's init may take to report, where there is a command.
    pub boot_timeout: BootTimeout,
    /// How long the end may take where the host's disk hangs; see `--stop-timeout`.
    pub stop_timeout: Option<Duration>,
    /// Where the statistics go.
    pub stats: Option<StatsTarget>,
    /// Where the observation of the caches goes.
    pub observe: Option<ObserveTarget>,
    /// Bytes of the host's memory that this process may use.
    pub host_memory_limit: Option<u64>,
    /// The archive of a command that is the guest's only job.
    pub job: Option<Archive>,
    /// What the threads give up before the guest runs.
    pub sandbox: sandbox::Mode,
}

/// Where the statistics go at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatsTarget {
    /// To standard error, as text.
    Stderr,
    /// To a file, which begins empty, as JSON.
    Json(PathBuf),
}

/// Where an observation goes, and how often is looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObserveTarget {
    /// The CSV file, which begins empty.
    pub path: PathBuf,
    /// The time between two samples.
    pub interval: Duration,
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// To standard output, and standard input to it.
    Stdio,
    /// To standard error, without input.
    Stderr,
    /// Nowhere.
    Off,
    /// To a file, which begins empty.
    File(PathBuf),
}

/// How a VM ended that neither we nor the host have failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest has powered off.
    PowerOff,
    /// The guest has reset.
    Reset,
    /// The guest has panicked.
    GuestPanic,
    /// The guest has written to the exit port.
    ExitPort(u8),
    /// The user has typed Ctrl-A x.
    Quit,
    /// A signal.
    Signal(i32),
    /// The time is over.
    Timeout,
    /// The guest has powered off or reset after its command has ended.
    Command(CommandEnd, Times),
    /// The guest has powered off or reset, and never told how its command ended.
    NoReport,
    /// The guest has not started its command: not all of its files have come.
    Incomplete(Incomplete),
    /// The guest's init has not reported in this time.
    BootTimeout(Duration),
}

/// A run that is over.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub outcome: Result<Ending, VmmError>,
    /// What the guest's kernel has printed last, where the guest has not ended in order: from the line on that says
    /// what went wrong, or the last 40. None elsewhere.
    pub kernel_lines: Option<Vec<String>>,
    /// These lines have been on this process's standard output or error.
    pub lines_were_shown: bool,
}

/// Why a VM could not be built, run or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's")]
pub enum VmmError {
    #[error(transparent)]
    Image(#[from] ImageError),
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
    #[error(
        "--disk {first} and --disk {second} are the same bytes: give each disk an image of its own (readers can share \
         an image when all say readonly)"
    )]
    SameDisk { first: PathBuf, second: PathBuf },
    #[error("too many disks: {asked}, and there is room for {max}")]
    TooManyDisks { asked: usize, max: usize },
    #[error(
        "too many virtio-mmio devices: {asked}, and there are interrupt lines for {max} (use transport=pci)"
    )]
    TooManyMmio { asked: usize, max: usize },
    #[error(transparent)]
    File(#[from] OutputRefused),
    #[error("cannot write the statistics to {path}")]
    Stats { path: PathBuf, source: io::Error },
    #[error("cannot write the observation to {path}")]
    Observe { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    HostCache(#[from] ControlError),
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

/// To be used as `.map_err(host("..."))`.
fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> VmmError {
    move |source| VmmError::Host { what, source: source.into() }
}

/// Builds the machine, runs its guest to the end, stops it. `signals` are blocked already, so that all threads inherit
/// that, and stay blocked: whatever arrives after the first one does not keep us from the end.
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
    sandbox::arm(config.sandbox)?;
    let ticket = Ticket::new(Role::Main);
    let mut machine = build::build(config, log)?;
    let open = |target| stop::StatsReport::open(target, &config.files);
    let mut report = config.stats.as_ref().map(open).transpose()?;
    signals.started();
    let mut files = ImageFiles::watch(&machine.disks);
    let mut run = Run::new(&mut machine, signals, config)?;
    let ended = run
        .start(&mut machine, ticket)
        .and_then(|()| run.supervise(&mut files, &machine, &mut || tell(report.as_mut(), &machine)));
    let stopped = run.stop(&machine);
    let observed = std::mem::replace(&mut run.observed, Ok(()));
    // What the guest said last may have come to us only when its device was stopped.
    let ended = ended.and_then(|ending| run.with_command(ending));
    let reported = report.as_mut().map_or(Ok(()), |report| report.write(&machine.disks, &machine.exits));
    let reported = match (reported, observed) {
        (Ok(()), observed) => observed,
        (Err(error), observed) => Err(moreover(error, observed.err())),
    };
    if let Err(StopError::Stuck { .. }) = stopped {
        // Dropping devices waits for their I/O, which is what hangs.
        std::mem::forget(machine);
    }
    match (ended, stopped) {
        (Ok(ending), Ok(())) => reported.map(|()| ending),
        (Ok(_), Err(error)) => Err(moreover(error.into(), reported.err())),
        (Err(error), stopped) => Err(moreover(moreover(error, stopped.err()), reported.err())),
    }
}

/// The statistics as they are now, wherever they go at the end; to standard error where nobody has said.
fn tell(report: Option<&mut stop::StatsReport>, machine: &Machine) {
    let written = match report {
        Some(report) => report.write(&machine.disks, &machine.exits),
        None => stop::StatsReport::Stderr.write(&machine.disks, &machine.exits),
    };
    if let Err(error) = written {
        // The VM goes on; what is written at its end may do better.
        log::error!(
            "{error}: {}",
            std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
        );
    }
}

/// The first error is the one that counts; those that follow it are only told.
fn moreover(error: VmmError, next: Option<impl std::fmt::Display>) -> VmmError {
    if let Some(next) = next {
        log::error!("moreover: {next}");
    }
    error
}

/// Its arrival is all that matters: it interrupts KVM_RUN, or a write of the console.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
