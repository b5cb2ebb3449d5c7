//! Reset, and whatever else stops a queue (virtio 2.4.1, 4.2.2.2): the I/O in flight is waited for,
//! then nothing moves any more, and the next driver finds the device as new.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use minivmm::disk::Image;
use minivmm::disk::blocking::BlockingEngine;
use minivmm::disk::disk_queue::StableBy;
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::mem;
use minivmm::virtio::Transport;
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, pattern};
use minivmm_testkit::over_pci;
use minivmm_testkit::turns::Turns;

/// With all that is offered.
fn start(rig: &mut Rig) {
    let features = rig.offered();
    rig.start(features);
}

/// With EVENT_IDX a driver hears of the next answer only if it says so.
fn listen(rig: &Rig) {
    rig.poke(AVAIL + 4 + 2 * u64::from(rig.size), &rig.used_idx().to_le_bytes());
}

/// What a [`Slow`] engine and its test say to each other.
struct Gate {
    started: Receiver<()>,
    /// Told when the reset has returned.
    returned: Sender<()>,
    executed: Arc<AtomicUsize>,
}

/// Gives a reset that does not wait the time to return before each write is executed.
struct Slow {
    inner: BlockingEngine,
    writes: usize,
    started: Sender<()>,
    returned: Receiver<()>,
    executed: Arc<AtomicUsize>,
}

impl Slow {
    fn with_gate(image: &Image) -> (Box<dyn Engine>, Gate) {
        let (started, theirs) = channel();
        let (ours, returned) = channel();
        let executed = Arc::new(AtomicUsize::new(0));
        let gate = Gate { started: theirs, returned: ours, executed: Arc::clone(&executed) };
        let inner = BlockingEngine::new(Arc::clone(image.file().descriptor()));
        (Box::new(Self { inner, writes: 0, started, returned, executed }), gate)
    }
}

impl Engine for Slow {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.writes += usize::from(matches!(op, HostOp::Writev { .. }));
        self.inner.submit(token, op)
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        if self.writes == 0 {
            return self.inner.wait(wake, ended);
        }
        let _ = self.started.send(());
        let too_early = self.returned.recv_timeout(Duration::from_millis(20)).is_ok();
        self.inner.wait(wake, ended)?;
        self.writes -= 1;
        if !too_early {
            self.executed.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Shows S10 and R15.
#[test]
fn whatever_stops_a_queue_waits_for_the_io_in_flight_and_then_leaves_memory_alone() {
    type Stop = (&'static str, fn(&mut Rig));
    let stops: [Stop; 3] = [
        ("reset", |rig| rig.write(reg::STATUS, 0)),
        ("QueueReady 0", |rig| rig.write(reg::QUEUE_READY, 0)),
        ("the end of the machine", |rig| rig.mmio.stop()),
    ];
    for (what, stop) in stops {
        if what == "QueueReady 0" && over_pci::is_pci() {
            continue; // A driver of PCI may not (virtio 4.1.4.3.2); it is ignored.
        }
        let test = TestImage::new(1 << 20);
        let image = test.open("none");
        let (engine, gate) = Slow::with_gate(&image);
        let mut rig = Rig::with_engine(image, engine, StableBy::Dsync);
        start(&mut rig);
        rig.fill(DATA, 0x5a, 4096);
        rig.put_header(OUT, 64);
        // Five times the same write: the first is with the host, the others wait behind it.
        rig.put_chain(DESC, &[(HEADER, 16, 0), (DATA, 4096, 0), (STATUS_BYTE, 1, WRITE)]);
        rig.make_available(&[0; 5]);
        rig.ring_doorbell();
        gate.started.recv().unwrap();
        stop(&mut rig);
        assert_eq!(gate.executed.load(Ordering::SeqCst), 5, "{what} returned with I/O in flight");
        let _ = gate.returned.send(());
        assert_eq!(test.content()[64 * 512..][..4096], [0x5a; 4096], "{what}");
        assert_eq!(rig.used_idx(), 5, "{what}: each was answered");
        // The image, the rings and the line are quiet, whatever the old driver still does.
        rig.has_interrupt(0);
        let before = rig.peek(0, RAM_BYTES as usize);
        rig.ring_doorbell();
        rig.ring_doorbell();
        assert!(!rig.has_interrupt(20), "{what}: a notification after it");
        assert!(rig.peek(0, RAM_BYTES as usize) == before, "{what}: memory was touched after it");
        drop(gate);
        start(&mut rig);
        assert_eq!(rig.read_sectors(8, 512), (OK, vec![pattern(8); 512]), "{what}: and the device is as new");
    }
}

/// What a [`Lingering`] engine has, and what it has ended.
#[derive(Default)]
struct Lingered {
    operations: Vec<(OpToken, HostOp)>,
    ended: usize,
    may_end: bool,
}

/// Ends one operation a wait that may sleep, the newest first, once the test lets it.
struct Lingering(Arc<Mutex<Lingered>>);

impl Engine for Lingering {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        self.0.lock().unwrap().operations.push((token, op));
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let mut lingered = self.0.lock().unwrap();
        let may_end = lingered.may_end && !matches!(wake, Wake::Now);
        if let Some((token, op)) = may_end.then(|| lingered.operations.pop()).flatten() {
            let bytes = match &op {
                HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => iov.bytes(),
                _ => 0,
            };
            ended.push(Ended { token, result: Ok(bytes as usize) });
            lingered.ended += 1;
        }
        Ok(())
    }
}

#[test]
fn a_drain_ends_when_every_request_is_answered_however_many_operations_that_takes() {
    const WRITES: u16 = 8;
    // How writes become stable, whether the ring breaks behind them, and the operations that they take.
    for (stable_by, breaks, operations) in [
        (StableBy::Dsync, false, 8),
        (StableBy::Fdatasync, false, 16),
        (StableBy::Group, false, 9),
        (StableBy::Fdatasync, true, 16),
    ] {
        let what = format!("{stable_by:?}, the ring breaks: {breaks}");
        let test = TestImage::new(1 << 20);
        let lingered = Arc::new(Mutex::new(Lingered::default()));
        let engine = Box::new(Lingering(Arc::clone(&lingered)));
        let mut turns = Turns::with_way(test.open("directsync"), 128, 0, engine, stable_by);
        turns.run(|worker, driver| {
            for slot in 0..WRITES {
                let header = driver.put_header(slot, OUT, 8 * u64::from(slot));
                driver.put_desc(DESC, 3 * slot, (header, 16, NEXT, 3 * slot + 1));
                driver.put_desc(
                    DESC,
                    3 * slot + 1,
                    (DATA + 4096 * u64::from(slot), 4096, NEXT, 3 * slot + 2),
                );
                driver.put_desc(DESC, 3 * slot + 2, (STATUS_BYTE + u64::from(slot), 1, WRITE, 0));
                driver.poke(STATUS_BYTE + u64::from(slot), &[UNTOUCHED]);
            }
            driver.submit((0..WRITES).map(|slot| 3 * slot));
            if breaks {
                // A descriptor that is its own next.
                driver.put_desc(DESC, 100, (DATA, 16, NEXT, 100));
                driver.submit([100]);
            }
            assert_eq!(worker.turn().is_err(), breaks, "{what}");
            assert_eq!(driver.used_idx(), 0, "{what}: nothing has ended");
            lingered.lock().unwrap().may_end = true;
            worker.drain().unwrap();
            worker.owes_nothing().unwrap();
            assert!(worker.is_idle(), "{what}");
            let lingered = lingered.lock().unwrap();
            assert_eq!((lingered.operations.len(), lingered.ended), (0, operations), "{what}: I/O in flight");
            assert_eq!(driver.used_idx(), WRITES, "{what}: each is answered, and once");
            for slot in 0..WRITES {
                let mut status = [0];
                mem::read_bytes(driver.ram, STATUS_BYTE + u64::from(slot), &mut status).unwrap();
                assert_eq!(status, [OK], "{what}: request {slot}");
            }
        });
        assert!(turns.disk.is_idle(), "{what}");
    }
}

#[test]
fn the_device_can_be_set_up_a_hundred_times() {
    let test = TestImage::new(1 << 20);
    let mut rig = Rig::new(test.open("none"));
    for round in 0..100u8 {
        rig.size = 1 << (2 + round % 6);
        let features =
            [rig.offered(), 0, F_EVENT_IDX, F_INDIRECT | F_FLUSH, F_CONFIG_WCE][usize::from(round) % 5];
        rig.start(features);
        let sector = u64::from(round) * 8;
        assert_eq!(rig.write_sectors(sector, &[round; 4096]), OK);
        listen(&rig);
        assert_eq!(rig.read_sectors(sector, 4096), (OK, vec![round; 4096]));
        assert_eq!(test.content()[sector as usize * 512..][..4096], [round; 4096]);
        if round % 7 == 0 {
            rig.set_avail_idx(0x8000);
            rig.ring_doorbell();
            while !rig.needs_reset() {
                rig.wait_interrupt();
            }
        }
    }
}
