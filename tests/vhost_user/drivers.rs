//! A front end that nobody here wrote (the crate virtio-driver): every request in every mode, several queues at once, and
//! front ends that disappear with requests in flight.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use minivmm_testkit::front_end::{FrontEnd, Queue, Request};
use minivmm_testkit::images;
use minivmm_testkit::signalled::Chance;

use super::daemon::{Daemon, Export};
use super::qemu::can_run;
use super::trials;

const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE_BYTES: u64 = 8 << 20;
const BLOCK: usize = 4096;

fn start(dir: &Path, exports: &[Export]) -> Daemon {
    for export in exports {
        let image = File::create(dir.join(export.image())).unwrap();
        image.write_all_at(&vec![0xa5; 8 << 20], 0).unwrap();
    }
    Daemon::start(dir, exports, &[])
}

fn connect(dir: &Path, export: &Export, slots: usize) -> FrontEnd {
    let queues = export.queues as usize;
    FrontEnd::connect(&dir.join(export.socket()), queues, 128, (slots, 1 << 16)).unwrap()
}

fn run(queue: &mut Queue, request: Request) -> i32 {
    queue.run(request, PATIENCE).unwrap_or_else(|error| panic!("{request:?}: {error}"))
}

#[test]
fn each_request_does_in_each_mode_what_it_is_for() {
    if !can_run(&[]) {
        return;
    }
    let dir = images::test_dir();
    let exports: Vec<_> = images::modes().into_iter().map(|mode| Export::new(mode, mode)).collect();
    let mut daemon = start(dir.path(), &exports);
    for export in &exports {
        let what = &export.name;
        let mut front_end = connect(dir.path(), export, 1);
        let config = front_end.config().unwrap();
        assert_eq!(u64::from(config.capacity) * 512, IMAGE_BYTES, "{what}");
        let queue = &mut front_end.queues[0];
        let read = |queue: &mut Queue, at, bytes| {
            assert_eq!(run(queue, Request::Read { at, bytes }), 0, "{what}");
            queue.buffer(0)[..bytes].to_vec()
        };
        assert_eq!(read(queue, 0, BLOCK), [0xa5; BLOCK], "{what}");
        for (at, bytes, byte) in
            [(0, 512, 1), (512, 65536, 2), (1 << 20, BLOCK, 3), (IMAGE_BYTES - 512, 512, 4)]
        {
            queue.buffer(0)[..bytes].fill(byte);
            assert_eq!(run(queue, Request::Write { at, bytes }), 0, "{what}");
            assert_eq!(read(queue, at, bytes), vec![byte; bytes], "{what}");
        }
        assert_eq!(run(queue, Request::Flush), 0, "{what}");
        for unmap in [false, true] {
            let at = (2 << 20) + u64::from(unmap) * 8192;
            assert_eq!(run(queue, Request::WriteZeroes { at, bytes: 8192, unmap }), 0, "{what}");
            assert_eq!(read(queue, at, 8192), [0; 8192], "{what}");
        }
        assert_eq!(run(queue, Request::Discard { at: 3 << 20, bytes: 1 << 20 }), 0, "{what}");
        // Past the end: refused, and nothing is hurt.
        assert_eq!(run(queue, Request::Read { at: IMAGE_BYTES, bytes: 512 }), -libc::EIO, "{what}");
        assert_eq!(run(queue, Request::Write { at: IMAGE_BYTES - 512, bytes: 1024 }), -libc::EIO, "{what}");
        drop(front_end);
        let image = fs::read(dir.path().join(export.image())).unwrap();
        assert_eq!(image.len() as u64, IMAGE_BYTES, "{what}");
        assert_eq!(image[..512], [1; 512], "{what}");
        assert_eq!(image[512..512 + 65536], [2; 65536], "{what}");
        assert_eq!(image[2 << 20..(2 << 20) + 16384], [0; 16384], "{what}");
        assert_eq!(image[image.len() - 512..], [4; 512], "{what}");
        daemon.is_alive();
    }
    daemon.stop();
}

/// Keeps `depth` requests in flight on blocks of its own, each written and then read again, until `count` were verified.
fn write_and_verify(queue: &mut Queue, blocks: std::ops::Range<u64>, depth: usize, count: usize, seed: u64) {
    let mut chance = Chance::new(seed);
    let share = (blocks.end - blocks.start) / depth as u64;
    // A slot's block and byte, and whether it is being read.
    let mut slots = vec![(0, 0_u8, true); depth];
    let mut completed: Vec<_> = (0..depth).map(|slot| (slot, 0)).collect();
    let (mut verified, mut begun) = (0, false);
    while verified < count {
        for (slot, result) in std::mem::take(&mut completed) {
            assert_eq!(result, 0, "{:?}", slots[slot]);
            let (at, byte, reading) = slots[slot];
            if reading {
                if begun && at > 0 {
                    assert!(queue.buffer(slot)[..BLOCK].iter().all(|found| *found == byte), "block {at}");
                    verified += 1;
                }
                let at = (blocks.start + slot as u64 * share + chance.below(share)) * BLOCK as u64;
                let byte = u8::try_from(chance.below(255)).unwrap();
                slots[slot] = (at, byte, false);
                queue.buffer(slot)[..BLOCK].fill(byte);
                queue.submit(slot, Request::Write { at, bytes: BLOCK }).unwrap();
            } else {
                slots[slot].2 = true;
                queue.buffer(slot)[..BLOCK].fill(!byte);
                queue.submit(slot, Request::Read { at, bytes: BLOCK }).unwrap();
            }
        }
        begun = true;
        queue.notify().unwrap();
        queue.take(&mut completed);
        if completed.is_empty() {
            queue.wait(PATIENCE).unwrap_or_else(|error| panic!("the back end hangs: {error}"));
        }
    }
    let in_flight = depth - completed.len();
    while completed.len() < depth {
        queue.take(&mut completed);
        if completed.len() < depth {
            queue.wait(PATIENCE).unwrap_or_else(|error| panic!("{in_flight} were in flight: {error}"));
        }
    }
}

#[test]
fn four_queues_verify_what_they_write_at_once() {
    if !can_run(&[]) {
        return;
    }
    let dir = images::test_dir();
    let exports = [Export::new("none", "none").queues(4), Export::new("writeback", "writeback").queues(4)];
    let daemon = start(dir.path(), &exports);
    for export in &exports {
        let mut front_end = connect(dir.path(), export, 32);
        let share = IMAGE_BYTES / BLOCK as u64 / 4;
        std::thread::scope(|threads| {
            for (index, queue) in front_end.queues.iter_mut().enumerate() {
                let begin = index as u64 * share + 1;
                threads.spawn(move || {
                    write_and_verify(queue, begin..begin + share - 1, 31, 2000, index as u64 + 1);
                });
            }
        });
    }
    daemon.stop();
}

#[test]
fn a_front_end_that_disappears_leaves_no_write_behind() {
    if !can_run(&[]) {
        return;
    }
    const SLOTS: usize = 32;
    let dir = images::test_dir();
    let exports: Vec<_> = ["none", "writeback"].map(|mode| Export::new(mode, mode)).into();
    let mut daemon = start(dir.path(), &exports);
    for trial in 0..trials() * 10 {
        let export = &exports[trial as usize % exports.len()];
        let old = u8::try_from(trial % 100).unwrap();
        let mut first = connect(dir.path(), export, SLOTS);
        submit_writes(&mut first.queues[0], SLOTS, old);
        // In the middle of it: nobody waits for a completion.
        drop(first);
        let mut second = connect(dir.path(), export, SLOTS);
        let queue = &mut second.queues[0];
        submit_writes(queue, SLOTS, old + 100);
        let mut completed = Vec::new();
        while completed.len() < SLOTS {
            queue.take(&mut completed);
            if completed.len() < SLOTS {
                queue.wait(PATIENCE).unwrap_or_else(|error| panic!("trial {trial}: {error}"));
            }
        }
        assert!(completed.iter().all(|(_, result)| *result == 0), "trial {trial}: {completed:?}");
        for slot in 0..SLOTS as u64 {
            assert_eq!(run(queue, Request::Read { at: slot << 16, bytes: 1 << 16 }), 0, "trial {trial}");
            let kept = queue.buffer(0).iter().all(|byte| *byte == old + 100);
            assert!(kept, "trial {trial}: a write of the front end before came after one of this one's");
        }
        daemon.is_alive();
    }
    daemon.stop();
}

/// Submits one large write a slot, all of this byte.
fn submit_writes(queue: &mut Queue, slots: usize, byte: u8) {
    for slot in 0..slots {
        queue.buffer(slot).fill(byte);
        queue.submit(slot, Request::Write { at: (slot as u64) << 16, bytes: 1 << 16 }).unwrap();
    }
    queue.notify().unwrap();
}

#[test]
fn a_readonly_disk_refuses_writes_of_a_driver_that_asks_all_the_same() {
    if !can_run(&[]) {
        return;
    }
    let dir = images::test_dir();
    let export = Export::new("readonly", "none").readonly();
    let daemon = start(dir.path(), std::slice::from_ref(&export));
    let mut front_end = connect(dir.path(), &export, 1);
    assert!(front_end.is_readonly());
    let queue = &mut front_end.queues[0];
    for request in
        [Request::Write { at: 0, bytes: BLOCK }, Request::WriteZeroes { at: 0, bytes: 4096, unmap: true }]
    {
        let result = run(queue, request);
        assert!(result < 0, "{request:?}: {result}");
    }
    assert_eq!(run(queue, Request::Read { at: 0, bytes: BLOCK }), 0);
    drop(front_end);
    daemon.stop();
    let image = fs::read(dir.path().join(export.image())).unwrap();
    assert!(image.iter().all(|byte| *byte == 0xa5), "it was written");
}
