//! Reset, and whatever else stops a queue (virtio 2.4.1, 4.2.2.2): the I/O in flight is waited for,
//! then nothing moves any more, and the next driver finds the device as new.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use common::driver::*;
use common::images::{TestImage, pattern};
use common::over_pci;
use minivmm::disk::Image;
use minivmm::disk::blocking::BlockingEngine;
use minivmm::disk::engine::{Ended, Engine, HostOp, Wake};
use minivmm::disk::machine::StableBy;
use minivmm::virtio::Transport;

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
        let inner = BlockingEngine::new(Arc::clone(image.file()));
        (Box::new(Self { inner, writes: 0, started, returned, executed }), gate)
    }
}

impl Engine for Slow {
    fn submit(&mut self, token: u64, op: HostOp) -> Result<(), HostOp> {
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
