//! A daemon that is killed with requests in flight, and its successor under a driver that goes on.

use std::os::fd::AsRawFd;
use std::time::Duration;

use minivmm_testkit::images::pattern;

use super::daemon::Daemon;
use super::front_end::*;
use super::protocol::{disk, image};

/// A front end with one queue and an inflight region, which it keeps.
struct Keeper {
    front_end: FrontEnd,
    description: Vec<u8>,
    region: std::fs::File,
}

impl Keeper {
    fn new(dir: &std::path::Path) -> Self {
        let mut front_end = FrontEnd::negotiated(dir);
        front_end.share_memory();
        let (description, region) = front_end.get_inflight(1);
        front_end.set(msg::SET_INFLIGHT_FD, &description, &[region.as_raw_fd()]);
        front_end.add_queue();
        front_end.start_queue(0, 0);
        Self { front_end, description, region }
    }

    /// Connects to the successor as QEMU does: with the same memory and region, and used.idx as the queue's base.
    fn reconnect(self, dir: &std::path::Path) -> Self {
        let Self { front_end: before, description, region } = self;
        let mut front_end = FrontEnd::negotiated(dir);
        front_end.carry_on(before);
        front_end.share_memory();
        front_end.set(msg::SET_INFLIGHT_FD, &description, &[region.as_raw_fd()]);
        let base = u32::from(front_end.used(0));
        front_end.start_queue(0, base);
        Self { front_end, description, region }
    }
}

#[test]
fn what_was_in_flight_at_a_kill_is_done_and_what_was_acknowledged_is_not_done_again() {
    let (dir, image) = image();
    // Writes wait before they begin, so they are in flight at the kill and not done.
    let slow = disk(&image, "cache=writeback,queues=1,fault=delay=60s:write");
    let daemon = Daemon::start(dir.path(), &slow);
    let mut keeper = Keeper::new(dir.path());
    let front_end = &mut keeper.front_end;
    for (slot, sector) in [(2, 16), (0, 0), (3, 24)] {
        front_end.memory.write(FrontEnd::data(0, slot), &[slot as u8 + 0x40; 4096]);
        front_end.put(0, slot, OUT, sector, 4096);
    }
    front_end.kick(0);
    // Reads overtake them, and are returned.
    for round in 0..20u64 {
        front_end.put(0, 1, IN, 100 + round, 512);
        front_end.kick(0);
        front_end.wait_used(0, round as u16 + 1);
        assert_eq!(front_end.memory.read::<512>(FrontEnd::data(0, 1)), [pattern(100 + round); 512]);
    }
    daemon.kill();
    assert_eq!(image.content()[..512], [pattern(0); 512], "nothing was written");
    // A read again would show here.
    front_end.memory.write(FrontEnd::data(0, 1), &[0xcc; 512]);
    front_end.put(0, 4, IN, 200, 512);
    let daemon = Daemon::start(dir.path(), &disk(&image, "cache=writeback,queues=1"));
    let keeper = keeper.reconnect(dir.path());
    let front_end = &keeper.front_end;
    front_end.wait_used(0, 24);
    let last: Vec<u16> = front_end.used_heads(0)[20..].to_vec();
    assert_eq!([0, 2, 3, 4].map(|slot| front_end.status(0, slot)), [0; 4]);
    let mut sorted = last.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [0, 6, 9, 12], "each came back once: {last:?}");
    assert_eq!(front_end.memory.read::<512>(FrontEnd::data(0, 1)), [0xcc; 512], "no read was repeated");
    for (slot, sector) in [(2, 16), (0, 0), (3, 24)] {
        assert_eq!(image.content()[sector * 512..][..4096], [slot + 0x40; 4096]);
    }
    let mut keeper = keeper;
    assert_eq!(keeper.front_end.stop_queue(0), 24);
    drop(keeper);
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
}

#[test]
fn kills_at_any_moment_lose_nothing_and_repeat_nothing() {
    for engine in ["auto", "sync"] {
        kill_at_any_moment(engine);
    }
}

fn kill_at_any_moment(engine: &str) {
    let (dir, image) = image();
    let keys = disk(&image, &format!("cache=writeback,queues=1,engine={engine}"));
    let mut daemon = Daemon::start(dir.path(), &keys);
    let mut keeper = Keeper::new(dir.path());
    let (mut expected, mut made) = ([0u8; 4], 0u16);
    for round in 1..=12u64 {
        // Each slot writes its own sectors, one write in flight each; some complete before the kill.
        let front_end = &mut keeper.front_end;
        for slot in 0..4u16 {
            expected[usize::from(slot)] = (round * 16 + u64::from(slot)) as u8;
            front_end.memory.write(FrontEnd::data(0, slot), &[expected[usize::from(slot)]; 4096]);
            front_end.put(0, slot, OUT, 8 * u64::from(slot), 4096);
            made += 1;
            front_end.kick(0);
        }
        std::thread::sleep(Duration::from_micros(150 * (round - 1)));
        daemon.kill();
        daemon = Daemon::start(dir.path(), &keys);
        keeper = keeper.reconnect(dir.path());
        keeper.front_end.wait_used(0, made);
        for slot in 0..4u16 {
            assert_eq!(keeper.front_end.status(0, slot), 0, "round {round}");
            let at = usize::from(slot) * 4096;
            assert_eq!(image.content()[at..at + 4096], [expected[usize::from(slot)]; 4096], "round {round}");
        }
    }
}

#[test]
fn the_write_cache_that_a_driver_has_switched_off_stays_off_over_a_kill() {
    let (dir, image) = image();
    let keys = disk(&image, "cache=writeback,queues=1,stable=dsync");
    let words = ["--disk", &keys, "--socket", "s", "--stats=stats"];
    let daemon = Daemon::with(dir.path(), &words);
    let mut keeper = Keeper::new(dir.path());
    keeper.front_end.set_writeback(false);
    keeper.front_end.write(0, 0, 1);
    daemon.kill();
    let daemon = Daemon::with(dir.path(), &words);
    let mut keeper = keeper.reconnect(dir.path());
    // QEMU does not ask for the byte again.
    keeper.front_end.write(0, 8, 2);
    assert_eq!(daemon.stats()["host_calls"]["pwritev_dsync"], 1, "{}", daemon.log());
    keeper.front_end.set_writeback(true);
    daemon.kill();
    let daemon = Daemon::with(dir.path(), &words);
    let mut keeper = keeper.reconnect(dir.path());
    keeper.front_end.write(0, 16, 3);
    assert_eq!(daemon.stats()["host_calls"]["pwritev_dsync"], 0, "the driver had switched it on again");
}

#[test]
fn a_sync_that_failed_is_not_forgotten_by_the_successor_of_a_driver_that_goes_on() {
    let (dir, image) = image();
    let failing = disk(&image, "cache=writeback,queues=1,fault=flush-fail=once");
    let daemon = Daemon::start(dir.path(), &failing);
    let mut keeper = Keeper::new(dir.path());
    keeper.front_end.write(0, 0, 1);
    assert_eq!(keeper.front_end.request(0, FLUSH, 0, 0), 1, "IOERR");
    daemon.kill();
    let keys = disk(&image, "cache=writeback,queues=1");
    let daemon = Daemon::start(dir.path(), &keys);
    let mut keeper = keeper.reconnect(dir.path());
    assert_eq!(keeper.front_end.request(0, FLUSH, 0, 0), 1, "IOERR still");
    assert_eq!(keeper.front_end.read(0, 0), [1; 4096]);
    drop(keeper);
    assert_eq!(daemon.end(), 125);
    // A driver that begins anew is another matter.
    let daemon = Daemon::start(dir.path(), &keys);
    let mut keeper = Keeper::new(dir.path());
    assert_eq!(keeper.front_end.request(0, FLUSH, 0, 0), 0);
    drop(keeper);
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
}

#[test]
fn without_a_region_a_driver_of_unknown_write_cache_gets_stable_writes() {
    let (dir, image) = image();
    let keys = disk(&image, "cache=writeback,queues=1,stable=dsync");
    let words = ["--disk", &keys, "--socket", "s", "--stats=stats"];
    let daemon = Daemon::with(dir.path(), &words);
    let mut front_end = FrontEnd::live(dir.path(), 1);
    front_end.set_writeback(false);
    front_end.write(0, 0, 1);
    daemon.kill();
    let daemon = Daemon::with(dir.path(), &words);
    let mut after = FrontEnd::negotiated(dir.path());
    after.carry_on(front_end);
    after.share_memory();
    let base = u32::from(after.used(0));
    after.start_queue(0, base);
    after.write(0, 8, 2);
    assert_eq!(daemon.stats()["host_calls"]["pwritev_dsync"], 1);
    daemon.says("write-cache setting is not known");
}

#[test]
fn a_region_of_lies_is_the_front_end_s_own_harm() {
    let (dir, image) = image();
    let mut daemon = Daemon::start(dir.path(), &disk(&image, "queues=1"));
    for fill in [0xff, 0x01, 0x55] {
        let keeper = Keeper::new(dir.path());
        let Keeper { front_end, description, region } = keeper;
        let bytes = region.metadata().unwrap().len();
        let memory = Memory::of(region.try_clone().unwrap(), bytes);
        memory.write(0, &vec![fill; bytes as usize]);
        if fill == 0x55 {
            // Version 1, so that the lies are believed.
            memory.write(8, &[1, 0]);
        }
        drop(front_end);
        let mut liar = FrontEnd::negotiated(dir.path());
        liar.share_memory();
        liar.set(msg::SET_INFLIGHT_FD, &description, &[region.as_raw_fd()]);
        liar.add_queue();
        let (kick, at) = (liar.queues[0].kick.as_raw_fd(), [USER, USER + 0x2000, USER + 0x1000, 0]);
        let at: Vec<u8> = at.iter().flat_map(|word| word.to_le_bytes()).collect();
        let _ = liar.acknowledged(msg::SET_VRING_NUM, &state(0, 16), &[]);
        let _ = liar.acknowledged(msg::SET_VRING_ADDR, &[state(0, 0), at].concat(), &[]);
        let _ = liar.acknowledged(msg::SET_VRING_KICK, &[0; 8], &[kick]);
        let _ = liar.acknowledged(msg::SET_VRING_ENABLE, &state(0, 1), &[]);
        std::thread::sleep(Duration::from_millis(20));
        daemon.assert_alive();
        drop(liar);
        assert_eq!(FrontEnd::live(dir.path(), 1).read(0, 3)[..512], [pattern(3); 512]);
    }
}
