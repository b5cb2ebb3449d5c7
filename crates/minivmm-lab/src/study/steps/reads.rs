//! The step of reads: one guest with a disk in each mode, for T1, T6 and T7.
//!
//! Owns its size and order. What each experiment does with a disk is in its own file; they leave both
//! caches empty behind them.

use std::time::Duration;

use anyhow::Result;

use super::Bench;
use crate::study::experiment::MODES;
use crate::study::figures::Record;
use crate::study::guest::{Guest, device, disk, no_others};
use crate::study::{t01, t06, t07};

/// Does it.
pub fn reads(bench: &Bench<'_>, record: &mut Record) -> Result<()> {
    let mib: u64 = bench.pick(8, 256);
    let mut disks = Vec::new();
    let mut script = String::new();
    for (at, mode) in MODES.into_iter().enumerate() {
        disks.push(disk(bench.image(&format!("read-{mode}"), mib << 20)?, mode)?);
        let device = device(at);
        // The guest's kernel forgets a device's pages when nobody has it open any more.
        script += &format!("exec 3</dev/{device}\n");
        let clean = format!("forget; ask drop {device}\n");
        for (id, part) in [
            ("T7", t07::script(mode, &device)),
            ("T1", t01::script(mode, &device, mib)),
            ("T6", t06::script(mode, &device, mib)),
        ] {
            if bench.wants(id) {
                script += &clean;
                script += &part;
            }
        }
        script += "exec 3<&-\n";
        script += &clean;
    }
    let guest = Guest { disks, memory_mib: mib + 256, script, interval: Duration::from_secs(2) };
    guest.run(bench, record, &mut no_others)?;
    Ok(())
}
