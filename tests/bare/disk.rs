//! The disk as the guest and the image's reader see it.

use std::fs;

use minivmm_testkit::dontcache;
use minivmm_testkit::machine::*;

/// One row of the modes' table, as a guest and the host's kernel see it.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    pub name: &'static str,
    pub direct: bool,
    /// RWF_DONTCACHE on each read and write.
    pub dontcache: bool,
    pub write_cache: bool,
    pub honours_flush: bool,
}

#[rustfmt::skip]
const MODES: [Mode; 6] = [
    Mode { name: "none", direct: true, dontcache: false, write_cache: true, honours_flush: true },
    Mode { name: "writeback", direct: false, dontcache: false, write_cache: true, honours_flush: true },
    Mode { name: "writethrough", direct: false, dontcache: false, write_cache: false, honours_flush: true },
    Mode { name: "directsync", direct: true, dontcache: false, write_cache: false, honours_flush: true },
    Mode { name: "unsafe", direct: false, dontcache: false, write_cache: true, honours_flush: false },
    Mode { name: "dontcache", direct: false, dontcache: true, write_cache: true, honours_flush: true },
];

/// The modes that can be had here.
pub fn modes() -> Vec<Mode> {
    dontcache::those_here(&MODES, |mode| mode.dontcache)
}

pub fn run_io(mode: Mode, entry: Entry, words: &str, image: &Image) -> Ran {
    let cmdline = format!("scenario=io {words}");
    let disk = image.disk(&format!("cache={}", mode.name));
    run_plain(entry, &cmdline, &["--disk", &disk])
}

#[test]
fn a_guest_writes_flushes_and_reads_back_in_every_mode_by_both_entries() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        for entry in ENTRIES {
            let what = format!("cache={} by {entry:?}", mode.name);
            let image = Image::new();
            let ran = run_io(mode, entry, "", &image).expect(exit(0x20), &what);
            let writeback = format!("writeback 0x0{}", u8::from(mode.write_cache));
            let lines = [
                entry.greeting(),
                &writeback,
                "wrote",
                "flushed",
                "read back what was written",
                "reset the device",
            ];
            for line in lines {
                assert!(ran.console.contains(line), "{what}: no {line:?} in\n{}", ran.console);
            }
            image.must_hold(&Image::after(), &what);
        }
    }
}

#[test]
fn a_readonly_disk_refuses_the_write_and_stays_as_it_was() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let disk = image.disk(&format!("cache={},readonly", mode.name));
        let ran = run_plain(Entry::Elf, "scenario=io", &["--disk", &disk]).expect(exit(0x18), mode.name);
        assert!(!ran.console.contains("wrote"), "{}", ran.console);
        image.must_hold(&Image::before(), mode.name);
    }
}

#[test]
fn the_guest_reads_the_serial_number_it_was_given() {
    if !kvm() {
        return;
    }
    for serial in ["x", "disk-7", "12345678901234567890"] {
        let image = Image::new();
        let disk = image.disk(&format!("cache=writeback,serial={serial}"));
        let ran = run_plain(Entry::Pvh, "scenario=io", &["--disk", &disk]).expect(exit(0x20), serial);
        assert!(ran.console.contains(&format!("id {serial}\r\n")), "{}", ran.console);
    }
}

#[test]
fn without_flush_writeback_cannot_be_turned_on() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        run_io(mode, Entry::Elf, "noflush wb=1", &image).expect(exit(0x25), mode.name);
        image.must_hold(&Image::before(), mode.name);
    }
}

#[test]
fn two_disks_are_two_devices() {
    if !kvm() {
        return;
    }
    let (first, second) = (Image::new(), Image::new());
    for (words, first_holds, second_holds) in
        [("second", Image::before(), Image::after()), ("", Image::after(), Image::after())]
    {
        let (a, b) = (first.disk("cache=writeback,serial=a"), second.disk("cache=none,serial=b"));
        let cmdline = format!("scenario=io {words}");
        run_plain(Entry::Elf, &cmdline, &["--disk", &a, "--disk", &b]).expect(exit(0x20), words);
        first.must_hold(&first_holds, "the first disk");
        second.must_hold(&second_holds, "the second disk");
    }
}

#[test]
fn after_a_reset_the_device_works_again_with_its_configured_cache() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let other = u8::from(!mode.write_cache);
        let ran =
            run_io(mode, Entry::Pvh, &format!("twice wb={other}"), &image).expect(exit(0x20), mode.name);
        let values: Vec<_> = ran.console.lines().filter(|line| line.contains("writeback 0x")).collect();
        let expected = [other, 1 - other].map(|value| format!("bare guest: writeback 0x0{value}"));
        assert_eq!(values, expected, "cache={}", mode.name);
        image.must_hold(&Image::after(), mode.name);
    }
}

#[test]
fn a_reset_waits_for_the_write_in_flight() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let disk = image.disk(&format!("cache={}", mode.name));
        run_plain(Entry::Elf, "scenario=inflight", &["--disk", &disk]).expect(exit(0x23), mode.name);
        // The write was taken or was not, but it was not torn.
        let found = fs::read(&image.path).unwrap();
        assert!(found == Image::before() || found == Image::after(), "cache={}: torn", mode.name);
    }
}

#[test]
fn no_device_answers_where_no_disk_was_given() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        run_plain(entry, "scenario=io", &[]).expect(exit(0x11), "without a disk");
    }
}
