//! The step of reads, for T1, T6 and T7: one guest with a disk in each mode.
//!
//! Owns the size and the order. The file of an experiment says what it does with a disk. Both caches are
//! emptied before each experiment and at the end.

use std::time::Duration;

use anyhow::Result;

use super::StepContext;
use crate::study::experiment::MODES;
use crate::study::figures::StepRecord;
use crate::study::guest::{Guest, device, disk, no_other_requests};
use crate::study::{double_caching, read_ahead, warm_cache};

/// Runs the step.
pub fn reads(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let mib: u64 = context.pick(8, 256);
    let mut disks = Vec::new();
    let mut script = String::new();
    for (at, mode) in context.modes_here(MODES, record)?.into_iter().enumerate() {
        disks.push(disk(context.image(&format!("read-{mode}"), mib << 20)?, mode)?);
        let device = device(at);
        // The guest's kernel drops the pages of a device when its last descriptor is closed.
        script += &format!("exec 3</dev/{device}\n");
        let clean = format!("forget; ask drop {device}\n");
        for (id, part) in [
            ("T7", read_ahead::script(mode, &device)),
            ("T1", double_caching::script(mode, &device, mib)),
            ("T6", warm_cache::script(mode, &device, mib)),
        ] {
            if context.wants(id) {
                script += &clean;
                script += &part;
            }
        }
        script += "exec 3<&-\n";
        script += &clean;
    }
    let guest = Guest { disks, memory_mib: mib + 256, script, interval: Duration::from_secs(2) };
    guest.run(context, record, &mut no_other_requests)?;
    Ok(())
}
