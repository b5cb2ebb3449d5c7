//! The fsync trap for real: a disk whose host runs out of room behind a loop device. The host tells the
//! error once, at one fdatasync; when there is room again it would call the next one good, though the
//! data of the first are gone. What was latched must not be believed again.
//!
//! Runs on this machine's KVM where it can run Linux and this is root, in the emulated host elsewhere.

use minivmm_testkit::host::{Host, Outcome};
use minivmm_testkit::skips::skip;
use serde_json::Value;

/// A tmpfs of 24 MiB under a sparse file of 96; it gets larger when the guest says that a FLUSH has failed.
const SCRIPT: &str = r#"
[ "$(id -u)" = 0 ] || { echo "not root"; exit 77; }
modprobe loop 2>/dev/null
mkdir small && mount -t tmpfs -o size=24M tmpfs small || exit 1
truncate -s 96M small/back
loop=$(losetup -f) && losetup "$loop" small/back || exit 1
(minivmm --timeout 120 --disk "$loop,cache=writeback" --stats=stats.json -- sh /work 2>errors; echo "STATUS $?") |
    while read -r line; do
        echo "$line"
        [ "$line" != "T small is full" ] || mount -o remount,size=400M small
    done
echo ERRORS; cat errors
echo STATISTICS; cat stats.json
losetup -d "$loop"; umount small
"#;

const JOB: &str = r#"
tell() { echo "T $*"; }
try() { name=$1; shift; "$@" >/tmp/said 2>&1; tell "$name" $?; cat /tmp/said; }
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=1 -J size=4 /dev/vda && mount -t ext4 /dev/vda /mnt || exit 3
try fits dd if=/dev/zero of=/mnt/first bs=1M count=4 conv=fsync
try flush_1 dd if=/dev/urandom of=/mnt/big bs=1M count=48 conv=fsync
tell small is full
sleep 5
# There is room now. Past the file system, which has shut itself.
umount /mnt
dd if=/dev/urandom of=/tmp/block bs=4k count=1 2>/dev/null
write() { dd if=/tmp/block of=/dev/vda bs=4k seek=24000 count=1 "$@"; }
try write write oflag=direct
try flush_2 write oflag=direct conv=fdatasync
try flush_3 write oflag=direct conv=fdatasync
try read dd if=/dev/vda of=/dev/null bs=4k skip=24000 count=1 iflag=direct
echo "write through" >/sys/block/vda/cache_type
tell cache_type $(cat /sys/block/vda/cache_type)
try stable_write write oflag=direct
dmesg | sed -n 's/.*\(Aborting journal\|Remounting filesystem read-only\|lost sync page write\).*/T kernel \1/p'
"#;

fn told<'a>(outcome: &'a Outcome, name: &str) -> Option<&'a str> {
    let mut lines = outcome.stdout.lines().map(str::trim);
    lines.find_map(|line| line.strip_prefix("T ")?.strip_prefix(name)?.strip_prefix(' '))
}

/// Shows E1, E2 and E6.
#[test]
fn after_the_first_failed_flush_nothing_is_called_stable_though_the_host_would() {
    let place = Host::get().place();
    place.put("job", JOB.as_bytes());
    let script = SCRIPT.replace("-- sh /work", "--add job:/work -- sh /work");
    let outcome = place.sh(&script);
    if outcome.status == 77 {
        skip("root", "a loop device needs root");
        return;
    }
    let must = |name: &str, good: bool| {
        let status = told(&outcome, name).unwrap_or_else(|| panic!("no {name}: {outcome:#?}"));
        assert_eq!(status == "0", good, "{name} has ended with {status}: {outcome:#?}");
    };
    must("fits", true);
    must("flush_1", false);
    // A write that is merely reported, and a read, are promises that can be kept.
    must("write", true);
    must("flush_2", false);
    must("flush_3", false);
    must("read", true);
    assert_eq!(told(&outcome, "cache_type"), Some("write through"), "{outcome:#?}");
    must("stable_write", false);
    let kernel = told(&outcome, "kernel").unwrap_or_else(|| panic!("ext4 has not complained: {outcome:#?}"));
    assert!(kernel.contains("Aborting journal") || kernel.contains("lost sync page write"), "{kernel}");

    assert!(outcome.stdout.contains("STATUS 125"), "{outcome:#?}");
    let (_, rest) = outcome.stdout.split_once("ERRORS\n").unwrap();
    let (errors, statistics) = rest.split_once("STATISTICS\n").unwrap();
    assert!(errors.contains("could not make data stable"), "{errors}");
    assert!(errors.contains("what the guest wrote may be lost"), "{errors}");
    let statistics: Value = serde_json::from_str(statistics).unwrap();
    let disk = &statistics["disks"][0];
    assert!(disk["durability"]["sync_error"].as_str().is_some(), "{disk:#}");
    assert!(disk["requests"]["errors"].as_u64().unwrap() >= 4, "{disk:#}");
    assert!(disk["durability"]["bytes_at_risk_at_guest_end"].as_u64().unwrap() > 0, "{disk:#}");
}
