//! The disk: images as the user names them, host operations per mode, and what happens when the
//! host fails.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use minivmm::disk::cache::POLICIES;
use minivmm::disk::disk_queue::StableBy;
use minivmm::disk::{DiskConfig, Image};
use minivmm_testkit::driver::*;
use minivmm_testkit::engines::{Fate, Kind, Log, Script, Scripted};
use minivmm_testkit::images::{TestImage, modes, pattern, policies, test_dir};
use minivmm_testkit::skips::skip;

const IMAGE_BYTES: u64 = 1 << 20;
const BOTH: u64 = F_FLUSH | F_CONFIG_WCE;
const ALL: u64 = BOTH | F_DISCARD | F_WRITE_ZEROES;

fn scripted(mode: &str, features: u64, stable_by: StableBy, script: Script) -> (TestImage, Rig, Log) {
    let image = TestImage::new(IMAGE_BYTES);
    let opened = image.open(mode);
    let (engine, log) = Scripted::with_log(&opened, script);
    let mut rig = Rig::with_engine(opened, engine, stable_by);
    rig.start(features);
    (image, rig, log)
}

fn honest(mode: &str, features: u64, stable_by: StableBy) -> (TestImage, Rig, Log) {
    scripted(mode, features, stable_by, Box::new(|_, _| Fate::Real))
}

fn taken(log: &Log) -> Vec<Kind> {
    std::mem::take(&mut log.lock().unwrap())
}

/// What one write must be on the host, by mode, negotiation and the writeback byte.
/// Shows B5, B7, H1 and H2.
#[test]
fn each_write_is_the_host_operations_that_its_mode_promises() {
    use Kind::{Fdatasync, Write, WriteDsync};
    // (flush, config_wce, writeback as set by the guest) -> is the write stable?
    let cases = [(false, false, None), (true, false, None), (false, true, None)].into_iter().chain([
        (true, true, None),
        (true, true, Some(1)),
        (true, true, Some(0)),
        (false, true, Some(1)),
    ]);
    for (flush, config_wce, byte) in cases {
        for policy in policies() {
            let stable = policy.honour_flush
                && match (flush, config_wce, byte) {
                    (false, ..) => true,
                    (true, false, _) => !policy.write_cache,
                    (true, true, None) => !policy.write_cache,
                    (true, true, Some(byte)) => byte == 0,
                };
            for (stable_by, stable_ops) in
                [(StableBy::Dsync, vec![WriteDsync]), (StableBy::Fdatasync, vec![Write, Fdatasync])]
            {
                let features = (u64::from(flush) * F_FLUSH) | (u64::from(config_wce) * F_CONFIG_WCE);
                let (_image, mut rig, log) = honest(policy.name, features, stable_by);
                if let Some(byte) = byte {
                    rig.set_writeback(byte);
                    // A change to 0 makes older writes stable, though nobody asks for it.
                    // Two reads, one after the other: the sync may come behind the first.
                    assert_eq!([rig.read_sectors(0, 512).0, rig.read_sectors(0, 512).0], [OK, OK]);
                }
                taken(&log);
                assert_eq!(rig.write_sectors(8, &[7; 4096]), OK);
                let expected = if stable { stable_ops } else { vec![Write] };
                assert_eq!(
                    taken(&log),
                    expected,
                    "{} {flush} {config_wce} {byte:?} {stable_by:?}",
                    policy.name
                );
                assert_eq!(rig.flush(), OK);
                let expected = if policy.honour_flush { vec![Fdatasync] } else { vec![] };
                assert_eq!(taken(&log), expected, "FLUSH in {}", policy.name);
            }
        }
    }
}

/// Shows B13.
#[test]
fn erases_are_made_stable_where_writes_are() {
    for policy in policies() {
        let (_image, mut rig, log) = honest(policy.name, ALL, StableBy::Dsync);
        for (kind, flags, op) in
            [(DISCARD, 0, Kind::Punch), (WRITE_ZEROES, 1, Kind::Punch), (WRITE_ZEROES, 0, Kind::Zero)]
        {
            taken(&log);
            assert_eq!(rig.erase(kind, &[(8, 8, flags), (32, 8, flags)]), OK);
            let mut expected = vec![op, op];
            if policy.honour_flush && !policy.write_cache {
                expected.push(Kind::Fdatasync);
            }
            assert_eq!(taken(&log), expected, "{} {kind} {flags}", policy.name);
        }
    }
}

/// Shows B6.
#[test]
fn the_guests_change_to_writethrough_counts_at_once_and_syncs_what_was_before() {
    for mode in ["none", "writeback"] {
        let (_image, mut rig, log) = honest(mode, BOTH, StableBy::Dsync);
        assert_eq!(rig.write_sectors(8, &[1; 512]), OK);
        rig.set_writeback(0);
        assert_eq!(rig.write_sectors(9, &[2; 512]), OK);
        rig.set_writeback(1);
        assert_eq!(rig.write_sectors(10, &[3; 512]), OK);
        let kinds = taken(&log);
        let without_sync: Vec<_> = kinds.iter().copied().filter(|&kind| kind != Kind::Fdatasync).collect();
        assert_eq!(without_sync, [Kind::Write, Kind::WriteDsync, Kind::Write], "{mode}");
        assert_eq!(kinds.len(), 4, "{mode}: one fdatasync for the change from 1 to 0: {kinds:?}");
        assert_eq!(rig.config(32, 1), 1);
    }
}

/// Shows B4.
#[test]
fn reset_restores_the_configured_writeback_byte_and_its_meaning() {
    for policy in policies() {
        let (_image, mut rig, log) = honest(policy.name, BOTH, StableBy::Dsync);
        rig.set_writeback(u8::from(!policy.write_cache));
        rig.start(BOTH);
        assert_eq!(rig.config(32, 1), u64::from(policy.write_cache), "{}", policy.name);
        assert_eq!(rig.read_sectors(0, 512).0, OK);
        taken(&log);
        assert_eq!(rig.write_sectors(8, &[1; 512]), OK);
        let stable = policy.honour_flush && !policy.write_cache;
        assert_eq!(taken(&log), [if stable { Kind::WriteDsync } else { Kind::Write }], "{}", policy.name);
    }
}

/// Shows E1 and E2.
#[test]
fn the_first_failed_fdatasync_fails_every_later_flush_and_stable_write_in_every_mode() {
    for mode in modes().into_iter().filter(|mode| *mode != "unsafe") {
        let script = |kind, nth| match (kind, nth) {
            (Kind::Fdatasync, 1) => Fate::Fails(libc::EIO),
            _ => Fate::Real,
        };
        let (_image, mut rig, log) = scripted(mode, BOTH, StableBy::Dsync, Box::new(script));
        assert_eq!(rig.flush(), OK, "{mode}: the first one works");
        assert_eq!(rig.flush(), IOERR, "{mode}");
        taken(&log);
        for _ in 0..3 {
            assert_eq!(rig.flush(), IOERR, "{mode}: latched");
        }
        assert_eq!(taken(&log), [], "{mode}: and never retried");
        rig.set_writeback(0);
        assert_eq!(rig.write_sectors(0, &[1; 512]), IOERR, "{mode}: a stable write");
        // Neither a reset nor another driver makes lost data come back.
        rig.start(0);
        assert_eq!(rig.write_sectors(0, &[1; 512]), IOERR, "{mode}: a stable write after reset");
        assert_eq!(rig.flush(), IOERR, "{mode}: after reset");
        assert_eq!(rig.read_sectors(3, 512), (OK, vec![pattern(3); 512]), "{mode}: reads go on");
        rig.start(BOTH);
        if rig.config(32, 1) == 1 {
            assert_eq!(rig.write_sectors(0, &[1; 512]), OK, "{mode}: what promises nothing goes on");
        }
        let image = Arc::clone(&rig.image);
        drop(rig);
        assert_eq!(image.close().unwrap_err().raw_os_error(), Some(libc::EIO), "{mode}: at the end");
    }
}

/// Shows E1.
#[test]
fn a_failed_stable_write_latches_whichever_way_it_is_made_stable() {
    for (stable_by, failing) in [(StableBy::Dsync, Kind::WriteDsync), (StableBy::Fdatasync, Kind::Fdatasync)]
    {
        for errno in [libc::EIO, libc::ENOSPC] {
            let script = move |kind, _| if kind == failing { Fate::Fails(errno) } else { Fate::Real };
            let (_image, mut rig, _log) = scripted("directsync", BOTH, stable_by, Box::new(script));
            assert_eq!(rig.write_sectors(0, &[1; 512]), IOERR, "{stable_by:?} {errno}");
            assert_eq!(rig.flush(), IOERR, "{stable_by:?} {errno}: latched");
        }
    }
}

#[test]
fn an_erase_whose_sync_fails_is_not_ok() {
    let script = |kind, _| if kind == Kind::Fdatasync { Fate::Fails(libc::EIO) } else { Fate::Real };
    let (_image, mut rig, _log) = scripted("writethrough", ALL, StableBy::Dsync, Box::new(script));
    assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.write_sectors(0, &[1; 512]), IOERR, "latched");
}

#[test]
fn a_failed_write_that_promised_nothing_fails_alone() {
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
        let script =
            move |kind, nth| if (kind, nth) == (Kind::Write, 0) { Fate::Fails(errno) } else { Fate::Real };
        let (_image, mut rig, _log) = scripted("none", BOTH, StableBy::Dsync, Box::new(script));
        assert_eq!(rig.write_sectors(0, &[1; 512]), IOERR, "errno {errno}");
        assert_eq!(rig.write_sectors(0, &[1; 512]), OK);
        assert_eq!(rig.flush(), OK);
    }
}

/// Shows E5.
#[test]
fn an_interrupted_operation_is_done_again() {
    for kind in [Kind::Read, Kind::Write, Kind::WriteDsync, Kind::Fdatasync, Kind::Punch] {
        let script =
            move |this, nth| if this == kind && nth < 3 { Fate::Fails(libc::EINTR) } else { Fate::Real };
        let mode = if kind == Kind::WriteDsync { "directsync" } else { "none" };
        let (image, mut rig, log) = scripted(mode, ALL, StableBy::Dsync, Box::new(script));
        assert_eq!(rig.read_sectors(3, 512), (OK, vec![pattern(3); 512]), "{kind:?}");
        assert_eq!(rig.write_sectors(5, &[9; 512]), OK, "{kind:?}");
        assert_eq!(rig.flush(), OK, "{kind:?}");
        assert_eq!(rig.erase(DISCARD, &[(64, 8, 0)]), OK, "{kind:?}");
        assert_eq!(image.content()[5 * 512..6 * 512], [9; 512]);
        assert_eq!(taken(&log).into_iter().filter(|&done| done == kind).count(), 4, "{kind:?}");
    }
}

/// Shows E5.
#[test]
fn short_transfers_are_continued_to_the_last_byte() {
    for mode in modes().into_iter().filter(|mode| *mode != "unsafe") {
        let script = |kind, nth| match kind {
            Kind::Read | Kind::Write | Kind::WriteDsync if nth % 3 != 2 => Fate::Short(4096 + 512),
            _ => Fate::Real,
        };
        let (image, mut rig, _log) = scripted(mode, BOTH, StableBy::Dsync, Box::new(script));
        let data: Vec<u8> = (0..65536u32).map(|i| (i * 11 % 251) as u8).collect();
        assert_eq!(rig.write_sectors(24, &data), OK, "{mode}");
        assert_eq!(rig.read_sectors(24, 65536), (OK, data.clone()), "{mode}");
        assert_eq!(image.content()[24 * 512..24 * 512 + 65536], data, "{mode}");
        assert!(rig.image.stats.counters().continued.load(Ordering::Relaxed) > 0);
    }
}

/// Shows E5.
#[test]
fn a_transfer_that_gets_nowhere_or_claims_too_much_is_an_error() {
    for claim in [0, 511, 4097, 1 << 40] {
        for (kind, request) in [(Kind::Read, IN), (Kind::Write, OUT), (Kind::WriteDsync, OUT)] {
            let script = move |this, _| if this == kind { Fate::Claims(claim) } else { Fate::Real };
            let mode = if kind == Kind::WriteDsync { "directsync" } else { "none" };
            let (_image, mut rig, _log) = scripted(mode, BOTH, StableBy::Dsync, Box::new(script));
            let flags = if request == IN { WRITE } else { 0 };
            assert_eq!(rig.request(request, 0, Some((4096, flags))).0, IOERR, "{kind:?} claims {claim}");
        }
    }
}

#[test]
fn without_rwf_dsync_stable_writes_use_fdatasync() {
    let script = |kind, _| if kind == Kind::WriteDsync { Fate::Fails(libc::EOPNOTSUPP) } else { Fate::Real };
    let (image, mut rig, log) = scripted("directsync", BOTH, StableBy::Dsync, Box::new(script));
    assert_eq!(rig.write_sectors(0, &[5; 512]), OK);
    assert_eq!(taken(&log), [Kind::WriteDsync, Kind::Write, Kind::Fdatasync]);
    assert_eq!(rig.write_sectors(1, &[6; 512]), OK);
    assert_eq!(taken(&log), [Kind::Write, Kind::Fdatasync], "and remember it");
    assert_eq!(image.content()[..1024], [[5; 512], [6; 512]].concat());
}

#[test]
fn write_zeroes_falls_back_to_writing_zeroes_and_discard_to_nothing() {
    for errno in [libc::EOPNOTSUPP, libc::EINVAL] {
        let script = move |kind, _| {
            if matches!(kind, Kind::Punch | Kind::Zero) { Fate::Fails(errno) } else { Fate::Real }
        };
        let (image, mut rig, log) = scripted("writethrough", ALL, StableBy::Dsync, Box::new(script));
        let before = image.content();
        assert_eq!(rig.erase(DISCARD, &[(0, 64, 0)]), OK);
        assert_eq!(image.content(), before, "a discard is advice");
        taken(&log);
        // More than one buffer of zeroes.
        assert_eq!(rig.erase(WRITE_ZEROES, &[(8, 1200, 1), (1600, 8, 0)]), OK);
        let content = image.content();
        assert!(content[8 * 512..1208 * 512].iter().all(|&byte| byte == 0));
        assert!(content[1600 * 512..1608 * 512].iter().all(|&byte| byte == 0));
        assert_eq!(content[1208 * 512..1600 * 512], before[1208 * 512..1600 * 512]);
        assert_eq!(content[..8 * 512], before[..8 * 512]);
        assert_eq!(taken(&log).last(), Some(&Kind::Fdatasync), "and is stable");
    }
}

#[test]
fn a_failing_fallocate_is_an_error_not_a_reason_to_try_something_else() {
    let script =
        |kind, _| if matches!(kind, Kind::Punch | Kind::Zero) { Fate::Fails(libc::EIO) } else { Fate::Real };
    let (image, mut rig, _log) = scripted("none", ALL, StableBy::Dsync, Box::new(script));
    let before = image.content();
    assert_eq!(rig.erase(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(image.content(), before);
}

/// Shows B16.
#[test]
fn a_truncated_image_fails_reads_and_the_rest_goes_on() {
    let image = TestImage::new(IMAGE_BYTES);
    let mut rig = Rig::live(image.open("none"), BOTH);
    File::options().write(true).open(&image.path).unwrap().set_len(IMAGE_BYTES / 2).unwrap();
    assert_eq!(rig.read_sectors(IMAGE_BYTES / 512 - 8, 4096).0, IOERR);
    assert_eq!(rig.read_sectors(3, 512), (OK, vec![pattern(3); 512]));
    assert_eq!(rig.config(0, 8), IMAGE_BYTES / 512, "the capacity stays");
}

/// Shows E4.
#[test]
fn the_end_is_an_fdatasync_except_where_flushes_are_ignored() {
    for policy in policies() {
        let image = TestImage::new(IMAGE_BYTES);
        let opened = image.open(policy.name);
        opened.close().unwrap();
        let syncs = opened.stats.counters().fdatasyncs.load(Ordering::Relaxed);
        assert_eq!(syncs, u64::from(policy.honour_flush), "{}", policy.name);
    }
}

fn open_error(options: &DiskConfig) -> String {
    let error = Image::open(options).unwrap_err();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Shows D4 and R21.
#[test]
fn images_that_cannot_be_are_refused_with_the_reason_and_the_remedy() {
    let dir = test_dir();
    let make = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    };
    let padded = |magic: &[u8]| [magic, &vec![0; 4096 - magic.len()]].concat();
    let mut vhd_footer = vec![0; 8192];
    vhd_footer[8192 - 512..8192 - 504].copy_from_slice(b"conectix");
    for (path, needles) in [
        (dir.path().join("missing.img"), &["missing.img", "does not exist", "truncate -s 1G"][..]),
        (dir.path().to_path_buf(), &["a directory"][..]),
        ("/dev/null".into(), &["character device"][..]),
        (make("empty.img", b""), &["is empty", "truncate -s 1G"][..]),
        (make("odd.img", &[0; 1000]), &["1000 bytes", "not a multiple", "truncate -s %"][..]),
        (make("a.qcow2", &padded(b"QFI\xfb")), &["qcow2", "qemu-img convert -O raw", "format=raw"][..]),
        (make("a.vmdk", &padded(b"KDMV")), &["vmdk", "qemu-img convert"][..]),
        (make("b.vmdk", &padded(b"# Disk DescriptorFile")), &["vmdk"][..]),
        (make("a.vhd", &padded(b"conectix")), &["vhd"][..]),
        (make("b.vhd", &vhd_footer), &["vhd"][..]),
        (make("a.vhdx", &padded(b"vhdxfile")), &["vhdx"][..]),
    ] {
        let text = open_error(&DiskConfig::new(&path));
        for needle in needles {
            assert!(text.contains(needle), "{}: no '{needle}' in: {text}", path.display());
        }
    }
    let forced = DiskConfig { force_raw: true, ..DiskConfig::new(dir.path().join("a.qcow2")) };
    assert!(Image::open(&forced).is_ok(), "format=raw forces it");
    let blocks =
        DiskConfig { block_size: Some(4096), ..DiskConfig::new(make("small.img", &[0; 4096 + 512])) };
    let buffered = DiskConfig { cache: &POLICIES[1], ..blocks };
    assert!(open_error(&buffered).contains("block size of 4096"));
}

/// Shows D5.
#[test]
fn a_writer_locks_out_everybody_and_readers_share() {
    let image = TestImage::new(IMAGE_BYTES);
    let readonly = DiskConfig { readonly: true, ..image.options("none") };
    let writer = image.open("none");
    assert!(open_error(&image.options("writeback")).contains("locked"));
    assert!(open_error(&readonly).contains("locked"));
    drop(writer);
    let first = Image::open(&readonly).unwrap();
    let second = Image::open(&readonly).unwrap();
    assert!(open_error(&image.options("none")).contains("locked"));
    drop((first, second));
    assert!(Image::open(&image.options("none")).is_ok());
}

/// Shows H1.
#[test]
fn each_mode_opens_with_its_flags() {
    let image = TestImage::new(IMAGE_BYTES);
    for policy in policies() {
        let opened = image.open(policy.name);
        let expected = if policy.direct { "O_RDWR|O_DIRECT" } else { "O_RDWR" };
        assert_eq!(opened.file().open_flags(), expected, "{}", policy.name);
        assert_eq!(opened.warnings().iter().any(|line| line.contains("ignores")), !policy.honour_flush);
    }
    let readonly = Image::open(&DiskConfig { readonly: true, ..image.options("none") }).unwrap();
    assert_eq!(readonly.file().open_flags(), "O_RDONLY|O_DIRECT");
}

#[test]
fn o_direct_on_tmpfs_warns_and_works() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        skip("tmpfs", "no /dev/shm");
        return;
    };
    let path = dir.path().join("a.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    match Image::open(&DiskConfig::new(&path)) {
        Ok(image) => {
            assert!(image.warnings().iter().any(|line| line.contains("tmpfs")), "{:?}", image.warnings());
            let mut rig = Rig::live(Arc::new(image), BOTH);
            assert_eq!(rig.write_sectors(8, &[3; 4096]), OK);
            let mut data = [0; 4096];
            File::open(&path).unwrap().read_exact_at(&mut data, 4096).unwrap();
            assert_eq!(data, [3; 4096]);
        }
        Err(error) => {
            let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
            assert!(text.contains("no O_DIRECT"), "before Linux 6.6: {text}");
        }
    }
}
