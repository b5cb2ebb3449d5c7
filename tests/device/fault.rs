//! Faults on purpose (`fault=`) as a driver sees them, with both engines: what fails, what is told, what
//! is on the disk, and what is counted.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use minivmm::blk::BlockDevice;
use minivmm::disk::config::EngineChoice;
use minivmm::disk::{DiskConfig, Image};
use minivmm_block::threads::{ThreadKind, Threads};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, modes, pattern};

const ALL: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;

/// A disk with these faults in each mode of `modes` and with each engine that is there.
fn each(modes: &[&str], fault: &str, test: impl Fn(&TestImage, &mut Rig, &str)) {
    for mode in modes {
        for engine in [EngineChoice::Blocking, EngineChoice::Auto] {
            let image = TestImage::new(1 << 20);
            let options = DiskConfig { fault: Some(fault.parse().unwrap()), engine, ..image.options(mode) };
            let mut rig = Rig::new(Arc::new(Image::open(&options).unwrap()));
            rig.start(ALL);
            let what = format!("{mode}, {}, {fault}", rig.image.stats.engine());
            test(&image, &mut rig, &what);
        }
    }
}

/// Starts every thread but that of the delays.
#[derive(Debug)]
struct NoDelays;

impl Threads for NoDelays {
    fn spawn(
        &self,
        kind: ThreadKind,
        builder: Builder,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        match kind {
            ThreadKind::Worker => builder.spawn(body),
            ThreadKind::Delays => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
        }
    }
}

#[test]
fn a_disk_whose_delays_have_no_thread_is_refused_before_the_guest_runs() {
    let image = TestImage::new(1 << 20);
    let device = |fault: &str, engine| {
        let options = DiskConfig { fault: Some(fault.parse().unwrap()), engine, ..image.options("none") };
        let image = Image::open(&options).unwrap().with_threads(Arc::new(NoDelays));
        BlockDevice::new("vda", Arc::new(image)).map(drop)
    };
    for engine in [EngineChoice::Blocking, EngineChoice::Auto] {
        let error = device("delay=5ms:read", engine).unwrap_err();
        let (text, cause) = (error.to_string(), error.source().unwrap().to_string());
        for word in [image.path.to_str().unwrap(), "fault-delays", "ulimit -u"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(cause.contains("os error 11"), "{cause}");
        device("fail:read", engine).unwrap();
    }
}

#[test]
fn the_nth_write_fails_and_the_others_do_not() {
    each(&modes(), "fail=ENOSPC:write:nth=2", |test, rig, what| {
        let statuses: Vec<u8> = (0..3).map(|at| rig.write_sectors(at * 8, &[0xee; 4096])).collect();
        // Where the write was to be stable by itself its failure is one of stability, which stays.
        let last = if rig.image.latch.check().is_err() { IOERR } else { OK };
        assert_eq!(statuses, [OK, IOERR, last], "{what}");
        assert_eq!(test.content()[4096], pattern(8), "{what}: nothing was written");
        assert_eq!(rig.image.stats.counters().faults_failed.load(Ordering::Relaxed), 1, "{what}");
    });
}

#[test]
fn reads_and_discards_fail_in_their_range_only() {
    each(&["none", "writeback"], "fail:read:sectors=8-15+fail:discard:sectors=0-7", |_, rig, what| {
        assert_eq!(rig.read_sectors(0, 4096).0, OK, "{what}");
        assert_eq!(rig.read_sectors(8, 4096).0, IOERR, "{what}");
        assert_eq!(rig.read_sectors(16, 4096).0, OK, "{what}");
        assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 8, 0)]), IOERR, "{what}");
        assert_eq!(rig.erase(WRITE_ZEROES, &[(8, 8, 0)]), OK, "{what}");
    });
}

#[test]
fn after_one_failed_flush_none_succeeds_though_the_host_would_say_so() {
    // The trap: the kernel reports a lost page once, and the next fdatasync succeeds.
    let modes: Vec<_> = modes().into_iter().filter(|mode| *mode != "unsafe").collect();
    each(&modes, "flush-fail=once", |_, rig, what| {
        let (write, flush) = (rig.write_sectors(0, &[1; 4096]), rig.flush());
        assert!(write == IOERR || flush == IOERR, "{what}");
        assert_eq!(rig.flush(), IOERR, "{what}: latched");
        assert_eq!(rig.read_sectors(0, 4096).0, OK, "{what}: reads go on");
        assert_eq!(rig.image.stats.counters().faults_failed.load(Ordering::Relaxed), 1, "{what}");
        assert!(rig.image.close().is_err(), "{what}: the end tells");
    });
}

#[test]
fn short_transfers_are_continued_to_the_last_byte() {
    each(&modes(), "short:write+short:read+seed=5", |test, rig, what| {
        let data: Vec<u8> = (0..65536u32).map(|at| (at / 512 + 7) as u8).collect();
        assert_eq!(rig.write_sectors(8, &data), OK, "{what}");
        let (status, read) = rig.read_sectors(8, 65536);
        assert!(status == OK && read == data && test.content()[4096..][..65536] == data, "{what}");
        assert!(rig.image.stats.counters().continued.load(Ordering::Relaxed) > 2, "{what}");
    });
}

#[test]
fn a_torn_write_fails_and_leaves_some_whole_sectors() {
    for seed in 0..8 {
        each(&["none", "writeback"], &format!("tear:write:once+seed={seed}"), |test, rig, what| {
            assert_eq!(rig.write_sectors(0, &[0xee; 65536]), IOERR, "{what}");
            let content = test.content();
            let is_new: Vec<bool> = (0..128)
                .map(|sector| {
                    let old = [pattern(sector); 512];
                    let found = &content[sector as usize * 512..][..512];
                    assert!(found == [0xee; 512] || found == old, "{what}: sector {sector} is torn inside");
                    found != old
                })
                .collect();
            let new = is_new.iter().filter(|new| **new).count();
            assert!((1..128).contains(&new), "{what}: {new} of 128 sectors");
            assert_eq!(rig.write_sectors(0, &[0xdd; 4096]), OK, "{what}: once is once");
        });
    }
}

#[test]
fn what_is_lost_is_told_as_done() {
    each(&["none", "writeback"], "lose:write:nth=1+lose:flush+lose:discard", |test, rig, what| {
        let before = test.content();
        assert_eq!(rig.write_sectors(0, &[0xee; 4096]), OK, "{what}");
        assert_eq!(rig.flush(), OK, "{what}");
        assert_eq!(rig.erase(WRITE_ZEROES, &[(8, 8, 0)]), OK, "{what}");
        assert!(test.content() == before, "{what}");
        assert_eq!(rig.image.stats.counters().faults_lost.load(Ordering::Relaxed), 3, "{what}");
    });
}

#[test]
fn a_lost_flush_of_a_stable_write_leaves_the_write() {
    each(&["writethrough", "directsync"], "lose:flush", |test, rig, what| {
        assert_eq!(rig.write_sectors(0, &[0xee; 4096]), OK, "{what}");
        assert_eq!(test.content()[..4096], [0xee; 4096], "{what}");
        assert!(rig.image.stats.counters().faults_lost.load(Ordering::Relaxed) > 0, "{what}");
    });
}

#[test]
fn a_delayed_operation_takes_so_long_and_keeps_no_other_waiting() {
    const DELAY: Duration = Duration::from_millis(300);
    each(&["none", "writeback"], "delay=300ms:read:sectors=0-7", |_, rig, what| {
        let since = Instant::now();
        assert_eq!(rig.read_sectors(0, 4096).0, OK, "{what}");
        assert!(since.elapsed() >= DELAY, "{what}");
        // The slow one first, then one that is not meant, in a chain of its own.
        let (slow, fast) = (0u16, 8u16);
        for (head, header, sector, at) in [(slow, HEADER, 0u64, DATA), (fast, HEADER + 64, 64, DATA + 8192)] {
            rig.poke(header, &[IN.to_le_bytes(), [0; 4]].concat());
            rig.poke(header + 8, &sector.to_le_bytes());
            rig.put_desc(DESC, head, (header, 16, NEXT, head + 1));
            rig.put_desc(DESC, head + 1, (at, 4096, NEXT | WRITE, head + 2));
            rig.put_desc(DESC, head + 2, (STATUS_BYTE + u64::from(head), 1, WRITE, 0));
        }
        rig.make_available(&[slow, fast]);
        let since = Instant::now();
        rig.ring_doorbell();
        assert_eq!(rig.wait_used().0, fast, "{what}");
        assert!(since.elapsed() < DELAY, "{what}: it was kept waiting");
        assert_eq!(rig.wait_used().0, slow, "{what}");
        assert!(since.elapsed() >= DELAY, "{what}");
    });
}

#[test]
fn a_reset_waits_for_what_is_held() {
    each(&["none"], "delay=50ms:write", |test, rig, what| {
        rig.fill(DATA, 0xee, 4096);
        rig.put_header(OUT, 0);
        rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 4096, 0), (STATUS_BYTE, 1, WRITE)]);
        rig.make_available(&[0]);
        rig.ring_doorbell();
        while rig.image.stats.counters().faults_delayed.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        rig.write(reg::STATUS, 0);
        assert_eq!(test.content()[..4096], [0xee; 4096], "{what}: nothing is in flight after a reset");
        rig.start(ALL);
        assert_eq!(rig.write_sectors(0, &[0xdd; 4096]), OK, "{what}");
    });
}
