//! The write log (`log-writes=`): that replaying it gives the disk, that a flush in it speaks for no write
//! that had not ended before, and what is called stable when syncs fail or overlap.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use minivmm::disk::cache::{Negotiated, WriteCache};
use minivmm::disk::choice::equip;
use minivmm::disk::config::EngineChoice;
use minivmm::disk::disk_queue::{DiskQueue, Op, RequestId, StableBy};
use minivmm::disk::engine::{HostOp, Wake};
use minivmm::disk::{DiskConfig, Image};
use minivmm::mem::{AlignedBuffer, Iov};
use minivmm_lab::crash::log::{Entry, WriteLog};
use minivmm_testkit::alone;
use minivmm_testkit::driver::*;
use minivmm_testkit::hands::Hands;
use minivmm_testkit::images::{TestImage, modes};

use super::FORKS;

const ALL: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;
const BLOCK: usize = 4096;

fn log_path(test: &TestImage) -> PathBuf {
    test.path.with_extension("log")
}

fn open(test: &TestImage, options: DiskConfig) -> Arc<Image> {
    let options = DiskConfig { log_writes: Some(log_path(test)), ..options };
    Arc::new(Image::open(&options).unwrap())
}

/// What the log says, a word an entry: w and d with the block's number, + where stable by itself, F.
fn words(test: &TestImage) -> Vec<String> {
    let log = WriteLog::open(&log_path(test)).unwrap();
    let word = |entry: &Entry| {
        let kind = if entry.is_discard() { "d" } else { "w" };
        match (&entry.mark, entry.bytes) {
            (Some(mark), _) => mark.clone(),
            (None, 0) if entry.is_flush() => "F".to_owned(),
            _ => {
                let plus = if entry.is_fua() { "+" } else { "" };
                format!("{kind}{}{plus}", entry.offset / BLOCK as u64)
            }
        }
    };
    log.entries.iter().map(word).collect()
}

/// `base` with everything in the log done to it.
fn replay(log: &WriteLog, mut base: Vec<u8>) -> Vec<u8> {
    for entry in log.entries.iter().filter(|entry| entry.changes()) {
        let to = &mut base[entry.offset as usize..][..entry.bytes as usize];
        log.read_data(entry, 0, to).unwrap();
    }
    base
}

#[test]
fn replaying_the_log_of_any_mode_and_engine_gives_the_disk() {
    for mode in modes() {
        for engine in [EngineChoice::Blocking, EngineChoice::Auto] {
            let test = TestImage::new(4 << 20);
            let base = test.content();
            let options = DiskConfig { engine, ..test.options(mode) };
            let stable_by = options.stable;
            let mut rig = Rig::new(open(&test, options));
            rig.start(ALL);
            let mut seed = 1u32;
            for round in 0..60u8 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let sector = u64::from(seed >> 16) % 7000;
                let sectors = seed >> 3 & 63 | 1;
                let status = match round % 6 {
                    0 => rig.flush(),
                    1 => rig.erase(WRITE_ZEROES, &[(sector & !7, 64, u32::from(round & 1))]),
                    2 => rig.erase(DISCARD, &[(sector & !7, 64, 0)]),
                    _ => rig.write_sectors(sector, &vec![round; sectors as usize * 512]),
                };
                assert_eq!(status, OK, "{mode}, round {round}");
            }
            let image = Arc::clone(&rig.image);
            drop(rig);
            image.close().unwrap();
            image.close_log().unwrap();
            let log = WriteLog::open(&log_path(&test)).unwrap();
            let flushes = log.entries.iter().filter(|entry| entry.is_flush()).count();
            // Ten FLUSHes and the end; where nothing may be volatile also a sync for each of the twenty erasures, and,
            // unless RWF_DSYNC makes it stable, for each of the thirty writes.
            let stable_mode = mode == "writethrough" || mode == "directsync";
            let by_dsync = matches!(stable_by, StableBy::Dsync | StableBy::Auto);
            let expected = match (stable_mode, by_dsync) {
                (false, _) => 11,
                (true, true) => 31,
                (true, false) => 61,
            };
            assert_eq!(flushes, if mode == "unsafe" { 0 } else { expected }, "{mode}");
            assert_eq!(log.entries.last().unwrap().mark.as_deref(), Some("minivmm-end"));
            assert_eq!(image.write_log().unwrap().entries(), log.entries.len() as u64);
            let writes = log.entries.iter().filter(|entry| entry.data_at.is_some());
            let stable = writes.filter(|entry| entry.is_fua()).count();
            assert_eq!(stable > 0, stable_mode && by_dsync, "{mode}");
            assert!(replay(&log, base) == test.content(), "{mode}, {}", image.stats.engine());
        }
    }
}

#[test]
fn zeroes_and_discards_cost_the_log_no_space() {
    let test = TestImage::new(1 << 20);
    let image = open(&test, test.options("none"));
    File::options().write(true).open(&test.path).unwrap().set_len(1 << 20).unwrap();
    let mut rig = Rig::new(image);
    rig.start(ALL);
    assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 2048, 0)]), OK);
    assert_eq!(rig.erase(DISCARD, &[(0, 2048, 0)]), OK);
    let found = std::fs::metadata(log_path(&test)).unwrap();
    assert!(found.len() > 1 << 20 && found.blocks() * 512 < 64 << 10, "{} blocks", found.blocks());
}

#[test]
fn the_log_has_what_was_really_done_not_what_was_told() {
    let test = TestImage::new(1 << 20);
    let base = test.content();
    let fault = "lose:write:nth=2+lose:flush:nth=1+tear:write:nth=3+fail:write:nth=4".parse().unwrap();
    let mut rig = Rig::new(open(&test, DiskConfig { fault: Some(fault), ..test.options("none") }));
    rig.start(ALL);
    assert_eq!(rig.write_sectors(0, &[1; BLOCK]), OK);
    assert_eq!(rig.write_sectors(8, &[2; BLOCK]), OK, "lost");
    assert_eq!(rig.flush(), OK, "lost");
    assert_eq!(rig.write_sectors(16, &[3; 4 * BLOCK]), IOERR, "torn");
    assert_eq!(rig.write_sectors(64, &[4; BLOCK]), IOERR);
    assert_eq!(rig.flush(), OK);
    let log = WriteLog::open(&log_path(&test)).unwrap();
    assert_eq!(words(&test).iter().filter(|word| *word == "F").count(), 1);
    assert_eq!(log.entries.len(), 3, "{:?}", words(&test));
    assert!(replay(&log, base) == test.content());
}

/// One queue: its state machine and the hands on its engine.
struct Queue {
    disk: DiskQueue,
    hands: Hands,
    ids: u64,
}

impl Queue {
    /// Writes that block.
    fn write(&mut self, block: u64) {
        let range = self.disk.image().geometry().check(block * 8, BLOCK as u64).unwrap();
        let buffer = AlignedBuffer::new(BLOCK, 4096).unwrap();
        self.submit(Op::Write(range, Iov::from_buffer(&Arc::new(buffer), BLOCK)));
    }

    fn flush(&mut self) {
        self.submit(Op::Flush);
    }

    fn submit(&mut self, op: Op) {
        self.ids += 1;
        self.disk.submit(RequestId(self.ids), op);
        self.disk.wait(Wake::Now).unwrap();
    }

    /// The operation that `wanted` finds ends so; the oldest of them.
    fn end(&mut self, wanted: fn(&HostOp) -> bool, result: Result<usize, i32>) {
        {
            let at = self.hands.held().operations.iter().position(|held| wanted(&held.op)).unwrap();
            self.hands.end(at, result.map_err(std::io::Error::from_raw_os_error));
        }
        self.disk.wait(Wake::Now).unwrap();
        // Whoever joined by this end has its sync begin.
        self.disk.wait(Wake::Now).unwrap();
    }

    fn end_write(&mut self) {
        self.end(|op| matches!(op, HostOp::Writev { .. }), Ok(BLOCK));
    }

    fn end_sync(&mut self, result: Result<usize, i32>) {
        self.end(|op| matches!(op, HostOp::Fdatasync), result);
    }
}

/// An image with a log, and so many queues over it.
fn queues<const N: usize>(mode: &str, stable_by: StableBy) -> (TestImage, Arc<Image>, [Queue; N]) {
    let test = TestImage::new(1 << 20);
    let image = open(&test, test.options(mode));
    let cache = Arc::new(WriteCache::new(image.config().cache));
    cache.negotiate(Negotiated { flush: true, config_wce: true });
    let queue = |_| {
        let hands = Hands::new(64);
        let engine = equip(hands.engine(), &image).unwrap();
        let disk = DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), engine, stable_by);
        Queue { disk, hands, ids: 0 }
    };
    let queues = std::array::from_fn(queue);
    (test, image, queues)
}

#[test]
fn a_flush_speaks_for_no_write_that_ended_after_its_fdatasync_was_handed_over() {
    let (test, _image, [mut queue]) = queues("none", StableBy::Fdatasync);
    queue.write(1);
    queue.write(2);
    queue.end_write();
    queue.flush();
    queue.end_write();
    queue.write(3);
    queue.end_write();
    assert_eq!(words(&test), ["w1"], "the others wait for the sync");
    queue.end_sync(Ok(0));
    assert_eq!(words(&test), ["w1", "F", "w2", "w3"]);
}

#[test]
fn nothing_flushed_is_said_of_a_sync_that_failed_or_of_any_after_it() {
    let (test, _image, [mut queue]) = queues("none", StableBy::Fdatasync);
    queue.write(1);
    queue.end_write();
    queue.flush();
    queue.end_sync(Err(libc::EIO));
    queue.write(2);
    queue.end_write();
    assert_eq!(words(&test), ["w1", "w2"]);
}

#[test]
fn an_interrupted_sync_says_nothing_and_its_repetition_counts() {
    let (test, _image, [mut queue]) = queues("none", StableBy::Fdatasync);
    queue.flush();
    queue.write(1);
    queue.end_write();
    queue.end_sync(Err(libc::EINTR));
    queue.end_sync(Ok(0));
    assert_eq!(words(&test), ["w1", "F"]);
}

#[test]
fn a_group_commit_is_one_flush_behind_its_writes() {
    let (test, _image, [mut queue]) = queues("writethrough", StableBy::Group);
    queue.write(1);
    queue.write(2);
    queue.end_write();
    queue.end_write();
    queue.write(3);
    queue.end_write();
    queue.end_sync(Ok(0));
    assert_eq!(words(&test), ["w1", "w2", "F", "w3"]);
    queue.end_sync(Ok(0));
    assert_eq!(words(&test), ["w1", "w2", "F", "w3", "F"]);
}

#[test]
fn a_dsync_write_is_stable_by_itself_and_speaks_for_no_other() {
    let (test, image, [mut queue]) = queues("directsync", StableBy::Dsync);
    queue.write(1);
    queue.end_write();
    assert_eq!(words(&test), ["w1+"]);
    assert!(image.latch.check().is_ok());
}

/// Shows E7.
#[test]
fn of_two_syncs_at_once_none_counts_before_both_are_judged() {
    for (first, second, expected) in [
        (Ok(0), Ok(0), &["w1", "F", "w2", "F", "w3"][..]),
        (Ok(0), Err(libc::EIO), &["w1", "w2", "w3"]),
        (Err(libc::EIO), Ok(0), &["w1", "w2", "w3"]),
    ] {
        for second_ends_first in [false, true] {
            let (test, _image, [mut a, mut b]) = queues("none", StableBy::Fdatasync);
            a.write(1);
            a.end_write();
            a.flush();
            b.write(2);
            b.end_write();
            b.flush();
            b.write(3);
            b.end_write();
            if second_ends_first {
                b.end_sync(second);
                assert_eq!(words(&test), ["w1"]);
                a.end_sync(first);
            } else {
                a.end_sync(first);
                assert_eq!(words(&test)[0], "w1");
                assert!(!words(&test).contains(&"F".to_owned()));
                b.end_sync(second);
            }
            assert_eq!(words(&test), expected, "{first:?}, {second:?}, {second_ends_first}");
        }
    }
}

#[test]
fn a_dsync_write_that_ends_well_beside_a_sync_that_fails_is_not_called_stable() {
    let (test, _image, [mut a, mut b]) = queues("writethrough", StableBy::Dsync);
    a.write(1);
    b.flush();
    a.end_write();
    assert_eq!(words(&test), [""; 0], "held");
    b.end_sync(Err(libc::EIO));
    assert_eq!(words(&test), ["w1"]);
}

#[test]
fn a_log_is_made_in_the_place_of_a_log_and_of_nothing_else() {
    let test = TestImage::new(1 << 20);
    let options = |log: PathBuf| DiskConfig { log_writes: Some(log), ..test.options("none") };
    let chain = |options: &DiskConfig| {
        let error = Image::open(options).unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    };
    let letter = test.path.with_file_name("letter");
    std::fs::write(&letter, "dear").unwrap();
    assert!(chain(&options(letter.clone())).contains("would be lost"));
    assert_eq!(std::fs::read(&letter).unwrap(), b"dear");
    let own = chain(&options(test.path.clone()));
    assert!(own.contains("has locked it as its own"), "{own}");
    assert!(chain(&options("/nowhere/x".into())).contains("cannot be created"));
    let first = Image::open(&options(log_path(&test))).unwrap();
    let other = TestImage::new(1 << 20);
    let second = DiskConfig { log_writes: Some(log_path(&test)), ..other.options("none") };
    assert!(chain(&second).contains("locked"));
    // The child of another test would hold the lock as well, for a moment.
    let _no_child = FORKS.lock();
    drop(first);
    Image::open(&second).unwrap();
}

#[test]
fn a_log_that_cannot_be_written_ends_and_the_guest_does_not() {
    // Nothing may be written beyond 64 KiB by this process's child, as if the disk were full.
    if std::env::var_os("LOG_TEST_LIMITED").is_none() {
        let me = std::env::current_exe().unwrap();
        let test = "a_log_that_cannot_be_written_ends_and_the_guest_does_not";
        let name = alone::name(module_path!(), test);
        let _alone = FORKS.lock();
        let run = "trap '' XFSZ; ulimit -f 128; exec \"$0\" \"$1\" --exact --nocapture";
        let mut child = Command::new("sh");
        child.args(["-c", run]).arg(me).arg(name).env("LOG_TEST_LIMITED", "1");
        let out = child.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        return;
    }
    let test = TestImage::new(32 << 10);
    let mut rig = Rig::new(open(&test, test.options("writeback")));
    rig.start(ALL);
    for round in 0..32 {
        assert_eq!(rig.write_sectors(0, &[round; BLOCK]), OK);
        assert_eq!(rig.flush(), OK);
    }
    let image = Arc::clone(&rig.image);
    drop(rig);
    image.close().unwrap();
    assert!(image.close_log().is_err());
    let log = WriteLog::open(&log_path(&test)).unwrap();
    assert_eq!(image.write_log().unwrap().entries(), log.entries.len() as u64);
    assert!((20..31).contains(&log.entries.len()), "{} entries", log.entries.len());
}

#[test]
fn what_is_no_log_or_a_damaged_one_is_an_error_that_says_so() {
    let dir = minivmm_testkit::images::test_dir();
    let path = dir.path().join("x.log");
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        WriteLog::open(&path).unwrap_err().to_string()
    };
    assert!(refused(b"").contains("not a write log"));
    assert!(refused(&[0; 4096]).contains("not a write log"));
    let superblock = |entries: u64, sector: u32| {
        let mut bytes = [0x006a_7366_7773_6872, 1, entries].map(u64::to_le_bytes).concat();
        bytes.extend(sector.to_le_bytes());
        bytes.resize(512, 0);
        bytes
    };
    let with = |fields: [u64; 4]| {
        let mut bytes = superblock(1, 512);
        bytes.extend(fields.map(u64::to_le_bytes).concat());
        bytes.resize(1024, 0);
        bytes
    };
    assert!(refused(&superblock(0, 100)).contains("sectors of 100 bytes"));
    assert!(refused(&superblock(1, 512)).contains("ends in it"));
    assert!(refused(&with([0, 1, 0, 0])).contains("ends in it"));
    assert!(refused(&with([0, u64::MAX, 0, 0])).contains("beyond all disks"));
    assert!(refused(&with([u64::MAX, 0, 0, 0])).contains("beyond all disks"));
    assert!(refused(&with([0, 0, 8, 481])).contains("text is longer"));
    std::fs::write(&path, with([0, 0, 1, 0])).unwrap();
    assert!(WriteLog::open(&path).unwrap().entries[0].is_flush());
    let file = File::open(&path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1024);
    file.read_exact_at(&mut [0], 1023).unwrap();
}
