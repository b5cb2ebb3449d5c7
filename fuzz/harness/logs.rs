//! How much was logged: a logger that counts and forgets.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

static LINES: AtomicUsize = AtomicUsize::new(0);

/// Lines that one device may log in one run, whatever happens: five of each of its sources of errors
/// (R18), of which there are at most two a queue and a handful beside them.
const LINES_MAX: usize = 64;

struct Counter;

impl Log for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // Formatted as a real logger would, which may be where it goes wrong.
            let line = record.args().to_string();
            assert!(!line.contains('\n'), "a line of the log has several: {line}");
            LINES.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn flush(&self) {}
}

/// From now on lines are counted from 0. Runs of targets that log must not overlap.
pub fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Counter).expect("the only logger");
        log::set_max_level(LevelFilter::Warn);
    });
    LINES.store(0, Ordering::SeqCst);
}

/// Not too many were logged.
pub fn check() {
    let lines = LINES.load(Ordering::SeqCst);
    assert!(lines <= LINES_MAX, "R18: {lines} lines were logged");
}
