//! Describes the machine on which figures were measured, and which of them are meaningful.
//!
//! Owns the description. Figures without it mean nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use serde::Serialize;

use minivmm::explain::{Layer, Place, below_device};
use minivmm::files::Device;

/// The machine, and the storage below a path on it.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// Version of minivmm.
    pub minivmm: &'static str,
    /// The host's kernel: release and version.
    pub kernel: String,
    /// Model name of the CPU.
    pub cpu: String,
    /// Number of CPUs that this process may use.
    pub cpus: usize,
    /// Size of the memory; `None` if unknown.
    pub memory_bytes: Option<u64>,
    /// Name of the hypervisor that the machine runs under; `None` if it is not a virtual machine.
    pub hypervisor: Option<String>,
    /// True if the CPU is emulated instruction by instruction.
    pub emulated: bool,
    /// The file system of the images.
    pub place: Place,
    /// The disks below it, and what they say about their write caches.
    pub disks: Vec<Layer>,
    /// Age in seconds from which dirty pages are written back (vm.dirty_expire_centisecs); `None` if unknown.
    pub dirty_expire_s: Option<f64>,
    /// Version of fio; `None` if fio is not installed.
    pub fio: Option<String>,
    /// Time of the inspection, in seconds since 1970 UTC.
    pub unix_time: u64,
    /// Load average of the minute before the inspection: what else was running.
    pub load: Option<f64>,
}

/// Which figures of a machine are meaningful beyond this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MeaningfulFigures {
    /// All figures.
    All,
    /// Ratios, because the machine is virtual: its disk belongs to a hypervisor, and the other work there is
    /// invisible.
    Relative,
    /// Counts, cache contents and ratios, because the machine is emulated: times are those of the emulator.
    Counts,
}

impl MeaningfulFigures {
    /// Returns the caveat for readers; `None` if there is none.
    pub fn caveat(self) -> Option<&'static str> {
        match self {
            Self::All => None,
            Self::Relative => Some(
                "this host is a virtual machine: its disk is whatever its own hypervisor makes of it, cache included. \
                 Ratios of the same rounds mean something; times and rates are this machine's alone",
            ),
            Self::Counts => Some(
                "this host is emulated: counts, what caches hold, and ratios of the same rounds mean something; times, \
                 rates and latencies are the emulator's and mean nothing",
            ),
        }
    }
}

impl Host {
    /// Inspects this machine and what is below `path`: an image, a directory for images or a block device. The
    /// file system of a block device is only that of its node.
    pub fn look(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let (found, place) = (file.metadata()?, Place::of_file(&file));
        let device = match found.file_type().is_block_device() {
            true => Some(Device::from_number(found.rdev())),
            false => place.device,
        };
        let disks = device.map(below_device).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let hypervisor = hypervisor();
        Ok(Self {
            minivmm: env!("CARGO_PKG_VERSION"),
            kernel: format!("{} {}", read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version")),
            cpu: field(&cpuinfo, "model name").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field(&read("/proc/meminfo"), "MemTotal").as_deref().and_then(kib),
            emulated: hypervisor.as_deref().is_some_and(|name| name.starts_with("TCG")),
            hypervisor,
            place,
            disks,
            dirty_expire_s: read("/proc/sys/vm/dirty_expire_centisecs")
                .parse()
                .ok()
                .map(|cs: f64| cs / 100.0),
            fio: fio_version(),
            unix_time: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |age| age.as_secs()),
            load: read("/proc/loadavg").split(' ').next().and_then(|text| text.parse().ok()),
        })
    }

    /// Returns which figures are meaningful.
    pub fn meaningful_figures(&self) -> MeaningfulFigures {
        match (self.emulated, &self.hypervisor) {
            (true, _) => MeaningfulFigures::Counts,
            (false, Some(_)) => MeaningfulFigures::Relative,
            (false, None) => MeaningfulFigures::All,
        }
    }

    /// Returns the description as one line.
    pub fn in_words(&self) -> String {
        let under = match (&self.hypervisor, self.emulated) {
            (Some(name), true) => format!(" emulated ({name})"),
            (Some(name), false) => format!(" in a virtual machine ({name})"),
            (None, _) => String::new(),
        };
        let plural = if self.cpus == 1 { "" } else { "s" };
        let disks: Vec<String> = self.disks.iter().map(disk_in_words).collect();
        format!(
            "{} CPU{plural}{under}, {}; Linux {}; {} ({}) on {}; {}",
            self.cpus,
            self.cpu,
            self.kernel.split(' ').next().unwrap_or_default(),
            self.place.file_system,
            self.place.options.join(","),
            if disks.is_empty() { self.place.source.clone() } else { disks.join(" on ") },
            self.fio.as_deref().unwrap_or("no fio"),
        )
    }
}

fn disk_in_words(disk: &Layer) -> String {
    match &disk.write_cache {
        Some(cache) => format!("{} ({cache} cache)", disk.name),
        None => disk.name.clone(),
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Returns the value of the first line `name: value`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn kib(text: &str) -> Option<u64> {
    text.strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Returns the name of the hypervisor (CPUID leaf 0x40000000) if the CPU reports one.
fn hypervisor() -> Option<String> {
    const PRESENT: u32 = 1 << 31;
    #[allow(unused_unsafe, reason = "newer compilers know it to be safe")]
    // SAFETY: every CPU that this is built for (x86-64) has the instruction.
    let (features, named) =
        unsafe { (std::arch::x86_64::__cpuid(1), std::arch::x86_64::__cpuid(0x4000_0000)) };
    if features.ecx & PRESENT == 0 {
        return None;
    }
    let bytes: Vec<u8> = [named.ebx, named.ecx, named.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    let printed: String = bytes.into_iter().filter(u8::is_ascii_graphic).map(char::from).collect();
    Some(known(&printed).to_owned())
}

/// Replaces signatures that are meant for programs.
fn known(signature: &str) -> &str {
    match signature {
        "KVMKVMKVM" => "KVM",
        "TCGTCGTCGTCG" => "TCG, QEMU's emulation",
        "MicrosoftHv" => "Hyper-V",
        "VMwareVMware" => "VMware",
        "XenVMMXenVMM" => "Xen",
        "" => "one without a name",
        other => other,
    }
}

fn fio_version() -> Option<String> {
    let output = Command::new("fio").arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_told() {
        let host = Host::look(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(!host.kernel.trim().is_empty() && !host.place.file_system.is_empty(), "{host:?}");
        assert!(host.cpus > 0 && host.memory_bytes.unwrap() > 1 << 20 && host.unix_time > 1_700_000_000);
        assert!(host.dirty_expire_s.unwrap() > 0.0, "{host:?}");
        let cpuinfo = read("/proc/cpuinfo");
        let flagged = cpuinfo.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor"));
        assert_eq!(host.hypervisor.is_some(), flagged, "{host:?}");
        assert!(host.in_words().contains(&host.place.file_system), "{}", host.in_words());
        assert!(Host::look(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn what_means_something_follows_from_what_it_runs_under() {
        let mut host = Host::look(Path::new("/")).unwrap();
        for (hypervisor, emulated, meaning) in [
            (None, false, MeaningfulFigures::All),
            (Some("KVM"), false, MeaningfulFigures::Relative),
            (Some("TCG"), true, MeaningfulFigures::Counts),
        ] {
            (host.hypervisor, host.emulated) = (hypervisor.map(str::to_owned), emulated);
            assert_eq!(host.meaningful_figures(), meaning);
            assert_eq!(meaning.caveat().is_none(), meaning == MeaningfulFigures::All);
        }
        assert_eq!(
            (known("TCGTCGTCGTCG").starts_with("TCG"), known("KVMKVMKVM"), known("bhyve")),
            (true, "KVM", "bhyve")
        );
    }
}
