//! Block devices as images, and a disk that really fails: loop devices of our own (as root; else
//! each test says that it is not run).

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use minivmm::disk::cache::CachePolicy;
use minivmm::disk::config::EngineChoice;
use minivmm::disk::disk_queue::StableBy;
use minivmm::disk::{DiskConfig, Image};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, pattern, test_dir};
use minivmm_testkit::loops::{LoopDevice, Mounted};
use minivmm_testkit::skips::skip;

const BYTES: u64 = 4 << 20;
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;

fn options(device: &LoopDevice, mode: &str) -> DiskConfig {
    DiskConfig { cache: CachePolicy::by_name(mode).unwrap(), ..DiskConfig::new(&device.0) }
}

/// Shows D1 and D3.
#[test]
fn a_block_device_is_a_disk_with_its_own_block_size_in_every_mode() {
    for sector_bytes in [512, 4096] {
        for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            let image = TestImage::new(BYTES);
            let Some(device) = LoopDevice::new(&image.path, sector_bytes) else { return };
            let opened = Arc::new(Image::open(&options(&device, mode)).unwrap());
            let mut rig = Rig::live(Arc::clone(&opened), FEATURES);
            assert_eq!(rig.config(0, 8), BYTES / 512);
            assert_eq!(rig.config(20, 4), u64::from(sector_bytes), "{mode}: blk_size");
            assert_eq!(rig.read_sectors(8, 4096).1[0], pattern(8), "{mode} {sector_bytes}");
            assert_eq!(rig.write_sectors(16, &[0x77; 8192]), OK, "{mode} {sector_bytes}");
            assert_eq!(rig.flush(), OK, "{mode} {sector_bytes}");
            for (kind, sector, flags) in [(DISCARD, 64, 0), (WRITE_ZEROES, 128, 1), (WRITE_ZEROES, 192, 0)] {
                assert_eq!(rig.erase(kind, &[(sector, 64, flags)]), OK, "{mode} {sector_bytes} {kind}");
            }
            for sector in [128, 192, 255] {
                assert_eq!(rig.read_sectors(sector & !7, 4096).1, vec![0; 4096], "{mode} {sector_bytes}");
            }
            let small = rig.write_sectors(17, &[1; 512]);
            let refused = sector_bytes == 4096 && opened.config().cache.direct;
            assert_eq!(small, if refused { IOERR } else { OK }, "{mode} {sector_bytes}: 512 bytes");
            assert_eq!(rig.read_sectors(24, 4096).1, vec![0x77; 4096]);
            drop(rig);
            opened.close().unwrap();
            let mut content = vec![0; 4096];
            File::open(&device.0).unwrap().read_exact_at(&mut content, 24 * 512).unwrap();
            assert_eq!(content, [0x77; 4096], "{mode} {sector_bytes}: on the device");
        }
    }
}

/// How often the disk below a device was told to empty its cache: "flush requests completed" of
/// Documentation/block/stat.rst.
fn flushes(device: &LoopDevice) -> u64 {
    let name = device.0.file_name().unwrap().to_str().unwrap();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    stat.split_whitespace().nth(15).unwrap().parse().unwrap()
}

/// Shows H3: a loop device has no FUA.
#[test]
fn a_stable_write_to_a_device_without_fua_costs_one_flush_and_by_pwritev2_with_dsync_two() {
    for (engine, stable, expected) in [
        (EngineChoice::Auto, StableBy::Auto, 1),
        (EngineChoice::Blocking, StableBy::Auto, 1),
        (EngineChoice::Blocking, StableBy::Dsync, 2),
    ] {
        let image = TestImage::new(BYTES);
        let Some(device) = LoopDevice::new(&image.path, 512) else { return };
        let asked = DiskConfig { engine, stable, ..options(&device, "directsync") };
        let mut rig = Rig::live(Arc::new(Image::open(&asked).unwrap()), FEATURES);
        let before = flushes(&device);
        assert_eq!(rig.write_sectors(16, &[7; 4096]), OK);
        assert_eq!(flushes(&device) - before, expected, "{engine:?} {stable:?}");
    }
}

#[test]
fn a_smaller_block_size_than_the_device_can_do_is_refused() {
    let image = TestImage::new(BYTES);
    let Some(device) = LoopDevice::new(&image.path, 4096) else { return };
    let asked = DiskConfig { block_size: Some(512), ..options(&device, "none") };
    let error = Image::open(&asked).unwrap_err();
    assert!(error.source().unwrap().to_string().contains("use block-size=4096"), "{error:?}");
}

#[test]
fn a_mounted_device_cannot_be_written_by_a_guest_but_read() {
    let image = TestImage::new(BYTES);
    let Some(device) = LoopDevice::new(&image.path, 512) else { return };
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.0).status().unwrap().success());
    let Some(_mounted) = Mounted::device(&device.0) else { return };
    let error = Image::open(&options(&device, "none")).unwrap_err();
    assert!(error.source().unwrap().to_string().contains("mounted"), "{error:?}");
    let readonly = DiskConfig { readonly: true, ..options(&device, "none") };
    assert!(Image::open(&readonly).is_ok());
}

/// The fsync trap for real: a device that runs out of space behind the page cache. The first
/// fdatasync fails, the kernel calls the lost pages clean, and a second one would succeed.
/// Shows E1.
#[test]
fn a_real_sync_error_is_latched_though_the_kernel_forgets_it() {
    for mode in ["writeback", "writethrough", "none", "directsync"] {
        let Some(small) = Mounted::tmpfs(1 << 20) else { return };
        let backing = small.dir.path().join("backing");
        File::create(&backing).unwrap().set_len(16 << 20).unwrap();
        let Some(device) = LoopDevice::new(&backing, 512) else { return };
        let opened = Arc::new(Image::open(&options(&device, mode)).unwrap());
        let mut rig = Rig::live(Arc::clone(&opened), FEATURES);
        let mut failed = 0;
        for round in 0..4 {
            let status = rig.write_sectors(round * 2048, &vec![9; 1 << 20]);
            failed += u32::from(status == IOERR);
        }
        let first_flush = rig.flush();
        if mode == "writeback" {
            assert_eq!((failed, first_flush), (0, IOERR), "the page cache took it all");
            let other = File::open(&device.0).unwrap();
            assert!(other.sync_data().is_ok(), "what the kernel says to whoever asks again");
        } else {
            assert!(failed > 0, "{mode}: the failure is seen by the write itself");
        }
        // An O_DIRECT write that fails by itself has promised nothing and lost nothing but itself.
        // With RWF_DSYNC it cannot be told from a sync that failed.
        let by_dsync = match opened.config().stable {
            StableBy::Dsync => true,
            StableBy::Auto => opened.file().dsync_is_one_flush(),
            StableBy::Fdatasync | StableBy::Group => false,
        };
        if matches!(mode, "writeback" | "writethrough") || (mode == "directsync" && by_dsync) {
            for _ in 0..3 {
                assert_eq!(rig.flush(), IOERR, "{mode}: latched");
            }
            drop(rig);
            assert!(opened.close().is_err(), "{mode}: and told at the end");
        }
    }
}

#[test]
fn a_file_system_without_o_direct_is_named_with_the_modes_that_work() {
    let Some(ramfs) = Mounted::ramfs() else { return };
    let path = ramfs.dir.path().join("a.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for mode in ["none", "directsync"] {
        let options = DiskConfig { cache: CachePolicy::by_name(mode).unwrap(), ..DiskConfig::new(&path) };
        let text = Image::open(&options).unwrap_err().source().unwrap().to_string();
        for needle in ["no O_DIRECT", &format!("cache={mode}"), "cache=writeback"] {
            assert!(text.contains(needle), "{text}");
        }
    }
    let buffered = DiskConfig { cache: CachePolicy::by_name("writeback").unwrap(), ..DiskConfig::new(&path) };
    assert!(Image::open(&buffered).is_ok());
}

/// A bare-metal guest on `device` that hangs until its time is over.
fn hanging_guest(device: &LoopDevice, kernel: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_minivmm"))
        .args(["--initrd", "none", "--timeout", "2", "--cmdline", "scenario=hang"])
        .arg("--kernel")
        .arg(kernel)
        .arg("--disk")
        .arg(format!("{},cache=writeback", device.0.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The same through the binary: the exit status says that data was lost, at the end and at the
/// next start.
/// Shows E3 and E4.
#[test]
fn a_failed_last_fdatasync_is_the_exit_status() {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip("kvm", "no /dev/kvm");
        return;
    }
    let Some(small) = Mounted::tmpfs(64 << 10) else { return };
    let backing = small.dir.path().join("backing");
    File::create(&backing).unwrap().set_len(16 << 20).unwrap();
    let Some(device) = LoopDevice::new(&backing, 512) else { return };
    let dir = test_dir();
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/guest-images/bare/build.sh");
    assert!(Command::new(build).arg(dir.path()).status().unwrap().success());
    let kernel = dir.path().join("pvh.elf");

    let clean = hanging_guest(&device, &kernel).wait_with_output().unwrap();
    assert_eq!(clean.status.code(), Some(126), "nothing to lose: {clean:?}");

    // More than fits goes into the page cache while the guest runs, as its own writes would.
    let mut lossy = hanging_guest(&device, &kernel);
    let mut greeting = [0];
    lossy.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
    let writer = File::options().write(true).open(&device.0).unwrap();
    writer.write_all_at(&vec![5; 1 << 20], 0).unwrap();
    let lossy = lossy.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&lossy.stderr);
    assert_eq!(lossy.status.code(), Some(125), "{text}");
    assert!(text.contains("last fdatasync"), "{text}");

    writer.write_all_at(&vec![6; 1 << 20], 0).unwrap();
    let refused = hanging_guest(&device, &kernel).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(125), "{text}");
    assert!(text.contains("cannot be made stable"), "{text}");
}
