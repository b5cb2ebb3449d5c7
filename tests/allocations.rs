//! What a request costs the allocator, counted: nothing, once a queue has warmed up. Every chain and
//! every kind of request that a guest sends all the time goes through the real worker; the global
//! allocator of this binary counts what happens in its turns.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use minivmm::blk::worker::QueueWorker;
use minivmm::disk::blocking::BlockingEngine;
use minivmm::disk::engine::Engine;
use minivmm::disk::uring::UringEngine;
use minivmm::disk::{DiskConfig, Image};
use minivmm_testkit::driver::*;
use minivmm_testkit::images::TestImage;
use minivmm_testkit::turns::{Driver, Turns};

const BATCH: u16 = 32;
const QUEUE: u16 = 256;
/// What the growth of lists may cost where operations end when the host ends them: a batch may be heard of at
/// once for the first time, and four lists then double three or four times. One a request would be 160.
const GROWTHS: u64 = 16;

/// What executes the operations.
#[derive(Debug, Clone, Copy)]
enum By {
    /// An engine of the tests' that ends a batch at once.
    Nobody,
    Blocking,
    Uring,
}

/// How many batches each is given: to warm up, and then to count. Real I/O takes its time.
const BELOW: [(By, u16, u16); 3] = [(By::Nobody, 50, 100), (By::Blocking, 3, 1), (By::Uring, 10, 5)];

thread_local! {
    static IS_COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct CountingAllocator;

fn count() {
    if IS_COUNTING.get() {
        COUNT.set(COUNT.get() + 1);
    }
}

// SAFETY: everything is the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Allocations of this thread in `what`.
fn allocations(what: impl FnOnce()) -> u64 {
    COUNT.set(0);
    IS_COUNTING.set(true);
    what();
    IS_COUNTING.set(false);
    COUNT.get()
}

/// How a request lies in guest memory.
#[derive(Debug, Clone, Copy)]
struct Shape {
    kind: u32,
    /// Pieces of data, each 4096 bytes.
    pieces: u16,
    indirect: bool,
}

/// Descriptors of a request that go into the queue's own table.
const PLACES: u16 = 8;

fn put(driver: &Driver<'_>, shape: Shape, slot: u16) {
    let header = driver.put_header(slot, shape.kind, 8 * u64::from(slot));
    let data_flags = if shape.kind == OUT { 0 } else { WRITE };
    let len = if shape.kind == GET_ID { 20 } else { 4096 };
    let mut parts = vec![(header, 16, 0)];
    for piece in 0..shape.pieces {
        parts.push((DATA + 4096 * u64::from(16 * slot + piece), len, data_flags));
    }
    parts.push((STATUS_BYTE + u64::from(slot), 1, WRITE));
    let (table, first) = if shape.indirect {
        let table = INDIRECT_TABLE + 0x200 * u64::from(slot);
        driver.put_desc(DESC, PLACES * slot, (table, 16 * parts.len() as u32, INDIRECT, 0));
        (table, 0)
    } else {
        (DESC, PLACES * slot)
    };
    for (at, &(addr, len, flags)) in (0u16..).zip(&parts) {
        let next = usize::from(at) + 1 < parts.len();
        let flags = if next { flags | NEXT } else { flags };
        driver.put_desc(table, first + at, (addr, len, flags, first + at + 1));
    }
}

/// Batches of the same requests, each until it is answered.
fn batches(worker: &mut QueueWorker<'_>, driver: &mut Driver<'_>, count: u16) -> u64 {
    let mut seen = 0;
    for _ in 0..count {
        let done = driver.used_idx().wrapping_add(BATCH);
        driver.submit((0..BATCH).map(|slot| PLACES * slot));
        // One operation a turn is what the blocking engine does.
        for _ in 0..2 * BATCH {
            seen += allocations(|| worker.turn().unwrap());
            if driver.used_idx() == done {
                break;
            }
        }
        assert_eq!(driver.used_idx(), done);
        for slot in 0..u64::from(BATCH) {
            let mut status = [UNTOUCHED];
            minivmm::mem::read_bytes(driver.ram, STATUS_BYTE + slot, &mut status).unwrap();
            assert_eq!(status, [OK]);
            driver.poke(STATUS_BYTE + slot, &[UNTOUCHED]);
        }
    }
    seen
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for indirect in [false, true] {
        for kind in [IN, OUT] {
            for pieces in [1, 2, 5] {
                shapes.push(Shape { kind, pieces, indirect });
            }
        }
        shapes.push(Shape { kind: FLUSH, pieces: 0, indirect });
        shapes.push(Shape { kind: GET_ID, pieces: 1, indirect });
    }
    let long = |kind| Shape { kind, pieces: 14, indirect: true };
    shapes.extend([long(IN), long(OUT)]);
    shapes
}

/// Allocations of so many batches once the queue is warm.
fn steady(turns: &mut Turns, shape: Shape, (_, warm_up, counted): (By, u16, u16)) -> u64 {
    turns.run(|worker, driver| {
        for slot in 0..BATCH {
            put(driver, shape, slot);
        }
        batches(worker, driver, warm_up);
        batches(worker, driver, counted)
    })
}

fn queue(image: &Arc<Image>, by: By, features: u64) -> Option<Turns> {
    let engine: Box<dyn Engine> = match by {
        By::Nobody => return Some(Turns::new(Arc::clone(image), QUEUE, features)),
        By::Blocking => Box::new(BlockingEngine::new(Arc::clone(image.file().descriptor()))),
        // Not every host has it.
        By::Uring => Box::new(UringEngine::new(Arc::clone(image), QUEUE, None).ok()?),
    };
    Some(Turns::with_engine(Arc::clone(image), QUEUE, features, engine))
}

#[test]
fn a_request_allocates_nothing_in_steady_state() {
    let image = TestImage::new(1 << 20);
    let modes =
        [("none", false), ("writethrough", false), ("unsafe", false), ("none", true), ("writethrough", true)];
    for (mode, timed) in modes {
        let options = DiskConfig { timed, ..image.options(mode) };
        let opened = Arc::new(Image::open(&options).unwrap());
        for below in BELOW {
            for features in [F_INDIRECT, F_INDIRECT | F_EVENT_IDX] {
                for shape in shapes() {
                    let Some(mut queue) = queue(&opened, below.0, features) else { continue };
                    let seen = steady(&mut queue, shape, below);
                    let requests = BATCH * below.2;
                    let allowed = if matches!(below.0, By::Nobody) { 0 } else { GROWTHS };
                    assert!(
                        seen <= allowed,
                        "{seen} allocations by {requests} requests: {mode}, timed {timed}, {below:?}, {shape:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![0u8; 100]))), 1);
    assert_eq!(allocations(|| ()), 0);
}
