//! Stock Linux kernels under minivmm, many checks a boot: the guest's view of each cache mode,
//! fio's verify, ext4 from mkfs to e2fsck on both sides, the FLUSHes that the guest counts against
//! the fdatasyncs that strace sees, and every way to end.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm_testkit::cpio;
use minivmm_testkit::host::{Host, Outcome, Place};
use minivmm_testkit::skips::skip;

/// One boot of the test guest.
struct Boot<'a> {
    kernel: &'a str,
    /// The rest of the command line.
    args: &'a str,
    /// What the guest does; it ends with power-off.
    job: &'a str,
}

impl Boot<'_> {
    /// The command line, in the shell of the host.
    fn command(&self, place: &Place) -> String {
        place.put("job.cpio", &cpio::job(self.job));
        let guest = format!("$GUESTS/{}", self.kernel);
        let made = place.sh(&format!("cat {guest}/initrd.cpio job.cpio > initrd.cpio"));
        assert_eq!(made.status, 0, "{}", made.stderr);
        format!(
            "minivmm --timeout 200 --kernel {guest}/vmlinuz --initrd initrd.cpio --append quiet {}",
            self.args
        )
    }

    fn run(&self, place: &Place) -> Outcome {
        let command = self.command(place);
        place.sh(&command)
    }
}

/// The value of a line "T NAME VALUE" that a job has printed.
fn told<'a>(outcome: &'a Outcome, name: &str) -> &'a str {
    let lines = outcome.stdout.lines().map(str::trim);
    let mut values = lines.filter_map(|line| line.strip_prefix("T ")?.strip_prefix(name)?.strip_prefix(' '));
    let value = values.next();
    value.unwrap_or_else(|| panic!("the guest did not tell {name}: {outcome:#?}")).trim()
}

fn number(outcome: &Outcome, name: &str) -> u64 {
    told(outcome, name).parse().unwrap_or_else(|_| panic!("{name} is no number: {outcome:#?}"))
}

/// Lines that kernels log as warnings or worse here, and why that is right.
const EXPECTED: [&str; 6] = [
    // There is no PCI bus, and that is all they say.
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    // The CPU that the host passes on; emulated hosts have no constant TSC either.
    "amd_pstate: the _CPC object is not present",
    "TSC",
    "clocksource",
    // An emulated host is busy with others now and then.
    "hrtimer: interrupt took",
];

/// Warnings and errors in the kernel's log (lines "K ..." of the job) that are not expected.
fn complaints(outcome: &Outcome) -> Vec<&str> {
    let lines = outcome.stdout.lines().filter_map(|line| line.trim().strip_prefix("K "));
    lines.filter(|line| !EXPECTED.iter().any(|expected| line.contains(expected))).collect()
}

const FIELDS: &str = r#"
field() { awk -v n="$2" '{ print $n }' /sys/block/$1/stat; }
tell() { echo "T $*"; }
"#;

/// In each mode: what the guest sees, verified random writes, a file system's life, counters.
/// The first disk has the engine whose system calls strace sees, the second io_uring and `stable`.
///
/// The pairs of mode, kernel and transport are spread over the five runs. Both disks have the same one: with
/// two, the order in which a guest loads its drivers would decide which is vda.
fn a_mode_from_mkfs_to_fsck(
    mode: &str,
    stable: &str,
    kernel: &str,
    (cpus, memory): (u32, &str),
    transport: &str,
) {
    let through = matches!(mode, "writethrough" | "directsync");
    let place = Host::get().place();
    place.sh("truncate -s 64M a.img b.img");
    let job = format!(
        r#"{FIELDS}
tell cache_type $(cat /sys/block/vda/cache_type)
tell places $(for d in vda vdb; do readlink -f /sys/block/$d | grep -oE '/pci0000:00/|/LNRO0005:' | tr -d '/:0-9'; done)
tell messages $(grep -cE 'MSI.*virtio.*req' /proc/interrupts)
tell cpus $(grep -c ^processor /proc/cpuinfo)
tell memory $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo)
tell sizes $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)
fio --name=verify --filename=/dev/vdb --rw=randwrite --bsrange=512-64k --size=16M --direct=1 --ioengine=libaio \
    --iodepth=8 --verify=crc32c --do_verify=1 --end_fsync=1 --output-format=terse >/tmp/fio 2>&1
tell fio $?
mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt
i=0; while [ $i -lt 20 ]; do head -c 20000 /dev/urandom > /mnt/$i; sync -f /mnt/$i 2>/dev/null || sync; i=$((i+1)); done
(cd /mnt && sha256sum * > SUMS); umount /mnt
e2fsck -fn /dev/vda >/tmp/fsck 2>&1; tell fsck $?
mount -t ext4 /dev/vda /mnt && (cd /mnt && sha256sum -c -s SUMS 2>/dev/null || sha256sum -c SUMS >/dev/null); tell sums $?
umount /mnt
tell writes $(field vda 5)
tell flushes $(field vda 16)
dmesg -r | sed -n 's/^<[0-4]>//p' | sed 's/^/K /'
"#
    );
    let args = format!(
        "--cpus {cpus} --memory {memory} --disk a.img,cache={mode},engine=sync,stable=dsync,transport={transport} \
         --disk b.img,cache={mode},serial=two,engine=io_uring,stable={stable},transport={transport}"
    );
    let boot = Boot { kernel, args: &args, job: &job };
    // Only the calls on a.img count: strace shows the path behind each descriptor.
    let command = boot.command(&place);
    let traced = format!(
        "strace -f --seccomp-bpf -y -o trace -e trace=fdatasync,fsync,pwritev,pwritev2,openat {command}"
    );
    let outcome = place.sh(&traced);
    assert_eq!(outcome.status, 0, "{mode}: {outcome:#?}");
    assert_eq!(told(&outcome, "cache_type"), if through { "write through" } else { "write back" }, "{mode}");
    let (places, messages) = if transport == "pci" { ("pci pci", 2) } else { ("LNRO LNRO", 0) };
    assert_eq!(told(&outcome, "places"), places);
    assert!(number(&outcome, "messages") >= messages, "{outcome:#?}");
    assert_eq!(told(&outcome, "cpus"), cpus.to_string());
    assert_eq!(told(&outcome, "sizes"), "131072 131072");
    for name in ["fio", "fsck", "sums"] {
        assert_eq!(told(&outcome, name), "0", "{mode} {name}: {outcome:#?}");
    }

    assert_eq!(complaints(&outcome), Vec::<&str>::new(), "{mode}: the kernel complains");

    let on_host = place.sh("e2fsck -fn a.img");
    assert_eq!(on_host.status, 0, "{mode}: e2fsck on the host: {}", on_host.stdout);

    let count = |pattern: &str| -> u64 {
        place.sh(&format!("grep -cE '{pattern}' trace")).stdout.trim().parse().unwrap()
    };
    let fdatasyncs = count("fdatasync\\([0-9]+<[^>]*/a.img>");
    let (writes, flushes) = (number(&outcome, "writes"), number(&outcome, "flushes"));
    // One at the start and one at the end, where the mode honours flushes.
    match mode {
        "none" | "writeback" | "dontcache" => {
            assert!(flushes > 20, "{mode}: {flushes} FLUSHes");
            assert_eq!(fdatasyncs, flushes + 2, "{mode}");
            assert_eq!(count("pwritev2\\([0-9]+<[^>]*/a.img>.*RWF_DSYNC"), 0, "{mode}");
            // strace before 6.14 does not know the flag's name.
            let flagged = count("pwritev2\\([0-9]+<[^>]*/a.img>.*(RWF_DONTCACHE|0x80 )");
            let all = count("pwritev2?\\([0-9]+<[^>]*/a.img>");
            assert_eq!(flagged, if mode == "dontcache" { all } else { 0 }, "{mode}");
        }
        "unsafe" => {
            assert!(flushes > 20, "{mode}: {flushes} FLUSHes");
            assert_eq!(fdatasyncs, 0, "{mode}");
        }
        _ => {
            assert_eq!(flushes, 0, "{mode}: a guest without a write cache sends none");
            let stable = count("pwritev2\\([0-9]+<[^>]*/a.img>.*RWF_DSYNC");
            let erases_synced = fdatasyncs.saturating_sub(2);
            assert!(stable > 0 && stable <= writes + 1, "{mode}: {stable} stable writes of {writes}");
            assert_eq!(
                count("pwritev2?\\([0-9]+<[^>]*/a.img>") - stable,
                0,
                "{mode}: no write without RWF_DSYNC"
            );
            assert!(erases_synced <= writes, "{mode}: {fdatasyncs} fdatasyncs");
        }
    }
    let flags = place.sh("grep -m1 'openat.*a.img' trace").stdout;
    assert_eq!(flags.contains("O_DIRECT"), matches!(mode, "none" | "directsync"), "{mode}: {flags}");
}

#[test]
fn mode_none_on_6_12() {
    a_mode_from_mkfs_to_fsck("none", "auto", "6.12", (1, "128M"), "pci");
}

#[test]
fn mode_writeback_on_6_1_with_two_cpus() {
    a_mode_from_mkfs_to_fsck("writeback", "fdatasync", "6.1", (2, "512M"), "pci");
}

#[test]
fn mode_writethrough_on_6_12_with_two_cpus_and_memory_beyond_the_hole() {
    a_mode_from_mkfs_to_fsck("writethrough", "group", "6.12", (2, "4G"), "mmio");
}

#[test]
fn mode_directsync_on_6_1() {
    a_mode_from_mkfs_to_fsck("directsync", "dsync", "6.1", (1, "128M"), "mmio");
}

#[test]
fn mode_unsafe_on_6_12() {
    a_mode_from_mkfs_to_fsck("unsafe", "auto", "6.12", (1, "512M"), "pci");
}

/// Where the host has RWF_DONTCACHE, as the emulated host has with EMUHOST_KERNEL=backports. With its 6.12 it has not:
/// minivmm must say so, and what to use.
#[test]
fn mode_dontcache_on_6_12_or_its_refusal() {
    let place = Host::get().place();
    let asked = place.sh("truncate -s 1M c.img; minivmm --explain --disk c.img,cache=dontcache");
    if asked.status == 0 {
        return a_mode_from_mkfs_to_fsck("dontcache", "auto", "6.12", (2, "512M"), "pci");
    }
    assert_eq!(asked.status, 125, "{asked:#?}");
    for word in ["RWF_DONTCACHE", "use cache=none or cache=writeback"] {
        assert!(asked.stderr.replace('\n', " ").contains(word), "no {word}: {asked:#?}");
    }
    skip("dontcache", "this host has no RWF_DONTCACHE (ext4 since Linux 6.17)");
}

/// A queue a CPU without being asked; fio's jobs, each on a CPU of its own, write through both of them.
#[test]
fn two_cpus_have_two_queues_and_verify_finds_what_they_wrote() {
    let place = Host::get().place();
    place.sh("truncate -s 32M a.img b.img");
    let job = r#"
tell() { echo "T $*"; }
tell queues $(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdb/mq | wc -l)
fio --name=verify --filename=/dev/vda --rw=randwrite --bsrange=4k-32k --size=4M --offset_increment=8M --numjobs=2 \
    --cpus_allowed=0,1 --cpus_allowed_policy=split --direct=1 --ioengine=libaio --iodepth=4 --fsync=16 \
    --verify=crc32c --do_verify=1 --end_fsync=1 --output-format=terse >/tmp/fio 2>&1
tell fio $?
dmesg -r | sed -n 's/^<[0-4]>//p' | sed 's/^/K /'
"#;
    let args = "--cpus 2 --stats=stats.json --disk a.img,cache=none --disk b.img,queues=1";
    let outcome = Boot { kernel: "6.12", args, job }.run(&place);
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    assert_eq!(told(&outcome, "queues"), "2 1", "{outcome:#?}");
    assert_eq!(told(&outcome, "fio"), "0", "{outcome:#?}");
    assert_eq!(complaints(&outcome), Vec::<&str>::new(), "the kernel complains");
    let stats = place.sh("cat stats.json").stdout;
    assert!(stats.contains("\"queues\": 2") && stats.contains("\"errors\": 0"), "{stats}");
}

/// With virtio-mmio the guest reads InterruptStatus and writes InterruptACK, and each comes out of KVM; a
/// message needs neither, and the doorbell is KVM's own business.
#[test]
fn an_interrupt_costs_two_exits_over_mmio_and_none_over_pci() {
    const READS: u64 = 2000;
    let place = Host::get().place();
    place.sh("truncate -s 16M a.img");
    let job = format!(
        "fio --name=t --filename=/dev/vda --rw=randread --bs=4k --direct=1 --ioengine=psync --size=16M \
         --io_size={}k >/dev/null 2>&1; echo \"T fio $?\"",
        4 * READS
    );
    let registers = |transport: &str| {
        let args = format!("--transport {transport} --stats=stats.json --disk a.img,cache=none");
        let outcome = Boot { kernel: "6.12", args: &args, job: &job }.run(&place);
        assert_eq!((outcome.status, told(&outcome, "fio")), (0, "0"), "{outcome:#?}");
        let json: serde_json::Value = serde_json::from_str(&place.sh("cat stats.json").stdout).unwrap();
        let requests = &json["disks"][0]["requests"];
        assert!(requests["read"].as_u64().unwrap() >= READS, "{json}");
        println!("{transport}: {} for {requests}", json["exits"]);
        let exits = |name: &str| json["exits"][name].as_u64().unwrap();
        [exits("mmio_read"), exits("mmio_write")]
    };
    let (mmio, pci) = (registers("mmio"), registers("pci"));
    // All of bring-up is in these figures: a few hundred accesses.
    for (kind, (by_line, by_message)) in ["reads", "writes"].iter().zip(mmio.into_iter().zip(pci)) {
        assert!(
            by_line >= READS && by_message < READS / 2,
            "{kind}: {by_line} over mmio, {by_message} over pci"
        );
    }
}

/// A small kernel of our own reads both ACPI and `virtio_mmio.device=`, and has virtio built in: it is told of each
/// device once. Without ACPI it finds the PCI bus by its ports.
#[test]
fn a_kernel_that_reads_acpi_and_the_command_line_ends_with_one_device_a_disk() {
    let place = Host::get().place();
    place.sh("truncate -s 4M a.img b.img");
    let job = format!(
        r#"{FIELDS}
tell disks $(ls /sys/block | grep -c '^vd')
tell sizes $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)
tell serials $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)
tell cpus $(grep -c ^processor /proc/cpuinfo)
dd if=/dev/urandom of=/dev/vda bs=4096 count=4 2>/dev/null && sync; tell wrote $?
tell twice $(dmesg | grep -cE "virtio.*(error|failed)")
"#
    );
    let made = place.sh("cat $GUESTS/6.12/initrd.cpio > base.cpio");
    assert_eq!(made.status, 0, "{}", made.stderr);
    place.put("job.cpio", &cpio::job(&job));
    place.sh("cat base.cpio job.cpio > initrd.cpio");
    // (image, what the guest is told, what it can read): PVH and the 64-bit boot protocol.
    for (image, parameters, transport) in [
        ("vmlinux", "quiet", "pci"),
        ("bzImage", "quiet", "mmio"),
        ("vmlinux", "quiet acpi=off minivmm.end=reboot", "mmio"),
        ("bzImage", "quiet acpi=off minivmm.end=reboot -- an argument for init", "pci"),
    ] {
        let outcome = place.sh(&format!(
            "minivmm --timeout 60 --cpus 2 --kernel $GUESTS/small/{image} --initrd initrd.cpio \
             --transport {transport} --append '{parameters}' --disk a.img,serial=A --disk b.img,serial=B"
        ));
        assert_eq!(outcome.status, 0, "{image} {parameters}: {outcome:#?}");
        for (name, expected) in [
            ("disks", "2"),
            ("sizes", "8192 8192"),
            ("serials", "A B"),
            ("cpus", "2"),
            ("wrote", "0"),
            ("twice", "0"),
        ] {
            assert_eq!(told(&outcome, name), expected, "{image} {parameters}: {outcome:#?}");
        }
    }
}

#[test]
fn the_guest_switches_its_write_cache_and_the_host_follows_at_once() {
    let place = Host::get().place();
    place.sh("truncate -s 16M a.img");
    let write = "dd if=/dev/urandom of=/dev/vda bs=4096 count=1 seek=$1 2>/dev/null";
    let job = format!(
        r#"{FIELDS}
w() {{ {write}; }}
tell before $(cat /sys/block/vda/cache_type)
w 0; w 1
echo "write through" > /sys/block/vda/cache_type
tell after $(cat /sys/block/vda/cache_type)
w 2; w 3; w 4
echo "write back" > /sys/block/vda/cache_type
tell again $(cat /sys/block/vda/cache_type)
w 5
"#
    );
    let boot = Boot { kernel: "6.12", args: "--disk a.img,cache=none,engine=sync,stable=dsync", job: &job };
    let command = boot.command(&place);
    let outcome =
        place.sh(&format!("strace -f --seccomp-bpf -o trace -e trace=fdatasync,pwritev,pwritev2 {command}"));
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    for (name, expected) in [("before", "write back"), ("after", "write through"), ("again", "write back")] {
        assert_eq!(told(&outcome, name), expected);
    }
    let calls = place.sh("grep -E 'pwritev|fdatasync' trace | sed -E 's/^[0-9]+ +//'").stdout;
    let letters: String = calls
        .lines()
        .map(|line| match line {
            _ if line.contains("fdatasync") => 'f',
            _ if line.contains("RWF_DSYNC") => 'D',
            _ => 'w',
        })
        .collect();
    // At the start, two plain writes, the sync of the change, three stable ones, a plain one, the end.
    assert_eq!(letters.trim_start_matches('f').trim_end_matches('f'), "wwfDDDw", "{calls}");
}

#[test]
fn readonly_block_size_discard_and_serial_are_as_asked() {
    let place = Host::get().place();
    place.sh("truncate -s 16M z.img; head -c 16777216 /dev/urandom > a.img; cp a.img ro.img; truncate -s 16M big.img");
    let job = format!(
        r#"{FIELDS}
tell ro $(cat /sys/block/vdb/ro)
dd if=/dev/zero of=/dev/vdb bs=4096 count=1 2>/dev/null; tell written $?
tell logical $(cat /sys/block/vdc/queue/logical_block_size)
fio --name=small --filename=/dev/vdc --rw=write --bs=512 --size=512 --direct=1 >/dev/null 2>&1; tell small $?
mkfs.ext4 -q -F /dev/vdc && e2fsck -fn /dev/vdc >/dev/null 2>&1; tell fsck $?
tell serial $(cat /sys/block/vda/serial)
tell discard $(cat /sys/block/vda/queue/discard_max_bytes)
blkdiscard -z -o 1048576 -l 1048576 /dev/vda; tell zeroed $?
cmp -n 1048576 -s /dev/zero /dev/vda; tell first $?
dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | cmp -s -n 1048576 - /dev/zero; tell second $?
blkdiscard -o 4194304 -l 4194304 /dev/vda; tell discarded $?
"#
    );
    let args =
        "--disk a.img,serial=twenty-bytes-long-ID --disk ro.img,readonly --disk big.img,block-size=4096";
    let outcome = Boot { kernel: "6.12", args, job: &job }.run(&place);
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    for (name, expected) in [
        ("ro", "1"),
        ("written", "1"),
        ("logical", "4096"),
        ("small", "1"),
        ("fsck", "0"),
        ("serial", "twenty-bytes-long-ID"),
        ("zeroed", "0"),
        ("first", "1"),
        ("second", "0"),
        ("discarded", "0"),
    ] {
        assert_eq!(told(&outcome, name), expected, "{name}: {outcome:#?}");
    }
    assert!(number(&outcome, "discard") > 0);
    let freed = place.sh("stat -c '%s %b' a.img ro.img").stdout;
    let lines: Vec<Vec<u64>> =
        freed.lines().map(|line| line.split(' ').map(|word| word.parse().unwrap()).collect()).collect();
    assert_eq!(lines[0][0], 16 << 20, "the file keeps its size");
    assert!(lines[0][1] + 4096 <= lines[1][1], "a discard of 4 MiB frees space: {lines:?}");
}

#[test]
fn power_off_and_reboot_are_success_and_panics_are_not() {
    let place = Host::get().place();
    place.sh("truncate -s 1M a.img");
    let boots = [("poweroff -f", "", 0), ("reboot -f", "", 0), ("echo c > /proc/sysrq-trigger", "", 124)];
    for (job, args, status) in boots {
        for kernel in ["6.12", "6.1"] {
            let args = format!("--disk a.img {args}");
            let outcome = Boot { kernel, args: &args, job }.run(&place);
            assert_eq!(outcome.status, status, "{job} on {kernel}: {outcome:#?}");
        }
    }
    let early = place.sh("minivmm --timeout 100 --kernel $GUESTS/6.12/vmlinuz --initrd none --disk a.img");
    assert_eq!(early.status, 124, "a panic before any module is loaded: {early:#?}");
}

#[test]
fn a_signal_or_the_timeout_ends_the_machine_in_order_and_flushed_data_is_there() {
    let place = Host::get().place();
    let job = "mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file && sync\n\
               echo T ready now; while :; do echo more >> /mnt/file; done";
    for (signal, status) in [("TERM", 143), ("INT", 130), ("HUP", 129), ("", 126)] {
        place.sh("rm -f a.img out; truncate -s 32M a.img");
        let command = Boot { kernel: "6.12", args: "--disk a.img,cache=writeback", job }.command(&place);
        let outcome = if signal.is_empty() {
            place.sh(&format!("{} > out 2> err", command.replace("--timeout 200", "--timeout 60")))
        } else {
            let traced = "strace -f --seccomp-bpf -o trace -e trace=fdatasync sh -c";
            place.sh(&format!(
                "{traced} 'echo $$ > pid; exec {command}' > out 2> err & \
                 until grep -q 'T ready' out || ! kill -0 $!; do sleep 0.2; done; \
                 kill -{signal} $(cat pid); wait $!"
            ))
        };
        let shown = place.sh("tail -n 5 out err").stdout;
        assert_eq!(outcome.status, status, "signal {signal:?}: {shown}");
        if !signal.is_empty() {
            let last = place.sh("grep fdatasync trace | tail -n 1").stdout;
            assert!(last.trim_end().ends_with("= 0"), "the final fdatasync: {last}");
        }
        let content = place
            .sh("e2fsck -fy a.img >/dev/null 2>&1; debugfs -R 'cat /file' a.img 2>/dev/null | head -n 1");
        assert_eq!(content.stdout.trim(), "kept", "signal {signal:?}");
    }
}

#[test]
fn ext4_survives_every_loss_of_power_that_the_log_allows_and_a_disk_that_lies_is_found_out() {
    let place = Host::get().place();
    let made = place.sh("truncate -s 64M base.img && mkfs.ext4 -q -F base.img");
    assert_eq!(made.status, 0, "{}", made.stderr);
    let job = "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && i=0
while [ $i -lt 8 ]; do
    head -c $((i * 3000 + 1)) /dev/urandom > /mnt/new; sync; mv /mnt/new /mnt/f$i; mkdir -p /mnt/d$((i % 3))
    cp /mnt/f$i /mnt/d$((i % 3)); [ $((i % 3)) = 0 ] && rm -f /mnt/f$((i / 2)); i=$((i + 1))
done
umount /mnt; echo T done $?";
    for (keys, states, status) in [("cache=none", 6, 0), ("cache=writeback,fault=lose:flush", 24, 1)] {
        place.sh("cp base.img a.img");
        let args = format!("--disk a.img,{keys},log-writes=a.log");
        let outcome = Boot { kernel: "6.12", args: &args, job }.run(&place);
        assert_eq!((outcome.status, told(&outcome, "done")), (0, "0"), "{keys}: {outcome:#?}");
        let command = format!("minivmm crash a.log --base base.img --states {states} --keep kept");
        let crashed = place.sh(&command);
        assert_eq!(crashed.status, status, "{keys}: {crashed:#?}");
        let summary = crashed.stdout.lines().last().unwrap_or_default();
        let number = |at| summary.split(' ').nth(at).and_then(|word| word.parse().ok()).unwrap_or(0);
        let (states, points): (u64, u64) = (number(0), number(3));
        println!("{keys}: {summary}");
        if status == 0 {
            assert!(points > 8 && states > 2 * points, "{summary}");
        } else {
            assert!(crashed.stdout.contains("e2fsck"), "{crashed:#?}");
            // What was kept is not good by itself: either its recovery fails, or what it leaves.
            let kept = "ls kept/*.img || exit 1
                for i in kept/*.img; do e2fsck -p $i >&2; [ $? -gt 1 ] || { e2fsck -fn $i && exit 1; }; done
                exit 0";
            assert_eq!(place.sh(kept).status, 0, "{crashed:#?}");
        }
    }
}
