//! What a front end cannot do: whatever it sends, passes or truncates costs its own connection, and the daemon serves the
//! next one.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Duration;

use minivmm_testkit::images::{TestImage, pattern, test_dir};
use vmm_sys_util::eventfd::EventFd;

use super::daemon::{Daemon, until};
use super::front_end::*;
use super::protocol::{disk, image};

fn start() -> (tempfile::TempDir, TestImage, Daemon) {
    let (dir, image) = image();
    let daemon = Daemon::start(dir.path(), &disk(&image, "cache=writeback,queues=2"));
    (dir, image, daemon)
}

/// The next front end is served as if nothing had happened.
#[track_caller]
fn next_is_served(dir: &std::path::Path, daemon: &mut Daemon) {
    daemon.assert_alive();
    let mut front_end = FrontEnd::live(dir, 2);
    assert_eq!(front_end.read(0, 5)[..512], [pattern(5); 512], "{}", daemon.log());
    assert_eq!(front_end.read(1, 6)[..512], [pattern(6); 512], "{}", daemon.log());
}

fn number(number: u64) -> Vec<u8> {
    number.to_le_bytes().to_vec()
}

#[test]
fn a_message_that_makes_no_sense_ends_the_connection() {
    let (dir, _image, mut daemon) = start();
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    let whole =
        |request, payload: &[u8]| [header(request, V1, payload.len() as u32), payload.to_vec()].concat();
    let addresses = |index: u32, words: [u64; 4]| {
        [state(index, 0), words.iter().flat_map(|word| word.to_le_bytes()).collect()].concat()
    };
    let config = |offset: u32, size: u32, data: usize| {
        [[offset, size, 0].map(u32::to_le_bytes).concat(), vec![7; data]].concat()
    };
    for (what, bytes) in [
        ("an unknown request", header(99, V1, 0)),
        ("request 0", header(0, V1, 0)),
        ("version 2", header(msg::GET_FEATURES, 2, 0)),
        ("a reply", header(msg::GET_FEATURES, 1 | 4, 0)),
        ("reserved flags", header(msg::GET_FEATURES, 1 | 1 << 9, 0)),
        ("4 GiB", header(msg::SET_FEATURES, V1, u32::MAX)),
        ("more than 4 KiB", header(msg::SET_CONFIG, V1, 4097)),
        ("a short number", whole(msg::SET_FEATURES, &[0; 4])),
        ("a long number", whole(msg::SET_FEATURES, &[0; 16])),
        ("a payload where none belongs", whole(msg::GET_FEATURES, &[0; 8])),
        ("features that were not offered", whole(msg::SET_FEATURES, &number(u64::MAX))),
        ("protocol features that were not offered", whole(msg::SET_PROTOCOL_FEATURES, &number(u64::MAX))),
        ("a ring beyond", whole(msg::SET_VRING_NUM, &state(2, 16))),
        ("a ring far beyond", whole(msg::SET_VRING_BASE, &state(u32::MAX, 0))),
        ("a base beyond", whole(msg::SET_VRING_BASE, &state(0, 1 << 16))),
        ("a base of no ring", whole(msg::GET_VRING_BASE, &state(7, 0))),
        ("enabled by 2", whole(msg::SET_VRING_ENABLE, &state(0, 2))),
        ("unaligned rings", whole(msg::SET_VRING_ADDR, &addresses(0, [USER + 1, USER, USER, 0]))),
        ("a kick without a descriptor", whole(msg::SET_VRING_KICK, &number(0))),
        ("a kick that is to be polled for", whole(msg::SET_VRING_KICK, &number(0x100))),
        ("a table without descriptors", whole(msg::SET_MEM_TABLE, &table(GUEST, MEMORY, USER, 0))),
        ("an empty table", whole(msg::SET_MEM_TABLE, &number(0))),
        ("more regions than there are", whole(msg::SET_MEM_TABLE, &[number(3), vec![0; 32]].concat())),
        ("a region that was never added", whole(msg::REM_MEM_REG, &region(GUEST, MEMORY, USER, 0))),
        ("the configuration of a read-only field", whole(msg::SET_CONFIG, &config(0, 8, 8))),
        ("a configuration beyond", whole(msg::SET_CONFIG, &config(4000, 200, 200))),
        ("a configuration shorter than it says", whole(msg::SET_CONFIG, &config(32, 8, 1))),
        ("an inflight region for no queue", whole(msg::GET_INFLIGHT_FD, &[0; 24])),
        ("an inflight region for 65535 queues", whole(msg::GET_INFLIGHT_FD, &[0xff; 24])),
        ("migration", whole(6, &[0; 16])),
    ] {
        let mut front_end = FrontEnd::negotiated(dir.path());
        let _ = front_end.send_bytes(&bytes, &[]);
        front_end.is_disconnected();
        daemon.assert_alive();
        drop(front_end);
        assert_eq!(FrontEnd::negotiated(dir.path()).ask(msg::GET_QUEUE_NUM, &[]), 2, "after {what}");
    }
    next_is_served(dir.path(), &mut daemon);
}

#[test]
fn descriptors_that_are_not_what_they_must_be_end_the_connection() {
    let (dir, image, mut daemon) = start();
    let (null, file) = (File::open("/dev/null").unwrap(), File::open(&image.path).unwrap());
    let memory = Memory::new(MEMORY).file;
    let (pipe, _end) = std::io::pipe().unwrap();
    let event = EventFd::new(0).unwrap();
    let [null, file, memory, pipe, event] =
        [null.as_raw_fd(), file.as_raw_fd(), memory.as_raw_fd(), pipe.as_raw_fd(), event.as_raw_fd()];
    let guest_table = table(GUEST, MEMORY, USER, 0);
    let two = [&2u64.to_le_bytes()[..], &guest_table[8..], &guest_table[8..]].concat();
    for (what, request, payload, fds) in [
        ("a pipe to kick", msg::SET_VRING_KICK, number(0), vec![pipe]),
        ("a file to call", msg::SET_VRING_CALL, number(0), vec![file]),
        ("a device for errors", msg::SET_VRING_ERR, number(0), vec![null]),
        ("memory to kick", msg::SET_VRING_KICK, number(0), vec![memory]),
        ("two eventfds", msg::SET_VRING_KICK, number(0), vec![event, event]),
        ("an eventfd that the message denies", msg::SET_VRING_KICK, number(0x100), vec![event]),
        ("an eventfd of no ring", msg::SET_VRING_CALL, number(200), vec![event]),
        ("a descriptor where none belongs", msg::GET_FEATURES, vec![], vec![event]),
        ("an eventfd as memory", msg::SET_MEM_TABLE, guest_table.clone(), vec![event]),
        ("a device as memory", msg::SET_MEM_TABLE, guest_table.clone(), vec![null]),
        ("memory that cannot be written", msg::SET_MEM_TABLE, guest_table.clone(), vec![file]),
        ("more descriptors than regions", msg::SET_MEM_TABLE, guest_table.clone(), vec![memory, memory]),
        ("a region twice", msg::SET_MEM_TABLE, two, vec![memory, memory]),
        (
            "a region longer than its file",
            msg::SET_MEM_TABLE,
            table(GUEST, 2 * MEMORY, USER, 0),
            vec![memory],
        ),
        ("a region of 2^63 bytes", msg::SET_MEM_TABLE, table(0, 1 << 63, 0, 0), vec![memory]),
        ("a region that wraps", msg::ADD_MEM_REG, region(u64::MAX - 4095, 8192, USER, 0), vec![memory]),
        ("an unaligned offset", msg::ADD_MEM_REG, region(GUEST, 4096, USER, 100), vec![memory]),
        (
            "a short inflight region",
            msg::SET_INFLIGHT_FD,
            [&[16, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8], &[2, 0, 16, 0, 0, 0, 0, 0]].concat(),
            vec![memory],
        ),
    ] {
        let mut front_end = FrontEnd::negotiated(dir.path());
        let answer = front_end.acknowledged(request, &payload, &fds);
        assert!(!matches!(answer, Ok(0)), "{what} was accepted");
        front_end.is_disconnected();
        daemon.assert_alive();
    }
    assert_eq!(event_count(event), 0, "nothing was written to what was refused");
    next_is_served(dir.path(), &mut daemon);
}

fn event_count(fd: i32) -> u64 {
    let mut count = 0u64;
    // SAFETY: the descriptor is an eventfd that its test keeps open; O_NONBLOCK keeps the read from waiting.
    unsafe {
        libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK);
        libc::read(fd, (&raw mut count).cast(), 8);
    }
    count
}

#[test]
fn more_descriptors_than_one_message_may_have_leave_none_open() {
    let (dir, _image, mut daemon) = start();
    let open = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).map(Iterator::count);
    // A process that is not dumpable shows its descriptors to root alone.
    let before = open().ok();
    let event = EventFd::new(0).unwrap();
    for count in [33, 100, 253] {
        let mut front_end = FrontEnd::negotiated(dir.path());
        let _ = front_end.send(msg::SET_VRING_KICK, V1, &number(0), &vec![event.as_raw_fd(); count]);
        front_end.is_disconnected();
    }
    if let Some(before) = before {
        until("the descriptors are closed", || open().unwrap() <= before);
    }
    next_is_served(dir.path(), &mut daemon);
}

#[test]
fn rings_outside_the_memory_are_refused_and_rings_over_each_other_harm_nobody_else() {
    let (dir, _image, mut daemon) = start();
    for (what, rings) in [
        ("outside", [USER + MEMORY, USER + MEMORY, USER + MEMORY]),
        ("guest addresses in place of the front end's", [GUEST, GUEST + 0x2000, GUEST + 0x1000]),
        ("across the end", [USER + MEMORY - 16, USER + 0x2000, USER + 0x1000]),
    ] {
        let mut front_end = FrontEnd::negotiated(dir.path());
        front_end.share_memory();
        front_end.add_queue();
        let words: Vec<u8> =
            [rings[0], rings[1], rings[2], 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        front_end.set(msg::SET_VRING_NUM, &state(0, 16), &[]);
        front_end.set(msg::SET_VRING_ADDR, &[state(0, 0), words].concat(), &[]);
        let kick = front_end.queues[0].kick.as_raw_fd();
        front_end.set(msg::SET_VRING_KICK, &number(0), &[kick]);
        let enabled = front_end.acknowledged(msg::SET_VRING_ENABLE, &state(0, 1), &[]);
        assert!(!matches!(enabled, Ok(0)), "{what}");
        front_end.is_disconnected();
    }
    for size in [0u32, 3, 512, 1 << 16, u32::MAX] {
        let mut front_end = FrontEnd::negotiated(dir.path());
        front_end.share_memory();
        front_end.add_queue();
        let kick = front_end.queues[0].kick.as_raw_fd();
        let at: Vec<u8> =
            [USER, USER + 0x2000, USER + 0x1000, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        front_end.set(msg::SET_VRING_ADDR, &[state(0, 0), at].concat(), &[]);
        front_end.set(msg::SET_VRING_KICK, &number(0), &[kick]);
        front_end.set(msg::SET_VRING_ENABLE, &state(0, 1), &[]);
        let answer = front_end.acknowledged(msg::SET_VRING_NUM, &state(0, size), &[]);
        // A size of 0 is none, so the ring is not served.
        assert_eq!(matches!(answer, Ok(0)), size == 0, "{size}");
    }
    // All three parts and both rings in one place.
    let mut front_end = FrontEnd::negotiated(dir.path());
    front_end.share_memory();
    for index in 0..2 {
        front_end.add_queue();
        let at: Vec<u8> = [USER, USER, USER, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let kick = front_end.queues[index as usize].kick.as_raw_fd();
        front_end.set(msg::SET_VRING_NUM, &state(index, 16), &[]);
        front_end.set(msg::SET_VRING_ADDR, &[state(index, 0), at].concat(), &[]);
        front_end.set(msg::SET_VRING_KICK, &number(u64::from(index)), &[kick]);
        front_end.set(msg::SET_VRING_ENABLE, &state(index, 1), &[]);
    }
    for byte in 0..=255u8 {
        front_end.memory.write(u64::from(byte), &[byte.wrapping_mul(37)]);
        front_end.kick(u32::from(byte % 2));
    }
    std::thread::sleep(Duration::from_millis(50));
    drop(front_end);
    next_is_served(dir.path(), &mut daemon);
}

#[test]
fn chains_that_lead_astray_are_a_hostile_guest_s() {
    let (dir, _image, mut daemon) = start();
    let mut front_end = FrontEnd::live(dir.path(), 2);
    let (header, status) = (GUEST + 0x3000, GUEST + 0x4000);
    assert_eq!(front_end.request(0, IN, 0, 512), 0);
    // Data that is nowhere, or the front end's own addresses: IOERR.
    for (count, addr) in [(2, 0), (3, GUEST + MEMORY - 256), (4, USER), (5, u64::MAX - 255)] {
        front_end.put_chain(0, 3, &[(header, 16, 0), (addr, 512, WRITE), (status, 1, WRITE)]);
        front_end.kick(0);
        front_end.wait_used(0, count);
        assert_eq!(front_end.status(0, 0), 1, "{addr:#x}");
    }
    // A loop: the ring cannot be followed any more, and its err eventfd says so.
    front_end.memory.write(16 * 10, &[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 10, 0]);
    front_end.make_available(0, 10);
    front_end.kick(0);
    until("the err eventfd is written", || front_end.queues[0].err.read().is_ok());
    assert_eq!(front_end.read(1, 3)[..512], [pattern(3); 512], "the other queue goes on");
    // Started anew, it works again.
    front_end.stop_queue(0);
    front_end.start_queue(0, 6);
    front_end.put(0, 0, IN, 4, 512);
    front_end.kick(0);
    front_end.wait_used(0, 6);
    assert_eq!(front_end.status(0, 0), 0, "{}", daemon.log());
    daemon.assert_alive();
}

#[test]
fn memory_that_is_truncated_costs_the_connection_alone() {
    for (what, rest) in [("all of it", 0), ("what is behind the rings", 0x1_0000)] {
        let (dir, image) = image();
        let other = TestImage::new(1 << 20);
        let others = test_dir();
        std::os::unix::fs::symlink(others.path(), dir.path().join("other")).unwrap();
        let words = [
            "--disk",
            &disk(&image, "cache=writeback,queues=1"),
            "--socket",
            "s",
            "--disk",
            &disk(&other, "queues=1"),
            "--socket",
            "other/s",
        ];
        let mut daemon = Daemon::with(dir.path(), &words);
        let mut unharmed = FrontEnd::live(others.path(), 1);
        let mut front_end = FrontEnd::live(dir.path(), 1);
        front_end.write(0, 0, 1);
        front_end.put(0, 1, OUT, 8, 4096);
        front_end.put(0, 2, IN, 16, 4096);
        front_end.memory.file.set_len(rest).unwrap();
        front_end.kick(0);
        if rest == 0 {
            front_end.is_disconnected();
            daemon.says("has truncated memory");
        } else {
            // The kernel's own accesses fail by EFAULT: IOERR, and the rings are still there.
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon.assert_alive();
        assert_eq!(unharmed.read(0, 7)[..512], [pattern(7); 512], "{what}");
        drop(front_end);
        let mut next = FrontEnd::live(dir.path(), 1);
        assert_eq!(next.read(0, 0), [1; 4096], "{what}");
        let kept = image.content()[8 * 512..8 * 512 + 512].to_vec();
        assert!(kept == [pattern(8); 512] || kept == [0; 512], "{what}: never anybody else's data");
        drop((next, unharmed));
        assert_eq!(daemon.end(), 128 + libc::SIGTERM);
    }
}

#[test]
fn whoever_disappears_with_requests_in_flight_leaves_the_disk_to_the_next() {
    let (dir, image) = image();
    let mut daemon =
        Daemon::start(dir.path(), &disk(&image, "cache=writeback,queues=2,fault=delay=100ms:write"));
    for round in 0..5u64 {
        let mut front_end = FrontEnd::live(dir.path(), 2);
        for slot in 0..4 {
            front_end.memory.write(FrontEnd::data(0, slot), &[round as u8 + 1; 4096]);
            front_end.put(0, slot, OUT, 8 * u64::from(slot), 4096);
        }
        front_end.kick(0);
        std::thread::sleep(Duration::from_millis(20 * round));
        drop(front_end);
        let mut next = FrontEnd::live(dir.path(), 2);
        let first = next.read(1, 0);
        assert!(first.iter().all(|byte| *byte == first[0]) || round == 0, "whole blocks");
        drop(next);
        daemon.assert_alive();
    }
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
}

#[test]
fn half_a_message_is_not_waited_for_without_end() {
    let (dir, _image, mut daemon) = start();
    let whole = [msg::SET_FEATURES, V1, 8].map(u32::to_le_bytes).concat();
    for half in [&whole[..5], &[&whole[..], &[0; 4]].concat()] {
        let mut front_end = FrontEnd::connect(dir.path());
        front_end.stream.write_all(half).unwrap();
        front_end.is_disconnected();
        daemon.says("only a part of a message");
    }
    // What comes in pieces but comes is a message.
    let mut front_end = FrontEnd::connect(dir.path());
    for byte in [msg::GET_FEATURES, V1, 0].map(u32::to_le_bytes).concat() {
        front_end.stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    front_end.reply(msg::GET_FEATURES).unwrap();
    drop(front_end);
    next_is_served(dir.path(), &mut daemon);
}

#[test]
fn half_a_message_keeps_nobody_from_ending_the_daemon() {
    let (dir, _image, daemon) = start();
    let mut front_end = FrontEnd::connect(dir.path());
    front_end.stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
    // Nor do replies that nobody takes.
    let (dir, _image, daemon) = start();
    let mut front_end = FrontEnd::connect(dir.path());
    front_end.stream.set_nonblocking(true).unwrap();
    while front_end.send(msg::GET_FEATURES, V1, &[], &[]).is_ok() {}
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
}

#[test]
fn random_bytes_are_refused() {
    let (dir, _image, mut daemon) = start();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..50 {
        let mut front_end = FrontEnd::negotiated(dir.path());
        let bytes: Vec<u8> = (0..200)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect();
        let _ = front_end.send_bytes(&bytes, &[]);
        front_end.is_disconnected();
        daemon.assert_alive();
    }
    next_is_served(dir.path(), &mut daemon);
}
