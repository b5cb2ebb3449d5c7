//! The export as a whole: it is built in order, run until a signal ends it, and stopped in order.
//!
//! Owns the order. The images are opened and locked first, so that of two daemons for one image only one comes to its
//! socket. The stop is a VM's: I/O in flight, the last sample, the last fdatasync, the statistics.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use minivmm::disk_options::DiskOptions;
use minivmm::disks::end::{self, Ender, Patience, StopError};
use minivmm::disks::report::{ObserveTarget, ReportError, StatsReport, StatsTarget, Watch};
use minivmm::disks::vanished::ImageFiles;
use minivmm::disks::{self, OpenDisk, OpenError, SharedBytes};
use minivmm::files::{Inventory, OutputRefused};
use minivmm::sandbox::{self, Role, SandboxEntry, SandboxError};
use minivmm::signals::Signals;
use minivmm::stats::ExitStats;
use minivmm_block::blk::{BlockDevice, DeviceError};
use minivmm_block::mem::survive_lost_memory;

use crate::backend::Backend;
use crate::serve::SocketThread;
use crate::socket::{Listener, Made, Place, SocketError};

/// How many descriptors a connection may need beside those of its rings: the connection itself, a region of memory
/// for each message and for the table, the inflight region.
const DESCRIPTORS_OF_CONNECTION: u64 = 2 * crate::table::REGIONS_MAX as u64 + 8;
/// How many descriptors a ring may need: its kick, call, err and doorbell, each while the previous one is open.
const DESCRIPTORS_OF_RING: u64 = 8;

/// A disk and where its front end is waited for.
#[derive(Debug, Clone)]
pub struct Exported {
    /// The disk.
    pub disk: DiskOptions,
    /// Its socket.
    pub place: Place,
}

/// What is exported, and how it is watched.
#[derive(Debug)]
pub struct Config {
    /// The disks, in the order of the command line.
    pub exports: Vec<Exported>,
    /// Where the statistics are written; `None` writes none at the end.
    pub stats: Option<StatsTarget>,
    /// Where the observation of the caches is written; `None` observes nothing.
    pub observe: Option<ObserveTarget>,
    /// How long the stop may take if the host's disk hangs; `None` is as for a VM.
    pub stop_timeout: Option<Duration>,
    /// How much each thread gives up before a front end is served.
    pub sandbox: sandbox::Mode,
    /// All files that the command line names.
    pub files: Inventory,
}

/// Why an export could not be built, run or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's")]
pub enum ExportError {
    #[error(transparent)]
    File(#[from] OutputRefused),
    #[error(transparent)]
    SameDisk(#[from] SharedBytes),
    #[error(transparent)]
    Disk(#[from] OpenError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Stop(#[from] StopError),
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Host { what, source }
}

impl Config {
    fn options(&self) -> Vec<DiskOptions> {
        self.exports.iter().map(|export| export.disk.clone()).collect()
    }

    /// Returns every reason, found without opening anything, for which nothing would be exported.
    pub fn refusals(&self) -> Vec<ExportError> {
        let files = self.files.check().into_iter().map(ExportError::from);
        files.chain(disks::shared_bytes(&self.options()).into_iter().map(ExportError::from)).collect()
    }
}

/// Exports the disks until a signal ends it, whose number is returned. The caller has blocked `signals`.
pub fn run(config: &Config, signals: &Signals) -> Result<libc::c_int, ExportError> {
    if let Some(refused) = config.refusals().into_iter().next() {
        return Err(refused);
    }
    let rings: u64 = config.exports.iter().map(|export| u64::from(export.disk.config.queue_count())).sum();
    let connections = config.exports.len() as u64;
    let spare = connections * DESCRIPTORS_OF_CONNECTION + rings * DESCRIPTORS_OF_RING;
    sandbox::arm(config.sandbox, &Role::OF_EXPORT, spare + sandbox::VM_SPARE_DESCRIPTORS)?;
    survive_lost_memory().map_err(host("handle SIGBUS"))?;
    let entry = SandboxEntry::new(Role::Export);
    let mut export = Export::build(config)?;
    signals.started();
    let ended = export.supervise(signals, entry);
    let stopped = export.stop(Patience::new(config.stop_timeout), signals);
    let reported = export.report.as_mut().map_or(Ok(()), |it| it.write(&export.disks, ExitStats::default()));
    if matches!(stopped, Err(ExportError::Stop(StopError::Stuck { .. }))) {
        // Dropping the devices would wait for their I/O, and that I/O is what hangs.
        std::mem::forget(export);
    }
    let reported = reported.map_err(ExportError::from);
    first_error(ended, first_error(stopped, reported))
}

/// Returns the first error, which is the one that counts; an error that follows it is only logged.
fn first_error<T>(first: Result<T, ExportError>, next: Result<(), ExportError>) -> Result<T, ExportError> {
    match (first, next) {
        (Ok(_), Err(error)) => Err(error),
        (Err(error), Err(next)) => {
            log::error!("moreover: {next}");
            Err(error)
        }
        (first, Ok(())) => first,
    }
}

/// A running export.
struct Export {
    disks: Vec<OpenDisk>,
    sockets: Vec<SocketThread>,
    /// The sockets' names, to be removed.
    names: Vec<Made>,
    ender: Ender,
    watch: Option<Watch>,
    report: Option<StatsReport>,
}

impl Export {
    fn build(config: &Config) -> Result<Self, ExportError> {
        let options = config.options();
        let workers: usize = options.iter().map(|disk| usize::from(disk.config.queue_count())).sum();
        // Each worker has a guest's CPU, or another thread, that feeds it.
        let disks = disks::open(&options, 2 * workers, config.stats.is_some())?;
        let mut listeners = Vec::with_capacity(config.exports.len());
        for export in &config.exports {
            listeners.push(Listener::open(&export.place)?);
        }
        let names = listeners.iter_mut().filter_map(Listener::take_name).collect();
        let mut export = Self {
            sockets: Vec::with_capacity(disks.len()),
            disks,
            names,
            ender: Ender::start().map_err(host("start a thread for the end"))?,
            watch: None,
            report: None,
        };
        let built = export.start(config, listeners);
        if built.is_err() {
            export.remove_names();
        }
        built.map(|()| export)
    }

    fn start(&mut self, config: &Config, listeners: Vec<Listener>) -> Result<(), ExportError> {
        for ((disk, listener), letter) in self.disks.iter().zip(listeners).zip('a'..='z') {
            let device = BlockDevice::new(&format!("vd{letter}"), Arc::clone(&disk.image))?;
            log::info!(
                "vd{letter}: engine={}, stable={}, queues={}",
                device.engine().name(),
                disk.image.config().stable.name(),
                device.queues()
            );
            let backend = Backend::new(device, Arc::clone(&disk.image)).map_err(host("make an eventfd"))?;
            let thread = SocketThread::start(format!("vd{letter}-socket"), listener.socket, backend);
            self.sockets.push(thread.map_err(host("start a thread for a socket"))?);
        }
        let open = |target| StatsReport::open(target, &config.files);
        self.report = config.stats.as_ref().map(open).transpose()?;
        let watch = |target| Watch::begin(target, &config.files, &self.disks, None);
        self.watch = config.observe.as_ref().map(watch).transpose()?;
        Ok(())
    }

    /// Enters the sandbox, then waits for the signal that ends the export.
    fn supervise(&mut self, signals: &Signals, entry: SandboxEntry) -> Result<libc::c_int, ExportError> {
        let mut files = ImageFiles::watch(&self.disks);
        let directories: Result<Vec<File>, _> =
            self.names.iter().map(|name| name.directory().try_clone()).collect();
        entry.enter_removing(&directories.map_err(host("use a socket's directory"))?);
        loop {
            let fds = [Some(signals.as_raw_fd()), files.as_raw_fd()];
            wait(fds, files.wait()).map_err(host("wait for events"))?;
            files.look(&self.disks);
            while let Some(signal) = signals.take() {
                if signal.number == libc::SIGUSR1 {
                    self.tell();
                } else if signal.is_ending() {
                    return Ok(signal.number);
                }
            }
        }
    }

    /// Writes the current statistics to where they go at the end, or to standard error.
    fn tell(&mut self) {
        let mut stderr = StatsReport::Stderr;
        let report = self.report.as_mut().unwrap_or(&mut stderr);
        if let Err(error) = report.write(&self.disks, ExitStats::default()) {
            // The export goes on; writing the statistics at the end may succeed.
            log::error!("{error}");
        }
    }

    fn stop(&mut self, patience: Patience, signals: &Signals) -> Result<(), ExportError> {
        // From now on nobody finds us.
        self.remove_names();
        self.sockets.iter().for_each(SocketThread::end);
        let done = || self.sockets.iter().all(SocketThread::has_ended);
        end::wait_until(done, || end::in_flight(&self.disks), Some(patience.drain), signals)?;
        let observed = self.watch.take().map_or(Ok(()), Watch::end).map_err(ExportError::from);
        let closed = end::close(&self.ender, &self.disks, patience, signals).map_err(ExportError::from);
        first_error(closed, observed)
    }

    fn remove_names(&mut self) {
        for name in self.names.drain(..) {
            if let Err(error) = name.remove() {
                log::warn!("a socket cannot be removed: {error}");
            }
        }
    }
}

/// Waits until a descriptor can be read, or until `timeout` has passed.
fn wait(fds: [Option<libc::c_int>; 2], timeout: Option<Duration>) -> io::Result<()> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
    let limit = |it: Duration| i32::try_from(it.as_millis() + 1).unwrap_or(i32::MAX);
    // SAFETY: the pointer and the count are those of one array.
    if unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout.map_or(-1, limit)) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    Ok(())
}
