//! Runs the device's parser and the disk's state machine over an engine that only records the operations.
//!
//! Owns the engine, and the choice of drivers to try: what they negotiate, and what they write to `writeback`.
//! Every decision is made by the same code that makes it when a guest runs.

use std::io;
use std::sync::{Arc, Mutex};

use serde::Serialize;

use crate::blk::config;
use crate::blk::request::{self, Data, Frame, Header, Limits, Request, Status, UNMAP, kind};
use crate::disk::Image;
use crate::disk::blocking::system_call;
use crate::disk::cache::{CachePolicy, Negotiated, WriteCache};
use crate::disk::choice::EngineKind;
use crate::disk::disk_queue::{DiskQueue, Op, RequestId};
use crate::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use crate::mem::{AlignedBuffer, Iov, Segment};
use crate::sync::unpoisoned;

/// What the requests of one driver become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// True if the driver negotiates FLUSH.
    pub negotiates_flush: bool,
    /// True if the driver negotiates CONFIG_WCE.
    pub negotiates_config_wce: bool,
    /// What the driver writes to config.writeback; `None` if it writes nothing after a reset.
    pub sets_writeback: Option<u8>,
    /// The value of config.writeback afterwards.
    pub writeback: u8,
    /// Host calls that the write to config.writeback itself causes.
    pub on_setting: Vec<&'static str>,
    /// The result of IN.
    pub read: RequestOutcome,
    /// The result of OUT.
    pub write: RequestOutcome,
    /// The result of FLUSH.
    pub flush: RequestOutcome,
    /// The result of DISCARD.
    pub discard: RequestOutcome,
    /// The result of WRITE_ZEROES.
    pub write_zeroes: RequestOutcome,
    /// The result of WRITE_ZEROES with the unmap flag.
    pub write_zeroes_unmap: RequestOutcome,
}

/// What one request becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RequestOutcome {
    /// The status byte: OK, IOERR or UNSUPP.
    pub status: &'static str,
    /// The host's system calls in order. Each is made once per piece of the request.
    pub calls: Vec<&'static str>,
    /// All calls if the host answers EOPNOTSUPP to RWF_DSYNC or fallocate for this image; `None` if they are
    /// the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub where_refused: Option<Vec<&'static str>>,
    /// All calls of two such requests in flight at once; `None` if they are simply twice those of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub two_at_once: Option<Vec<&'static str>>,
}

/// Returns the calls before the guest runs.
pub fn at_start(image: &Image) -> Vec<&'static str> {
    let (config, policy) = (image.config(), image.config().cache);
    let mut calls = Vec::new();
    if let (true, Ok(iov)) = (policy.drop_behind, memory(512)) {
        // Whether the host takes the flag, which `Image::look` has tried as well.
        calls.push(system_call(&HostOp::Readv { iov, offset: 0 }, policy));
    }
    if config.is_synced_at_both_ends() {
        calls.push(system_call(&HostOp::Fdatasync, policy));
        calls.extend((!image.file().is_device()).then_some("fsync(directory)"));
    }
    calls
}

/// Returns the calls after the guest has ended.
pub fn at_end(image: &Image) -> Vec<&'static str> {
    let config = image.config();
    if config.is_synced_at_both_ends() { vec![system_call(&HostOp::Fdatasync, config.cache)] } else { vec![] }
}

/// Tries every possible driver: what it negotiates, and what it writes to `writeback`.
pub fn drivers(image: &Arc<Image>, engine: EngineKind) -> Vec<Driver> {
    let mut drivers = Vec::new();
    for (flush, config_wce) in [(true, true), (true, false), (false, true), (false, false)] {
        let settings: &[Option<u8>] = if config_wce { &[None, Some(0), Some(1)] } else { &[None] };
        for &sets in settings {
            drivers.push(driver(image, engine, Negotiated { flush, config_wce }, sets));
        }
    }
    drivers
}

fn driver(image: &Arc<Image>, engine: EngineKind, negotiated: Negotiated, sets: Option<u8>) -> Driver {
    let trial = Trial { image, engine, negotiated, sets };
    let (cache, _, on_setting) = trial.begin(false);
    Driver {
        negotiates_flush: negotiated.flush,
        negotiates_config_wce: negotiated.config_wce,
        sets_writeback: sets,
        writeback: config::space(image, image.config().queue_count(), cache.writeback())[config::WRITEBACK],
        on_setting,
        read: trial.try_request(kind::IN, 0),
        write: trial.try_request(kind::OUT, 0),
        flush: trial.try_request(kind::FLUSH, 0),
        discard: trial.try_request(kind::DISCARD, 0),
        write_zeroes: trial.try_request(kind::WRITE_ZEROES, 0),
        write_zeroes_unmap: trial.try_request(kind::WRITE_ZEROES, UNMAP),
    }
}

/// One driver on one image.
struct Trial<'a> {
    image: &'a Arc<Image>,
    engine: EngineKind,
    negotiated: Negotiated,
    sets: Option<u8>,
}

impl Trial<'_> {
    /// Returns a disk in the state in which this driver's requests begin, and the calls that were made to get
    /// there.
    fn begin(&self, refuse: bool) -> (Arc<WriteCache>, (DiskQueue, CallLog), Vec<&'static str>) {
        let policy = self.image.config().cache;
        let cache = Arc::new(WriteCache::new(policy));
        let (calls, kind) = (CallLog::default(), self.engine);
        let engine = Box::new(Recorder { calls: calls.clone(), kind, policy, ended: Vec::new(), refuse });
        let mut disk =
            DiskQueue::new(Arc::clone(self.image), Arc::clone(&cache), engine, self.image.config().stable);
        cache.negotiate(self.negotiated);
        if let Some(value) = self.sets {
            cache.guest_sets_writeback(value != 0);
            disk.sync_if_switched_off();
            finish(&mut disk);
        }
        let on_setting = calls.take();
        (cache, (disk, calls), on_setting)
    }

    /// Returns what a request for the first block of the image becomes.
    fn try_request(&self, kind: u32, flags: u32) -> RequestOutcome {
        let (status, calls) = self.run(kind, flags, 1, false);
        let (_, refused) = self.run(kind, flags, 1, true);
        let (_, two) = self.run(kind, flags, 2, false);
        let (mut twice, mut sorted) = ([calls.as_slice(), &calls].concat(), two.clone());
        twice.sort_unstable();
        sorted.sort_unstable();
        RequestOutcome {
            status,
            where_refused: (refused != calls).then_some(refused),
            two_at_once: (sorted != twice).then_some(two),
            calls,
        }
    }

    /// Submits `times` requests at once. Returns the status of all of them together, and the calls.
    fn run(&self, kind: u32, flags: u32, times: u64, refuse: bool) -> (&'static str, Vec<&'static str>) {
        let (_, (mut disk, calls), _) = self.begin(refuse);
        for id in 0..times {
            match self.parse(kind, flags) {
                Ok(op) => disk.submit(RequestId(id), op),
                Err(status) => return (name(status), vec![]),
            }
        }
        let ok = finish(&mut disk);
        (name(if ok { Status::Ok } else { Status::IoErr }), calls.take())
    }

    fn parse(&self, kind: u32, flags: u32) -> Result<Op, Status> {
        let geometry = self.image.geometry();
        let block = geometry.logical_block;
        let data = |wanted: u32| if kind == wanted { vec![Segment { addr: 0, len: block }] } else { vec![] };
        let (out, into) = (data(kind::OUT), data(kind::IN));
        let frame = Frame { data_out: Data::new(&out), data_in: Data::new(&into), ..Frame::default() };
        let mut payload = vec![0; 8];
        payload.extend((block / 512).to_le_bytes());
        payload.extend(flags.to_le_bytes());
        let mut features = config::offered(self.image, self.image.config().queue_count())
            & !(config::FLUSH | config::CONFIG_WCE);
        features |= if self.negotiated.flush { config::FLUSH } else { 0 };
        features |= if self.negotiated.config_wce { config::CONFIG_WCE } else { 0 };
        let limits = Limits { geometry, features, readonly: self.image.config().readonly };
        Ok(match request::parse(Header { kind, sector: 0 }, &frame, &payload, &limits)? {
            Request::In(range) => Op::Read(range, memory(block)?),
            Request::Out(range) => Op::Write(range, memory(block)?),
            Request::Flush => Op::Flush,
            Request::Discard(ranges) => Op::Discard(ranges),
            Request::WriteZeroes(ranges) => Op::WriteZeroes(ranges),
            Request::GetId => return Err(Status::Ok),
        })
    }
}

/// Returns memory that is aligned as a guest's pages are.
fn memory(bytes: u32) -> Result<Iov, Status> {
    let buffer = AlignedBuffer::new(bytes as usize, 4096).map_err(|_| Status::IoErr)?;
    Ok(Iov::from_buffer(&Arc::new(buffer), bytes as usize))
}

fn name(status: Status) -> &'static str {
    match status {
        Status::Ok => "OK",
        Status::IoErr => "IOERR",
        Status::Unsupp => "UNSUPP",
    }
}

/// Runs the disk until nothing is in flight. Returns `true` if everything succeeded.
fn finish(disk: &mut DiskQueue) -> bool {
    let mut ok = true;
    // The limit is far above the number of operations in a request of one block.
    for _ in 0..64 {
        if disk.wait(Wake::Now).is_err() {
            return false;
        }
        ok &= disk.take_completions().all(|completion| completion.result.is_ok());
        if disk.is_idle() {
            break;
        }
    }
    ok
}

/// The calls so far, shared by all clones.
#[derive(Debug, Clone, Default)]
struct CallLog(Arc<Mutex<Vec<&'static str>>>);

impl CallLog {
    fn push(&self, call: &'static str) {
        unpoisoned(self.0.lock()).push(call);
    }

    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *unpoisoned(self.0.lock()))
    }
}

/// An engine without a file. All operations succeed, or those that a host may lack are refused.
struct Recorder {
    calls: CallLog,
    /// The engine whose calls are named.
    kind: EngineKind,
    /// The cache mode.
    policy: &'static CachePolicy,
    ended: Vec<Ended>,
    refuse: bool,
}

impl Engine for Recorder {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.calls.push(self.kind.call(&op, self.policy));
        let result = match &op {
            HostOp::Writev { dsync: true, .. } | HostOp::PunchHole { .. } | HostOp::ZeroRange { .. }
                if self.refuse =>
            {
                Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
            HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => {
                usize::try_from(iov.bytes()).map_err(io::Error::other)
            }
            HostOp::Fdatasync | HostOp::PunchHole { .. } | HostOp::ZeroRange { .. } => Ok(0),
        };
        self.ended.push(Ended { token, result });
        Ok(())
    }

    fn wait(&mut self, _: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        ended.append(&mut self.ended);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::DiskConfig;
    use crate::disk::cache::POLICIES;
    use crate::disk::geometry::{BUFFERED, Geometry};
    use crate::disk::image::ImageProblem;
    use crate::disk::stable::StableBy;

    fn image(directory: &tempfile::TempDir, mode: &str, change: impl FnOnce(&mut DiskConfig)) -> Arc<Image> {
        let path = directory.path().join("a.img");
        std::fs::write(&path, [7; 8192]).unwrap();
        let cache = CachePolicy::by_name(mode).unwrap();
        let mut config = DiskConfig { cache, ..DiskConfig::new(path) };
        change(&mut config);
        Arc::new(Image::look(&config).unwrap())
    }

    #[test]
    fn every_driver_there_can_be_is_tried_once() {
        let directory = tempfile::tempdir().unwrap();
        let drivers = drivers(&image(&directory, "writeback", |_| ()), EngineKind::Blocking);
        assert_eq!(drivers.len(), 8);
        for (at, driver) in drivers.iter().enumerate() {
            let key = |d: &Driver| (d.negotiates_flush, d.negotiates_config_wce, d.sets_writeback);
            assert!(drivers[..at].iter().all(|other| key(other) != key(driver)));
        }
    }

    /// An image in the page cache's modes that needs no file, so no file system with RWF_DONTCACHE either.
    fn simulated(policy: &'static CachePolicy) -> Arc<Image> {
        let geometry =
            Geometry { capacity_sectors: 16, logical_block: 512, physical_block: 4096, alignment: BUFFERED };
        let config = DiskConfig { cache: policy, ..DiskConfig::new("simulated") };
        Arc::new(Image::simulated(&config, geometry).unwrap())
    }

    /// The calls of a mode without O_DIRECT, as preadv2(2) and the stability rule have them: (mode, read, write,
    /// stable write).
    const CALLS: [(&str, &str, &str, &str); 4] = [
        ("writeback", "preadv", "pwritev", "pwritev2(RWF_DSYNC)"),
        ("writethrough", "preadv", "pwritev", "pwritev2(RWF_DSYNC)"),
        ("unsafe", "preadv", "pwritev", "pwritev2(RWF_DSYNC)"),
        (
            "dontcache",
            "preadv2(RWF_DONTCACHE)",
            "pwritev2(RWF_DONTCACHE)",
            "pwritev2(RWF_DSYNC|RWF_DONTCACHE)",
        ),
    ];

    fn is_stable(policy: &CachePolicy, driver: &Driver) -> bool {
        let negotiated =
            Negotiated { flush: driver.negotiates_flush, config_wce: driver.negotiates_config_wce };
        let on = driver.writeback != 0;
        policy.write_must_be_stable(negotiated, on, on)
    }

    #[test]
    fn writes_are_told_as_the_stability_rule_has_them() {
        assert_eq!(CALLS.len(), POLICIES.iter().filter(|policy| !policy.direct).count());
        for (mode, read, plain, dsync) in CALLS {
            let policy = CachePolicy::by_name(mode).unwrap();
            for driver in drivers(&simulated(policy), EngineKind::Blocking) {
                let stable = is_stable(policy, &driver);
                assert_eq!(driver.read.calls, [read], "{mode} {driver:?}");
                assert_eq!(driver.write.calls, [if stable { dsync } else { plain }], "{mode} {driver:?}");
                let refused = stable.then(|| vec![dsync, plain, "fdatasync"]);
                assert_eq!(driver.write.where_refused, refused, "{mode} {driver:?}");
                let flush: &[&str] = if policy.honour_flush { &["fdatasync"] } else { &[] };
                assert_eq!(driver.flush.calls, flush, "{mode} {driver:?}");
            }
        }
    }

    #[test]
    fn the_ring_is_told_with_what_is_tried_before_it() {
        for (mode, ..) in CALLS {
            let policy = CachePolicy::by_name(mode).unwrap();
            for driver in drivers(&simulated(policy), EngineKind::Uring) {
                // A stable write has to wait for the disk, so it is not first tried with RWF_NOWAIT.
                let (read, write) = match (mode, is_stable(policy, &driver)) {
                    ("dontcache", false) => (
                        "preadv2(RWF_NOWAIT|RWF_DONTCACHE), else IORING_OP_READ(RWF_DONTCACHE)",
                        "pwritev2(RWF_NOWAIT|RWF_DONTCACHE), else pwritev2(RWF_DONTCACHE) if alone, else \
                         IORING_OP_WRITE(RWF_DONTCACHE)",
                    ),
                    ("dontcache", true) => (
                        "preadv2(RWF_NOWAIT|RWF_DONTCACHE), else IORING_OP_READ(RWF_DONTCACHE)",
                        "pwritev2(RWF_DSYNC|RWF_DONTCACHE) if alone, else IORING_OP_WRITE(RWF_DSYNC|RWF_DONTCACHE)",
                    ),
                    (_, false) => (
                        "preadv2(RWF_NOWAIT), else IORING_OP_READ",
                        "pwritev2(RWF_NOWAIT), else pwritev if alone, else IORING_OP_WRITE",
                    ),
                    (_, true) => (
                        "preadv2(RWF_NOWAIT), else IORING_OP_READ",
                        "pwritev2(RWF_DSYNC) if alone, else IORING_OP_WRITE(RWF_DSYNC)",
                    ),
                };
                assert_eq!(
                    (driver.read.calls.as_slice(), driver.write.calls.as_slice()),
                    (&[read][..], &[write][..]),
                    "{mode}"
                );
            }
        }
    }

    #[test]
    fn two_at_once_share_a_sync_where_they_may() {
        let directory = tempfile::tempdir().unwrap();
        let (write, sync) = ("pwritev", "fdatasync");
        for (by, one, two) in [
            ("dsync", vec!["pwritev2(RWF_DSYNC)"], None),
            ("fdatasync", vec![write, sync], None),
            ("group", vec![write, sync], Some(vec![write, write, sync])),
            ("auto", vec!["pwritev2(RWF_DSYNC)"], Some(vec![write, write, sync])),
        ] {
            let stable = StableBy::by_name(by).unwrap();
            let image = image(&directory, "writethrough", |config| config.stable = stable);
            for driver in drivers(&image, EngineKind::Blocking) {
                if driver.writeback == 0 && driver.sets_writeback.is_none() {
                    assert_eq!((&driver.write.calls, &driver.write.two_at_once), (&one, &two), "{by}");
                }
                assert_eq!(driver.flush.two_at_once, Some(vec![sync]), "{by}");
                assert_eq!(driver.read.two_at_once, None);
            }
        }
    }

    #[test]
    fn nothing_is_written_and_nobody_kept_out() {
        let directory = tempfile::tempdir().unwrap();
        let looked = image(&directory, "writeback", |_| ());
        drivers(&looked, EngineKind::Blocking);
        assert_eq!(std::fs::read(&looked.config().path).unwrap(), [7; 8192]);
        let config = DiskConfig { cache: &POLICIES[1], ..DiskConfig::new(&looked.config().path) };
        let running = Image::open(&config).unwrap();
        assert!(matches!(looked.refusals()[..], [ImageProblem::Locked(_)]));
        drop(running);
        assert!(looked.refusals().is_empty());
    }

    #[test]
    fn a_readonly_disk_answers_writes_with_errors_and_never_syncs() {
        let directory = tempfile::tempdir().unwrap();
        let looked = image(&directory, "writethrough", |config| config.readonly = true);
        for driver in drivers(&looked, EngineKind::Blocking) {
            for outcome in [&driver.write, &driver.discard, &driver.write_zeroes] {
                assert_eq!((outcome.status, outcome.calls.len()), ("IOERR", 0), "{driver:?}");
            }
            assert_eq!(driver.read.calls, ["preadv"]);
            assert!(driver.on_setting.is_empty());
        }
        assert!(at_start(&looked).is_empty() && at_end(&looked).is_empty());
    }
}
