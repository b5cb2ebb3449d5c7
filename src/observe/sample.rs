//! One sample of everything, and the figures derived from it.
//!
//! Owns the combination and the three derived figures, which docs/observing.md defines. Counters start at 0
//! when the observation begins, so that what the host's disk did before does not count.

use std::borrow::Borrow;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::cache::{Residency, Watched};
use super::guest::{GuestDisk, GuestEnd, GuestView};
use super::host::{DiskIo, HostDisk, IoAccounting, ProcessIo};
use crate::disk::Image;

/// How long an answer of the guest is waited for.
const GUEST_PATIENCE: Duration = Duration::from_millis(50);

/// A sample of everything at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Time since the observation began.
    pub at: Duration,
    /// The disks: vda, vdb, ...
    pub disks: Vec<DiskSample>,
    /// What this process has read from and written to disks since the observation began; `None` if the kernel
    /// does not account for it.
    pub process: Option<ProcessIo>,
    /// The guest's view; `None` if it has not reported one.
    pub guest: Option<GuestSample>,
    /// Share of the bytes read by the guest that needed no read of the host's disk, from 0 to 1, for all disks
    /// together. `None` until something is read.
    pub host_hit_share: Option<f64>,
}

/// The guest's view in a sample.
#[derive(Debug, Clone)]
pub struct GuestSample {
    /// What the guest reported.
    pub view: GuestView,
    /// Age of the report.
    pub age: Duration,
    /// Growth of the guest's pages of files and devices since its first report.
    pub page_cache_growth_bytes: u64,
}

/// The figures of one disk in a sample.
#[derive(Debug, Clone)]
pub struct DiskSample {
    /// Name of the disk: vda, vdb, ...
    pub name: String,
    /// Name of the cache mode.
    pub cache: &'static str,
    /// What the host's page cache holds of the image; `None` if it cannot be measured.
    pub residency: Option<Residency>,
    /// Requests that the guest made to the device.
    pub requests: Requests,
    /// Number of fdatasyncs that minivmm has made.
    pub syncs: u64,
    /// Number of bytes that a crash of the host would lose.
    pub at_risk_bytes: u64,
    /// Name of the host's disk below the image; `None` if it is not known.
    pub host_disk: Option<String>,
    /// What that disk has done for everybody since the observation began.
    pub host_io: Option<DiskIo>,
    /// The guest's own counters of this disk; `None` without a guest's view.
    pub guest: Option<GuestDisk>,
    /// Upper bound of the bytes that both the guest and the host have cached. `None` without a guest's view.
    pub double_cached_bytes: Option<u64>,
    /// FLUSHes of the host's disk per FLUSH of the guest; `None` without a FLUSH.
    pub flush_amplification: Option<f64>,
}

/// Requests that the device has received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is its name")]
pub struct Requests {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
}

impl Requests {
    fn of(image: &Image) -> Self {
        let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = image.stats.counters();
        Self {
            reads: at(&counters.reads),
            read_bytes: at(&counters.read_bytes),
            writes: at(&counters.writes),
            written_bytes: at(&counters.write_bytes),
            flushes: at(&counters.flushes),
        }
    }
}

/// Takes samples repeatedly.
#[derive(Debug)]
pub struct Sampler {
    begun: Instant,
    disks: Vec<ObservedDisk>,
    process: Option<(IoAccounting, ProcessIo)>,
    guest: Option<GuestEnd>,
    /// Size of the guest's page cache at its first report.
    guest_first_bytes: Option<u64>,
}

#[derive(Debug)]
struct ObservedDisk {
    name: String,
    image: Arc<Image>,
    watched: Watched<SharedFile>,
    host: Option<(HostDisk, DiskIo)>,
    warned: bool,
}

/// The descriptor of an image.
#[derive(Debug)]
struct SharedFile(Arc<File>);

impl Borrow<File> for SharedFile {
    fn borrow(&self) -> &File {
        &self.0
    }
}

impl Sampler {
    /// Begins the observation of these images and, through `guest`, of the guest.
    pub fn begin(images: impl IntoIterator<Item = Arc<Image>>, guest: Option<GuestEnd>) -> Self {
        let disk = |(image, letter): (Arc<Image>, char)| ObservedDisk {
            name: format!("vd{letter}"),
            watched: Watched::new(SharedFile(Arc::clone(image.file().descriptor()))),
            host: HostDisk::of(&image).and_then(|disk| disk.io().map(|io| (disk, io))),
            image,
            warned: false,
        };
        Self {
            disks: images.into_iter().zip('a'..='z').map(disk).collect(),
            process: IoAccounting::of_this_process()
                .and_then(|accounting| accounting.now().map(|now| (accounting, now))),
            guest,
            guest_first_bytes: None,
            begun: Instant::now(),
        }
    }

    /// Takes a sample. If the guest is `running`, it is asked, and its answer is waited for briefly.
    pub fn sample(&mut self, running: bool) -> Sample {
        let guest = self.ask_guest(running);
        let disks: Vec<_> = self.disks.iter_mut().map(|disk| disk.sample(guest.as_ref())).collect();
        let process = self.process.as_ref().and_then(|(accounting, then)| {
            let now = accounting.now()?;
            Some(ProcessIo {
                read_bytes: now.read_bytes.saturating_sub(then.read_bytes),
                written_bytes: now.written_bytes.saturating_sub(then.written_bytes),
            })
        });
        let asked = disks.iter().map(|disk| disk.requests.read_bytes).sum();
        let host_hit_share = process.and_then(|io| hit_share(asked, io.read_bytes));
        Sample { at: self.begun.elapsed(), disks, process, guest, host_hit_share }
    }

    fn ask_guest(&mut self, running: bool) -> Option<GuestSample> {
        let end = self.guest.as_mut()?;
        let (view, age) = if running { end.ask(GUEST_PATIENCE) } else { end.newest() }?;
        let now = view.page_cache_bytes();
        let first = *self.guest_first_bytes.get_or_insert(now);
        Some(GuestSample { view, age, page_cache_growth_bytes: now.saturating_sub(first) })
    }
}

impl ObservedDisk {
    fn sample(&mut self, guest: Option<&GuestSample>) -> DiskSample {
        let residency = match self.watched.measure() {
            Ok(found) => Some(found),
            Err(error) => {
                if !std::mem::replace(&mut self.warned, true) {
                    log::warn!("{}: {error}", self.name);
                }
                None
            }
        };
        let requests = Requests::of(&self.image);
        let host_io = self.host.as_ref().and_then(|(disk, then)| Some(since(disk.io()?, *then)));
        let double = residency.zip(guest).map(|(host, guest)| double_cached(&host, guest));
        DiskSample {
            name: self.name.clone(),
            cache: self.image.config().cache.name,
            residency,
            requests,
            syncs: self.image.stats.counters().fdatasyncs.load(Ordering::Relaxed),
            at_risk_bytes: self.image.monitor.snapshot().at_risk_bytes,
            host_disk: self.host.as_ref().map(|(disk, _)| disk.name().to_owned()),
            host_io,
            guest: guest.and_then(|guest| guest.view.disk(&self.name)).cloned(),
            double_cached_bytes: double,
            flush_amplification: host_io
                .and_then(|io| io.flushes)
                .and_then(|flushes| amplification(requests.flushes, flushes)),
        }
    }
}

fn since(now: DiskIo, then: DiskIo) -> DiskIo {
    DiskIo {
        reads: now.reads.saturating_sub(then.reads),
        read_bytes: now.read_bytes.saturating_sub(then.read_bytes),
        writes: now.writes.saturating_sub(then.writes),
        written_bytes: now.written_bytes.saturating_sub(then.written_bytes),
        flushes: now.flushes.zip(then.flushes).map(|(now, then)| now.saturating_sub(then)),
    }
}

/// Returns an upper bound of what both have cached: it cannot be more than either has.
fn double_cached(host: &Residency, guest: &GuestSample) -> u64 {
    host.cached_bytes().min(guest.page_cache_growth_bytes)
}

/// Returns the share of `asked` bytes for which no disk was read. Read-ahead may read more than was asked for.
pub fn hit_share(asked: u64, from_disk: u64) -> Option<f64> {
    (asked > 0).then(|| 1.0 - (from_disk.min(asked) as f64 / asked as f64))
}

/// Returns the FLUSHes of the host's disk per FLUSH of the guest; `None` if the guest sent none.
pub fn amplification(asked: u64, done: u64) -> Option<f64> {
    (asked > 0).then(|| done as f64 / asked as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::cache::ResidencySource;

    #[test]
    fn derived_figures_are_what_the_documentation_defines() {
        for (asked, from_disk, share) in
            [(0, 0, None), (0, 9, None), (100, 0, Some(1.0)), (100, 25, Some(0.75)), (100, 400, Some(0.0))]
        {
            assert_eq!(hit_share(asked, from_disk), share, "{asked} {from_disk}");
        }
        for (asked, done, factor) in [(0, 5, None), (4, 0, Some(0.0)), (4, 8, Some(2.0))] {
            assert_eq!(amplification(asked, done), factor);
        }
        let host = |cached| Residency {
            page_bytes: 4096,
            cached,
            dirty: None,
            writeback: None,
            evicted: None,
            recently_evicted: None,
            source: ResidencySource::Mincore,
        };
        let guest = |bytes| GuestSample {
            view: GuestView::default(),
            age: Duration::ZERO,
            page_cache_growth_bytes: bytes,
        };
        for (cached, bytes, both) in [(0, 8192, 0), (1, 8192, 4096), (9, 8192, 8192), (9, 0, 0)] {
            assert_eq!(double_cached(&host(cached), &guest(bytes)), both);
        }
    }
}
