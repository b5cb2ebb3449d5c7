//! The arguments of `minivmm bench`.
//!
//! Owns their names and help; `bench` decides what they mean.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use crate::bench::BenchOptions;
use minivmm::cli::{size, values};
use minivmm::disk::DiskConfig;
use minivmm::disk::cache::{CachePolicy, POLICIES};
use minivmm::disk_options::{self, split_at_commas};
use minivmm::hosts::{Asked, HostChoice};
use minivmm::observe::control::HostCache;

const IMAGE: &str = "Image";
const WHAT: &str = "What runs";
const GUEST: &str = "Guest";

/// A bench, as the user types it.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Where the guests run: auto, direct, or emulated, as for `minivmm` itself
    #[arg(long, value_name = "auto|direct|emulated", value_parser = values::host(), hide_possible_values = true, help_heading = GUEST)]
    host: Option<HostChoice>,

    /// The image, with any keys of --disk but the cache mode (`minivmm --help` lists them)
    #[arg(long, value_name = "PATH[,KEY=VALUE]...", value_parser = OsStringValueParser::new().try_map(|text| Disk::parse(&text)), help_heading = IMAGE)]
    disk: Disk,

    /// If there is no image, create it with this size, fully written and synced
    #[arg(long, value_name = "SIZE", value_parser = size::disk, help_heading = IMAGE)]
    size: Option<u64>,

    /// Write zeroes to the holes of the image; without this option, an image with holes is refused
    #[arg(long, help_heading = IMAGE)]
    fill: bool,

    /// Allow jobs to overwrite what is in the image
    ///
    /// Without this option an image that existed before is only read: jobs that write are refused.
    #[arg(long, help_heading = IMAGE)]
    destroy: bool,

    /// The cache modes, separated by commas; or all that this host has
    #[arg(long, value_name = "LIST", default_value = "none,writeback", value_parser = Modes::parse, help_heading = WHAT)]
    modes: Modes,

    /// An fio job file, each section a job [default: the five jobs of docs/benchmarking.md]
    #[arg(long, value_name = "FILE", help_heading = WHAT)]
    jobs: Option<PathBuf>,

    /// Run only these jobs, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = WHAT)]
    only: Vec<String>,

    /// Number of rounds; each round runs every job in every mode once
    #[arg(long, value_name = "N", default_value = "3", value_parser = super::crash::count, help_heading = WHAT)]
    rounds: usize,

    /// How long a job runs [default: what the job file says, or 10]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400), help_heading = WHAT)]
    seconds: Option<u64>,

    /// What the host's page cache holds of the image before each run: nothing (drop), or all of it (warm)
    #[arg(long, value_name = "drop|warm", default_value = "drop", hide_possible_values = true, help_heading = WHAT)]
    host_cache: State,

    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::memory, help_heading = GUEST)]
    memory: u64,

    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = values::cpus, help_heading = GUEST)]
    cpus: u8,

    /// Also write the report to FILE as JSON, with the figures of every run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum State {
    Drop,
    Warm,
}

/// A disk whose cache mode is given elsewhere, by --modes.
#[derive(Debug, Clone)]
struct Disk {
    config: DiskConfig,
    keys: Vec<String>,
}

/// Keys that bench sets itself, or that would make its results meaningless.
const NOT_HERE: [(&str, &str); 5] = [
    ("cache", "--modes gives the modes"),
    ("host-cache", "--host-cache sets it for guest and host alike"),
    ("readonly", "a job that only reads gets a disk that can only be read anyway"),
    ("fault", "a disk that goes wrong on purpose measures nothing"),
    ("log-writes", "a log would be in the figures"),
];

impl Disk {
    fn parse(text: &OsStr) -> Result<Self, String> {
        let options = disk_options::parse(text).map_err(|error| error.to_string())?;
        // The keys accepted here contain no path.
        let keys = split_at_commas(text).split_off(1);
        let keys: Vec<_> = keys.iter().map(|key| key.to_string_lossy().into_owned()).collect();
        for key in &keys {
            let name = key.split('=').next().unwrap_or_default();
            if let Some((_, why)) = NOT_HERE.iter().find(|not_here| not_here.0 == name) {
                return Err(format!("the key {name} cannot be used here: {why}"));
            }
        }
        Ok(Self { config: options.config, keys: keys.iter().map(|key| key.replace(',', ",,")).collect() })
    }
}

/// Cache modes, none twice.
#[derive(Debug, Clone)]
struct Modes {
    list: Vec<&'static CachePolicy>,
    all: bool,
}

impl Modes {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self { list: POLICIES.iter().collect(), all: true });
        }
        let mut modes: Vec<&'static CachePolicy> = Vec::new();
        for name in text.split(',') {
            let mode = CachePolicy::by_name(name).ok_or_else(|| {
                let names: Vec<_> = POLICIES.iter().map(|mode| mode.name).collect();
                format!("'{name}' is not a cache mode: the modes are {}, or all", names.join(", "))
            })?;
            if modes.iter().any(|known| known.name == mode.name) {
                return Err(format!("{name} is given twice"));
            }
            modes.push(mode);
        }
        Ok(Self { list: modes, all: false })
    }
}

impl BenchArgs {
    /// Returns what decides where the guests run.
    pub fn asked(&self) -> Asked<'static> {
        Asked::for_tool(self.host.unwrap_or_default())
    }

    /// Converts the arguments into options.
    pub fn options(self) -> BenchOptions {
        BenchOptions {
            disk: self.disk.config,
            keys: self.disk.keys,
            modes: self.modes.list,
            only_modes_here: self.modes.all,
            jobs: self.jobs,
            only: self.only,
            size_bytes: self.size,
            fill: self.fill,
            destroy: self.destroy,
            rounds: self.rounds,
            seconds: self.seconds,
            host_cache: match self.host_cache {
                State::Drop => HostCache::Drop,
                State::Warm => HostCache::Warm,
            },
            memory_bytes: self.memory,
            cpus: self.cpus,
            json: self.json,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_names_or_all() {
        let names = |text: &str| {
            Modes::parse(text).map(|it| it.list.iter().map(|m| m.name).collect::<Vec<_>>().join("+"))
        };
        assert_eq!(names("none,unsafe"), Ok("none+unsafe".into()));
        assert_eq!(names("all").unwrap().matches('+').count(), 5);
        assert!(names("none,fast").unwrap_err().contains("'fast' is not a cache mode: the modes are none, "));
        assert!(names("none,none").unwrap_err().contains("twice"));
        assert!(names("").is_err());
    }

    #[test]
    fn keys_go_to_the_guests_disk_but_for_those_that_are_benchs() {
        let disk = Disk::parse("a,,b.img,queues=2,serial=x,,y".as_ref()).unwrap();
        assert_eq!(
            (disk.config.path, disk.keys.as_slice()),
            ("a,b.img".into(), &["queues=2".into(), "serial=x,,y".into()][..])
        );
        for (text, word) in [
            ("a,cache=none", "--modes"),
            ("a,host-cache=warm", "--host-cache"),
            ("a,readonly", "only reads"),
            ("a,fault=fail:read", "on purpose"),
            ("a,log-writes=x", "a log"),
            ("a,colour=red", "unknown key"),
        ] {
            let error = Disk::parse(text.as_ref()).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
