//! The machine that a study measures, and how to recognize a record of the same machine.
//!
//! Owns the texts of the page's table of facts. [`crate::measuring::host`] inspects the machine.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::measuring::Host;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct StudyMachine {
    /// Everything known about it.
    pub host: Host,
    /// Which of its figures are meaningful, in words; `None` if all are.
    pub caveat: Option<String>,
}

/// The properties that must be equal for figures to be combined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of minivmm.
    pub minivmm: String,
    /// Version of the host's kernel.
    pub kernel: String,
    /// Number and name of the CPUs.
    pub cpu: String,
    /// Size of the memory.
    pub memory_bytes: Option<u64>,
    /// File system and disk that hold the images.
    pub place: String,
}

impl StudyMachine {
    /// Inspects this machine. `directory` holds the images.
    pub fn look(directory: &Path) -> io::Result<Self> {
        let host = Host::look(directory)?;
        let caveat = host.meaningful_figures().caveat().map(str::to_owned);
        Ok(Self { host, caveat })
    }

    /// Returns the properties that identify the machine.
    pub fn identity(&self) -> Identity {
        let host = &self.host;
        Identity {
            minivmm: host.minivmm.to_owned(),
            kernel: host.kernel.clone(),
            cpu: format!("{} of {}", host.cpus, host.cpu),
            memory_bytes: host.memory_bytes,
            place: format!("{} on {}", host.place.file_system, host.place.source),
        }
    }

    /// Returns the names and facts that the page shows.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let host = &self.host;
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
        let under = match (&host.hypervisor, host.emulated) {
            (None, _) => "none: a machine of its own".to_owned(),
            (Some(name), true) => format!("{name}: each instruction is emulated"),
            (Some(name), false) => name.clone(),
        };
        let disks: Vec<String> = host
            .disks
            .iter()
            .map(|disk| {
                let cache = disk.write_cache.as_deref().unwrap_or("unknown");
                let fua = match disk.fua {
                    Some(true) => ", FUA",
                    Some(false) => ", no FUA",
                    None => "",
                };
                format!("{} (write cache: {cache}{fua})", disk.name)
            })
            .collect();
        let expire = host.dirty_expire_s.map_or("not known".into(), |seconds| format!("after {seconds} s"));
        vec![
            ("minivmm", host.minivmm.to_owned()),
            ("kernel", format!("Linux {}", host.kernel)),
            ("CPUs", format!("{}, {}", host.cpus, host.cpu)),
            ("memory", host.memory_bytes.map_or("not known".into(), gib)),
            ("hypervisor above", under),
            ("images on", format!("{} ({})", host.place.file_system, host.place.options.join(", "))),
            ("disks below", if disks.is_empty() { "not known".into() } else { disks.join("; ") }),
            ("dirty pages are written back", expire),
        ]
    }
}

impl Identity {
    /// Describes how the machines differ; empty if they are the same.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        // The memory that a kernel reports varies by some pages from boot to boot.
        let same_memory = match (self.memory_bytes, other.memory_bytes) {
            (Some(then), Some(now)) => then.abs_diff(now) <= then / 100,
            (then, now) => then == now,
        };
        let memory = |bytes: Option<u64>| match bytes {
            _ if same_memory => String::new(),
            Some(bytes) => bytes.to_string(),
            None => "unknown".to_owned(),
        };
        let pairs = [
            ("minivmm", self.minivmm.clone(), other.minivmm.clone()),
            ("kernel", self.kernel.clone(), other.kernel.clone()),
            ("CPUs", self.cpu.clone(), other.cpu.clone()),
            ("bytes of memory", memory(self.memory_bytes), memory(other.memory_bytes)),
            ("place of the images", self.place.clone(), other.place.clone()),
        ];
        let differ = pairs.into_iter().filter(|(_, then, now)| then != now);
        differ.map(|(name, then, now)| format!("{name}: then {then}, now {now}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_pages_more_are_no_other_machine() {
        let machine = |memory_bytes| Identity {
            minivmm: "1".into(),
            kernel: "a".into(),
            cpu: "1 of x".into(),
            memory_bytes,
            place: "ext4 on /dev/vda".into(),
        };
        let first = machine(Some(4_112_384_000));
        assert!(first.differences(&machine(Some(4_112_375_808))).is_empty());
        for other in [Some(2_000_000_000), None] {
            let differences = first.differences(&machine(other)).join("; ");
            assert!(differences.starts_with("bytes of memory: then 4112384000, now "), "{differences}");
        }
    }
}
