//! Operations that block, on a real file through a real ring: the worker makes those that are alone, and the kernel
//! those that have company. What the worker makes is seen from outside by strace, which does not see into a ring.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use minivmm::disk::cache::CachePolicy;
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm_testkit::driver::*;
use minivmm_testkit::images::TestImage;
use minivmm_testkit::places;
use minivmm_testkit::skips::skip;

use crate::queues::Many;

const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD;
/// Set in the process that strace looks at.
const UNDER_STRACE: &str = "MINIVMM_TEST_UNDER_STRACE";
/// As many undisturbed operations by the kernel bring the next one back to the worker.
const QUIET: u64 = 4;

fn open(test: &TestImage, mode: &str, keys: &str) -> Arc<Image> {
    let keyed = disk_options::parse(format!("x,engine=io_uring,{keys}")).unwrap().config;
    let cache = CachePolicy::by_name(mode).unwrap();
    Arc::new(Image::open(&DiskConfig { cache, path: test.path.clone(), ..keyed }).unwrap())
}

fn has_io_uring(image: &Arc<Image>) -> bool {
    let has = minivmm::disk::choice::choose(image, None, 1).is_ok();
    if !has {
        skip("io_uring", "no io_uring here");
    }
    has
}

/// (made by the worker, made by a thread of the kernel).
fn made(image: &Image) -> (u64, u64) {
    let counters = image.stats.counters();
    let at = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    (at(&counters.blocking_by_worker), at(&counters.blocking_by_kernel_thread))
}

/// A read of sector 0 and a FLUSH, made available together.
fn read_and_flush(rig: &mut Rig) {
    rig.put_header(IN, 0);
    let (other_header, other_status) = (HEADER + 0x100, STATUS_BYTE + 0x100);
    rig.poke(other_header, &FLUSH.to_le_bytes());
    rig.poke(other_header + 4, &[0; 12]);
    rig.put_desc(DESC, 0, (HEADER, 16, NEXT, 1));
    rig.put_desc(DESC, 1, (DATA, 4096, NEXT | WRITE, 2));
    rig.put_desc(DESC, 2, (STATUS_BYTE, 1, WRITE, 0));
    rig.put_desc(DESC, 3, (other_header, 16, NEXT, 4));
    rig.put_desc(DESC, 4, (other_status, 1, WRITE, 0));
    rig.fill(STATUS_BYTE, UNTOUCHED, 1);
    rig.fill(other_status, UNTOUCHED, 1);
    rig.make_available(&[0, 3]);
    rig.ring_doorbell();
    rig.wait_used();
    rig.wait_used();
    assert_eq!((rig.peek(STATUS_BYTE, 1)[0], rig.peek(other_status, 1)[0]), (OK, OK));
}

#[test]
fn the_worker_makes_what_is_alone() {
    for poll in ["poll-us=0", "poll-us=100"] {
        let test = TestImage::new(1 << 20);
        let image = open(&test, "none", poll);
        if !has_io_uring(&image) {
            return;
        }
        let mut rig = Rig::live(Arc::clone(&image), FEATURES);
        for _ in 0..20 {
            assert_eq!(rig.flush(), OK);
        }
        assert_eq!(made(&image), (20, 0), "FLUSH, {poll}");
        for sector in 0..5 {
            assert_eq!(rig.erase(DISCARD, &[(sector * 8, 8, 0)]), OK);
        }
        assert_eq!(made(&image), (25, 0), "DISCARD, {poll}");
        for _ in 0..5 {
            assert_eq!(rig.write_sectors(8, &[7; 4096]), OK);
            assert_eq!(rig.flush(), OK);
        }
        assert_eq!(made(&image), (30, 0), "a FLUSH after each write, {poll}");
        let counters = image.stats.counters();
        assert_eq!(counters.fdatasyncs.load(Ordering::Relaxed), 25);
        assert_eq!(counters.fallocates.load(Ordering::Relaxed), 5);
    }
}

#[test]
fn stable_writes_that_are_alone_are_one_call() {
    for stable in ["dsync", "fdatasync", "group"] {
        let test = TestImage::new(1 << 20);
        let image = open(&test, "directsync", &format!("stable={stable}"));
        if !has_io_uring(&image) {
            return;
        }
        let mut rig = Rig::live(Arc::clone(&image), FEATURES);
        for sector in 0..10 {
            assert_eq!(rig.write_sectors(sector * 8, &[9; 4096]), OK);
        }
        assert_eq!(made(&image), (10, 0), "{stable}");
        assert_eq!(test.content()[..10 * 4096], [9; 10 * 4096], "{stable}");
    }
}

#[test]
fn the_kernel_makes_what_has_company_and_what_comes_after() {
    let test = TestImage::new(1 << 20);
    let image = open(&test, "none", "poll-us=0");
    if !has_io_uring(&image) {
        return;
    }
    let mut rig = Rig::live(Arc::clone(&image), FEATURES);
    assert_eq!(rig.flush(), OK);
    assert_eq!(made(&image), (1, 0));
    for round in 1..=3 {
        read_and_flush(&mut rig);
        assert_eq!(made(&image), (1, round), "a read must not wait for a sync");
    }
    for alone in 1..=QUIET {
        assert_eq!(rig.flush(), OK);
        assert_eq!(made(&image), (1, 3 + alone), "it takes {QUIET} to believe in quiet");
    }
    for alone in 1..=3 {
        assert_eq!(rig.flush(), OK);
        assert_eq!(made(&image), (1 + alone, 3 + QUIET));
    }
}

/// Runs a test of this suite, [`flushes_under_strace`] for example, with `inject`; what it printed, and what strace
/// saw. `None` without strace.
fn under_strace(test: &str, inject: &str) -> Option<(String, String)> {
    let log = places::tmp().join(format!("{test}-{}.strace", inject.len()));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", "trace=fdatasync", "-e", &format!("inject=fdatasync:{inject}"), "-o"]).arg(&log);
    strace.env(UNDER_STRACE, "1").arg(std::env::current_exe().unwrap());
    strace.args(["--exact", "--nocapture", &format!("alone::{test}")]);
    let output = {
        let _forks = crate::FORKS.lock().unwrap();
        strace.output()
    };
    let Ok(output) = output else {
        skip("strace", "strace is not installed");
        return None;
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let seen = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(log).unwrap();
    Some((said, seen))
}

/// Does something only in the process that [`under_strace`] starts.
#[test]
fn flushes_under_strace() {
    if std::env::var_os(UNDER_STRACE).is_none() {
        return;
    }
    let test = TestImage::new(1 << 20);
    let image = open(&test, "none", "poll-us=0");
    if !has_io_uring(&image) {
        return println!("no io_uring");
    }
    let mut rig = Rig::live(Arc::clone(&image), FEATURES);
    for _ in 0..3 {
        assert_eq!(rig.write_sectors(0, &[3; 4096]), OK);
        let since = Instant::now();
        let status = rig.flush();
        println!("FLUSH {status} after {} ms", since.elapsed().as_millis());
    }
    // The end of the image syncs once more, which is not looked at here.
    std::process::exit(0);
}

/// The statuses of the FLUSHes, and how long they took.
fn flushes(said: &str) -> Vec<(u8, Duration)> {
    let line = |line: &str| {
        let (status, rest) = line.split_once("FLUSH ")?.1.split_once(" after ")?;
        let millis = rest.trim_end_matches(" ms").parse().ok()?;
        Some((status.parse().ok()?, Duration::from_millis(millis)))
    };
    said.lines().filter_map(line).collect()
}

/// Shows E1. strace counts the calls of each thread: the second is that of the second FLUSH.
#[test]
fn an_error_of_the_workers_own_sync_fails_the_flush_and_all_that_follow() {
    let Some((said, seen)) = under_strace("flushes_under_strace", "error=EIO:when=2") else { return };
    if said.contains("no io_uring") {
        return;
    }
    let statuses: Vec<u8> = flushes(&said).into_iter().map(|(status, _)| status).collect();
    assert_eq!(statuses, [OK, IOERR, IOERR], "{said}\n{seen}");
    let failed = seen.lines().filter(|line| line.contains("(INJECTED)")).count();
    let calls = seen.matches("fdatasync(").count();
    assert_eq!((failed, calls), (1, 3), "it is never tried again: {seen}");
}

/// Shows B5.
#[test]
fn a_flush_completes_only_when_the_workers_own_sync_has_returned() {
    let Some((said, seen)) = under_strace("flushes_under_strace", "delay_exit=400000:when=2") else { return };
    if said.contains("no io_uring") {
        return;
    }
    let flushes = flushes(&said);
    assert_eq!(flushes.iter().map(|&(status, _)| status).collect::<Vec<_>>(), [OK; 3], "{said}\n{seen}");
    assert!(flushes[1].1 >= Duration::from_millis(400), "{said}\n{seen}");
}

/// Does something only in the process that [`under_strace`] starts.
#[test]
fn a_flush_beside_another_queues_sync_under_strace() {
    if std::env::var_os(UNDER_STRACE).is_none() {
        return;
    }
    let test = TestImage::new(1 << 20);
    let image = open(&test, "none", "poll-us=0,queues=2");
    if !has_io_uring(&image) {
        return println!("no io_uring");
    }
    let mut many = Many::new(&image);
    many.start(FEATURES | F_MQ, &[0, 1]);
    many.submit(0, FLUSH, 0, None);
    // That sync has begun, and strace keeps it from returning while the other queue writes and flushes.
    std::thread::sleep(Duration::from_millis(200));
    let written = many.write(1, 8, 7);
    println!("written {written} during the sync: {}", !many.is_done(0));
    println!("FLUSH {} after 0 ms", many.flush(1));
    println!("FLUSH {} after 0 ms", many.wait(0));
    std::process::exit(0);
}

/// Shows B5. A sync covers only writes that completed before it began.
#[test]
fn a_flush_needs_a_sync_that_began_after_the_writes_it_covers_whichever_queue_made_them() {
    let suite = "a_flush_beside_another_queues_sync_under_strace";
    let Some((said, seen)) = under_strace(suite, "delay_exit=1000000:when=1") else { return };
    if said.contains("no io_uring") {
        return;
    }
    assert!(said.contains("written 0 during the sync: true"), "{said}\n{seen}");
    let statuses: Vec<u8> = flushes(&said).into_iter().map(|(status, _)| status).collect();
    assert_eq!(statuses, [OK, OK], "{said}\n{seen}");
    // One at the start, and one for each FLUSH.
    assert_eq!(seen.matches("fdatasync(").count(), 3, "{seen}");
}
