//! The syntax of `--disk PATH[,KEY=VALUE]...`.
//!
//! Owns the table of keys. Parsing, errors and `--help` are all made from it: a new key is a new row.

mod spellings;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::cache::{CachePolicy, POLICIES};
use super::fault::spec::{FaultError, FaultSpec};
use super::stable::StableBy;

/// The largest virtqueue: one preadv takes this many pieces (IOV_MAX).
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// The smallest virtqueue: a header, one piece of data and a status, rounded up to a power of two.
pub const QUEUE_SIZE_MIN: u16 = 4;
/// The most queues of a disk.
const QUEUES_MAX: u16 = 16;
/// The most queues that a disk gets by default.
const QUEUES_DEFAULT_MAX: u16 = 4;
/// The longest time in microseconds that a worker may spin before it blocks.
const POLL_US_MAX: u32 = 1000;
/// Default of `batch`, in operations.
const BATCH: u16 = 4;
/// Default of `poll-us`, in microseconds.
pub const POLL_US: u32 = 100;
/// `Key::takes` of a key whose value is a path, which may be any bytes.
const FILE: &str = "FILE";
/// The longest serial in bytes (virtio 5.2.6: GET_ID).
pub const SERIAL_MAX: usize = 20;

/// The options of one disk, as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// The row of the cache mode.
    pub cache: &'static CachePolicy,
    /// `true` if nothing is ever written to the image.
    pub readonly: bool,
    /// The answer to GET_ID; `None` means the image's file name.
    pub serial: Option<String>,
    /// Descriptors in each virtqueue, a power of two.
    pub queue_size: u16,
    /// Virtqueues; `None` means one per guest CPU, at most four ([`DiskOptions::for_cpus`]).
    pub queues: Option<u16>,
    /// Logical block size in bytes; `None` means that it is probed.
    pub block_size: Option<u32>,
    /// `true` if DISCARD is offered, which frees space in the image.
    pub discard: bool,
    /// `true` if `format=raw` was given: the image's first bytes are not checked.
    pub force_raw: bool,
    /// The engine that executes host operations.
    pub engine: EngineChoice,
    /// How a write is made stable where it must be.
    pub stable: StableBy,
    /// Operations queued in the middle of a batch before io_uring is entered.
    pub batch: u16,
    /// Microseconds that a worker spins before it blocks; `None` means whatever suits the host.
    pub poll_us: Option<u32>,
    /// How the guest reaches the device; `None` means as it reaches the machine's other devices.
    pub transport: Option<TransportChoice>,
    /// `true` if guest RAM is registered with io_uring, which pins all of it.
    pub fixed_buffers: bool,
    /// `true` if every transfer of a direct mode goes through a private buffer. A guest that changes memory in
    /// flight then cannot upset checksums or mirrors below.
    pub bounce_always: bool,
    /// The faults that are made on purpose; `None` for none.
    pub fault: Option<FaultSpec>,
    /// Where every write, discard and flush of the host is recorded; `None` for nowhere.
    pub log_writes: Option<PathBuf>,
    /// What the host's page cache holds of the image when the guest starts.
    pub host_cache: HostCache,
    /// `true` if this host may use the image at the same time: mounted, behind a loop device, as swap.
    pub shared_with_host: bool,
    /// `true` if latencies are measured. There is no key for this: `--stats` turns it on.
    pub timed: bool,
}

/// What happens to the host's page cache of an image before the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCache {
    /// Nothing happens to it.
    Keep,
    /// It is written back and dropped.
    Drop,
    /// It is filled with the whole image.
    Warm,
}

impl HostCache {
    const ALL: [Self; 3] = [Self::Keep, Self::Drop, Self::Warm];

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
            Self::Warm => "warm",
        }
    }
}

/// Which engine executes a disk's host operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring. The blocking engine if there is no io_uring, and on tmpfs, where it measures better.
    Auto,
    /// io_uring, or an error.
    Uring,
    /// The blocking engine.
    Blocking,
}

/// How a guest reaches a virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportChoice {
    /// virtio-pci with MSI-X (virtio 4.1).
    Pci,
    /// virtio-mmio (virtio 4.2).
    Mmio,
}

impl TransportChoice {
    /// Returns the transport of this name on the command line, or `None` if the name is unknown.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "pci" => Some(Self::Pci),
            "mmio" => Some(Self::Mmio),
            _ => None,
        }
    }

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pci => "pci",
            Self::Mmio => "mmio",
        }
    }
}

/// Why the value of `--disk` cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The path is missing.
    #[error("--disk needs the path of an image: --disk PATH[,KEY=VALUE]...")]
    NoPath,
    /// The key is unknown.
    #[error("unknown key '{key}'{hint} (the keys are {known}; a comma in the path is written twice)")]
    UnknownKey {
        /// The key as given.
        key: String,
        /// A suggestion of what may have been meant, after a semicolon; else empty.
        hint: String,
        /// All known keys.
        known: String,
    },
    /// A key is given twice.
    #[error("the key '{0}' is given twice")]
    Twice(&'static str),
    /// The key does not take this value.
    #[error("invalid {key}={value}: expected {}{}", expected(takes), spellings::of_value(key, value, &words(takes)))]
    Value {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What the key takes.
        takes: &'static str,
    },
    /// The image's name most likely contains a comma.
    #[error(
        "the path '{path}' does not exist, but there is a file '{whole}': a comma in a path is written twice, --disk \
         '{doubled}'"
    )]
    Comma {
        /// The part before the first comma.
        path: String,
        /// The whole argument.
        whole: String,
        /// How the argument has to be written.
        doubled: String,
    },
    /// The rules of `fault` make no sense. The error is transparent because the source of an argument's error
    /// is not shown.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

struct Key {
    name: &'static str,
    takes: &'static str,
    help: &'static str,
    /// The value that the key has without `=`; `None` if it needs one.
    alone: Option<&'static str>,
    set: fn(&mut DiskOptions, &str) -> Option<()>,
}

static KEYS: [Key; 19] = [
    Key {
        name: "cache",
        takes: "none|writethrough|writeback|directsync|unsafe",
        help: "where data may be when a write or FLUSH is reported complete [none]",
        alone: None,
        set: |options, value| {
            options.cache = CachePolicy::by_name(value)?;
            Some(())
        },
    },
    Key {
        name: "readonly",
        takes: "on|off",
        help: "the guest cannot write; the image may be shared with other readers [off]",
        alone: Some("on"),
        set: |options, value| on_off(value).map(|on| options.readonly = on),
    },
    Key {
        name: "serial",
        takes: "1 to 20 bytes",
        help: "what the guest sees as the disk's serial [the image's file name]",
        alone: None,
        set: |options, value| {
            (1..=SERIAL_MAX).contains(&value.len()).then(|| options.serial = Some(value.to_owned()))
        },
    },
    Key {
        name: "queues",
        takes: "1 to 16",
        help: "virtqueues, a worker thread each [one a guest CPU, at most 4]",
        alone: None,
        set: |options, value| {
            let queues: u16 = value.parse().ok()?;
            (1..=QUEUES_MAX).contains(&queues).then(|| options.queues = Some(queues))
        },
    },
    Key {
        name: "queue-size",
        takes: "a power of two from 4 to 1024",
        help: "descriptors in a virtqueue [256]",
        alone: None,
        set: |options, value| {
            let size: u16 = value.parse().ok()?;
            let fits = size.is_power_of_two() && (QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&size);
            fits.then(|| options.queue_size = size)
        },
    },
    Key {
        name: "block-size",
        takes: "512|4096",
        help: "the disk's logical block [what the host needs for O_DIRECT, or 512]",
        alone: None,
        set: |options, value| {
            options.block_size = Some(match value {
                "512" => 512,
                "4096" => 4096,
                _ => return None,
            });
            Some(())
        },
    },
    Key {
        name: "discard",
        takes: "on|off",
        help: "offer DISCARD, which frees space in the image [on]",
        alone: Some("on"),
        set: |options, value| on_off(value).map(|on| options.discard = on),
    },
    Key {
        name: "engine",
        takes: "io_uring|sync|auto",
        help: "what does the host's I/O; auto is io_uring where the host has it and it is the faster [auto]",
        alone: None,
        set: |options, value| {
            options.engine = match value {
                "auto" => EngineChoice::Auto,
                "io_uring" => EngineChoice::Uring,
                "sync" => EngineChoice::Blocking,
                _ => return None,
            };
            Some(())
        },
    },
    Key {
        name: "stable",
        takes: "dsync|fdatasync|group|auto",
        help: "how a write is made stable where it must be: by RWF_DSYNC, by an fdatasync of its own, by one \
               fdatasync for all that are in flight, or what is best for the image [auto]",
        alone: None,
        set: |options, value| {
            options.stable = StableBy::by_name(value)?;
            Some(())
        },
    },
    Key {
        name: "batch",
        takes: "1 to 1024",
        help: "after how many operations io_uring is entered in the midst of a batch: few keep a fast disk busy, \
               many save system calls [4]",
        alone: None,
        set: |options, value| {
            let batch: u16 = value.parse().ok()?;
            (1..=QUEUE_SIZE_MAX).contains(&batch).then(|| options.batch = batch)
        },
    },
    Key {
        name: "poll-us",
        takes: "0 to 1000",
        help: "how many microseconds a worker looks for more before it sleeps, where that pays; 0 is never [100, \
               or 0 where workers and guest CPUs outnumber the host's]",
        alone: None,
        set: |options, value| {
            let us: u32 = value.parse().ok()?;
            (us <= POLL_US_MAX).then(|| options.poll_us = Some(us))
        },
    },
    Key {
        name: "transport",
        takes: "pci|mmio",
        help: "how the guest reaches the disk; with both in one machine the order in which the guest loads its drivers \
               decides which disk is vda [what --transport says]",
        alone: None,
        set: |options, value| {
            options.transport = Some(TransportChoice::by_name(value)?);
            Some(())
        },
    },
    Key {
        name: "buffers",
        takes: "plain|fixed",
        help: "fixed registers guest memory with io_uring, which pins all of it at the start [plain]",
        alone: None,
        set: |options, value| {
            options.fixed_buffers = match value {
                "plain" => false,
                "fixed" => true,
                _ => return None,
            };
            Some(())
        },
    },
    Key {
        name: "bounce",
        takes: "auto|always",
        help: "copy every O_DIRECT transfer, not only what is misaligned, for hosts with checksums [auto]",
        alone: None,
        set: |options, value| {
            options.bounce_always = match value {
                "auto" => false,
                "always" => true,
                _ => return None,
            };
            Some(())
        },
    },
    Key {
        name: "format",
        takes: "raw",
        help: "take the image as raw bytes even if it looks like qcow2, vmdk or vhd",
        alone: None,
        set: |options, value| (value == "raw").then(|| options.force_raw = true),
    },
    Key {
        name: "fault",
        takes: "ACTION:KIND[:WHEN][+...]",
        help: "make the host's I/O go wrong on purpose: fail, fail=ENOSPC, delay=5ms, short, tear or lose; of read, \
               write, flush or discard; with nth=N, every=N, once, chance=P%, sectors=A-B; flush-fail=once; seed=N",
        alone: None,
        set: |options, value| value.parse().ok().map(|spec| options.fault = Some(spec)),
    },
    Key {
        name: "log-writes",
        takes: FILE,
        help: "record every write, discard and flush in FILE, as the kernel's dm-log-writes does, for `minivmm log` \
               and `minivmm crash`",
        alone: None,
        set: |options, value| (!value.is_empty()).then(|| options.log_writes = Some(value.into())),
    },
    Key {
        name: "host-cache",
        takes: "keep|drop|warm",
        help: "what the host's page cache has of the image when the guest starts: what is there, nothing (it is \
               written, then dropped), or all of it [keep]",
        alone: None,
        set: |options, value| {
            options.host_cache = HostCache::ALL.into_iter().find(|wish| wish.name() == value)?;
            Some(())
        },
    },
    Key {
        name: "shared-with-host",
        takes: "on|off",
        help: "start although this host uses the image: has it mounted, behind a loop device, as swap, or locked by \
               flock; two writers destroy a file system [off]",
        alone: Some("on"),
        set: |options, value| on_off(value).map(|on| options.shared_with_host = on),
    },
];

fn on_off(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

impl DiskOptions {
    /// Returns the disk at `path` with every key at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            cache: &POLICIES[0],
            readonly: false,
            serial: None,
            queue_size: 256,
            queues: None,
            block_size: None,
            discard: true,
            force_raw: false,
            engine: EngineChoice::Auto,
            stable: StableBy::Auto,
            batch: BATCH,
            poll_us: None,
            transport: None,
            fixed_buffers: false,
            bounce_always: false,
            fault: None,
            log_writes: None,
            host_cache: HostCache::Keep,
            shared_with_host: false,
            timed: false,
        }
    }

    /// Sets what was not given and depends on the number of guest CPUs.
    pub fn for_cpus(mut self, cpus: u8) -> Self {
        self.queues.get_or_insert(u16::from(cpus).clamp(1, QUEUES_DEFAULT_MAX));
        self
    }

    /// Returns every key with the words that it takes, if it takes words. For shell completions.
    pub fn keys() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
        KEYS.iter().map(|key| (key.name, words(key.takes)))
    }

    /// Returns the `--help` text about the keys, one entry per key.
    pub fn keys_help() -> String {
        KEYS.iter().map(|key| format!("  {}={}\n      {}\n", key.name, key.takes, key.help)).collect()
    }
}

impl DiskOptions {
    /// Parses PATH[,KEY=VALUE]...; paths may be any bytes.
    pub fn parse(text: &OsStr) -> Result<Self, OptionsError> {
        check_commas(text)?;
        let mut parts = split_at_commas(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(OptionsError::NoPath)?;
        let mut options = DiskOptions::new(path);
        let mut given: Vec<&'static str> = Vec::new();
        for part in parts {
            let mut halves = part.as_bytes().splitn(2, |&byte| byte == b'=').map(OsStr::from_bytes);
            let name = halves.next().unwrap_or_default().to_string_lossy();
            let Some(key) = KEYS.iter().find(|key| key.name == name) else {
                let known: Vec<_> = KEYS.iter().map(|key| key.name).collect();
                let hint =
                    spellings::of_key(&name, &halves.next().unwrap_or_default().to_string_lossy(), &known);
                let known = known.join(", ");
                return Err(OptionsError::UnknownKey { key: name.into_owned(), hint, known });
            };
            if given.contains(&key.name) {
                return Err(OptionsError::Twice(key.name));
            }
            given.push(key.name);
            let value = halves.next().or(key.alone.map(OsStr::new)).unwrap_or_default();
            options.set(key, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, key: &Key, value: &OsStr) -> Result<(), OptionsError> {
        let set = match value.to_str() {
            Some(text) => {
                if key.name == "fault" {
                    text.parse::<FaultSpec>()?;
                }
                (key.set)(self, text)
            }
            None if key.takes == FILE => {
                self.log_writes = Some(value.into());
                Some(())
            }
            None => None,
        };
        set.ok_or_else(|| OptionsError::Value {
            key: key.name,
            value: value.to_string_lossy().into_owned(),
            takes: key.takes,
        })
    }
}

impl FromStr for DiskOptions {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        Self::parse(OsStr::new(text))
    }
}

/// Refuses e.g. `disk,readonly` if a file of exactly that name exists and none named `disk` does.
fn check_commas(text: &OsStr) -> Result<(), OptionsError> {
    let parts = split_at_commas(text);
    let Some(path) = parts.first().filter(|_| parts.len() > 1) else { return Ok(()) };
    if path.is_empty() || Path::new(path).exists() || !Path::new(text).exists() {
        return Ok(());
    }
    let whole = text.to_string_lossy().into_owned();
    let doubled = whole.replace(',', ",,");
    Err(OptionsError::Comma { path: path.to_string_lossy().into_owned(), whole, doubled })
}

/// Returns the words that a key takes; empty if it takes something else.
fn words(takes: &'static str) -> Vec<&'static str> {
    let words: Vec<_> = takes.split('|').collect();
    if words.len() > 1 || takes == "raw" { words } else { Vec::new() }
}

/// Describes in words what a key takes.
fn expected(takes: &'static str) -> String {
    match words(takes)[..] {
        [] | [_] => takes.to_owned(),
        [one, other] => format!("{one} or {other}"),
        [..] => format!("one of {}", takes.replace('|', ", ")),
    }
}

/// Splits at single commas. Two commas in a row are one literal comma.
pub fn split_at_commas(text: &OsStr) -> Vec<OsString> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = byte == b',' && bytes.next_if_eq(&b',').is_some();
        match parts.last_mut() {
            Some(part) if byte != b',' || escaped => part.push(byte),
            _ => parts.push(Vec::new()),
        }
    }
    parts.into_iter().map(OsString::from_vec).collect()
}

#[cfg(test)]
mod tests;
