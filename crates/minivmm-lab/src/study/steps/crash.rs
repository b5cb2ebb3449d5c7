//! The step of crashes, for T2: takes write logs of one guest's disks, and determines what a loss of power
//! could have left of them.
//!
//! Owns the guest's work and the evaluation of the logs. [`crate::crash::legal`] decides which states are
//! legal. [`crate::crash::campaign`] chooses states and checks them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::StepContext;
use crate::crash::campaign::{self, CampaignOptions};
use crate::crash::legal::{Pending, StateName};
use crate::crash::log::WriteLog;
use crate::crash::plan::Breadth;
use crate::crash::points::At;
use crate::measuring::child::{self, EndCause};
use crate::scratch_dir::ScratchDir;
use crate::study::figures::StepRecord;
use crate::study::guest::{Guest, device, disk, no_other_requests};
use crate::study::host_crash::{CASES, Case, GROUP};
use minivmm::files::output;

/// Size of a record in bytes.
const RECORD: u64 = 4096;
const RECORDS: u64 = 64;
const IMAGE_MIB: u64 = 4;
const EXT4_MIB: u64 = 24;
/// Time limit of mkfs. It takes less than a second, but longer on a busy disk.
const MKFS_MAX: Duration = Duration::from_secs(120);
/// Most random states that are examined at one point.
const STATES: usize = 32;

/// Runs the step.
pub fn crash(context: &StepContext<'_>, record: &mut StepRecord) -> Result<()> {
    let place = ScratchDir::new_in(&context.images, "crash")?;
    let base = ext4(context)?;
    let (mut disks, mut script, mut logs) = (Vec::new(), String::new(), Vec::new());
    let modes = context.modes_here(CASES.each_ref().map(|case| case.mode), record)?;
    for case in CASES.iter().filter(|case| modes.contains(&case.mode)) {
        for file_system in [false, true] {
            if file_system && (base.is_none() || !case.file_system) {
                continue;
            }
            let device = device(disks.len());
            let log = place.path().join(format!("{device}.log"));
            let image = match base.as_ref().filter(|_| file_system) {
                Some(base) => copied(base, &place.path().join(format!("{device}.img")))?,
                None => context.image(&format!("crash-{}", case.slug), IMAGE_MIB << 20)?,
            };
            let mut disk = disk(image, case.mode)?;
            disk.keys.push(format!("log-writes={}", log.display().to_string().replace(',', ",,")));
            disks.push(disk);
            if case.no_flush {
                script += &format!("echo 'write through' >/sys/block/{device}/queue/write_cache\n");
            }
            script += &if file_system { files(&device) } else { records(case, &device) };
            logs.push((case, file_system, log));
        }
    }
    let guest = Guest { disks, memory_mib: 256, script, interval: Duration::from_secs(2) };
    guest.run(context, record, &mut no_other_requests)?;
    for (case, file_system, log) in &logs {
        match base.as_ref().filter(|_| *file_system) {
            Some(base) => judge_files(context, case, log, base, record)?,
            None => judge_records(case, &WriteLog::open(log)?, record)?,
        }
    }
    Ok(())
}

/// Returns an image with an empty ext4, or `None` if the host has no mkfs.ext4.
fn ext4(context: &StepContext<'_>) -> Result<Option<PathBuf>> {
    let path = context.images.join("crash-ext4.img");
    if path.exists() {
        return Ok(Some(path));
    }
    let part = path.with_extension("part");
    output::make_anew(&part)?.set_len(EXT4_MIB << 20)?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    match child::run(command.arg(&part), MKFS_MAX, context.stop) {
        Ok(ended) if ended.cause == EndCause::ByItself && ended.status == 0 => {
            fs::rename(&part, &path)?;
            Ok(Some(path))
        }
        Ok(ended) => bail!("mkfs.ext4 ended with status {}: {}", ended.status, ended.stderr.trim()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            log::warn!(
                "no mkfs.ext4 on this host (Debian's package e2fsprogs): what becomes of an ext4 is not measured"
            );
            Ok(None)
        }
        Err(error) => Err(error).context("cannot start mkfs.ext4"),
    }
}

fn copied(from: &Path, to: &Path) -> Result<PathBuf> {
    let copied =
        fs::File::open(from).and_then(|mut from| std::io::copy(&mut from, &mut output::make_anew(to)?));
    copied.with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(to.to_owned())
}

/// Returns a script that writes the records in order, with a sync between two groups and none after the last.
fn records(case: &Case, device: &str) -> String {
    format!(
        "job T2.{}.job {device} --rw=write --bs={RECORD} --direct=1 --fdatasync={GROUP} --size={}k\n",
        case.slug,
        RECORD * RECORDS / 1024
    )
}

/// Returns a script that writes, syncs and renames files, and makes and removes directories.
fn files(device: &str) -> String {
    format!(
        "mkdir -p /mnt; mount -t ext4 /dev/{device} /mnt || exit 94
for round in 1 2 3; do
    mkdir /mnt/dir$round
    for name in a b c; do
        dd if=/dev/urandom of=/mnt/dir$round/$name.new bs=4k count=3 conv=fsync 2>/dev/null || exit 95
        mv /mnt/dir$round/$name.new /mnt/dir$round/$name
    done
    [ $round -lt 2 ] || rm -r /mnt/dir$((round - 1))
    sync
done
umount /mnt || exit 96\n"
    )
}

/// Determines which records could be lost, over all points at which the power may fail.
pub fn judge_records(case: &Case, log: &WriteLog, record: &mut StepRecord) -> Result<()> {
    let number = |entry: usize| log.entries.get(entry).map_or(0, |entry| entry.offset / RECORD);
    let changes: Vec<usize> = (0..log.entries.len())
        .filter(|&entry| log.entries.get(entry).is_some_and(|entry| entry.changes()))
        .collect();
    if changes.len() as u64 != RECORDS {
        bail!("{} writes in the log of {}, not {RECORDS}", changes.len(), case.name);
    }
    let (mut acknowledged_lost, mut open_lost, mut out_of_order) = (0, 0, 0u64);
    for point in 0..=log.entries.len() {
        // A group begins once the sync after the previous group was acknowledged. So all records before the
        // group of the newest completed record are synced.
        let newest = changes.iter().filter(|&&entry| entry < point).map(|&entry| number(entry)).max();
        let acknowledged = newest.map_or(0, |newest| newest / GROUP * GROUP);
        let pending = Pending::at(log, point, false);
        let worst: Vec<u64> = pending.lost(StateName::None).into_iter().map(number).collect();
        let of_those = worst.iter().filter(|&&number| number < acknowledged).count();
        acknowledged_lost = acknowledged_lost.max(of_those);
        open_lost = open_lost.max(worst.len() - of_those);
        for name in pending.names(STATES, 1).take(STATES) {
            let lost: Vec<u64> = pending.lost(name).into_iter().map(number).collect();
            let kept = worst.iter().filter(|number| !lost.contains(number)).max();
            let first_lost = lost.iter().min();
            out_of_order += u64::from(kept.zip(first_lost).is_some_and(|(kept, lost)| lost < kept));
        }
    }
    record.put(&format!("T2.{}.synced-lost", case.slug), acknowledged_lost as f64);
    record.put(&format!("T2.{}.open-lost", case.slug), open_lost as f64);
    record.put(&format!("T2.{}.out-of-order", case.slug), out_of_order as f64);
    Ok(())
}

/// Counts the possible disks that e2fsck cannot repair.
fn judge_files(
    context: &StepContext<'_>,
    case: &Case,
    log: &Path,
    base: &Path,
    record: &mut StepRecord,
) -> Result<()> {
    let options = CampaignOptions {
        log: log.to_owned(),
        base: base.to_owned(),
        at: vec![At::Flushes, At::Sample(context.pick(3, 24))],
        breadth: Breadth { states: context.pick(3, 32), seed: u64::from(record.round), ..Breadth::default() },
        repeat: None,
        check: None,
        check_timeout: Duration::from_secs(60),
        jobs: None,
        keep: Some(log.with_extension("failed")),
        scratch: None,
        write: None,
    };
    let report = campaign::run(&options, context.stop)?;
    record.put(&format!("T2.{}.disks", case.slug), report.states as f64);
    record.put(&format!("T2.{}.bad-disks", case.slug), report.failures.len() as f64);
    Ok(())
}
