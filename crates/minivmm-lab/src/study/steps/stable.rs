//! The step of stable writes, for A1, A2 and the latencies: one guest with a disk of its own for each job.
//!
//! Owns the size and the order. Jobs do not share a disk, because the device's statistics cover everything that
//! a disk has done.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::StepContext;
use crate::study::experiment::MODES;
use crate::study::figures::StepRecord;
use crate::study::guest::{Guest, device, disk, no_other_requests};
use crate::study::{bulk_writes, log_appends};

const IMAGE_MIB: u64 = 32;

/// Runs the step.
pub fn stable(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let mut disks = Vec::new();
    let mut script = String::new();
    let mut add = |name: String, mode: &'static str, part: &dyn Fn(&str) -> String| -> Result<()> {
        let device = device(disks.len());
        script += &format!("exec 3</dev/{device}\n{}exec 3<&-\n", part(&device));
        disks.push(disk(context.image(&name, IMAGE_MIB << 20)?, mode)?);
        Ok(())
    };
    let times = context.pick(1, 3);
    for mode in log_appends::MODES {
        if context.wants("A1") {
            let appends = context.pick(128, 2048);
            add(format!("log-{mode}"), mode, &|device| log_appends::script(mode, device, appends, times))?;
        }
        if context.wants("A2") {
            add(format!("bulk-{mode}"), mode, &|device| {
                bulk_writes::script(mode, device, context.pick(16, 32), times)
            })?;
        }
    }
    for mode in context.modes_here(MODES, record)? {
        if context.wants("A1") {
            let blocks = context.pick(256, 4096);
            add(format!("latency-{mode}"), mode, &|device| {
                log_appends::latency_script(mode, device, blocks)
            })?;
        }
    }
    let names: Vec<String> = disks
        .iter()
        .filter_map(|disk| Some(disk.image.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    let guest = Guest { disks, memory_mib: 256, script, interval: Duration::from_secs(2) };
    let left = guest.run(context, record, &mut no_other_requests)?;
    for (at, name) in names.iter().enumerate().filter(|(_, name)| name.starts_with("latency-")) {
        put_latencies(&name.replace("latency-", "L."), &left.stats["disks"][at]["latency_ns"], record);
    }
    Ok(())
}

/// Stores the quantiles of the total latency as a curve: microseconds, and the share of requests that took no
/// longer.
fn put_latencies(name: &str, latencies: &Value, record: &mut StepRecord) {
    const QUANTILES: [(&str, f64); 9] = [
        ("min", 0.0),
        ("p10", 0.1),
        ("p25", 0.25),
        ("p50", 0.5),
        ("p75", 0.75),
        ("p90", 0.9),
        ("p99", 0.99),
        ("p99_9", 0.999),
        ("max", 1.0),
    ];
    for kind in ["read", "write", "flush"] {
        let total = &latencies[kind]["total"];
        let points = QUANTILES
            .into_iter()
            .filter_map(|(quantile, part)| Some((total[quantile].as_f64()? / 1e3, part)));
        let points: Vec<_> = points.collect();
        if !points.is_empty() {
            record.curves.insert(format!("{name}.{kind}"), points);
        }
        if let Some(count) = total["count"].as_f64() {
            record.put(&format!("{name}.{kind}.count"), count);
        }
    }
}
