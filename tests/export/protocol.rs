//! What an honest front end asks for: features, configuration, queues, memory that changes, the write cache.

use std::os::fd::AsRawFd;
use std::time::Duration;

use minivmm_testkit::images::{TestImage, modes, pattern, test_dir};

use super::daemon::Daemon;
use super::front_end::*;

/// An image of 1 MiB, in a directory that also has the socket.
pub fn image() -> (tempfile::TempDir, TestImage) {
    (test_dir(), TestImage::new(1 << 20))
}

/// `--disk` for the image, with these keys.
pub fn disk(image: &TestImage, keys: &str) -> String {
    format!("{},{keys}", image.path.display())
}

#[test]
fn every_mode_reads_what_was_written_over_every_queue() {
    for (mode, engine) in modes().into_iter().flat_map(|mode| [(mode, "auto"), (mode, "sync")]) {
        let (dir, image) = image();
        let keys = format!("cache={mode},queues=2,engine={engine}");
        let daemon = Daemon::start(dir.path(), &disk(&image, &keys));
        let mut front_end = FrontEnd::live(dir.path(), 2);
        for round in 0..40u64 {
            let (queue, sector) = ((round % 2) as u32, 8 * round);
            assert_eq!(front_end.read(queue, sector)[..512], [pattern(sector); 512], "{mode}");
            front_end.write(queue, sector, round as u8);
            assert_eq!(front_end.request(queue, FLUSH, 0, 0), 0, "{mode}");
            assert_eq!(front_end.read(1 - queue, sector), [round as u8; 4096], "{mode}");
        }
        assert!(front_end.queues.iter().all(|queue| queue.call.read().is_ok()), "{mode}: called");
        drop(front_end);
        assert_eq!(daemon.end(), 128 + libc::SIGTERM, "{mode}");
        assert_eq!(image.content()[39 * 4096..40 * 4096], [39; 4096], "{mode}");
    }
}

#[test]
fn the_device_says_what_it_is() {
    let (dir, image) = image();
    let mut daemon = Daemon::start(dir.path(), &disk(&image, "cache=writeback,queues=3,serial=here"));
    let mut front_end = FrontEnd::negotiated(dir.path());
    assert_eq!(front_end.ask(msg::GET_QUEUE_NUM, &[]), 3);
    assert!(front_end.ask(msg::GET_MAX_MEM_SLOTS, &[]) >= 32);
    let offered = front_end.ask(msg::GET_PROTOCOL_FEATURES, &[]);
    assert_eq!(offered, PROTOCOL);
    let config = front_end.config(0, 60);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 2048, "sectors");
    assert_eq!(
        (config[32], u16::from_le_bytes(config[34..36].try_into().unwrap())),
        (1, 3),
        "writeback, queues"
    );
    assert_eq!(front_end.config(30, 200)[30..], [0; 170], "what is beyond reads 0");
    daemon.assert_alive();
}

#[test]
fn a_stopped_queue_says_where_it_stood_and_goes_on_from_there() {
    let (dir, image) = image();
    let _daemon = Daemon::start(dir.path(), &disk(&image, "queues=2"));
    let mut front_end = FrontEnd::live(dir.path(), 2);
    for sector in 0..5 {
        front_end.read(0, sector);
    }
    assert_eq!((front_end.stop_queue(0), front_end.stop_queue(1)), (5, 0));
    // Nothing is served meanwhile, whoever kicks.
    front_end.put(0, 0, IN, 77, 512);
    front_end.kick(0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((front_end.used(0), front_end.status(0, 0)), (5, 0xaa));
    front_end.start_queue(0, 5);
    front_end.wait_used(0, 6);
    assert_eq!(front_end.memory.read::<512>(FrontEnd::data(0, 0)), [pattern(77); 512]);
}

#[test]
fn a_disabled_queue_waits_and_an_enabled_one_needs_no_kick_for_what_is_there() {
    let (dir, image) = image();
    let _daemon = Daemon::start(dir.path(), &disk(&image, "queues=1"));
    let mut front_end = FrontEnd::live(dir.path(), 1);
    front_end.read(0, 1);
    front_end.set(msg::SET_VRING_ENABLE, &state(0, 0), &[]);
    front_end.put(0, 0, IN, 9, 512);
    front_end.kick(0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(front_end.used(0), 1);
    front_end.set(msg::SET_VRING_ENABLE, &state(0, 1), &[]);
    front_end.wait_used(0, 2);
    assert_eq!(front_end.status(0, 0), 0);
}

#[test]
fn memory_changes_under_a_running_queue() {
    let (dir, image) = image();
    let mut daemon = Daemon::start(dir.path(), &disk(&image, "queues=1"));
    let mut front_end = FrontEnd::live(dir.path(), 1);
    front_end.write(0, 8, 0x11);
    // The same memory at another place of another file, and more of it behind.
    let moved = Memory::new(2 * MEMORY);
    for page in 0..MEMORY / 4096 {
        moved.write(MEMORY + page * 4096, &front_end.memory.read::<4096>(page * 4096));
    }
    front_end.set(msg::SET_MEM_TABLE, &table(GUEST, MEMORY, USER, MEMORY), &[moved.file.as_raw_fd()]);
    front_end.memory = moved.from(MEMORY);
    assert_eq!(front_end.read(0, 8), [0x11; 4096]);
    // A region of its own for data comes and goes.
    let more = Memory::new(4096);
    let added = region(GUEST + 4 * MEMORY, 4096, USER + 4 * MEMORY, 0);
    front_end.set(msg::ADD_MEM_REG, &added, &[more.file.as_raw_fd()]);
    front_end.put(0, 0, IN, 8, 0);
    let header = GUEST + 0x3000;
    front_end.put_chain(
        0,
        6,
        &[(header, 16, 0), (GUEST + 4 * MEMORY, 4096, WRITE), (GUEST + 0x4000, 1, WRITE)],
    );
    front_end.kick(0);
    front_end.wait_used(0, 4);
    assert_eq!(more.read::<4096>(0), [0x11; 4096]);
    front_end.set(msg::REM_MEM_REG, &added, &[]);
    front_end.put_chain(
        0,
        9,
        &[(header, 16, 0), (GUEST + 4 * MEMORY, 4096, WRITE), (GUEST + 0x4000, 1, WRITE)],
    );
    front_end.kick(0);
    front_end.wait_used(0, 5);
    assert_eq!(front_end.status(0, 0), 1, "IOERR: that memory is gone");
    assert_eq!(front_end.read(0, 8), [0x11; 4096]);
    daemon.assert_alive();
}

/// How many writes were made stable by themselves, and how many fdatasyncs there were.
fn stable(daemon: &Daemon) -> (u64, u64) {
    let calls = daemon.stats()["host_calls"].clone();
    (calls["pwritev_dsync"].as_u64().unwrap(), calls["fdatasync"].as_u64().unwrap())
}

fn counted(dir: &std::path::Path, image: &TestImage, keys: &str) -> Daemon {
    Daemon::with(dir, &["--disk", &disk(image, keys), "--socket", "s", "--stats=stats"])
}

#[test]
fn the_write_cache_is_switched_as_over_pci_and_stays_off_over_a_reset() {
    let (dir, image) = image();
    let daemon = counted(dir.path(), &image, "cache=writeback,queues=1,stable=dsync");
    let mut front_end = FrontEnd::live(dir.path(), 1);
    front_end.write(0, 0, 1);
    let (dsyncs, syncs) = stable(&daemon);
    assert_eq!((dsyncs, front_end.config(32, 1)), (0, vec![1]));
    front_end.set_writeback(false);
    assert_eq!(front_end.config(32, 1), [0]);
    front_end.write(0, 8, 2);
    assert_eq!(stable(&daemon), (1, syncs + 1), "what was volatile is synced, the next write is stable");
    // QEMU keeps its copy of the byte over a reset, so the device does.
    front_end.set(msg::RESET_DEVICE, &[], &[]);
    assert_eq!(front_end.config(32, 1), [0]);
    front_end.memory = Memory::new(MEMORY);
    front_end.queues.clear();
    front_end.set_number(msg::SET_FEATURES, FEATURES & !(1 << 12)).unwrap();
    front_end.share_memory();
    front_end.add_queue();
    front_end.start_queue(0, 0);
    front_end.write(0, 16, 3);
    assert_eq!(stable(&daemon).0, 2);
    front_end.set_writeback(true);
    front_end.write(0, 24, 4);
    assert_eq!(stable(&daemon).0, 2);
    drop(front_end);
    // A new front end finds the device as new.
    let mut front_end = FrontEnd::live(dir.path(), 1);
    assert_eq!(front_end.config(32, 1), [1]);
}

#[test]
fn before_the_features_are_known_the_switch_works_as_well() {
    let (dir, image) = image();
    let daemon = counted(dir.path(), &image, "cache=writeback,queues=1,stable=dsync");
    let mut front_end = FrontEnd::connect(dir.path());
    front_end.ask(msg::GET_FEATURES, &[]);
    front_end.set_number(msg::SET_PROTOCOL_FEATURES, PROTOCOL).unwrap();
    front_end.set_writeback(false);
    front_end.set_number(msg::SET_FEATURES, FEATURES & !(1 << 12)).unwrap();
    front_end.share_memory();
    front_end.add_queue();
    front_end.start_queue(0, 0);
    front_end.write(0, 0, 1);
    assert_eq!(stable(&daemon).0, 1);
}

#[test]
fn a_disk_that_only_reads_says_so_and_refuses_writes() {
    let (dir, image) = image();
    let _daemon = Daemon::start(dir.path(), &disk(&image, "readonly,queues=1"));
    let mut front_end = FrontEnd::live(dir.path(), 1);
    assert_ne!(front_end.ask(msg::GET_FEATURES, &[]) & 1 << 5, 0, "RO");
    assert_eq!(front_end.request(0, OUT, 0, 512), 1, "IOERR");
    assert_eq!(front_end.read(0, 0)[..512], [pattern(0); 512]);
}
