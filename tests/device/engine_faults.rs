//! What an engine may do wrong and the disk's state machine must not believe; and how much a guest
//! can make us log (R18), in a process whose log is its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use minivmm::disk::disk_queue::StableBy;
use minivmm_testkit::alone;
use minivmm_testkit::driver::*;
use minivmm_testkit::engines::{Fate, Kind, Scripted};
use minivmm_testkit::images::TestImage;

use super::FORKS;

#[test]
fn zeroes_that_an_engine_claims_beyond_what_it_was_given_are_not_written() {
    // 1 MiB of zeroes goes in pieces of 256 KiB; the first claims to be all of it, or half.
    for claim in [1 << 20, 512 << 10, (256 << 10) + 512] {
        let test = TestImage::new(2 << 20);
        let image = test.open("none");
        let script = move |kind, before| match kind {
            Kind::Zero | Kind::Punch => Fate::Fails(libc::EOPNOTSUPP),
            Kind::Write if before == 0 => Fate::Claims(claim),
            _ => Fate::Real,
        };
        let (engine, _) = Scripted::with_log(&image, Box::new(script));
        let mut rig = Rig::with_engine(image, engine, StableBy::Dsync);
        rig.start(F_WRITE_ZEROES);
        let before = test.content();
        assert_eq!(rig.erase(WRITE_ZEROES, &[(0, 2048, 0)]), IOERR, "a claim of {claim}");
        assert_eq!(test.content(), before);
        assert!(!rig.needs_reset());
    }
}

#[test]
fn zeroes_that_end_short_are_continued_to_the_last_byte() {
    for step in [512, 4096, 100 << 10] {
        let test = TestImage::new(2 << 20);
        let image = test.open("none");
        let script = move |kind, before: usize| match kind {
            Kind::Zero | Kind::Punch => Fate::Fails(libc::EOPNOTSUPP),
            Kind::Write if before.is_multiple_of(2) => Fate::Short(step),
            _ => Fate::Real,
        };
        let (engine, _) = Scripted::with_log(&image, Box::new(script));
        let mut rig = Rig::with_engine(image, engine, StableBy::Dsync);
        rig.start(F_WRITE_ZEROES | F_FLUSH);
        let mut expected = test.content();
        expected[512..512 * 1801].fill(0);
        assert_eq!(rig.erase(WRITE_ZEROES, &[(1, 1000, 0), (7, 0, 0), (1001, 800, 1)]), OK);
        assert!(test.content() == expected, "in steps of {step}");
    }
}

/// Counts what is logged about guests.
struct Lines(AtomicUsize);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.level() <= log::Level::Warn {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn flush(&self) {}
}

static LINES: Lines = Lines(AtomicUsize::new(0));

/// Shows R18.
#[test]
fn a_guest_that_breaks_its_ring_again_and_again_does_not_fill_the_log() {
    if std::env::var_os("MINIVMM_TEST_LOG").is_none() {
        let test = "a_guest_that_breaks_its_ring_again_and_again_does_not_fill_the_log";
        let mut child = alone::command(module_path!(), test);
        let _alone = FORKS.lock();
        let out = child.env("MINIVMM_TEST_LOG", "1").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&[out.stdout, out.stderr].concat()));
        return;
    }
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let test = TestImage::new(1 << 20);
    let mut rig = Rig::new(test.open("none"));
    for _ in 0..200 {
        rig.start(0);
        // A header of 15 bytes is a line too, and a loop ends it.
        rig.put_chain(DESC, &[(HEADER, 15, 0), (STATUS_BYTE, 1, WRITE)]);
        rig.put_desc(DESC, 8, (DATA, 1, NEXT, 8));
        rig.make_available(&[0, 8]);
        rig.ring_doorbell();
        while !rig.needs_reset() {
            rig.wait_interrupt();
        }
    }
    let lines = LINES.0.load(Ordering::SeqCst);
    assert!((1..=30).contains(&lines), "{lines} lines in 200 rounds");
}
