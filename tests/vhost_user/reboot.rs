//! Devices that are reset and activated again while the connection stays: a guest that reboots, a driver that lets its
//! device go and takes it again; and a disk that cannot be written.

use std::fs::{self, File};

use minivmm_testkit::images;

use super::daemon::{Daemon, Export};
use super::is_torture;
use super::qemu::{Machine, can_run};

/// Each boot reads what the boot before has written, writes more, and reboots, until there were enough.
const REBOOTING: &str = r#"
read -r boot <<END
$(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\0')
END
boot=$((boot + 1))
if [ $boot -gt 1 ]; then
    dd if=/dev/vda bs=1M skip=1 count=4 iflag=direct 2>/dev/null | sha256sum >/tmp/found
    dd if=/dev/vda bs=512 skip=1 count=1 iflag=direct 2>/dev/null | tr -d '\0' >/tmp/written
    cmp /tmp/found /tmp/written
    tell kept.$boot $?
fi
head -c 4194304 /dev/urandom >/tmp/data
dd if=/tmp/data of=/dev/vda bs=1M seek=1 oflag=direct conv=notrunc 2>/dev/null
sha256sum </tmp/data | dd of=/dev/vda bs=512 seek=1 conv=notrunc,sync,fsync 2>/dev/null
echo $boot | dd of=/dev/vda bs=512 conv=notrunc,sync,fsync 2>/dev/null
if [ $boot -lt BOOTS ]; then
    # In the middle of what it does.
    fio --name=load --filename=/dev/vda --offset=8M --size=16M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
        --iodepth=16 --time_based --runtime=60 >/dev/null 2>&1 &
    sleep 1
    reboot -f
    sleep 60
fi
tell boots $boot
"#;

#[test]
fn a_guest_that_reboots_finds_what_it_has_written() {
    let kernels: &[&str] = if is_torture() { &["6.12", "6.1"] } else { &["6.12"] };
    if !can_run(kernels) {
        return;
    }
    for kernel in kernels {
        let boots = if is_torture() { 5 } else { 2 };
        let dir = images::test_dir();
        let export = Export::new("reboot", "writeback").queues(2);
        File::create(dir.path().join(export.image())).unwrap().set_len(32 << 20).unwrap();
        let daemon = Daemon::start(dir.path(), std::slice::from_ref(&export), &[]);
        let job = REBOOTING.replace("BOOTS", &boots.to_string());
        let mut machine = Machine::new(dir.path(), "pc");
        let heard = machine.disk(&export).linux(kernel, &job, &[], &[]).start(true).finish();
        heard.expect("boots", &boots.to_string());
        for boot in 2..=boots {
            heard.expect(&format!("kept.{boot}"), "0");
        }
        daemon.stop();
    }
}

/// The driver lets the device go under a load of reads, and takes it again.
const REBINDING: &str = r#"
device=$(basename $(readlink -f /sys/block/vda/device))
driver=/sys/bus/virtio/drivers/virtio_blk
head -c 1048576 /dev/urandom >/tmp/data
dd if=/tmp/data of=/dev/vda bs=1M oflag=direct conv=fsync 2>/dev/null
i=0 kept=0
while [ $i -lt TIMES ]; do
    fio --name=load --filename=/dev/vda --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --time_based \
        --runtime=60 >/dev/null 2>&1 &
    sleep 0.2
    echo $device >$driver/unbind
    wait
    echo $device >$driver/bind
    until [ -b /dev/vda ]; do sleep 0.05; done
    dd if=/dev/vda bs=1M count=1 iflag=direct 2>/dev/null | cmp - /tmp/data && kept=$((kept + 1))
    i=$((i + 1))
done
tell kept $kept
"#;

#[test]
fn a_driver_that_takes_its_device_again_finds_what_it_has_written() {
    if !can_run(&["6.12"]) {
        return;
    }
    let times = if is_torture() { 100 } else { 5 };
    let dir = images::test_dir();
    let export = Export::new("rebind", "none").queues(2);
    File::create(dir.path().join(export.image())).unwrap().set_len(32 << 20).unwrap();
    let daemon = Daemon::start(dir.path(), std::slice::from_ref(&export), &[]);
    let job = REBINDING.replace("TIMES", &times.to_string());
    let heard =
        Machine::new(dir.path(), "q35").disk(&export).linux("6.12", &job, &[], &[]).start(false).finish();
    heard.expect("kept", &times.to_string());
    daemon.stop();
}

#[test]
fn a_readonly_disk_is_read_and_not_written() {
    if !can_run(&["6.1"]) {
        return;
    }
    let dir = images::test_dir();
    let export = Export::new("readonly", "none").readonly();
    let content: Vec<u8> = (0..1_u32 << 20).flat_map(|word| word.to_le_bytes()).collect();
    fs::write(dir.path().join(export.image()), &content).unwrap();
    let daemon = Daemon::start(dir.path(), std::slice::from_ref(&export), &[]);
    let job = r#"
tell ro $(cat /sys/block/vda/ro)
dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct 2>/dev/null; tell write $?
blkdiscard /dev/vda 2>/dev/null; tell discard $?
tell sum $(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum)
"#;
    let heard =
        Machine::new(dir.path(), "pc").disk(&export).linux("6.1", job, &[], &[]).start(false).finish();
    heard.expect("ro", "1");
    heard.expect("write", "1");
    heard.expect("discard", "1");
    daemon.stop();
    heard.expect_sum("sum", &dir.path().join(export.image()), 4);
    assert!(fs::read(dir.path().join(export.image())).unwrap() == content, "the image was written");
}
