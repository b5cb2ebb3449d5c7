//! ext4 and xfs from mkfs to fsck on our disks, by Debian's kernels in plain QEMU; the host checks the images again.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use minivmm_testkit::cpio;
use minivmm_testkit::images;
use minivmm_testkit::skips::skip;

use super::daemon::{Daemon, Export};
use super::is_torture;
use super::qemu::{self, Machine, can_run};

/// xfs wants 300 MiB at least. The image is sparse.
const IMAGE_MIB: u64 = 320;

/// `life TYPE DISK MKFS... -- FSCK...`: mkfs, files that are synced, a second mount that finds them, fsck.
const LIFE: &str = r#"
host() { program=$1; shift; /job/host/ld.so --library-path /job/host /job/host/$program "$@"; }
modprobe xfs || tell xfs.module missing
life() {
    type=$1 disk=$2
    mkdir -p /mnt/$type
    mount -t $type $disk /mnt/$type || { tell $type.mounted no; return; }
    i=0
    while [ $i -lt 20 ]; do
        head -c $((i * 7001)) /dev/urandom >/mnt/$type/$i
        sync -f /mnt/$type/$i 2>/dev/null || sync
        i=$((i + 1))
    done
    (cd /mnt/$type && sha256sum * >SUMS)
    fio --name=files --directory=/mnt/$type --rw=randwrite --bsrange=4k-64k --size=4M --nrfiles=4 --ioengine=psync \
        --fsync=32 --verify=crc32c --do_verify=1 >/tmp/$type 2>&1
    tell $type.fio $?
    rm /mnt/$type/files* && fstrim /mnt/$type
    tell $type.trim $?
    umount /mnt/$type
    mount -t $type $disk /mnt/$type
    (cd /mnt/$type && sha256sum -c SUMS >/dev/null)
    tell $type.sums $?
    umount /mnt/$type
}
mkfs.ext4 -q -F /dev/vda
tell ext4.mkfs $?
host mkfs.xfs -q -f /dev/vdb
tell xfs.mkfs $?
life ext4 /dev/vda
life xfs /dev/vdb
e2fsck -fn /dev/vda >/dev/null 2>&1
tell ext4.fsck $?
host xfs_repair -n /dev/vdb >/dev/null 2>&1
tell xfs.fsck $?
"#;

fn is_possible(kernel: &str) -> bool {
    let here = [MKFS_XFS, XFS_REPAIR].iter().all(|program| Path::new(program).exists());
    if !here {
        skip("xfsprogs", "mkfs.xfs is not installed (make test-deps)");
    }
    here && can_run(&[kernel])
}

const MKFS_XFS: &str = "/sbin/mkfs.xfs";
const XFS_REPAIR: &str = "/sbin/xfs_repair";

fn from_mkfs_to_fsck(kernel: &str, board: &str, modes: [&'static str; 2]) {
    if !is_possible(kernel) {
        return;
    }
    let dir = images::test_dir();
    let exports = [Export::new("ext4", modes[0]).queues(2), Export::new("xfs", modes[1])];
    for export in &exports {
        File::create(dir.path().join(export.image())).unwrap().set_len(IMAGE_MIB << 20).unwrap();
    }
    let daemon = Daemon::start(dir.path(), &exports, &[]);
    let programs = cpio::host_programs(&[Path::new(MKFS_XFS), Path::new(XFS_REPAIR)]);
    let modules = fs::read(qemu::images(kernel).join("modules.cpio")).unwrap();
    let mut machine = Machine::new(dir.path(), board);
    machine.disk(&exports[0]).disk(&exports[1]);
    let heard = machine.linux(kernel, LIFE, &[], &[&programs, &modules]).start(false).finish();
    for system in ["ext4", "xfs"] {
        for step in ["mkfs", "fio", "trim", "sums", "fsck"] {
            heard.expect(&format!("{system}.{step}"), "0");
        }
    }
    daemon.stop();
    for [program, flag, image] in [["e2fsck", "-fn", "ext4.img"], [XFS_REPAIR, "-nf", "xfs.img"]] {
        let checked = Command::new(program).args([flag, image]).current_dir(dir.path()).output().unwrap();
        assert!(checked.status.success(), "{program} on the host: {checked:?}");
    }
}

#[test]
fn ext4_and_xfs_live_from_mkfs_to_fsck() {
    from_mkfs_to_fsck("6.12", "pc", ["writeback", "none"]);
}

#[test]
fn they_do_in_each_mode_and_under_both_kernels() {
    if !is_torture() {
        skip("torture", "file systems in each mode under both kernels (make torture)");
        return;
    }
    let modes = images::modes();
    for (at, &mode) in modes.iter().enumerate() {
        let other = modes[(at + 1) % modes.len()];
        from_mkfs_to_fsck("6.1", "q35", [mode, other]);
        from_mkfs_to_fsck("6.12", "pc", [other, mode]);
    }
}
