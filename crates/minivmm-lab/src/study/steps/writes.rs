//! The step of writes, for T3, T4, T10 and T11: one guest with a disk in each mode.
//!
//! Owns the size and the order, and the host's own figure with which T3 compares.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::StepContext;
use super::host::Aligned;
use crate::study::experiment::MODES;
use crate::study::figures::StepRecord;
use crate::study::guest::{Guest, device, disk, no_other_requests};
use crate::study::unsynced_data::JobSize;
use crate::study::{deferred_writes, sync_mechanisms, uncached_speed, unsynced_data};

/// Size of each image.
const IMAGE_MIB: u64 = 64;
const BLOCK: usize = 4096;

/// Runs the step.
pub fn writes(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let size = context.pick(
        JobSize { times: 1, blocks: 256, synced_blocks: 32 },
        JobSize { times: 3, blocks: 8192, synced_blocks: 1024 },
    );
    let mut disks = Vec::new();
    let mut script = String::new();
    for (at, mode) in context.modes_here(MODES, record)?.into_iter().enumerate() {
        let image = context.image(&format!("write-{mode}"), IMAGE_MIB << 20)?;
        if mode == "none" && context.wants("T3") {
            for _ in 0..size.times {
                natively(&image, size, record)?;
            }
        }
        disks.push(disk(image, mode)?);
        let device = device(at);
        // The observation of the whole period becomes a curve.
        script += &format!("exec 3</dev/{device}; ask begin W.{mode} {device}\n");
        for (ids, part) in [
            (&["T10"][..], sync_mechanisms::script(mode, &device)),
            (&["T3", "T11"][..], unsynced_data::script(mode, &device, size)),
            (&["T4"][..], uncached_speed::script(mode, &device, size)),
        ] {
            if ids.iter().any(|id| context.wants(id)) {
                script += &part;
            }
        }
        script += &format!("ask end W.{mode}; exec 3<&-; forget\n");
    }
    let guest = Guest { disks, memory_mib: 320, script, interval: Duration::from_secs(1) };
    guest.run(context, record, &mut no_other_requests)?;
    deferred_writes::trim(record);
    Ok(())
}

/// Measures the host itself: the same blocks, one at a time and with O_DIRECT, in the image that the guest gets
/// in mode none.
fn natively(path: &Path, size: JobSize, record: &mut StepRecord) -> Result<()> {
    let mut options = std::fs::File::options();
    let file = options.write(true).custom_flags(libc::O_DIRECT).open(path);
    let file = file.with_context(|| format!("cannot open {} with O_DIRECT", path.display()))?;
    let data = Aligned::new(BLOCK, 0x33);
    let blocks = (IMAGE_MIB << 20) / BLOCK as u64;
    // An odd step visits every block of a power of two once, and leaves a distance between successive blocks.
    let place = |number: u64| number.wrapping_mul(7919) % blocks * BLOCK as u64;
    for (sync, count) in [
        (unsynced_data::NO_SYNC, size.blocks),
        (unsynced_data::END, size.blocks),
        (unsynced_data::EACH, size.synced_blocks),
    ] {
        let begun = Instant::now();
        for number in 0..count {
            file.write_all_at(data.bytes(), place(number)).context("writing")?;
            if sync == unsynced_data::EACH {
                file.sync_data().context("fdatasync")?;
            }
        }
        if sync == unsynced_data::END {
            file.sync_data().context("fdatasync")?;
        }
        record.put(&format!("T3.host.{sync}.iops"), count as f64 / begun.elapsed().as_secs_f64());
    }
    Ok(())
}
