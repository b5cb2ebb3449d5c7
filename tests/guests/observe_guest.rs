//! `--observe` with a Linux guest: its own view is there, its counts of FLUSHes are the device's, and the
//! caches of both hold what the modes predict (T1, T6 of the argument of 2008). Memory limits too, where
//! the host has cgroup v2.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm::observe::csv::Row;
use minivmm_testkit::host::{Host, Outcome, Place};
use minivmm_testkit::skips::skip;

const MIB: f64 = (1 << 20) as f64;
const GUEST: &str = "minivmm --timeout 200 --kernel $GUESTS/6.12/vmlinuz --initrd $GUESTS/6.12/initrd.cpio";

/// The value of a line "T NAME VALUE" of the command's.
fn told(outcome: &Outcome, name: &str) -> f64 {
    let prefix = format!("T {name} ");
    let value = outcome.stdout.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("{name} is not told: {outcome:#?}")).parse().unwrap()
}

fn rows(place: &Place, file: &str) -> Vec<Row> {
    let text = place.sh(&format!("cat {file}")).stdout;
    let (header, lines) = text.split_once('\n').unwrap();
    lines
        .lines()
        .map(|line| Row::parse(header, line).unwrap_or_else(|| panic!("{line} below {header}")))
        .collect()
}

/// Reads 8 of 32 MiB of each disk, a cached and a direct one, lets go of the guest's cache and reads the
/// cached one again, and writes with an fsync five times. Then it waits until it has been asked once more.
const JOB: &str = r#"
# The guest's kernel forgets a device's pages when nobody has it open any more.
exec 3</dev/vda 4</dev/vdb
field() { awk -v n=$2 "{ print \$n }" /sys/block/$1/stat; }
for disk in vda vdb; do dd if=/dev/$disk of=/dev/null bs=1M count=8 2>/dev/null; done
sleep 1; echo 3 >/proc/sys/vm/drop_caches
for disk in vda vdb; do dd if=/dev/$disk of=/dev/null bs=1M count=8 2>/dev/null; done
for disk in vda vda vda vda vda vdb; do dd if=/dev/urandom of=/dev/$disk bs=4k count=1 conv=fsync 2>/dev/null; done
for disk in vda vdb; do
    echo T $disk-reads $(field $disk 1); echo T $disk-sectors $(field $disk 3)
    echo T $disk-writes $(field $disk 5); echo T $disk-flushes $(field $disk 16)
done
sleep 2
"#;

#[test]
fn guest_and_host_count_the_same_and_cache_what_the_modes_predict() {
    let place = Host::get().place();
    place.put("job", JOB.as_bytes());
    let disk = |name: &str, mode: &str| format!("--disk {name}.img,cache={mode},host-cache=drop");
    let outcome = place.sh(&format!(
        "for name in a b; do dd if=/dev/urandom of=$name.img bs=1M count=32 2>/dev/null; done; sync
         {GUEST} {} {} --observe a.csv --observe-interval 0.2 --stats=stats.json --add job:/tmp/job -- sh /tmp/job",
        disk("a", "writeback"),
        disk("b", "none"),
    ));
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    assert_eq!(outcome.stdout.lines().count(), 8, "nothing but the command's lines: {outcome:#?}");
    let rows = rows(&place, "a.csv");
    let last = |disk: &str| rows.iter().rfind(|row| row.text("disk") == disk).unwrap();
    let number = |row: &Row, name: &str| row.number(name).unwrap_or_else(|| panic!("no {name}: {row:?}"));
    let stats: serde_json::Value = serde_json::from_str(&place.sh("cat stats.json").stdout).unwrap();
    for (at, disk) in ["vda", "vdb"].into_iter().enumerate() {
        let row = last(disk);
        println!("{row:?}");
        for (column, name, scale) in [
            ("guest_reads", "reads", 1.0),
            ("guest_read_bytes", "sectors", 512.0),
            ("guest_writes", "writes", 1.0),
            ("guest_flushes", "flushes", 1.0),
        ] {
            let expected = told(&outcome, &format!("{disk}-{name}")) * scale;
            assert_eq!(number(row, column), expected, "{disk} {column}: {row:?}");
        }
        // What the guest has counted is what the device was asked.
        for (guest, device) in
            [("guest_flushes", "flushes"), ("guest_reads", "reads"), ("guest_read_bytes", "read_bytes")]
        {
            assert_eq!(number(row, guest), number(row, device), "{disk} {guest}: {row:?}");
        }
        // Linux counts a FLUSH among the writes too.
        let [writes, flushes] = ["guest_writes", "guest_flushes"].map(|name| number(row, name));
        assert_eq!(writes - flushes, number(row, "writes"), "{disk}: {row:?}");
        let requests = &stats["disks"][at]["requests"];
        assert_eq!(requests["flush"].as_f64().unwrap(), number(row, "guest_flushes"), "{disk}: {requests}");
        assert!(number(row, "guest_flushes") >= if disk == "vda" { 5.0 } else { 1.0 }, "{row:?}");
        assert!(number(row, "guest_cached_bytes") > 0.0 && number(row, "guest_age_s") < 10.0, "{row:?}");
        assert_eq!(number(row, "bytes_at_risk"), 0.0, "{row:?}");
        // The emulated host's disk is one that counts, and each of these FLUSHes had something to write.
        assert!(number(row, "flush_amplification") >= 1.0, "{row:?}");
    }
    // Read-ahead of both kernels goes on behind the 8 MiB, a MiB or so each.
    // The caches are looked at while the command still sleeps: what it had open goes with it.
    let end = number(last("vda"), "time_s");
    let asleep = |row: &&Row| number(row, "time_s") <= end - 1.0;
    let then = |disk: &str| rows.iter().filter(asleep).rfind(|row| row.text("disk") == disk).unwrap();
    let (cached, direct) = (then("vda"), then("vdb"));
    let eight = 8.0 * MIB..=12.0 * MIB;
    assert!(eight.contains(&number(cached, "host_cached_bytes")), "{cached:?}");
    assert!(eight.contains(&number(cached, "double_cached_bytes")), "{cached:?}");
    assert!(number(cached, "guest_cache_growth_bytes") >= 15.0 * MIB, "{cached:?}");
    for row in rows.iter().filter(|row| row.text("disk") == "vdb") {
        assert_eq!(number(row, "host_cached_bytes"), 0.0, "cache=none: {row:?}");
    }
    assert_eq!(number(direct, "double_cached_bytes"), 0.0, "{direct:?}");
    // T6: of four times 8 MiB that the guest has read, the host had one: the cached disk's second time.
    let share = number(cached, "host_hit_share");
    assert!((0.2..=0.3).contains(&share), "{share} of {cached:?}");
}

/// Writes all of each disk to new blocks, reads it again, and waits until the caches have been looked at.
const WHOLE: &str = r#"
for disk in vda vdb; do
    dd if=/dev/zero of=/dev/$disk bs=1M count=48 oflag=direct conv=fsync 2>/dev/null || exit 1
    dd if=/dev/$disk of=/dev/null bs=1M iflag=direct 2>/dev/null || exit 1
done
sleep 2
"#;

#[test]
fn what_goes_through_dontcache_does_not_stay_in_the_hosts_cache() {
    let place = Host::get().place();
    let asked = place.sh("truncate -s 48M a.img b.img; minivmm --explain --disk a.img,cache=dontcache");
    if asked.status == 125 && asked.stderr.contains("RWF_DONTCACHE") {
        skip("dontcache", "this host has no RWF_DONTCACHE (ext4 since Linux 6.17)");
        return;
    }
    assert_eq!(asked.status, 0, "{asked:#?}");
    place.put("job", WHOLE.as_bytes());
    let outcome = place.sh(&format!(
        "{GUEST} --disk a.img,cache=dontcache --disk b.img,cache=writeback --observe a.csv --observe-interval 0.2 \
         --add job:/tmp/job -- sh /tmp/job"
    ));
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    let rows = rows(&place, "a.csv");
    let of = |disk: &str, column: &str| -> Vec<f64> {
        let own = rows.iter().filter(|row| row.text("disk") == disk);
        own.map(|row| row.number(column).unwrap_or_else(|| panic!("no {column}: {row:?}"))).collect()
    };
    for (disk, end) in [("vda", 0.0..=MIB), ("vdb", 47.0 * MIB..=48.0 * MIB)] {
        let cached = of(disk, "host_cached_bytes");
        let most = cached.iter().fold(0.0_f64, |most, bytes| most.max(*bytes));
        println!("{disk}: {most} bytes in the host's cache at most, {} in the end", cached.last().unwrap());
        assert!(end.contains(cached.last().unwrap()), "{disk}: {cached:?}");
        for column in ["written_bytes", "read_bytes"] {
            assert!(of(disk, column).last().unwrap() >= &(48.0 * MIB), "{disk} {column}: {rows:?}");
        }
        assert_eq!(of(disk, "host_dirty_bytes").last(), Some(&0.0), "{disk}");
    }
}

#[test]
fn a_memory_limit_is_on_the_whole_process_and_goes_with_it() {
    let place = Host::get().place();
    let outcome = place.sh(&format!(
        "[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 77
         grep -qw memory /sys/fs/cgroup/cgroup.controllers || exit 77
         {GUEST} --memory 128M --host-memory-limit 256M -- sleep 5 & child=$!
         group=$(echo /proc/$child/cgroup)
         until grep -q minivmm $group; do kill -0 $child || exit 1; sleep 0.1; done
         own=/sys/fs/cgroup$(sed -n 's/^0:://p' $group)
         echo max $(cat $own/memory.max); echo procs $(grep -cx $child $own/cgroup.procs)
         wait $child; echo status $?; [ -e $own ] || echo gone"
    ));
    if outcome.status == 77 {
        skip("cgroup", "the host has no cgroup v2 with a memory controller");
        return;
    }
    assert_eq!(outcome.stdout, "max 268435456\nprocs 1\nstatus 0\ngone\n", "{outcome:#?}");
}
