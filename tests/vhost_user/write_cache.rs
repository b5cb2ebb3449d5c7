//! The guest switches its disk's write cache between write back and write through (SET_CONFIG), and strace says what
//! each of its writes then was to the host.

use std::fs::{self, File};
use std::process::Command;

use minivmm_testkit::images;
use minivmm_testkit::machine;
use minivmm_testkit::skips::skip;

use super::daemon::{Daemon, Export, Exporter, exporter};
use super::qemu::{Machine, can_run};

/// Where each phase writes: the offset tells whose write strace has seen.
const PHASE_BYTES: u64 = 1 << 20;
const WRITES: usize = 8;

const JOB: &str = r#"
switch() { echo "$1" >/sys/block/vda/cache_type; tell "$2.type" $(cat /sys/block/vda/cache_type); }
# write PHASE: eight blocks past the guest's own page cache, one after the other, and no sync.
write() {
    i=0
    while [ $i -lt 8 ]; do
        dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=$(($1 * 256 + i)) oflag=direct conv=notrunc 2>/dev/null
        i=$((i + 1))
    done
}
tell first.type $(cat /sys/block/vda/cache_type)
write 1
switch 'write through' second
write 2
switch 'write back' third
write 3
dd if=/dev/zero of=/dev/vda bs=4096 count=1 seek=1024 oflag=direct conv=notrunc,fsync 2>/dev/null
"#;

/// What strace has seen of the image, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// A write at this offset, stable by itself (RWF_DSYNC) or not.
    Write { at: u64, dsync: bool },
    /// fdatasync or fsync.
    Sync,
}

/// Reads lines such as `123 pwritev2(8</d/none.img>, [...], 1, 4096, RWF_DSYNC) = 4096`.
fn calls(trace: &str) -> Vec<Call> {
    let ours = trace.lines().filter(|line| line.contains("cache.img>"));
    ours.filter_map(|line| {
        if line.contains("fdatasync(") || line.contains("fsync(") {
            return Some(Call::Sync);
        }
        let (_, rest) = line.split_once("pwrite")?;
        let arguments = rest.rsplit_once(')').unwrap_or_else(|| panic!("cut by strace: {line}")).0;
        // After the data, which ends with a bracket (vectors) or a quotation mark.
        let tail = arguments.rsplit_once([']', '"']).unwrap().1.trim_start_matches("...");
        let numbers: Vec<_> = tail.split(", ").filter(|word| !word.is_empty()).collect();
        let dsync = tail.contains("RWF_DSYNC");
        let flags = usize::from(rest.starts_with("v2"));
        let at = numbers[numbers.len() - 1 - flags].trim_end_matches(',');
        Some(Call::Write { at: at.parse().unwrap_or_else(|_| panic!("{line}")), dsync })
    })
    .collect()
}

/// The writes of a phase: for each, whether it was stable by itself or by a sync before the next call.
fn stable(calls: &[Call], phase: u64) -> Vec<bool> {
    let mut found = Vec::new();
    for (position, call) in calls.iter().enumerate() {
        let Call::Write { at, dsync } = *call else { continue };
        if at / PHASE_BYTES == phase {
            found.push(dsync || calls.get(position + 1) == Some(&Call::Sync));
        }
    }
    found
}

fn audit(mode: &'static str, stable_by: &str) {
    if !can_run(&["6.12"]) {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed, nothing is audited");
        return;
    }
    if exporter() == Exporter::Qemu {
        skip("wce", "qemu-storage-daemon has no CONFIG_WCE");
        return;
    }
    let dir = images::test_dir();
    let export = Export::new("cache", mode).keys(&format!(",engine=sync,stable={stable_by}"));
    File::create(dir.path().join(export.image())).unwrap().set_len(16 << 20).unwrap();
    // -D: the back end is our child, and strace its grandchild.
    let strace = [
        "strace",
        "-D",
        "-f",
        "-y",
        "-s",
        "0",
        "-e",
        "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync",
        "-o",
        "trace",
    ];
    let daemon = Daemon::start_under(&strace, dir.path(), std::slice::from_ref(&export), machine::visible());
    let heard =
        Machine::new(dir.path(), "pc").disk(&export).linux("6.12", JOB, &[], &[]).start(false).finish();
    daemon.stop();
    for (phase, cache) in [("first", "write back"), ("second", "write through"), ("third", "write back")] {
        heard.expect(&format!("{phase}.type"), cache);
    }
    let calls = calls(&fs::read_to_string(dir.path().join("trace")).unwrap());
    let what = format!("{mode}, {stable_by}: {calls:?}");
    // What had completed is made stable by the switch (docs/reference/export.md).
    let mut until_the_switch = [false; WRITES];
    until_the_switch[WRITES - 1] = true;
    assert_eq!(stable(&calls, 1), until_the_switch, "write back, {what}");
    assert_eq!(stable(&calls, 2), [true; WRITES], "write through, {what}");
    assert_eq!(stable(&calls, 3), [false; WRITES], "write back again, {what}");
    let last = calls.iter().rposition(|call| matches!(call, Call::Write { .. })).unwrap();
    assert_eq!(calls[last], Call::Write { at: 4 * PHASE_BYTES, dsync: false }, "{what}");
    assert_eq!(calls.get(last + 1), Some(&Call::Sync), "the guest's fsync, {what}");
}

#[test]
fn a_guest_that_switches_its_cache_off_gets_stable_writes_past_the_page_cache() {
    audit("none", "dsync");
}

#[test]
fn it_gets_them_through_the_page_cache_too() {
    audit("writeback", "fdatasync");
}

#[test]
fn the_reader_of_traces_tells_stable_writes_from_others() {
    let trace = r#"7 pwritev2(8</d/cache.img>, [{iov_base=""..., iov_len=4096}], 1, 1048576, 0) = 4096
7 pwritev2(8</d/cache.img>, [{iov_base=""..., iov_len=4096}], 1, 2097152, RWF_DSYNC) = 4096
8 pwrite64(8</d/cache.img>, ""..., 4096, 2101248) = 4096
8 pwritev(9</d/daemon.log>, [{iov_base=""..., iov_len=4}], 1, 0) = 4
7 fdatasync(8</d/cache.img>) = 0
"#;
    let calls = calls(trace);
    let write = |at, dsync| Call::Write { at, dsync };
    assert_eq!(calls, [write(1 << 20, false), write(2 << 20, true), write(2_101_248, false), Call::Sync]);
    assert_eq!(stable(&calls, 1), [false]);
    assert_eq!(stable(&calls, 2), [true, true]);
}
