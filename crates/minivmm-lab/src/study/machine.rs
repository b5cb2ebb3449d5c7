//! The machine that a study is of, and how two runs know that theirs is the same.
//!
//! Owns the words of the page's table of facts; the looking is [`crate::lab::host`]'s.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::lab::Host;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// All that is known of it.
    pub host: Host,
    /// Which of its figures mean something, in words; nothing where all do.
    pub caveat: Option<String>,
}

/// What must be the same for figures to belong together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The program's version.
    pub minivmm: String,
    /// The host's kernel.
    pub kernel: String,
    /// Its CPU, and how many.
    pub cpu: String,
    /// Its memory in bytes.
    pub memory_bytes: Option<u64>,
    /// File system and disk of the images.
    pub place: String,
}

impl Machine {
    /// This machine; the images lie in `directory`.
    pub fn look(directory: &Path) -> io::Result<Self> {
        let host = Host::look(directory)?;
        let caveat = host.figures_that_mean_something().caveat().map(str::to_owned);
        Ok(Self { host, caveat })
    }

    /// What makes it this one.
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

    /// What the page tells of it: names and facts.
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
    /// What differs, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        // A kernel finds some pages more or less from boot to boot.
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
            let told = first.differences(&machine(other)).join("; ");
            assert!(told.starts_with("bytes of memory: then 4112384000, now "), "{told}");
        }
    }
}
