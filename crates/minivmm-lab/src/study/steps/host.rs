//! Steps that need no guest. They measure the host mechanisms that the cache modes are built from.
//!
//! Owns the system calls. The files belong to the run.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{StepContext, open};
use crate::study::figures::StepRecord;
use crate::study::{dirty_pages, sync_mechanisms};
use minivmm::observe::cache::Residency;
use minivmm::observe::control::drop_cache;
use minivmm::observe::host::{DiskIo, HostDisk};

const PAGE: usize = 4096;
/// Alignment of the buffers for O_DIRECT. No disk needs more.
const ALIGNMENT: usize = 4096;

/// A buffer that is aligned for O_DIRECT.
pub struct Aligned(Vec<u8>);

impl Aligned {
    /// Creates a buffer of this many bytes, all with this value.
    pub fn new(bytes: usize, value: u8) -> Self {
        Self(vec![value; bytes + ALIGNMENT])
    }

    /// Returns the aligned bytes.
    pub fn bytes(&self) -> &[u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        self.0.get(start..start + self.0.len() - ALIGNMENT).unwrap_or_default()
    }
}

/// Asks the kernel to drop the whole file from its page cache (POSIX_FADV_DONTNEED).
fn let_go(file: &File) -> Result<()> {
    // SAFETY: posix_fadvise takes numbers and touches no memory.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if error != 0 {
        bail!("posix_fadvise: {}", std::io::Error::from_raw_os_error(error));
    }
    Ok(())
}

/// The step of dirty pages, for T9: asks the kernel to drop clean pages, dirty pages, and the same pages after
/// a sync.
pub fn dirty(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let path = context.image("dirty", dirty_pages::BYTES)?;
    let file = open(&path)?;
    let disk = HostDisk::below(&file);
    let io = || disk.as_ref().and_then(HostDisk::io);
    let data = vec![0x5a; 1 << 20];
    for repetition in 0..dirty_pages::REPETITIONS {
        drop_cache(&file)?;
        let look = |record: &mut StepRecord, stage: &str| -> Result<Residency> {
            let found = Residency::of(&file)?;
            record.put(&format!("T9.{stage}.cached"), found.cached as f64);
            for (what, pages) in [("dirty", found.dirty), ("writeback", found.writeback)] {
                if let Some(pages) = pages {
                    record.put(&format!("T9.{stage}.{what}"), pages as f64);
                }
            }
            Ok(found)
        };
        // The control: pages that were only read are dropped.
        let mut read = vec![0; data.len()];
        for at in (0..dirty_pages::BYTES).step_by(data.len()) {
            file.read_exact_at(&mut read, at).context("reading")?;
        }
        look(record, "read")?;
        let_go(&file)?;
        look(record, "clean")?;
        let before = io();
        for at in (0..dirty_pages::BYTES).step_by(data.len()) {
            file.write_all_at(&data, at).context("writing")?;
        }
        let written = look(record, "written")?;
        if written.dirty == Some(0) && repetition == 0 {
            bail!("the file system keeps no dirty pages of this file (is it tmpfs, or mounted sync?)");
        }
        let_go(&file)?;
        look(record, "let-go")?;
        put_io(record, "T9.let-go", before, io());
        file.sync_data().context("fdatasync")?;
        look(record, "synced")?;
        let_go(&file)?;
        look(record, "let-go-again")?;
    }
    Ok(())
}

/// The step of mechanisms, for T10: makes the same sixteen writes with each mechanism.
pub fn mechanisms(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let path = context.image("mechanisms", sync_mechanisms::BYTES)?;
    for _ in 0..sync_mechanisms::REPETITIONS {
        for mechanism in &sync_mechanisms::MECHANISMS {
            one_mechanism(&path, mechanism, record)
                .with_context(|| format!("{} on {}", mechanism.name, path.display()))?;
        }
    }
    Ok(())
}

fn one_mechanism(path: &Path, mechanism: &sync_mechanisms::Mechanism, record: &mut StepRecord) -> Result<()> {
    let watched = open(path)?;
    drop_cache(&watched)?;
    let disk = HostDisk::below(&watched);
    let io = || disk.as_ref().and_then(HostDisk::io);
    let file = File::options().read(true).write(true).custom_flags(mechanism.flags).open(path)?;
    let data = Aligned::new(PAGE, 0xa5);
    let before = io();
    let begun = Instant::now();
    for at in 0..sync_mechanisms::WRITES {
        file.write_all_at(data.bytes(), at * sync_mechanisms::STRIDE).context("writing")?;
    }
    let named = |what: &str| format!("T10.{}.{what}", mechanism.name);
    let written = Residency::of(&watched)?;
    let after = io();
    record.put(&named("seconds"), begun.elapsed().as_secs_f64());
    record.put(&named("resident"), written.cached as f64);
    if let Some(pages) = written.dirty {
        // A page under writeback no longer counts as dirty, but it has not reached the disk either.
        record.put(&named("dirty"), (pages + written.writeback.unwrap_or(0)) as f64);
    }
    put_io(record, &named("writing"), before, after);
    if mechanism.then_fsync {
        file.sync_all().context("fsync")?;
        put_io(record, &named("fsync"), after, io());
        let found = Residency::of(&watched)?;
        if let Some(pages) = found.dirty {
            record.put(&named("dirty-after-fsync"), (pages + found.writeback.unwrap_or(0)) as f64);
        }
    }
    put_io(record, &named("all"), before, io());
    Ok(())
}

/// Stores the growth of the disk's counters between two readings.
pub fn put_io(record: &mut StepRecord, name: &str, before: Option<DiskIo>, after: Option<DiskIo>) {
    let (Some(before), Some(after)) = (before, after) else { return };
    for (what, from, to) in [
        ("disk-reads", Some(before.reads), Some(after.reads)),
        ("disk-read-bytes", Some(before.read_bytes), Some(after.read_bytes)),
        ("disk-writes", Some(before.writes), Some(after.writes)),
        ("disk-written-bytes", Some(before.written_bytes), Some(after.written_bytes)),
        ("disk-flushes", before.flushes, after.flushes),
    ] {
        if let (Some(from), Some(to)) = (from, to) {
            record.put(&format!("{name}.{what}"), to.saturating_sub(from) as f64);
        }
    }
}
