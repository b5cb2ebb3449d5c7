//! Each cache mode under Debian's kernels in plain QEMU: what the guest sees of it, fio's verified random writes, and the
//! same bytes in the image.

use std::fs::File;

use minivmm_testkit::images;
use minivmm_testkit::skips::skip;

use super::daemon::{Daemon, Export, Exporter, exporter};
use super::is_torture;
use super::qemu::{Machine, can_run};

/// One disk a mode, all with these keys, verified side by side.
fn all_modes(kernel: &str, board: &str, queues: u32, keys: &str) {
    if !can_run(&[kernel]) {
        return;
    }
    let dir = images::test_dir();
    let modes = images::modes();
    let exports: Vec<_> =
        modes.iter().map(|mode| Export::new(mode, mode).queues(queues).keys(keys)).collect();
    let (image_mib, mib) = if is_torture() { (512, 128) } else { (64, 6) };
    for export in &exports {
        File::create(dir.path().join(export.image())).unwrap().set_len(image_mib << 20).unwrap();
    }
    let daemon = Daemon::start(dir.path(), &exports, &[]);
    let job = format!(
        r#"
verify() {{
    tell $2.type $(cat /sys/block/$1/cache_type)
    tell $2.serial $(cat /sys/block/$1/serial)
    tell $2.sectors $(cat /sys/block/$1/size)
    tell $2.queues $(ls /sys/block/$1/mq | wc -l)
    fio --name=verify --filename=/dev/$1 --rw=randwrite --bsrange=512-64k --size={mib}M --direct=1 --ioengine=libaio \
        --iodepth=16 --verify=crc32c --do_verify=1 --fdatasync=64 --end_fsync=1 >/tmp/$1 2>&1
    status=$?
    [ $status -eq 0 ] || cat /tmp/$1
    tell $2.fio $status
    tell $2.sum $(dd if=/dev/$1 bs=1M count={mib} iflag=direct 2>/dev/null | sha256sum)
}}
disks='vda vdb vdc vdd vde vdf'
for mode in {modes}; do
    verify ${{disks%% *}} $mode &
    disks=${{disks#* }}
done
wait
"#,
        modes = modes.join(" ")
    );
    let mut machine = Machine::new(dir.path(), board);
    for export in &exports {
        machine.disk(export);
    }
    let heard = machine.linux(kernel, &job, &[], &[]).start(false).finish();
    for mode in modes {
        heard.expect(&format!("{mode}.fio"), "0");
        heard.expect(&format!("{mode}.sectors"), &(image_mib << 11).to_string());
        heard.expect(&format!("{mode}.queues"), &queues.to_string());
        heard.expect_sum(&format!("{mode}.sum"), &dir.path().join(format!("{mode}.img")), mib);
        if exporter() == Exporter::Minivmm {
            let through = matches!(mode, "writethrough" | "directsync");
            heard.expect(&format!("{mode}.type"), if through { "write through" } else { "write back" });
            heard.expect(&format!("{mode}.serial"), mode);
        }
    }
    daemon.stop();
}

#[test]
fn linux_6_12_verifies_what_it_writes_in_each_mode() {
    all_modes("6.12", "pc", 2, "");
}

#[test]
fn linux_6_1_verifies_what_it_writes_in_each_mode() {
    all_modes("6.1", "pc", 1, ",engine=sync");
}

#[test]
fn every_engine_and_way_to_stable_writes_serves_both_kernels() {
    if !is_torture() {
        skip("torture", "all engines and ways to stable writes under Linux guests (make torture)");
        return;
    }
    for kernel in ["6.1", "6.12"] {
        for (board, queues, keys) in [
            ("q35", 1, ",engine=io_uring,stable=dsync"),
            ("pc", 2, ",engine=io_uring,stable=fdatasync"),
            ("q35", 2, ",engine=io_uring,stable=group"),
            ("pc", 1, ",engine=io_uring,poll-us=0"),
            ("q35", 2, ",engine=sync,stable=dsync"),
            ("pc", 2, ",engine=sync,stable=group"),
        ] {
            all_modes(kernel, board, queues, keys);
        }
    }
}
