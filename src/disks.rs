//! The disks of a process: opened together, watched, reported, and closed in order.
//!
//! Owns what a VM and an export do alike with their disks' images. How a disk is reached, and by whom, is theirs.

pub mod end;
pub mod report;
pub mod threads;
pub mod vanished;

use std::path::PathBuf;
use std::sync::Arc;

use crate::disk::{Image, ImageError};
use crate::disk_options::DiskOptions;
use crate::files::host_use;
use crate::observe::control::{self, ControlError};
use threads::SandboxedThreads;

/// The maximum number of disks: each has a letter.
pub const DISKS_MAX: usize = 26;

/// An open disk: its path and its image.
pub struct OpenDisk {
    /// The path, for messages.
    pub path: PathBuf,
    /// The image.
    pub image: Arc<Image>,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is its source's")]
pub enum OpenError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    HostCache(#[from] ControlError),
}

/// Two disks share bytes, and at least one of them is written to.
#[derive(Debug, thiserror::Error)]
#[error(
    "--disk {first} and --disk {second} share bytes: give each disk an image of its own (disks can share an image \
     if all are readonly)"
)]
pub struct SharedBytes {
    first: PathBuf,
    second: PathBuf,
}

/// Opens the disks' images, brings the host's cache of each into the state that was asked for, and tells what the
/// user should know. `busy_threads` is how many threads may be busy at once: if there are more than CPUs, workers do
/// not spin. `timed`: latencies are measured.
pub fn open(disks: &[DiskOptions], busy_threads: usize, timed: bool) -> Result<Vec<OpenDisk>, OpenError> {
    let crowded = is_crowded(busy_threads);
    let open = |options: &DiskOptions| {
        let mut disk = options.config.clone();
        if crowded {
            disk.poll_us.get_or_insert(0);
        }
        disk.timed = timed;
        let image = Arc::new(Image::open(&disk)?.with_threads(Arc::new(SandboxedThreads)));
        control::apply(options.host_cache, &image)?;
        log::info!("{}", image.banner());
        for warning in image.warnings() {
            log::warn!("{warning}");
        }
        Ok(OpenDisk { path: disk.path, image })
    };
    disks.iter().map(open).collect()
}

/// Returns `true` if there are more busy `threads` than CPUs that this process may use. A worker that spins
/// instead of sleeping would then take CPU time from the others.
fn is_crowded(threads: usize) -> bool {
    std::thread::available_parallelism().is_ok_and(|cpus| threads > cpus.get())
}

/// Returns an error for each pair of disks that share bytes, unless both are read-only.
pub fn shared_bytes(disks: &[DiskOptions]) -> Vec<SharedBytes> {
    // An image without metadata is refused when it is opened.
    let with_metadata = |disk: &DiskOptions| {
        let metadata = std::fs::metadata(&disk.config.path).ok()?;
        Some((disk.config.clone(), metadata))
    };
    let images: Vec<_> = disks.iter().filter_map(with_metadata).collect();
    let mut pairs = Vec::new();
    for (at, (first, first_metadata)) in images.iter().enumerate() {
        for (second, second_metadata) in images.iter().skip(at + 1) {
            let is_written = !(first.readonly && second.readonly);
            if is_written && host_use::share_bytes(first_metadata, second_metadata) {
                pairs.push(SharedBytes { first: first.path.clone(), second: second.path.clone() });
            }
        }
    }
    pairs
}
