//! The machine as a whole: built in order, run, stopped in order.
//!
//! Owns the order, and which event ends the VM with what. The parts know nothing of each other:
//! here eventfds are bound to lines and addresses, and devices to buses.

mod build;
mod events;
mod hvc;
mod input;
mod job;
mod limits;
mod pace;
mod preflight;
mod stop;
mod vanished;
mod watch;
mod wiring;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::{Arc, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::blk::DeviceError;
use crate::boot::BootError;
use crate::boot::cpu::CpuError;
use crate::bus::{BusError, Outcome};
use crate::devices::kernel_log::KernelLog;
use crate::disk::{DiskOptions, Image, ImageError, TransportChoice};
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
use crate::terminal::{self, Input, RawMode};
use crate::vcpu::{End, Vcpu};
use build::Machine;
use events::{Report, Reporter, Reports};
use hvc::HvcEnd;
use input::{Console, READ_BYTES_MAX, Wish};
use job::JobEnd;
pub use job::Times;
pub use limits::BootTimeout;
use limits::{Heard, Limits, Over, Standing};
pub use preflight::Plan;
use stop::{Ender, Patience, StopError, VcpuThread};
use vanished::Names;
use watch::Watch;

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
    #[error("--host-memory-limit cannot be had")]
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
    let mut names = Names::watch(&machine.disks);
    let mut run = Run::new(&mut machine, signals, config)?;
    let ended = run
        .start(&mut machine, ticket)
        .and_then(|()| run.supervise(&mut names, &machine, &mut || tell(report.as_mut(), &machine)));
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

/// How soon the serial port is tried again while its CPU is in it.
const RETRY: Duration = Duration::from_millis(10);

/// A machine that runs.
struct Run<'a> {
    signals: &'a Signals,
    reports: Reports,
    threads: Vec<VcpuThread>,
    ender: Ender,
    serial: build::SerialEnd,
    stdin: File,
    console: Console,
    hvc: Option<HvcEnd>,
    raw_mode: Option<RawMode>,
    timeout: Option<Duration>,
    boot_timeout: BootTimeout,
    limits: Limits,
    images: Vec<Arc<Image>>,
    patience: Patience,
    job: Option<JobEnd>,
    watch: Option<Watch>,
    /// How its observation has ended.
    observed: Result<(), VmmError>,
    begin: Instant,
}

impl<'a> Run<'a> {
    fn new(machine: &mut Machine, signals: &'a Signals, config: &Config) -> Result<Self, VmmError> {
        let kind = (config.console == ConsoleTarget::Stdio).then(terminal::input);
        if kind == Some(Input::Background) {
            log::warn!("minivmm is in the background of its terminal: the guest gets no input");
        }
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(host("use standard input"))?;
        Ok(Self {
            signals,
            reports: Reports::new().map_err(host("make an eventfd"))?,
            threads: Vec::new(),
            ender: Ender::start().map_err(host("start a thread for the end"))?,
            serial: machine.serial.clone(),
            stdin: stdin.into(),
            console: Console::new(kind),
            hvc: machine.hvc.take(),
            raw_mode: match kind {
                Some(Input::Terminal) => {
                    Some(RawMode::enter().map_err(host("put the terminal into raw mode"))?)
                }
                _ => None,
            },
            timeout: config.timeout,
            boot_timeout: config.boot_timeout,
            limits: Limits::begin(Instant::now(), None, BootTimeout::Never, pace::slowness),
            images: machine.disks.iter().map(|disk| Arc::clone(&disk.image)).collect(),
            patience: Patience::new(config.stop_timeout),
            job: machine.job.take(),
            watch: config
                .observe
                .as_ref()
                .map(|target| Watch::begin(target, &config.files, machine))
                .transpose()?,
            observed: Ok(()),
            begin: Instant::now(),
        })
    }

    /// Starts the CPUs. None runs before every thread, this one by its `ticket`, is in the sandbox.
    fn start(&mut self, machine: &mut Machine, ticket: Ticket) -> Result<(), VmmError> {
        for vcpu in machine.vcpus.drain(..) {
            let reporter = self.reports.reporter().map_err(host("make an eventfd"))?;
            let page = Arc::clone(&vcpu.page);
            let stopping = machine.stopping.clone();
            let theirs = Ticket::new(Role::Vcpu);
            let thread = thread::Builder::new()
                .name(format!("vcpu{}", vcpu.id))
                .spawn(move || {
                    theirs.enter();
                    sandbox::wait_for_all();
                    run_vcpu(vcpu, reporter, &|| stopping.is_set());
                })
                .map_err(host("start a thread for a CPU"))?;
            self.threads.push(VcpuThread { thread, page });
        }
        self.begin = Instant::now();
        self.limits = Limits::begin(self.begin, self.timeout, self.boot_timeout, pace::slowness);
        ticket.enter();
        Ok(())
    }

    /// Waits for what ends the VM, and moves input meanwhile; `tell` tells the statistics.
    fn supervise(
        &mut self,
        names: &mut Names,
        machine: &Machine,
        tell: &mut dyn FnMut(),
    ) -> Result<Ending, VmmError> {
        let mut retry = false;
        loop {
            let left = self.limits.wait(Instant::now());
            let timeout = if retry { Some(left.map_or(RETRY, |left| left.min(RETRY))) } else { left };
            let [signal, report, asked, typed, told, panic, renamed] = events::wait(
                [
                    Some(self.signals.as_raw_fd()),
                    Some(self.reports.as_raw_fd()),
                    Some(self.serial.wants_input.as_raw_fd()),
                    self.console.wants_to_read().then(|| self.stdin.as_raw_fd()),
                    self.job.as_ref().map(JobEnd::as_raw_fd),
                    Some(self.serial.alarm.as_raw_fd()),
                    names.as_raw_fd(),
                ],
                timeout,
            )
            .map_err(host("wait for events"))?;
            if told && let Some(job) = &mut self.job {
                job.listen();
            }
            // Also with the statistics that a signal asks for: not every file system tells of it.
            if renamed || signal {
                names.look(&machine.disks);
            }
            if let Some(ending) = signal.then(|| self.take_signals(tell)).flatten() {
                return Ok(ending);
            }
            if report && let Some(report) = self.reports.take() {
                return self.ending_of(report);
            }
            if typed && self.read_input() == Wish::Quit {
                return Ok(Ending::Quit);
            }
            // An eventfd that was ready has something to read; nobody else reads it.
            if asked {
                let _ = self.serial.wants_input.read();
            }
            if panic {
                let _ = self.serial.alarm.read();
            }
            retry = self.hand_input_over();
            if let Some(ending) = self.over_limit() {
                return Ok(ending);
            }
        }
    }

    fn take_signals(&self, tell: &mut dyn FnMut()) -> Option<Ending> {
        while let Some(signal) = self.signals.take() {
            match (signal.number, &self.raw_mode) {
                (libc::SIGCONT, Some(raw_mode)) => raw_mode.renew(),
                (libc::SIGUSR1, _) => tell(),
                (libc::SIGWINCH, _) => self.hvc.iter().for_each(HvcEnd::follow_terminal),
                (number, _) if signal.is_ending() => return Some(Ending::Signal(number)),
                _ => {}
            }
        }
        None
    }

    fn ending_of(&self, report: Report) -> Result<Ending, VmmError> {
        match report {
            Report::Panicked(id) => Err(VmmError::Panicked(id)),
            Report::Vcpu(_, End::Failed(failure)) => Err(VmmError::Vcpu(failure)),
            Report::Vcpu(_, End::Outcome(outcome)) => Ok(match outcome {
                Outcome::Exit(value) => Ending::ExitPort(value),
                Outcome::GuestPanic => Ending::GuestPanic,
                // Before its pvpanic driver is loaded a guest can only print, and reset.
                Outcome::Reset if self.serial.panicked.get() => Ending::GuestPanic,
                Outcome::Reset => Ending::Reset,
                Outcome::Shutdown | Outcome::Continue => Ending::PowerOff,
            }),
            // Nobody stops a CPU before the machine is stopped.
            Report::Vcpu(id, End::Stopped) => Err(VmmError::Panicked(id)),
        }
    }

    /// What an ordinary end means where the guest had a command to run.
    fn with_command(&mut self, ending: Ending) -> Result<Ending, VmmError> {
        let Some(job) = &mut self.job else { return Ok(ending) };
        if !matches!(ending, Ending::PowerOff | Ending::Reset) {
            return Ok(ending);
        }
        if let Ok([true]) = events::wait([Some(job.as_raw_fd())], Some(Duration::ZERO)) {
            job.listen();
        }
        if let Some((stream, source)) = job.lost_output() {
            return Err(VmmError::Output { stream, source });
        }
        Ok(match (job.ended(self.begin), job.incomplete()) {
            (Some((end, times)), _) => Ending::Command(end, times),
            (None, Some(what)) => Ending::Incomplete(what),
            (None, None) => Ending::NoReport,
        })
    }

    /// What the VM ends with, if a limit of time is over.
    fn over_limit(&mut self) -> Option<Ending> {
        let counted =
            |image: &Arc<Image>| image.counters().snapshot().iter().map(|(_, count)| count).sum::<u64>();
        let heard = self.job.as_ref().map(JobEnd::heard);
        let requests = match heard {
            Some(Heard::Ended) => self.images.iter().map(counted).fold(0, u64::wrapping_add),
            _ => 0,
        };
        let panicked = self.serial.panicked.get();
        match self.limits.check(Standing { at: Instant::now(), heard, panicked, requests })? {
            Over::Timeout => Some(self.timed_out()),
            Over::Boot(limit) => Some(Ending::BootTimeout(limit)),
            Over::Panic => Some(Ending::GuestPanic),
            Over::Off(limit) => {
                log::warn!(
                    "the guest has told how its command ended, and in {} s has neither used a disk nor switched \
                     itself off: it is ended, and what it has not written to its disks is lost",
                    limit.as_secs()
                );
                // As after an end in order: what it has told is what counts.
                Some(Ending::PowerOff)
            }
        }
    }

    fn timed_out(&self) -> Ending {
        if self.serial.panicked.get() {
            log::warn!(
                "the guest's kernel had panicked, and did not reset (panic=-1 on its command line does)"
            );
        }
        Ending::Timeout
    }

    fn read_input(&mut self) -> Wish {
        let mut buffer = [0; READ_BYTES_MAX];
        let result = self.stdin.read(&mut buffer).map(|count| buffer.get(..count).unwrap_or_default());
        self.console.take_read(result)
    }

    /// Whether it has to be tried again soon. The port's lock is only tried: a CPU may hold it for
    /// long, when whoever reads our output does not.
    fn hand_input_over(&mut self) -> bool {
        if let Some(retry) = hvc::serve(self.hvc.as_ref(), &mut self.console, self.begin) {
            return retry;
        }
        let mut port = match self.serial.port.try_lock() {
            Ok(port) => port,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return true,
        };
        self.console.hand_over(|bytes| port.offer(bytes));
        false
    }

    fn stop(&mut self, machine: &Machine) -> Result<(), StopError> {
        machine.stopping.set();
        stop::stop_vcpus(&self.threads, self.patience, self.signals)?;
        for vcpu in self.threads.drain(..) {
            // A panic has been reported by the thread itself.
            let _ = vcpu.thread.join();
        }
        self.raw_mode = None;
        stop::drain(&self.ender, machine, self.patience, self.signals)?;
        // As the guest has left it: what is dirty still is.
        self.observed = self.watch.take().map_or(Ok(()), Watch::end);
        stop::close(&self.ender, &machine.disks, self.patience, self.signals)
    }
}

/// A vCPU's thread.
fn run_vcpu(mut vcpu: Vcpu, reporter: Reporter, stopping: &dyn Fn() -> bool) {
    /// Reports the panic of a thread that does not get to its own report.
    struct Unreported<'a>(&'a Reporter, u8);
    impl Drop for Unreported<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.send(Report::Panicked(self.1));
            }
        }
    }
    let _unreported = Unreported(&reporter, vcpu.id);
    let end = vcpu.run(stopping);
    if let End::Stopped = end {
        return;
    }
    reporter.send(Report::Vcpu(vcpu.id, end));
}
