//! One look at everything, and what follows from it.
//!
//! Owns the joining and the three derived figures, defined in docs/observing.md. Counts begin with the
//! observation, so that what the host's disk did before is nobody's.

use std::borrow::Borrow;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::cache::{Residency, Watched};
use super::guest::{GuestDisk, GuestEnd, GuestView};
use super::host::{Accounts, DiskIo, HostDisk, ProcessIo};
use crate::disk::Image;

/// So long a guest's answer is waited for.
const GUEST_PATIENCE: Duration = Duration::from_millis(50);

/// Everything at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Since the observation began.
    pub at: Duration,
    /// vda, vdb, ...
    pub disks: Vec<DiskSample>,
    /// What this process has had from and given to disks, since the observation began.
    pub process: Option<ProcessIo>,
    /// The guest's view, if it has told one.
    pub guest: Option<GuestSample>,
    /// Of the guest's reads, the share for which the host's disk was not needed: from 0 to 1; `None` as
    /// long as nothing was read. All disks together.
    pub host_hit_share: Option<f64>,
}

/// The guest's view in a sample.
#[derive(Debug, Clone)]
pub struct GuestSample {
    /// What it said.
    pub view: GuestView,
    /// How long ago.
    pub age: Duration,
    /// Pages of files and devices that have come since its first view.
    pub page_cache_growth_bytes: u64,
}

/// One disk at one moment.
#[derive(Debug, Clone)]
pub struct DiskSample {
    /// vda, vdb, ...
    pub name: String,
    /// The mode.
    pub cache: &'static str,
    /// What the host's cache has of the image; `None` where it cannot be looked at.
    pub residency: Option<Residency>,
    /// As the guest has asked the device.
    pub requests: Requests,
    /// fdatasyncs that minivmm has made.
    pub syncs: u64,
    /// Bytes that a crash of the host would cost.
    pub at_risk_bytes: u64,
    /// The host's disk below it.
    pub host_disk: Option<String>,
    /// What that disk has done for everybody, since the observation began.
    pub host_io: Option<DiskIo>,
    /// The guest's own count of what it has done with this disk.
    pub guest: Option<GuestDisk>,
    /// Bytes that guest and host may both have in their caches, at most. `None` without a guest's view.
    pub double_cached_bytes: Option<u64>,
    /// FLUSHes of the host's disk for each FLUSH of the guest's; `None` without a FLUSH.
    pub flush_amplification: Option<f64>,
}

/// Requests as the device has seen them.
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
        let counters = image.counters();
        Self {
            reads: at(&counters.reads),
            read_bytes: at(&counters.read_bytes),
            writes: at(&counters.writes),
            written_bytes: at(&counters.write_bytes),
            flushes: at(&counters.flushes),
        }
    }
}

/// Looks, again and again.
#[derive(Debug)]
pub struct Looker {
    begun: Instant,
    disks: Vec<Disk>,
    process: Option<(Accounts, ProcessIo)>,
    guest: Option<GuestEnd>,
    /// The guest's page cache when it first told of it.
    guest_first_bytes: Option<u64>,
}

#[derive(Debug)]
struct Disk {
    name: String,
    image: Arc<Image>,
    watched: Watched<SharedFile>,
    host: Option<(HostDisk, DiskIo)>,
    told: bool,
}

/// The image's descriptor.
#[derive(Debug)]
struct SharedFile(Arc<File>);

impl Borrow<File> for SharedFile {
    fn borrow(&self) -> &File {
        &self.0
    }
}

impl Looker {
    /// The observation of these images begins, and of the guest at the other end.
    pub fn begin(images: impl IntoIterator<Item = Arc<Image>>, guest: Option<GuestEnd>) -> Self {
        let disk = |(image, letter): (Arc<Image>, char)| Disk {
            name: format!("vd{letter}"),
            watched: Watched::new(SharedFile(Arc::clone(image.file()))),
            host: HostDisk::of(&image).and_then(|disk| disk.io().map(|io| (disk, io))),
            image,
            told: false,
        };
        Self {
            disks: images.into_iter().zip('a'..='z').map(disk).collect(),
            process: Accounts::of_this_process()
                .and_then(|accounts| accounts.now().map(|now| (accounts, now))),
            guest,
            guest_first_bytes: None,
            begun: Instant::now(),
        }
    }

    /// Everything now. The guest is asked, and its answer waited for a little, if it is `running`.
    pub fn look(&mut self, running: bool) -> Sample {
        let guest = self.look_at_guest(running);
        let disks: Vec<_> = self.disks.iter_mut().map(|disk| disk.look(guest.as_ref())).collect();
        let process = self.process.as_ref().and_then(|(accounts, then)| {
            let now = accounts.now()?;
            Some(ProcessIo {
                read_bytes: now.read_bytes.saturating_sub(then.read_bytes),
                written_bytes: now.written_bytes.saturating_sub(then.written_bytes),
            })
        });
        let asked = disks.iter().map(|disk| disk.requests.read_bytes).sum();
        let host_hit_share = process.and_then(|io| hit_share(asked, io.read_bytes));
        Sample { at: self.begun.elapsed(), disks, process, guest, host_hit_share }
    }

    fn look_at_guest(&mut self, running: bool) -> Option<GuestSample> {
        let end = self.guest.as_mut()?;
        let (view, age) = if running { end.look(GUEST_PATIENCE) } else { end.newest() }?;
        let now = view.page_cache_bytes();
        let first = *self.guest_first_bytes.get_or_insert(now);
        Some(GuestSample { view, age, page_cache_growth_bytes: now.saturating_sub(first) })
    }
}

impl Disk {
    fn look(&mut self, guest: Option<&GuestSample>) -> DiskSample {
        let residency = match self.watched.look() {
            Ok(found) => Some(found),
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
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
            cache: self.image.policy().name,
            residency,
            requests,
            syncs: self.image.counters().fdatasyncs.load(Ordering::Relaxed),
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

/// Whatever both have: no more than either has.
fn double_cached(host: &Residency, guest: &GuestSample) -> u64 {
    host.cached_bytes().min(guest.page_cache_growth_bytes)
}

/// The share of `asked` bytes for which no disk was read. Read-ahead may read more than was asked.
pub fn hit_share(asked: u64, from_disk: u64) -> Option<f64> {
    (asked > 0).then(|| 1.0 - (from_disk.min(asked) as f64 / asked as f64))
}

/// FLUSHes of the host's disk for each of the guest's.
pub fn amplification(asked: u64, done: u64) -> Option<f64> {
    (asked > 0).then(|| done as f64 / asked as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::cache::Means;

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
            means: Means::Mincore,
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
