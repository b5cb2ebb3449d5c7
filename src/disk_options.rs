//! The syntax of `--disk PATH[,KEY=VALUE]...`.
//!
//! Owns the table of keys. Parsing, errors and `--help` are all made from it: a new key is a new row.

mod spellings;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::disk::cache::CachePolicy;
use crate::disk::config::{DiskConfig, EngineChoice};
use crate::disk::fault::spec::{FaultError, FaultSpec};
use crate::disk::stable::StableBy;
use crate::observe::control::HostCache;
use crate::virtio::TransportChoice;
pub use spellings::from_qemu;

/// `Key::takes` of a key whose value is a path, which may be any bytes.
const FILE: &str = "FILE";

/// What one `--disk` asks for: the disk, and what the machine around it does with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The device and its image.
    pub config: DiskConfig,
    /// How the guest reaches the device; `None` means as it reaches the machine's other devices.
    pub transport: Option<TransportChoice>,
    /// What the host's page cache holds of the image when the guest starts.
    pub host_cache: HostCache,
}

/// Why the value of `--disk` cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The path is missing.
    #[error("--disk needs the path of an image: --disk PATH[,KEY=VALUE]...")]
    NoPath,
    /// The key is unknown.
    #[error("unknown key '{key}'{hint} (the keys are {known}; write a comma in a path twice)")]
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
    #[error("invalid {key}={value}: expected {}{}", expected(takes), spellings::hint_after_value(key, value, &words(takes)))]
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
        "the path '{path}' does not exist, but there is a file '{whole}': write a comma in a path twice, --disk \
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
    /// Sets the field; `None` if the value makes no sense. Ranges are [`DiskConfig::check`]'s.
    set: fn(&mut DiskOptions, &str) -> Option<()>,
}

static KEYS: [Key; 19] = [
    Key {
        name: "cache",
        takes: "none|writethrough|writeback|directsync|unsafe|dontcache",
        help: "where data may be when a write or FLUSH is reported complete [none]",
        alone: None,
        set: |options, value| {
            options.config.cache = CachePolicy::by_name(value)?;
            Some(())
        },
    },
    Key {
        name: "readonly",
        takes: "on|off",
        help: "the guest cannot write; the image may be shared with other readers [off]",
        alone: Some("on"),
        set: |options, value| on_off(value).map(|on| options.config.readonly = on),
    },
    Key {
        name: "serial",
        takes: "1 to 20 bytes",
        help: "the disk's serial number as the guest sees it [the image's file name]",
        alone: None,
        set: |options, value| (!value.is_empty()).then(|| options.config.serial = Some(value.to_owned())),
    },
    Key {
        name: "queues",
        takes: "1 to 16",
        help: "number of virtqueues, each with a worker thread [one per guest CPU, at most 4]",
        alone: None,
        set: |options, value| value.parse().ok().map(|queues| options.config.queues = Some(queues)),
    },
    Key {
        name: "queue-size",
        takes: "a power of two from 4 to 1024",
        help: "descriptors in a virtqueue [256]",
        alone: None,
        set: |options, value| value.parse().ok().map(|size| options.config.queue_size = size),
    },
    Key {
        name: "block-size",
        takes: "512|4096",
        help: "size of the disk's logical blocks [what the host needs for O_DIRECT, or 512]",
        alone: None,
        set: |options, value| {
            options.config.block_size = Some(match value {
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
        set: |options, value| on_off(value).map(|on| options.config.discard = on),
    },
    Key {
        name: "engine",
        takes: "io_uring|sync|auto",
        help: "how the host's I/O is done; auto takes io_uring if the host has it and it is faster [auto]",
        alone: None,
        set: |options, value| {
            options.config.engine = match value {
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
        help: "how a write that must be stable is made so: by RWF_DSYNC, by an fdatasync of its own, by one \
               fdatasync for all that are in flight, or by whatever is best for the image [auto]",
        alone: None,
        set: |options, value| {
            options.config.stable = StableBy::by_name(value)?;
            Some(())
        },
    },
    Key {
        name: "batch",
        takes: "1 to 1024",
        help: "number of queued operations after which io_uring is entered before a batch is complete: a small number \
               keeps a fast disk busy, a large one saves system calls [4]",
        alone: None,
        set: |options, value| value.parse().ok().map(|batch| options.config.batch = batch),
    },
    Key {
        name: "poll-us",
        takes: "0 to 1000",
        help: "for how many microseconds at most a worker spins before it blocks; 0 is never [100, or 0 if workers \
               and guest CPUs outnumber the host's CPUs]",
        alone: None,
        set: |options, value| value.parse().ok().map(|us| options.config.poll_us = Some(us)),
    },
    Key {
        name: "transport",
        takes: "pci|mmio",
        help: "how the guest reaches the disk; if a machine has both, the order in which the guest loads its drivers \
               decides which disk is vda [the value of --transport]",
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
            options.config.fixed_buffers = match value {
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
            options.config.bounce_always = match value {
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
        set: |options, value| (value == "raw").then(|| options.config.force_raw = true),
    },
    Key {
        name: "fault",
        takes: "ACTION:KIND[:WHEN][+...]",
        help: "make the host's I/O go wrong on purpose: fail, fail=ENOSPC, delay=5ms, short, tear or lose; of read, \
               write, flush or discard; with nth=N, every=N, once, chance=P%, sectors=A-B; flush-fail=once; seed=N",
        alone: None,
        set: |options, value| value.parse().ok().map(|spec| options.config.fault = Some(spec)),
    },
    Key {
        name: "log-writes",
        takes: FILE,
        help: "record every write, discard and flush in FILE, as the kernel's dm-log-writes does, for `minivmm log` \
               and `minivmm crash`",
        alone: None,
        set: |options, value| (!value.is_empty()).then(|| options.config.log_writes = Some(value.into())),
    },
    Key {
        name: "host-cache",
        takes: "keep|drop|warm",
        help: "what the host's page cache holds of the image when the guest starts: what it holds now, nothing (written \
               back, then dropped), or all of it [keep]",
        alone: None,
        set: |options, value| {
            options.host_cache = HostCache::ALL.into_iter().find(|wish| wish.name() == value)?;
            Some(())
        },
    },
    Key {
        name: "shared-with-host",
        takes: "on|off",
        help: "start even if this host uses the image: mounted, behind a loop device, as swap, or locked by \
               flock; two writers destroy a file system [off]",
        alone: Some("on"),
        set: |options, value| on_off(value).map(|on| options.config.shared_with_host = on),
    },
];

fn on_off(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// Returns every key with the words that it takes, if it takes words. For shell completions.
pub fn keys() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    KEYS.iter().map(|key| (key.name, words(key.takes)))
}

/// Returns the `--help` text about the keys, one entry per key.
pub fn keys_help() -> String {
    KEYS.iter().map(|key| format!("  {}={}\n      {}\n", key.name, key.takes, key.help)).collect()
}

/// Parses PATH[,KEY=VALUE]...; paths may be any bytes.
pub fn parse(text: impl AsRef<OsStr>) -> Result<DiskOptions, OptionsError> {
    let text = text.as_ref();
    check_commas(text)?;
    let mut parts = split_at_commas(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or(OptionsError::NoPath)?;
    let mut options =
        DiskOptions { config: DiskConfig::new(path), transport: None, host_cache: HostCache::Keep };
    let mut given: Vec<&'static str> = Vec::new();
    for part in parts {
        let mut halves = part.as_bytes().splitn(2, |&byte| byte == b'=').map(OsStr::from_bytes);
        let name = halves.next().unwrap_or_default().to_string_lossy();
        let Some(key) = KEYS.iter().find(|key| key.name == name) else {
            let known: Vec<_> = KEYS.iter().map(|key| key.name).collect();
            let hint = spellings::hint_after_key(
                &name,
                &halves.next().unwrap_or_default().to_string_lossy(),
                &known,
            );
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

impl DiskOptions {
    fn set(&mut self, key: &Key, value: &OsStr) -> Result<(), OptionsError> {
        let set = match value.to_str() {
            Some(text) => {
                if key.name == "fault" {
                    text.parse::<FaultSpec>()?;
                }
                (key.set)(self, text)
            }
            None if key.takes == FILE => {
                self.config.log_writes = Some(value.into());
                Some(())
            }
            None => None,
        };
        // What was set before is in range, so this is about `key`.
        set.filter(|()| self.config.check().is_ok()).ok_or_else(|| OptionsError::Value {
            key: key.name,
            value: value.to_string_lossy().into_owned(),
            takes: key.takes,
        })
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
