//! The step of memory pressure, for T5 and T8: limits the host memory for a guest's page cache, and runs a
//! process beside it that takes memory away.
//!
//! Owns the cgroup, the hog and the order of the jobs. A cgroup v2 with a limit contains the guest and, while
//! the step runs, this process. It acts as a small host within the host, so that nothing else is disturbed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::StepContext;
use crate::measuring::Distribution;
use crate::study::figures::StepRecord;
use crate::study::guest::{Guest, disk};
use crate::study::steadiness::{MODES, PHASES};
use minivmm::observe::limit::MemoryLimit;

const MIB: usize = 1 << 20;
const GUEST_MIB: u64 = 160;
/// Memory that the limit leaves for page cache, the hog and this process.
const REST_MIB: u64 = 112;
/// Size of the file that fills the page cache: more than `REST_MIB`.
const FILL_MIB: u64 = 160;
/// Memory that the hog repeatedly takes, holds and frees.
const HOG_MIB: usize = 72;
const HELD: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(200);

/// Runs the step.
pub fn pressure(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let seconds: u64 = context.pick(10, 60);
    let image_mib = context.pick(192, 768);
    let mut disks = Vec::new();
    for mode in MODES {
        disks.push(disk(context.image(&format!("pressure-{mode}"), image_mib << 20)?, mode)?);
    }
    // The guest's second job writes to this disk, bypassing the page cache.
    disks.push(disk(context.image("pressure-beside", image_mib << 20)?, "none")?);
    let guest = Guest {
        disks,
        memory_mib: GUEST_MIB,
        script: script(context, seconds, image_mib),
        interval: Duration::from_secs(1),
    };
    context.image("pressure-fill", FILL_MIB << 20)?;
    let limit =
        MemoryLimit::of_this_process((GUEST_MIB + REST_MIB) << 20).context("there is no memory limit")?;
    let group = limit.group().to_owned();
    let filler = context.images.join("pressure-fill.img");
    let mut hog: Option<Hog> = None;
    let mut others = |words: &[&str], record: &mut StepRecord| match *words {
        // This process reads the file within the cgroup, which fills the page cache with pages that nobody
        // needs.
        ["fill"] => fill(&filler),
        ["hog", "on", name] => {
            record.put(&format!("{name}.limit-hits.before"), limit_hits(&group));
            hog = Some(Hog::start());
            Ok(())
        }
        ["hog", "off", name] => {
            let times = hog.take().map(Hog::stop).unwrap_or_default();
            times.iter().for_each(|seconds| record.put(&format!("{name}.hog-seconds"), *seconds));
            record.put(&format!("{name}.limit-hits.after"), limit_hits(&group));
            Ok(())
        }
        _ => bail!("nobody knows what {} is", words.join(" ")),
    };
    let done = guest.run(context, record, &mut others);
    // Even after an error the memory is freed and this process leaves the cgroup.
    drop(hog.take().map(Hog::stop));
    drop(limit);
    done?;
    steadiness(record);
    Ok(())
}

fn script(context: &StepContext<'_>, seconds: u64, image_mib: u64) -> String {
    let size = image_mib - 16;
    let job = |name: &str, device: &str| {
        format!(
            "job {name} {device} --rw=randwrite --bs=16k --direct=1 --norandommap=1 --size={size}m --time_based --runtime={seconds}\n"
        )
    };
    let mut script = String::new();
    for (mode, device) in MODES.into_iter().zip(["vda", "vdb"]) {
        for phase in PHASES {
            let name = format!("P.{mode}.{phase}");
            let (on, off) = match phase {
                "pressed" => (format!("ask fill; ask hog on {name}; "), format!("; ask hog off {name}")),
                _ => (String::new(), String::new()),
            };
            script += &format!(
                "ask drop {device}\n{on}ask begin {name} {device}\n{}ask end {name}; ask look {name}.end {device}{off}\n",
                job(&name, device)
            );
        }
        script += &format!("ask drop {device}\n");
    }
    if context.wants("T8") {
        // The same job in none, beside a writer in writeback and beside one in none. Both run under pressure.
        for (beside, device) in [("writeback", "vdb"), ("none", "vdc")] {
            let name = format!("P.victim.{beside}");
            script += &format!(
                "fio --name=w --thread --ioengine=psync --filename=/dev/{device} --rw=randwrite --bs=16k --direct=1 --norandommap=1 \
                 --size={size}m --time_based --runtime={} >/dev/null 2>&1 &
ask fill; ask hog on {name}; sleep 1\n{}ask hog off {name}; wait; ask drop {device}\n",
                seconds + 4,
                job(&name, "vda")
            );
        }
    }
    script
}

/// Reads the whole file, so that it fills the page cache.
fn fill(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut piece = vec![0; MIB];
    let mut at = 0;
    loop {
        let count = file.read_at(&mut piece, at).context("reading")?;
        if count == 0 {
            return Ok(());
        }
        at += count as u64;
    }
}

/// Returns how often the cgroup was about to exceed its limit (`max` in memory.events).
fn limit_hits(group: &Path) -> f64 {
    let events = fs::read_to_string(group.join("memory.events")).unwrap_or_default();
    let max = events.lines().find_map(|line| line.strip_prefix("max "));
    max.and_then(|count| count.trim().parse().ok()).unwrap_or(0.0)
}

/// Stores, for each mode and phase, the curve of the observed write rate and its coefficient of variation.
fn steadiness(record: &mut StepRecord) {
    for mode in MODES {
        for phase in PHASES {
            let name = format!("P.{mode}.{phase}");
            let Some(points) = record.curves.get(&format!("{name}.writes")) else { continue };
            let rates = rates(points);
            // The first and the last interval contain the start and the end of the job.
            let inner = rates.iter().skip(1).take(rates.len().saturating_sub(2));
            let variation = Distribution::of(inner.map(|(_, rate)| *rate))
                .and_then(|distribution| distribution.variation);
            if let Some(variation) = variation {
                record.put(&format!("{name}.variation"), variation);
            }
            record.curves.insert(format!("{name}.rate"), rates);
        }
    }
    let keep = [".rate", ".host_cached_bytes", ".host_dirty_bytes"];
    record.curves.retain(|name, _| keep.iter().any(|end| name.ends_with(end)));
}

/// Returns the growth of a counter per second, at the end of each interval.
fn rates(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let pairs = points.iter().zip(points.iter().skip(1));
    let grown = pairs.filter(|(before, after)| after.0 > before.0);
    grown.map(|(before, after)| (after.0, (after.1 - before.1) / (after.0 - before.0))).collect()
}

/// A thread that repeatedly takes memory, holds it and frees it.
struct Hog {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<f64>>,
}

impl Hog {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut times = Vec::new();
            while !stopped.load(Ordering::SeqCst) {
                let begun = Instant::now();
                let mut pieces = Vec::new();
                for _ in 0..HOG_MIB {
                    if stopped.load(Ordering::SeqCst) {
                        return times;
                    }
                    // Writing to the memory makes the kernel allocate every page.
                    pieces.push(std::hint::black_box(vec![1u8; MIB]));
                }
                times.push(begun.elapsed().as_secs_f64());
                std::thread::sleep(HELD);
                drop(pieces);
                std::thread::sleep(PAUSE);
            }
            times
        });
        Self { stop, thread }
    }

    /// Stops the thread. Returns how many seconds each allocation took.
    fn stop(self) -> Vec<f64> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_intervals() {
        assert_eq!(
            rates(&[(0.0, 0.0), (0.5, 100.0), (1.0, 100.0), (1.0, 150.0)]),
            [(0.5, 200.0), (1.0, 0.0)]
        );
        let mut record = StepRecord::new("pressure", 1);
        let steady = (0..8).map(|at| (f64::from(at), f64::from(at) * 10.0)).collect();
        record.curves.insert("P.none.idle.writes".into(), steady);
        steadiness(&mut record);
        assert_eq!(record.get("P.none.idle.variation"), Some(0.0));
        assert_eq!(record.curves.len(), 1, "{record:?}");
    }
}
