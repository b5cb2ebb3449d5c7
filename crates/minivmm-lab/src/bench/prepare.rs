//! Prepares a bench: reads the jobs, checks that writing is allowed, completes the image, and checks that the
//! modes are available.
//!
//! Owns the refusals. An existing image is overwritten only if the user has allowed it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::BenchOptions;
use super::jobs::{self, Job, JobError};
use crate::measuring::Host;
use crate::measuring::extents::Layout;
use crate::measuring::image;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::image::ImageProblem;
use minivmm::disk::{DiskConfig, ImageError};
use minivmm::explain::{self, Explanation};

/// What a bench needs to begin.
pub struct Prepared {
    /// The jobs that run.
    pub jobs: Vec<Job>,
    /// How the image is laid out on the disk.
    pub layout: Layout,
    /// The machine.
    pub host: Host,
    /// The cache modes that run.
    pub modes: Vec<&'static CachePolicy>,
    /// The explanation of the disk in each mode.
    pub explained: Vec<Explanation>,
}

/// Why nothing runs.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it, or is its source's")]
pub enum PrepareError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("fio is not on this host: install it (Debian's package fio); the test guest has its own")]
    NoFio,
    #[error("there is no image {0}: --size SIZE creates one, fully written")]
    NoImage(PathBuf),
    #[error(
        "{jobs} would write over what is in {image}: give --destroy to allow that, or choose jobs that only read with --only"
    )]
    NoConsent { jobs: String, image: PathBuf },
    #[error(
        "{gaps} of the {bytes} bytes of {image} are holes, or reserved and never written: reading them reads no disk, and \
         a first write to them is an allocation. --fill writes the zeroes there that they read as; what can be read of \
         the image stays as it is, and it takes its full size on the disk"
    )]
    Gaps { image: PathBuf, gaps: u64, bytes: u64 },
    #[error(transparent)]
    Image(#[from] image::ImageError),
    #[error("cannot look at the machine below {0}")]
    Host(PathBuf, #[source] std::io::Error),
    #[error("cannot measure {} now: {why}", image.display())]
    Refused { image: PathBuf, why: String },
    #[error("cannot use {image} with cache={mode}")]
    Mode { mode: &'static str, image: PathBuf, source: ImageError },
}

/// Prepares the bench or returns why it cannot run. `written` is called first with the number of bytes that
/// will be written to the image, and then as they are written.
pub fn prepare(
    options: &BenchOptions,
    written: &mut dyn FnMut(WriteProgress),
    stop: &AtomicBool,
) -> Result<Prepared, PrepareError> {
    let path = &options.disk.path;
    let jobs: Vec<Job> = jobs::read(options.jobs.as_deref(), &options.only)?
        .iter()
        .map(|job| job.timed(options.seconds))
        .collect();
    let is_there = path.exists();
    let writing: Vec<_> = jobs.iter().filter(|job| job.writes()).map(|job| job.name.as_str()).collect();
    if is_there && !writing.is_empty() && !options.destroy {
        return Err(PrepareError::NoConsent { jobs: writing.join(", "), image: path.clone() });
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let place = if is_there { path } else { directory.unwrap_or(Path::new(".")) };
    let host = Host::look(place).map_err(|source| PrepareError::Host(place.to_owned(), source))?;
    if host.fio.is_none() {
        return Err(PrepareError::NoFio);
    }
    let layout = image(options, is_there, written, stop)?;
    let (mut modes, mut explained) = (Vec::new(), Vec::new());
    for &mode in &options.modes {
        let disk = disk(options, mode, writing.is_empty());
        let failed = |source| PrepareError::Mode { mode: mode.name, image: path.clone(), source };
        let looked = match minivmm::disk::Image::look(&disk) {
            Err(error)
                if options.only_modes_here && matches!(error.reason, ImageProblem::NoDontcache { .. }) =>
            {
                eprintln!("cache={} is left out: {}", mode.name, error.reason);
                continue;
            }
            looked => looked.map_err(failed)?,
        };
        if let Some(reason) = looked.refusals().into_iter().next() {
            return Err(PrepareError::Refused { image: path.clone(), why: reason.to_string() });
        }
        explained.push(explain::explain(&disk).map_err(failed)?);
        modes.push(mode);
    }
    Ok(Prepared { jobs, layout, host, modes, explained })
}

/// Returns the disk that the guest gets in a mode.
pub fn disk(options: &BenchOptions, mode: &'static CachePolicy, readonly: bool) -> DiskConfig {
    let disk = DiskConfig { cache: mode, readonly, ..options.disk.clone() };
    disk.for_cpus(options.cpus)
}

/// The progress of writing an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteProgress {
    /// This many bytes will be written.
    Total(u64),
    /// This many more bytes were written.
    Added(u64),
}

fn image(
    options: &BenchOptions,
    is_there: bool,
    written: &mut dyn FnMut(WriteProgress),
    stop: &AtomicBool,
) -> Result<Layout, PrepareError> {
    let path = &options.disk.path;
    if !is_there {
        let bytes = options.size_bytes.ok_or_else(|| PrepareError::NoImage(path.clone()))?;
        written(WriteProgress::Total(bytes));
        return Ok(image::make(path, bytes, &mut |more| written(WriteProgress::Added(more)), stop)?);
    }
    let layout = image::look(path)?;
    if let Some(wanted) = options.size_bytes.filter(|&wanted| wanted != layout.bytes) {
        let found = layout.bytes;
        return Err(image::ImageError::OtherSize { path: path.clone(), found, wanted }.into());
    }
    let gaps = layout.gap_bytes();
    if gaps == 0 {
        return Ok(layout);
    }
    if !options.fill {
        return Err(PrepareError::Gaps { image: path.clone(), gaps, bytes: layout.bytes });
    }
    written(WriteProgress::Total(gaps));
    Ok(image::fill(path, &mut |more| written(WriteProgress::Added(more)), stop)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minivmm::observe::control::HostCache;

    fn options(path: PathBuf) -> BenchOptions {
        BenchOptions {
            disk: DiskConfig::new(path),
            keys: Vec::new(),
            modes: vec![CachePolicy::by_name("writeback").unwrap()],
            only_modes_here: false,
            jobs: None,
            only: vec!["randread".into()],
            size_bytes: None,
            fill: false,
            destroy: false,
            rounds: 1,
            seconds: Some(1),
            host_cache: HostCache::Drop,
            memory_bytes: 512 << 20,
            cpus: 1,
            json: None,
        }
    }

    fn prepared(options: &BenchOptions) -> Result<Prepared, PrepareError> {
        prepare(options, &mut |_| {}, &AtomicBool::new(false))
    }

    fn refused(options: &BenchOptions) -> String {
        let error = prepared(options).err().unwrap();
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    }

    #[test]
    fn nobodys_data_is_written_over_and_no_image_with_holes_is_measured() {
        if Host::look(Path::new("/")).unwrap().fio.is_none() {
            println!("skipped: there is no fio here");
            return;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("a.img");
        let mut options = options(path.clone());
        assert!(refused(&options).contains("--size"));
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let holes = refused(&options);
        assert!(holes.contains("1048576 of the 1048576 bytes") && holes.contains("--fill"), "{holes}");
        assert!(!image::look(&path).unwrap().is_written());
        options.size_bytes = Some(2 << 20);
        assert!(refused(&options).contains("not replaced"));
        (options.size_bytes, options.fill) = (None, true);
        assert!(prepared(&options).unwrap().layout.is_written());
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 0));
        // Without permission no writing job begins, even if others only read.
        options.only = vec!["seqread".into(), "randwrite".into()];
        let consent = refused(&options);
        assert!(
            consent.starts_with("randwrite would write over") && consent.contains("--destroy"),
            "{consent}"
        );
        options.destroy = true;
        assert_eq!(prepared(&options).unwrap().jobs.len(), 2);
        // Creating an image needs no permission.
        let new = dir.path().join("new.img");
        let fresh = BenchOptions {
            disk: DiskConfig::new(&new),
            size_bytes: Some(1 << 20),
            destroy: false,
            ..options
        };
        let mut steps = Vec::new();
        let made = prepare(&fresh, &mut |step| steps.push(step), &AtomicBool::new(false)).unwrap();
        assert_eq!((made.layout.bytes, steps[0]), (1 << 20, WriteProgress::Total(1 << 20)));
        let locked = minivmm::disk::Image::open(&DiskConfig::new(&new)).unwrap();
        let error = refused(&BenchOptions { destroy: true, ..fresh });
        assert!(error.contains("locked"), "{error}");
        drop(locked);
    }
}
