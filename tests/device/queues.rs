//! Several queues of one disk, on real files and both engines: a FLUSH of one covers what is complete
//! on all, a success that waits for another queue's sync sleeps and is woken, and whoever is not
//! enabled stays parked.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use minivmm::blk::BlockDevice;
use minivmm::disk::blocking::BlockingEngine;
use minivmm::disk::cache::{CachePolicy, WriteCache};
use minivmm::disk::disk_queue::DiskQueue;
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::disk::uring::UringEngine;
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm::mem;
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, policies};

const ENGINES: [&str; 2] = ["sync", "io_uring"];
const QUEUES: u16 = 4;
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_MQ;

/// Where queue q keeps its things in RAM.
fn base(queue: u16) -> u64 {
    0x20_0000 + 0x10_0000 * u64::from(queue)
}
const AVAIL_AT: u64 = 0x1000;
const USED_AT: u64 = 0x2000;
const HEADER_AT: u64 = 0x3000;
const STATUS_AT: u64 = 0x3800;
const DATA_AT: u64 = 0x4000;
const DATA_BYTES: usize = 4096;

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::yield_now();
    }
}

fn open(test: &TestImage, mode: &str, engine: &str) -> Arc<Image> {
    let keys = format!("x,engine={engine},queues={QUEUES},poll-us=0");
    let cache = CachePolicy::by_name(mode).unwrap();
    let options = DiskConfig { cache, path: test.path.clone(), ..disk_options::parse(keys).unwrap().config };
    Arc::new(Image::open(&options).unwrap())
}

/// A driver of several queues, with one request at a time on each.
pub struct Many {
    rig: Rig,
    avail: [u16; QUEUES as usize],
}

impl Many {
    /// The device as a run makes it.
    pub fn new(image: &Arc<Image>) -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let device = BlockDevice::with_ram("vda", Arc::clone(image), Some(&ram)).unwrap();
        let cache = Arc::new(WriteCache::new(image.config().cache));
        Self { rig: Rig::over(Arc::clone(image), cache, ram, device), avail: [0; 4] }
    }

    /// A device over engines of the test's own, one a queue.
    fn over(image: &Arc<Image>, engines: Vec<Box<dyn Engine>>) -> Self {
        let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
        let cache = Arc::new(WriteCache::new(image.config().cache));
        let disk =
            |engine| DiskQueue::new(Arc::clone(image), Arc::clone(&cache), engine, image.config().stable);
        let disks = engines.into_iter().map(disk).collect();
        let device = BlockDevice::with_disks("vda", Arc::clone(image), Arc::clone(&cache), disks).unwrap();
        Self { rig: Rig::over(Arc::clone(image), cache, ram, device), avail: [0; 4] }
    }

    pub fn start(&mut self, features: u64, queues: &[u16]) {
        assert!(self.rig.negotiate(features | F_VERSION_1));
        for &queue in queues {
            self.rig.fill(base(queue), 0, 0x4000);
            self.avail[usize::from(queue)] = 0;
            self.rig.write(reg::QUEUE_SEL, u32::from(queue));
            self.rig.write(reg::QUEUE_SIZE, 16);
            self.rig.write64(reg::QUEUE_DESC, base(queue));
            self.rig.write64(reg::QUEUE_DRIVER, base(queue) + AVAIL_AT);
            self.rig.write64(reg::QUEUE_DEVICE, base(queue) + USED_AT);
            self.rig.write(reg::QUEUE_READY, 1);
            assert_eq!(self.rig.read(reg::QUEUE_READY), 1, "queue {queue}");
        }
        self.rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub fn submit(&mut self, queue: u16, kind: u32, sector: u64, data: Option<u16>) {
        let base = base(queue);
        self.rig.poke(base + HEADER_AT, &kind.to_le_bytes());
        self.rig.poke(base + HEADER_AT + 8, &sector.to_le_bytes());
        self.rig.poke(base + STATUS_AT, &[UNTOUCHED]);
        let mut parts = vec![(base + HEADER_AT, 16, 0)];
        parts.extend(data.map(|flags| (base + DATA_AT, DATA_BYTES as u32, flags)));
        parts.push((base + STATUS_AT, 1, WRITE));
        self.rig.put_chain(base, &parts);
        let avail = &mut self.avail[usize::from(queue)];
        // The head is 0 in every entry.
        *avail = avail.wrapping_add(1);
        let idx = *avail;
        std::sync::atomic::fence(Ordering::SeqCst);
        self.rig.poke(base + AVAIL_AT + 2, &idx.to_le_bytes());
        self.rig.write(reg::QUEUE_NOTIFY, u32::from(queue));
    }

    pub fn is_done(&self, queue: u16) -> bool {
        self.rig.peek16(base(queue) + USED_AT + 2) == self.avail[usize::from(queue)]
    }

    fn status(&self, queue: u16) -> u8 {
        self.rig.peek(base(queue) + STATUS_AT, 1)[0]
    }

    pub fn wait(&self, queue: u16) -> u8 {
        until("no answer", || self.is_done(queue));
        self.status(queue)
    }

    pub fn write(&mut self, queue: u16, sector: u64, byte: u8) -> u8 {
        self.rig.fill(base(queue) + DATA_AT, byte, DATA_BYTES);
        self.submit(queue, OUT, sector, Some(0));
        self.wait(queue)
    }

    fn read(&mut self, queue: u16, sector: u64) -> (u8, Vec<u8>) {
        self.rig.fill(base(queue) + DATA_AT, 0xee, DATA_BYTES);
        self.submit(queue, IN, sector, Some(WRITE));
        (self.wait(queue), self.rig.peek(base(queue) + DATA_AT, DATA_BYTES))
    }

    pub fn flush(&mut self, queue: u16) -> u8 {
        self.submit(queue, FLUSH, 0, None);
        self.wait(queue)
    }
}

/// Dirty pages, and pages under writeback, that the host's page cache has of the image; `None` where the
/// kernel has no cachestat (Linux 6.5).
fn dirty_pages(image: &Image) -> Option<u64> {
    const CACHESTAT: libc::c_long = 451;
    let range = [0u64; 2];
    let mut counts = [0u64; 5];
    // SAFETY: cachestat reads two u64 and writes five, to memory that is there for the call.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            image.file().descriptor().as_raw_fd(),
            range.as_ptr(),
            counts.as_mut_ptr(),
            0u32,
        )
    };
    (result == 0).then(|| counts[1] + counts[2])
}

/// Shows B15.
#[test]
fn mq_is_offered_with_its_number_where_there_are_several() {
    let test = TestImage::new(1 << 20);
    for queues in [1u16, 2, 4, 16] {
        let options = DiskConfig { queues: Some(queues), ..DiskConfig::new(&test.path) };
        let image = Arc::new(Image::open(&options).unwrap());
        let mut many = Many::new(&image);
        assert_eq!(many.rig.offered() & F_MQ != 0, queues > 1, "{queues}");
        assert_eq!(many.rig.config(34, 2), if queues > 1 { u64::from(queues) } else { 0 });
        for queue in 0..18 {
            many.rig.write(reg::QUEUE_SEL, queue);
            let size = if queue < u32::from(queues) { 256 } else { 0 };
            assert_eq!(many.rig.read(reg::QUEUE_SIZE_MAX), size, "queue {queue} of {queues}");
        }
    }
}

/// Shows B17.
#[test]
fn a_flush_on_one_queue_covers_what_is_complete_on_all() {
    let durable: Vec<_> = policies().into_iter().filter(|policy| policy.honour_flush).collect();
    for engine in ENGINES {
        for mode in durable.iter().map(|policy| policy.name) {
            let test = TestImage::new(1 << 20);
            let image = open(&test, mode, engine);
            let mut many = Many::new(&image);
            many.start(FEATURES, &[0, 1, 2, 3]);
            for flushing in 0..QUEUES {
                let what = format!("{mode} {engine}, FLUSH on queue {flushing}");
                for queue in 0..QUEUES {
                    let byte = 0x10 + (4 * flushing + queue) as u8;
                    assert_eq!(many.write(queue, 8 * u64::from(queue), byte), OK, "{what}");
                }
                let at_risk = image.monitor.snapshot().at_risk_bytes;
                assert_eq!(at_risk, if image.config().cache.write_cache { 4 * 4096 } else { 0 }, "{what}");
                let before = image.stats.counters().fdatasyncs.load(Ordering::Relaxed);
                assert_eq!(many.flush(flushing), OK, "{what}");
                assert_eq!(image.stats.counters().fdatasyncs.load(Ordering::Relaxed), before + 1, "{what}");
                assert_eq!(image.monitor.snapshot().at_risk_bytes, 0, "{what}");
                if let Some(pages) = dirty_pages(&image) {
                    assert_eq!(pages, 0, "{what}: dirty in the host's page cache");
                }
                for queue in 0..QUEUES {
                    let byte = 0x10 + (4 * flushing + queue) as u8;
                    let found = many.read((queue + 1) % QUEUES, 8 * u64::from(queue));
                    assert_eq!(found, (OK, vec![byte; DATA_BYTES]), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_queue_that_is_not_enabled_stays_parked_and_the_others_work() {
    let test = TestImage::new(1 << 20);
    for engine in ENGINES {
        let image = open(&test, "none", engine);
        let mut many = Many::new(&image);
        for queues in [&[2][..], &[0, 3], &[1], &[0, 1, 2, 3]] {
            many.start(FEATURES, queues);
            for &queue in queues {
                assert_eq!(many.write(queue, 16, queue as u8), OK, "{engine} {queues:?}");
                assert_eq!(many.flush(queue), OK);
            }
            for queue in (0..QUEUES).filter(|queue| !queues.contains(queue)) {
                many.rig.write(reg::QUEUE_NOTIFY, u32::from(queue));
            }
        }
    }
}

/// virtio 5.2.2: num_queues means nothing without MQ. A driver that enables more all the same is served on
/// queue 0, and the others are as if they were not there.
#[test]
fn without_mq_queue_0_is_served_and_what_else_is_enabled_is_not() {
    let test = TestImage::new(1 << 20);
    let image = open(&test, "none", "sync");
    let mut many = Many::new(&image);
    many.start(F_FLUSH, &[0]);
    assert_eq!(many.write(0, 0, 7), OK);
    for enabled in [&[0, 1][..], &[0, 1, 2, 3], &[0, 3]] {
        many.start(F_FLUSH, enabled);
        assert!(!many.rig.needs_reset(), "{enabled:?}");
        let last = *enabled.last().unwrap();
        many.submit(last, OUT, 8, Some(0));
        assert_eq!(many.write(0, 0, 9), OK, "{enabled:?}");
        assert_eq!(many.read(0, 0), (OK, vec![9; DATA_BYTES]));
        assert!(!many.is_done(last), "queue {last} does not exist");
        assert!(!many.rig.needs_reset(), "{enabled:?}");
    }
    // Without queue 0 nothing is served, and nothing breaks.
    many.start(F_FLUSH, &[1]);
    assert!(!many.rig.needs_reset());
    many.start(FEATURES, &[0, 1]);
    assert_eq!(many.write(1, 0, 8), OK);
}

#[test]
fn whoever_works_syncs_when_the_guest_turns_its_write_cache_off() {
    for engine in ENGINES {
        for (enabled, stopped) in [(&[0, 1][..], None), (&[1], None), (&[3], None), (&[0, 2], Some(0))] {
            let test = TestImage::new(1 << 20);
            let image = open(&test, "writeback", engine);
            let mut many = Many::new(&image);
            many.start(FEATURES, enabled);
            let last = *enabled.last().unwrap();
            assert_eq!(many.write(last, 0, 7), OK);
            if let Some(queue) = stopped {
                many.rig.write(reg::QUEUE_SEL, queue);
                many.rig.write(reg::QUEUE_READY, 0);
            }
            assert_eq!(image.monitor.snapshot().at_risk_bytes, 4096);
            many.rig.set_writeback(0);
            // No doorbell of the driver's.
            until("nobody syncs", || image.monitor.snapshot().at_risk_bytes == 0);
            assert_eq!(image.stats.counters().fdatasyncs.load(Ordering::Relaxed), 1, "{engine} {enabled:?}");
        }
    }
}

/// An fdatasync that ends only when the test says so.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn someone_waits(&self) -> bool {
        self.state.lock().unwrap().0
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 = true;
        while !state.1 {
            state = self.changed.wait(state).unwrap();
        }
    }
}

struct Gated {
    inner: Box<dyn Engine>,
    gate: Arc<Gate>,
    syncs: bool,
    /// What its fdatasyncs end with, in the place of the host's answer.
    errno: Option<i32>,
}

impl Engine for Gated {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let is_sync = op.is_sync();
        self.inner.submit(token, op)?;
        self.syncs |= is_sync;
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let syncs = std::mem::take(&mut self.syncs);
        if syncs {
            self.gate.pass();
        }
        self.inner.wait(wake, ended)?;
        if let (true, Some(errno)) = (syncs, self.errno) {
            ended.iter_mut().for_each(|end| end.result = Err(io::Error::from_raw_os_error(errno)));
        }
        Ok(())
    }
}

/// Writes down with what the state machine lets it wait.
struct Watched {
    inner: Box<dyn Engine>,
    wakes: Arc<Mutex<Vec<&'static str>>>,
}

impl Engine for Watched {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.inner.submit(token, op)
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        self.wakes.lock().unwrap().push(match wake {
            Wake::Doorbell(_) => "until its bell",
            Wake::EndOnly => "until an end",
            Wake::Now => "not at all",
        });
        self.inner.wait(wake, ended)
    }

    fn rest(&mut self) -> io::Result<()> {
        self.inner.rest()
    }
}

/// A FLUSH on queue 0 over `engine`, done and held by one on queue 1 that is in the gate.
fn held(
    test: &TestImage,
    engine: &str,
    errno: Option<i32>,
) -> (Many, Arc<Gate>, Arc<Mutex<Vec<&'static str>>>) {
    let image = open(test, "writeback", engine);
    let (gate, wakes) = (Arc::new(Gate::default()), Arc::new(Mutex::new(Vec::new())));
    let blocking = || Box::new(BlockingEngine::new(Arc::clone(image.file().descriptor()))) as Box<dyn Engine>;
    let inner: Box<dyn Engine> = match engine {
        "sync" => blocking(),
        _ => Box::new(UringEngine::new(Arc::clone(&image), 256, None).unwrap()),
    };
    let gated = Gated { inner: blocking(), gate: Arc::clone(&gate), syncs: false, errno };
    let watched = Watched { inner, wakes: Arc::clone(&wakes) };
    let mut many = Many::over(&image, vec![Box::new(watched), Box::new(gated)]);
    many.start(FEATURES, &[0, 1]);
    many.submit(1, FLUSH, 0, None);
    until("queue 1 syncs", || gate.someone_waits());
    many.submit(0, FLUSH, 0, None);
    let syncs = || image.monitor.snapshot().syncs.map_or(0, |syncs| syncs.count);
    until("queue 0 syncs", || image.stats.counters().fdatasyncs.load(Ordering::Relaxed) == 2);
    // The wait that ends the fdatasync, and the one that holds it.
    until("queue 0 holds", || wakes.lock().unwrap().len() >= 3);
    assert_eq!(syncs(), 0, "neither counts yet");
    (many, gate, wakes)
}

#[test]
fn a_queue_that_holds_a_success_sleeps_and_is_woken_by_the_judge() {
    for engine in ENGINES {
        for (errno, status) in [(None, OK), (Some(libc::EIO), IOERR)] {
            let test = TestImage::new(1 << 20);
            let (many, gate, wakes) = held(&test, engine, errno);
            assert!(!many.is_done(0) && many.status(0) == UNTOUCHED, "{engine}: acknowledged early");
            let so_far = wakes.lock().unwrap().clone();
            assert!(so_far.iter().all(|&wake| wake == "until its bell"), "{engine}: {so_far:?}");
            gate.open();
            assert_eq!((many.wait(1), many.wait(0)), (status, status), "{engine} {errno:?}");
        }
    }
}

#[test]
fn a_reset_waits_asleep_for_what_another_queue_holds() {
    for engine in ENGINES {
        let test = TestImage::new(1 << 20);
        let (mut many, gate, wakes) = held(&test, engine, None);
        let before = wakes.lock().unwrap().len();
        std::thread::scope(|scope| {
            let rig = &mut many.rig;
            let reset = scope.spawn(move || rig.write(reg::STATUS, 0));
            until("queue 0 drains", || wakes.lock().unwrap().len() > before);
            assert!(!reset.is_finished(), "{engine}: the reset has not waited");
            gate.open();
            reset.join().unwrap();
        });
        assert_eq!((many.wait(1), many.wait(0)), (OK, OK), "{engine}: answered before the reset was over");
        let all = wakes.lock().unwrap().clone();
        assert!(!all.contains(&"until an end"), "{engine}: an end that does not come: {all:?}");
        assert!(all.len() < 12, "{engine}: {} waits", all.len());
    }
}

#[test]
fn each_worker_has_the_name_of_its_queue() {
    let test = TestImage::new(1 << 20);
    let image = open(&test, "none", "sync");
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).unwrap();
    let _device = BlockDevice::with_ram("vdx", image, Some(&ram)).unwrap();
    let names = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let name = |task: io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
        };
        let mut names: Vec<_> = tasks.filter_map(name).filter(|name| name.starts_with("vdx")).collect();
        names.sort();
        names.concat()
    };
    until("four threads", || names() == "vdx-q0\nvdx-q1\nvdx-q2\nvdx-q3\n");
}
