//! Builds the machine: disks first, so that their errors are reported before anything else is done.
//!
//! Owns the order and the wiring. Whatever a later step needs from an earlier one is passed as an argument.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::hvc::{self, HvcEnd};
use super::job::{self, JobEnd};
use super::machine::{Machine, Planned, SerialEnd};
use super::wiring::{self, Wired};
use super::{Config, ConsoleTarget, VmmError, host, watch};
use crate::blk::BlockDevice;
use crate::boot::{self, BootError, Guest, Piece, Tail, cmdline};
use crate::bus::Bus;
use crate::console::ConsoleDevice;
use crate::devices::console::{ConsoleOutput, Stopping};
use crate::devices::exit::{ExitPort, Pvpanic};
use crate::devices::kernel_log::KernelLog;
use crate::devices::power::{ACPI_LEN, AcpiRegisters, I8042, I8042_LEN, RESET_CONTROL_LEN, ResetControl};
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::{self, SerialPort};
use crate::disk_options::DiskOptions;
use crate::disks::{self, OpenDisk};
use crate::kvm::cpuid::{Place, Supported};
use crate::kvm::run_page::RunPage;
use crate::kvm::{self, msrs};
use crate::layout;
use crate::mem::{self, Ram};
use crate::observe::guest::GuestEnd;
use crate::pci::root::{ConfigPorts, PORTS_LEN, PciRoot};
use crate::terminal::{self, Input};
use crate::vcpu::{Exits, Vcpu};
use crate::virtio::VirtioDevice;

/// Builds the machine that `config` describes. `log` keeps what the guest's kernel prints.
pub fn build(config: &Config, log: &KernelLog) -> Result<Machine, VmmError> {
    let mut laps = Laps::begin();
    let disks = open_disks(config)?;
    laps.end("disks");
    let console = open_console(config)?;
    let stopping = Stopping::default();
    let kvm = kvm::open(config.cpus)?;
    let ram = mem::map_ram(&layout::ram_regions(config.memory_bytes))?;
    let vm = Arc::new(kvm::create_vm(&kvm, &ram)?);
    let serial = serial_port(&vm, ConsoleOutput::new(console, stopping.clone()), log)?;
    let mut ports = ports(&serial)?;
    laps.end("RAM and VM");
    let mut devices = block_devices(config, &disks, &ram)?;
    let ConsoleEnds { device, job, observed } = console_device(config)?;
    let (terminal, hvc) = terminal_device(config)?.unzip();
    let consoles = device.into_iter().chain(terminal);
    devices.extend(consoles.map(|device| (Box::new(device) as Box<dyn VirtioDevice>, config.transport)));
    let Wired { mmio, transports, announced, root } = wiring::connect(&vm, &ram, devices)?;
    place_reset_control(&mut ports, root.as_ref())?;
    laps.end("queues and devices");
    let guest = Guest {
        kernel: &config.kernel,
        initrd: config.initrd.as_deref(),
        initrd_tail: tail_of(config)?,
        cmdline: &config.cmdline,
        cpus: config.cpus,
        devices: &announced,
        pci: root.is_some(),
    };
    let entry = boot::load(&ram, &guest)?;
    laps.end("kernel, initrd and tables");
    let exits = Arc::<Exits>::default();
    let parts =
        Parts { ports: Arc::new(ports), mmio: Arc::new(mmio), ram: ram.clone(), exits: Arc::clone(&exits) };
    let vcpus = vcpus(&kvm, &vm, config, &parts)?;
    if let Some(first) = vcpus.first() {
        boot::cpu::set_up(&first.fd, &ram, entry)?;
    }
    laps.end("CPUs");
    log::info!("built in {}", laps.in_words());
    Ok(Machine { vcpus, transports, disks, serial, job, hvc, observed, exits, stopping, _vm: vm, _ram: ram })
}

/// Returns what is appended to the initrd: the command's archive, then the archive of the kernel's other
/// modules.
fn tail_of(config: &Config) -> Result<Tail<'_>, VmmError> {
    /// Padding between two archives, so that the second begins where the kernel looks for one.
    static ZEROS: [u8; 512] = [0; 512];
    let mut tail = config.job.as_ref().map(job::tail).unwrap_or_default();
    let Some(path) = &config.modules else { return Ok(tail) };
    let found = std::fs::metadata(path);
    let bytes = found.map_err(|source| BootError::Added { path: path.clone(), source })?.len();
    let end = usize::try_from(tail.total_bytes() % ZEROS.len() as u64).unwrap_or_default();
    tail.pieces.push(Piece::Bytes(ZEROS.get(..(ZEROS.len() - end) % ZEROS.len()).unwrap_or_default()));
    tail.pieces.push(Piece::File(path, bytes));
    tail.unpacked_bytes = tail.unpacked_bytes.saturating_add(bytes);
    Ok(tail)
}

/// The console device, and our ends of its ports.
#[derive(Default)]
struct ConsoleEnds {
    device: Option<ConsoleDevice>,
    job: Option<JobEnd>,
    observed: Option<GuestEnd>,
}

/// Makes the console device if anything needs one: a command's streams or the port of an observation.
fn console_device(config: &Config) -> Result<ConsoleEnds, VmmError> {
    let observed = config.observe.as_ref().map(|_| watch::port()).transpose();
    let (port, observed) = observed.map_err(host("make a pipe"))?.unzip();
    if config.job.is_some() {
        let (device, job) = job::console(port).map_err(host("use the standard streams for the command"))?;
        return Ok(ConsoleEnds { device: Some(device), job: Some(job), observed });
    }
    let device = port.map(|port| ConsoleDevice::new(vec![port])).transpose();
    let device = device.map_err(host("start a thread for the console"))?;
    Ok(ConsoleEnds { device, job: None, observed })
}

/// Makes the device that turns the terminal into the guest's hvc0. Returns `None` if that is not wanted or if
/// standard input is no terminal in the foreground.
fn terminal_device(config: &Config) -> Result<Option<(ConsoleDevice, HvcEnd)>, VmmError> {
    let wanted = config.hvc && config.console == ConsoleTarget::Stdio;
    if !wanted || terminal::input() != Input::Terminal {
        return Ok(None);
    }
    hvc::console().map(Some).map_err(host("make the console device for the terminal"))
}

/// Measures the steps before the guest starts, for `-v`.
struct Laps {
    begun: Instant,
    last: Instant,
    words: Vec<String>,
}

impl Laps {
    fn begin() -> Self {
        let now = Instant::now();
        Self { begun: now, last: now, words: Vec::new() }
    }

    fn end(&mut self, what: &str) {
        let now = Instant::now();
        self.words.push(format!("{what} {}", ms(now - self.last)));
        self.last = now;
    }

    fn in_words(&self) -> String {
        format!("{} ms ({})", ms(self.last - self.begun), self.words.join(", "))
    }
}

/// Formats `duration` in milliseconds.
fn ms(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1000.0)
}

fn open_disks(config: &Config) -> Result<Vec<OpenDisk>, VmmError> {
    let workers: usize = config.disks.iter().map(|disk| usize::from(disk.config.queues.unwrap_or(1))).sum();
    let busy_threads = usize::from(config.cpus) + workers;
    Ok(disks::open(&config.disks, busy_threads, config.stats.is_some())?)
}

fn open_console(config: &Config) -> Result<Option<File>, VmmError> {
    if let Some(output) = config.console.output() {
        return Ok(Some(config.files.open(&output)?.file));
    }
    match &config.console {
        ConsoleTarget::Off | ConsoleTarget::File(_) => Ok(None),
        ConsoleTarget::Stderr => {
            let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(host("use standard error"))?;
            Ok(Some(stderr.into()))
        }
        ConsoleTarget::Stdio => {
            let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(host("use standard output"))?;
            Ok(Some(stdout.into()))
        }
    }
}

fn serial_port(vm: &VmFd, output: ConsoleOutput, log: &KernelLog) -> Result<SerialEnd, VmmError> {
    let irq = kvm::interrupt(vm, layout::IRQ_SERIAL)?;
    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let wants_input = event().map_err(host("make an eventfd"))?;
    let theirs = wants_input.try_clone().map_err(host("make an eventfd"))?;
    let alarm = event().map_err(host("make an eventfd"))?;
    let theirs_too = alarm.try_clone().map_err(host("make an eventfd"))?;
    let output = output.kept_in(log.clone(), theirs_too);
    let panicked = output.panicked();
    let port = Arc::new(Mutex::new(SerialPort::new(irq, output, theirs)));
    Ok(SerialEnd { port, wants_input: Arc::new(wants_input), panicked, alarm: Arc::new(alarm) })
}

fn ports(serial: &SerialEnd) -> Result<Bus, VmmError> {
    let mut ports = Bus::new();
    ports.place("i8042", layout::PORT_I8042, I8042_LEN, Arc::new(Mutex::new(I8042::default())))?;
    ports.place("clock", layout::PORT_RTC, rtc::LEN, Arc::new(Mutex::new(Rtc::default())))?;
    ports.place("exit port", layout::PORT_EXIT, 1, Arc::new(Mutex::new(ExitPort)))?;
    ports.place("serial port", layout::PORT_SERIAL, serial::LEN, serial.port.clone())?;
    ports.place("pvpanic", layout::PORT_PVPANIC, 1, Arc::new(Mutex::new(Pvpanic::default())))?;
    let acpi = Arc::new(Mutex::new(AcpiRegisters));
    ports.place("ACPI registers", layout::PORT_ACPI_SLEEP_CONTROL, ACPI_LEN, acpi)?;
    Ok(ports)
}

/// Places the reset control register and, around it, the ports of PCI's configuration space.
fn place_reset_control(ports: &mut Bus, root: Option<&Arc<PciRoot>>) -> Result<(), VmmError> {
    let reset = Arc::new(Mutex::new(ResetControl::default()));
    let Some(root) = root else {
        return Ok(ports.place("reset control", layout::PORT_PCI, RESET_CONTROL_LEN, reset)?);
    };
    let mut others = Bus::new();
    others.place("reset control", 0, RESET_CONTROL_LEN, reset)?;
    let configuration = Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(root), others)));
    Ok(ports.place("PCI configuration", layout::PORT_PCI, PORTS_LEN, configuration)?)
}

fn block_devices(config: &Config, disks: &[OpenDisk], ram: &Ram) -> Result<Vec<Planned>, VmmError> {
    let device = |((disk, options), letter): ((&OpenDisk, &DiskOptions), char)| {
        let device = BlockDevice::with_ram(&format!("vd{letter}"), Arc::clone(&disk.image), Some(ram))?;
        let transport = options.transport.unwrap_or(config.transport);
        log::info!(
            "vd{letter}: transport={}, engine={}, stable={}, queues={}",
            transport.name(),
            device.engine().name(),
            disk.image.config().stable.name(),
            device.queues()
        );
        Ok((Box::new(device) as Box<dyn VirtioDevice>, transport))
    };
    disks.iter().zip(&config.disks).zip('a'..='z').map(device).collect()
}

/// What all CPUs share.
struct Parts {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    ram: Ram,
    exits: Arc<Exits>,
}

fn vcpus(kvm: &Kvm, vm: &VmFd, config: &Config, parts: &Parts) -> Result<Vec<Vcpu>, VmmError> {
    let triple_fault_resets = cmdline::reboots_by_triple_fault(&config.cmdline);
    let cpuid = Supported::by(kvm)?;
    let mut vcpus = Vec::with_capacity(usize::from(config.cpus));
    for id in 0..config.cpus {
        let fd = kvm::create_vcpu(vm, id)?;
        let has_mtrrs = cpuid.set_up(&fd, Place { id, cpus: config.cpus })?;
        msrs::set_up(kvm, &fd, has_mtrrs)?;
        msrs::set_up_lapic(&fd)?;
        let page = RunPage::new(&fd).map_err(host("map a CPU's shared page"))?;
        vcpus.push(Vcpu {
            id,
            fd,
            page: Arc::new(page),
            ports: Arc::clone(&parts.ports),
            mmio: Arc::clone(&parts.mmio),
            ram: parts.ram.clone(),
            triple_fault_resets,
            exits: Arc::clone(&parts.exits),
        });
    }
    Ok(vcpus)
}
