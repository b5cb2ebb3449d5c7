//! A running machine: starts its CPUs, waits for what ends it, and stops it.
//!
//! Owns the main thread's loop, and how each event ends the VM. What is built before and reported after is
//! `vmm`'s; the orderly stop is [`super::stop`]'s.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use super::events::{self, Reporter, Reports, ThreadReport};
use super::hvc::{self, HvcEnd};
use super::input::{Console, READ_BYTES_MAX, Wish};
use super::job::JobEnd;
use super::limits::{BootTimeout, Heard, Limits, Over, Standing};
use super::machine::{Machine, SerialEnd};
use super::stop::{self, VcpuThread};
use super::{Config, ConsoleTarget, Ending, VmmError, host, pace};
use crate::bus::Outcome;
use crate::disk::Image;
use crate::disks::end::{self, Ender, Patience, StopError};
use crate::disks::report::{ReportError, Watch};
use crate::disks::vanished::ImageFiles;
use crate::sandbox::{self, Role, SandboxEntry};
use crate::signals::Signals;
use crate::terminal::{self, Input, RawMode};
use crate::vcpu::{End, Vcpu};

/// How soon the serial port is tried again while a CPU holds its lock.
const RETRY: Duration = Duration::from_millis(10);

/// A running machine.
pub(super) struct RunningMachine<'a> {
    signals: &'a Signals,
    reports: Reports,
    threads: Vec<VcpuThread>,
    ender: Ender,
    serial: SerialEnd,
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
    /// How its observation ended.
    pub(super) observed: Result<(), ReportError>,
    begin: Instant,
}

impl<'a> RunningMachine<'a> {
    pub(super) fn new(
        machine: &mut Machine,
        signals: &'a Signals,
        config: &Config,
    ) -> Result<Self, VmmError> {
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
                .map(|target| Watch::begin(target, &config.files, &machine.disks, machine.observed.take()))
                .transpose()?,
            observed: Ok(()),
            begin: Instant::now(),
        })
    }

    /// Starts the CPUs. None runs a guest before every thread is in the sandbox, including this one through
    /// its `entry`.
    pub(super) fn start(&mut self, machine: &mut Machine, entry: SandboxEntry) -> Result<(), VmmError> {
        for vcpu in machine.vcpus.drain(..) {
            let reporter = self.reports.reporter().map_err(host("make an eventfd"))?;
            let page = Arc::clone(&vcpu.page);
            let stopping = machine.stopping.clone();
            let theirs = SandboxEntry::new(Role::Vcpu);
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
        entry.enter();
        Ok(())
    }

    /// Waits for what ends the VM, and moves input meanwhile; `tell` writes the statistics.
    pub(super) fn supervise(
        &mut self,
        files: &mut ImageFiles,
        machine: &Machine,
        tell: &mut dyn FnMut(),
    ) -> Result<Ending, VmmError> {
        let mut retry = false;
        loop {
            let waits = [self.limits.wait(Instant::now()), files.wait(), retry.then_some(RETRY)];
            let timeout = waits.into_iter().flatten().min();
            let [signal, report, asked, typed, told, panic, renamed] = events::wait(
                [
                    Some(self.signals.as_raw_fd()),
                    Some(self.reports.as_raw_fd()),
                    Some(self.serial.wants_input.as_raw_fd()),
                    self.console.wants_to_read().then(|| self.stdin.as_raw_fd()),
                    self.job.as_ref().map(JobEnd::as_raw_fd),
                    Some(self.serial.alarm.as_raw_fd()),
                    files.as_raw_fd(),
                ],
                timeout,
            )
            .map_err(host("wait for events"))?;
            if told && let Some(job) = &mut self.job {
                job.listen();
            }
            // Also on a signal, so that the statistics which it may ask for are preceded by this check.
            if renamed || signal || files.wait() == Some(Duration::ZERO) {
                files.look(&machine.disks);
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
            // An eventfd that is ready has a value to read; only this thread reads it.
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

    fn ending_of(&self, report: ThreadReport) -> Result<Ending, VmmError> {
        match report {
            ThreadReport::Panicked(id) => Err(VmmError::Panicked(id)),
            ThreadReport::Vcpu(_, End::Failed(failure)) => Err(VmmError::Vcpu(failure)),
            ThreadReport::Vcpu(_, End::Outcome(outcome)) => Ok(match outcome {
                Outcome::Exit(value) => Ending::ExitPort(value),
                Outcome::GuestPanic => Ending::GuestPanic,
                // Until its pvpanic driver is loaded, a guest can only print a panic and reset.
                Outcome::Reset if self.serial.panicked.get() => Ending::GuestPanic,
                Outcome::Reset => Ending::Reset,
                Outcome::Shutdown | Outcome::Continue => Ending::PowerOff,
            }),
            // A CPU is told to stop only when the machine is stopped, which has not begun.
            ThreadReport::Vcpu(id, End::Stopped) => Err(VmmError::Panicked(id)),
        }
    }

    /// Returns what an ordinary end means if the guest had a command to run.
    pub(super) fn with_command(&mut self, ending: Ending) -> Result<Ending, VmmError> {
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

    /// Returns how the VM ends if a time limit has expired, or `None`.
    fn over_limit(&mut self) -> Option<Ending> {
        let counted = |image: &Arc<Image>| {
            image.stats.counters().snapshot().iter().map(|(_, count)| count).sum::<u64>()
        };
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
                // As after an orderly end, what the guest has reported is what counts.
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

    /// Hands waiting input to the guest, and returns `true` if it must be tried again soon. The port's lock
    /// is only tried: a CPU may hold it for long if the reader of our output is slow.
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

    pub(super) fn stop(&mut self, machine: &Machine) -> Result<(), StopError> {
        machine.stopping.set();
        stop::stop_vcpus(&self.threads, self.patience, self.signals)?;
        for vcpu in self.threads.drain(..) {
            // The thread itself has reported its panic.
            let _ = vcpu.thread.join();
        }
        self.raw_mode = None;
        stop::drain(&self.ender, machine, self.patience, self.signals)?;
        // Observes the state in which the guest left the caches, before the close: dirty data is still dirty.
        self.observed = self.watch.take().map_or(Ok(()), Watch::end);
        end::close(&self.ender, &machine.disks, self.patience, self.signals)
    }
}

/// Runs a vCPU on its own thread and reports how it ended.
fn run_vcpu(mut vcpu: Vcpu, reporter: Reporter, stopping: &dyn Fn() -> bool) {
    /// Reports the panic of a thread that does not reach its own report.
    struct Unreported<'a>(&'a Reporter, u8);
    impl Drop for Unreported<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.send(ThreadReport::Panicked(self.1));
            }
        }
    }
    let _unreported = Unreported(&reporter, vcpu.id);
    let end = vcpu.run(stopping);
    if let End::Stopped = end {
        return;
    }
    reporter.send(ThreadReport::Vcpu(vcpu.id, end));
}
