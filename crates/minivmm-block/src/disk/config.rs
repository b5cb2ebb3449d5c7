//! What an embedder asks of one disk.
//!
//! Owns the fields, their defaults and the ranges of their values, which [`DiskConfig::check`] knows. How a user
//! says them belongs to the embedder.

use std::path::PathBuf;
use std::time::Duration;

use super::cache::{CachePolicy, POLICIES};
use super::fault::spec::FaultSpec;
use super::stable::StableBy;

/// The largest virtqueue: one preadv takes this many pieces (IOV_MAX).
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// The smallest virtqueue: a header, one piece of data and a status, rounded up to a power of two.
pub const QUEUE_SIZE_MIN: u16 = 4;
/// The most queues of a disk.
pub const QUEUES_MAX: u16 = 16;
/// The most queues that a disk gets by default.
const QUEUES_DEFAULT_MAX: u16 = 4;
/// The most operations queued before io_uring is entered: a whole queue of the largest size.
pub const BATCH_MAX: u16 = QUEUE_SIZE_MAX;
/// Default of `batch`, in operations.
const BATCH: u16 = 4;
/// The longest time in microseconds that a worker may spin before it blocks.
pub const POLL_US_MAX: u32 = 1000;
/// Default of `poll_us`, in microseconds.
pub const POLL_US: u32 = 100;
/// The longest serial in bytes (virtio 5.2.6: GET_ID).
pub const SERIAL_MAX: usize = 20;

/// One disk, as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// The row of the cache mode.
    pub cache: &'static CachePolicy,
    /// `true` if nothing is ever written to the image.
    pub readonly: bool,
    /// The answer to GET_ID, at most [`SERIAL_MAX`] bytes; `None` means the image's file name.
    pub serial: Option<String>,
    /// Descriptors in each virtqueue, a power of two from [`QUEUE_SIZE_MIN`] to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Virtqueues, at most [`QUEUES_MAX`]; `None` means one, or what [`DiskConfig::for_cpus`] makes of it.
    pub queues: Option<u16>,
    /// Logical block size in bytes, 512 or 4096; `None` means that it is probed.
    pub block_size: Option<u32>,
    /// `true` if DISCARD is offered, which frees space in the image.
    pub discard: bool,
    /// `true` if the image is raw whatever it looks like: its first bytes are not checked.
    pub force_raw: bool,
    /// The engine that executes host operations.
    pub engine: EngineChoice,
    /// How a write is made stable where it must be.
    pub stable: StableBy,
    /// Operations queued in the middle of a batch before io_uring is entered, at most [`BATCH_MAX`].
    pub batch: u16,
    /// Microseconds that a worker spins before it blocks, at most [`POLL_US_MAX`]; `None` means [`POLL_US`].
    pub poll_us: Option<u32>,
    /// `true` if guest RAM is registered with io_uring, which pins all of it.
    pub fixed_buffers: bool,
    /// `true` if every transfer of a direct mode goes through a private buffer. A guest that changes memory in
    /// flight then cannot upset checksums or mirrors below.
    pub bounce_always: bool,
    /// The faults that are made on purpose; `None` for none.
    pub fault: Option<FaultSpec>,
    /// Where every write, discard and flush of the host is recorded; `None` for nowhere.
    pub log_writes: Option<PathBuf>,
    /// `true` if this host may use the image at the same time: mounted, behind a loop device, as swap.
    pub shared_with_host: bool,
    /// `true` if latencies are measured.
    pub timed: bool,
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

/// A field of a [`DiskConfig`] is out of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {field}={value}: expected {range}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What the field takes.
    pub range: &'static str,
}

impl DiskConfig {
    /// Returns the disk at `path` with every field at its default.
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
            fixed_buffers: false,
            bounce_always: false,
            fault: None,
            log_writes: None,
            shared_with_host: false,
            timed: false,
        }
    }

    /// Sets what was not given and depends on the number of guest CPUs: a queue for each, at most four.
    pub fn for_cpus(mut self, cpus: u8) -> Self {
        self.queues.get_or_insert(u16::from(cpus).clamp(1, QUEUES_DEFAULT_MAX));
        self
    }

    /// Returns how many virtqueues the device has.
    pub fn queue_count(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Returns `true` if the device offers DISCARD.
    pub fn offers_discard(&self) -> bool {
        self.discard && !self.readonly
    }

    /// Returns how long a worker spins before it blocks.
    pub fn poll(&self) -> Duration {
        Duration::from_micros(u64::from(self.poll_us.unwrap_or(POLL_US)))
    }

    /// Returns `true` if the image is synced at the start and at the end: it is writable, and the mode honours
    /// flushes.
    pub fn is_synced_at_both_ends(&self) -> bool {
        !self.readonly && self.cache.honour_flush
    }

    /// Returns an error if a field is out of its range, about the first such field.
    /// [`Image::open`](super::Image::open) calls this.
    pub fn check(&self) -> Result<(), ConfigError> {
        let serial_bytes = self.serial.as_ref().map_or(0, String::len);
        let (size, queues, poll_us) = (self.queue_size, self.queue_count(), self.poll_us.unwrap_or(0));
        let block = self.block_size.unwrap_or(512);
        let size_fits = size.is_power_of_two() && (QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&size);
        let quoted = || format!("{:?}", self.serial.as_deref().unwrap_or_default());
        ensure(serial_bytes <= SERIAL_MAX, "serial", "at most 20 bytes", quoted)?;
        ensure((1..=QUEUES_MAX).contains(&queues), "queues", "1 to 16", || queues.to_string())?;
        ensure(size_fits, "queue_size", "a power of two from 4 to 1024", || size.to_string())?;
        ensure(block == 512 || block == 4096, "block_size", "512 or 4096", || block.to_string())?;
        ensure((1..=BATCH_MAX).contains(&self.batch), "batch", "1 to 1024", || self.batch.to_string())?;
        ensure(poll_us <= POLL_US_MAX, "poll_us", "0 to 1000", || poll_us.to_string())
    }
}

fn ensure(
    fits: bool,
    field: &'static str,
    range: &'static str,
    value: impl FnOnce() -> String,
) -> Result<(), ConfigError> {
    if fits { Ok(()) } else { Err(ConfigError { field, value: value(), range }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_queue_a_cpu_up_to_four_unless_somebody_says_otherwise() {
        let plain = DiskConfig::new("a");
        for (cpus, queues) in [(1, 1), (2, 2), (4, 4), (5, 4), (254, 4)] {
            assert_eq!(plain.clone().for_cpus(cpus).queues, Some(queues), "{cpus} CPUs");
        }
        let asked = DiskConfig { queues: Some(7), ..plain };
        assert_eq!(asked.for_cpus(2).queues, Some(7));
    }

    #[test]
    fn a_field_out_of_its_range_is_refused_before_the_image_is_touched() {
        let plain = || DiskConfig::new("/nonexistent.img");
        assert_eq!(plain().check(), Ok(()));
        let long = Some("123456789012345678901".to_owned());
        for (config, message) in [
            (
                DiskConfig { serial: long, ..plain() },
                "invalid serial=\"123456789012345678901\": expected at most 20",
            ),
            (DiskConfig { queues: Some(0), ..plain() }, "invalid queues=0: expected 1 to 16"),
            (DiskConfig { queues: Some(17), ..plain() }, "invalid queues=17"),
            (
                DiskConfig { queue_size: 0, ..plain() },
                "invalid queue_size=0: expected a power of two from 4 to 1024",
            ),
            (DiskConfig { queue_size: 2, ..plain() }, "invalid queue_size=2"),
            (DiskConfig { queue_size: 48, ..plain() }, "invalid queue_size=48"),
            (DiskConfig { queue_size: 2048, ..plain() }, "invalid queue_size=2048"),
            (DiskConfig { block_size: Some(0), ..plain() }, "invalid block_size=0: expected 512 or 4096"),
            (DiskConfig { block_size: Some(1024), ..plain() }, "invalid block_size=1024"),
            (DiskConfig { batch: 0, ..plain() }, "invalid batch=0: expected 1 to 1024"),
            (DiskConfig { batch: 1025, ..plain() }, "invalid batch=1025"),
            (DiskConfig { poll_us: Some(1001), ..plain() }, "invalid poll_us=1001: expected 0 to 1000"),
        ] {
            for error in [super::super::Image::open(&config), super::super::Image::look(&config)] {
                let error = error.unwrap_err();
                assert_eq!(error.to_string(), "cannot use disk image /nonexistent.img");
                assert!(error.reason.to_string().contains(message), "{}", error.reason);
            }
        }
    }
}
