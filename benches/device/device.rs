//! One run of the real device: image, `BlockDevice`, its worker's thread, and the driver's thread.
//!
//! Owns bring-up and tear-down of a run and the check that data has really moved.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use minivmm::blk::BlockDevice;
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm::observe::Residency;
use minivmm::virtio::queue::Ring;
use minivmm::virtio::{Activation, EnabledQueue, Interrupt, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::counted::{self, Counter};
use crate::driver::{Driver, LastTransfer, Line, Seen, Waits};
use crate::load::{Load, Sync};
use crate::rings::{FEATURES, QUEUE_SIZE, Rings};

/// config.writeback (virtio 5.2.4).
const WRITEBACK_OFFSET: u64 = 32;
/// What names the worker's thread.
const DISK_NAME: &str = "bench";

/// How a run is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// The image.
    pub image: &'a Path,
    /// Keys of `--disk` besides the path and the mode.
    pub keys: &'a str,
    /// How the driver waits.
    pub waits: Waits,
    /// Bytes of one data descriptor, at most.
    pub segment_bytes: u32,
    /// Not measured.
    pub warm_up: Duration,
    /// Measured.
    pub window: Duration,
    /// Where the random offsets begin.
    pub seed: u64,
}

/// What is counted beside a run that is not timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Nothing: the run is timed.
    Nothing,
    /// System calls of the worker's thread.
    SystemCalls,
    /// Stores to the used index by the worker's thread.
    Publishes,
}

/// What a run gives.
#[derive(Debug, Clone)]
pub struct Run {
    /// What the driver has seen.
    pub seen: Seen,
    /// The disk's own counters, from start to end.
    pub counters: Vec<(&'static str, u64)>,
    /// The engine that did the I/O, as `--disk` calls it.
    pub engine: &'static str,
    /// Huge pages under guest RAM, and its size, in bytes.
    pub huge_bytes: (u64, u64),
    /// Bytes of the image in the host's page cache when the driver had ended, if the host tells.
    pub cached_bytes_after: Option<u64>,
}

/// The options of a disk for this load.
pub fn options(image: &Path, load: &Load, keys: &str) -> Result<DiskConfig> {
    let path = image.display().to_string().replace(',', ",,");
    let comma = if keys.is_empty() { "" } else { "," };
    let text = format!("{path},cache={},queue-size={QUEUE_SIZE}{comma}{keys}", load.cache);
    Ok(disk_options::parse(text)?.config)
}

/// Runs a load once.
pub fn run(load: &Load, setup: &Setup<'_>, count: Count) -> Result<Run> {
    let image = Arc::new(Image::open(&options(setup.image, load, setup.keys)?)?);
    let rings = Rings::new(load.depth, load.block_bytes, setup.segment_bytes.min(load.block_bytes))?;
    let huge_bytes = huge_bytes(&rings);
    let line = Arc::new(Line::new()?);
    let doorbell = Arc::new(EventFd::new(0)?);
    let mut device = BlockDevice::with_ram(DISK_NAME, Arc::clone(&image), Some(rings.ram()))?;
    let engine = device.engine().name();
    start(&mut device, load, &rings, &doorbell, &line)?;

    let worker = || counted::thread_named(&format!("{DISK_NAME}-q0"));
    let counters = match count {
        Count::Nothing => Vec::new(),
        Count::SystemCalls => vec![Counter::system_calls(worker()?)?],
        Count::Publishes => vec![Counter::stores(worker()?, rings.used_idx_address())?],
    };
    let wires = (doorbell, Arc::clone(&line));
    let image_bytes = image.geometry().capacity_sectors * 512;
    let driver = Driver::new(rings, *load, setup.waits, image_bytes, wires, counters, setup.seed)?;
    let (warm_up, window) = (setup.warm_up, setup.window);
    let thread = std::thread::Builder::new().name("driver".into());
    let outcome = thread.spawn(move || driver.run(warm_up, window))?.join();
    device.reset();
    drop(device);
    let (seen, last) = outcome.map_err(|_| anyhow!("the driver has panicked"))??;
    // The check below reads the image by way of the page cache.
    let cached_bytes_after = Residency::of(image.file().descriptor()).ok().map(|found| found.cached_bytes());
    if let Some(last) = &last {
        check_moved(setup.image, last)?;
    }
    let counters = image.stats.counters().snapshot();
    image.close()?;
    Ok(Run { seen, counters, engine, huge_bytes, cached_bytes_after })
}

/// What a transport does from FEATURES_OK to DRIVER_OK, and a guest that turns its write cache off.
fn start(
    device: &mut BlockDevice,
    load: &Load,
    rings: &Rings,
    doorbell: &Arc<EventFd>,
    line: &Arc<Line>,
) -> Result<()> {
    let features = device.features() & FEATURES;
    ensure!(features == FEATURES, "the device offers only {features:#x} of {FEATURES:#x}");
    device.negotiated(features);
    if load.sync == Sync::CacheOff {
        device.write_config(WRITEBACK_OFFSET, &[0]);
    }
    let ring = Ring::new(rings.ram(), &rings.config(), QUEUE_SIZE, features)?;
    let queues = vec![EnabledQueue { index: 0, ring, doorbell: Arc::clone(doorbell) }];
    let interrupt: Arc<dyn Interrupt> = Arc::clone(line) as Arc<dyn Interrupt>;
    Ok(device.activate(Activation { ram: rings.ram().clone(), features, queues, interrupt })?)
}

/// The last transfer's data must be both in the guest's memory and in the image.
fn check_moved(image: &Path, last: &LastTransfer) -> Result<()> {
    let mut data = vec![0; last.data.len()];
    std::fs::File::open(image)?.read_exact_at(&mut data, last.offset)?;
    ensure!(data == last.data, "the last transfer, at {}, is not what the image holds", last.offset);
    Ok(())
}

/// Bytes of guest RAM on huge pages, and of guest RAM.
fn huge_bytes(rings: &Rings) -> (u64, u64) {
    let range = rings.host_range();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut inside = false;
    let mut huge_kib = 0;
    for line in smaps.lines() {
        if let Some((from, to)) = mapping(line) {
            inside = from < range.end && range.start < to;
        } else if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
            huge_kib += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    // A mapping next to ours may have been merged with it.
    ((huge_kib << 10).min(range.end - range.start), range.end - range.start)
}

/// The range of a line that begins a mapping in smaps.
fn mapping(line: &str) -> Option<(u64, u64)> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}

/// Whether these keys are understood at all; if not, why.
pub fn understood(image: &Path, load: &Load, keys: &str) -> Result<()> {
    options(image, load, keys).map(drop).context("the device cannot be had so")
}
