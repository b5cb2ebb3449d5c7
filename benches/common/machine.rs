//! On what was measured: figures without it mean nothing.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// The machine, the file system under the image, and the day.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The CPU's name.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// The hypervisor that the machine runs under, if it tells.
    pub hypervisor: bool,
    /// Kernel release and version.
    pub kernel: String,
    /// Type of the file system under the image.
    pub file_system: String,
    /// Its mount options.
    pub mount_options: String,
    /// The device under it, and its write cache and scheduler.
    pub disk: String,
    /// Transparent huge pages, as configured.
    pub huge_pages: String,
    /// fio's version.
    pub fio: String,
    /// UTC, at the start.
    pub date: String,
    /// The commit that was built, and whether the tree had changes.
    pub commit: String,
    /// Load of the last minute when it began: what else was going on.
    pub load_at_start: String,
}

impl Machine {
    /// This machine.
    pub fn look(dir: &Path, fio: String) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim()).to_owned()
        };
        let (file_system, mount_options, device) = mount_of(dir);
        Self {
            cpu: field("model name"),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            hypervisor: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            kernel: output("uname", &["-rv"]),
            file_system,
            mount_options,
            disk: disk(&device),
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").trim().to_owned(),
            fio,
            date: output("date", &["-u", "+%Y-%m-%d %H:%M"]),
            commit: output("git", &["describe", "--always", "--dirty"]),
            load_at_start: load(),
        }
    }

    /// For the head of the table.
    pub fn describe(&self) -> String {
        let virtual_machine = if self.hypervisor { ", itself a virtual machine" } else { "" };
        format!(
            "{}, {} CPUs{virtual_machine}; Linux {}; {} ({}) on {}; huge pages {}; {}; {} UTC; commit {}; load {}",
            self.cpu,
            self.cpus,
            self.kernel,
            self.file_system,
            self.mount_options,
            self.disk,
            self.huge_pages,
            self.fio,
            self.date,
            self.commit,
            self.load_at_start
        )
    }
}

/// The load average of the last minute.
pub fn load() -> String {
    read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned()
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// Type, options and device of the mount that holds `dir` (proc(5), mountinfo).
fn mount_of(dir: &Path) -> (String, String, String) {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mut best = (0, Default::default());
    for line in read("/proc/self/mountinfo").lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let ([_, _, _, _, point, options, ..], [kind, device, more, ..]) = (&left[..], &right[..]) else {
            continue;
        };
        if dir.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), ((*kind).to_owned(), format!("{options},{more}"), (*device).to_owned()));
        }
    }
    best.1
}

fn disk(device: &str) -> String {
    let name = device.trim_start_matches("/dev/");
    let queue = Path::new("/sys/class/block").join(name).join("queue");
    let value = |file: &str| read(queue.join(file)).trim().to_owned();
    format!("{device} (cache {}, scheduler {})", value("write_cache"), value("scheduler"))
}
