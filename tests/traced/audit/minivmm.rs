//! minivmm audited: every mode, every negotiation, with the bare-metal guest.

use std::fs;

use minivmm_testkit::dontcache;
use minivmm_testkit::machine::*;

use super::host::File;
use super::rules::{Audit, Finding};
use super::{NEGOTIATIONS, strace, strace_is_here};

/// Mode, whether the guest sees a write cache, whether it honours FLUSH.
const MODES: [(&str, bool, bool); 6] = [
    ("none", true, true),
    ("writeback", true, true),
    ("writethrough", false, true),
    ("directsync", false, true),
    ("unsafe", true, false),
    ("dontcache", true, true),
];

/// The modes that can be had here.
pub fn modes() -> Vec<(&'static str, bool, bool)> {
    dontcache::those_here(&MODES, |mode| mode.0 == "dontcache")
}

fn audit(mode: &str, words: &str) -> Audit {
    audit_with(mode, words, &[], exit(0x2a))
}

/// `faults` are strace's: calls that are not made and seem to fail. `status`: how minivmm then ends.
fn audit_with(mode: &str, words: &str, faults: &[&str], status: i32) -> Audit {
    let image = Image::new();
    let (log, console) = (image.path.with_extension("strace"), image.path.with_extension("console"));
    let mut strace = strace(&log);
    strace.args(faults.iter().flat_map(|fault| ["-e", fault])).arg(binary());
    start(&mut strace, Entry::Pvh, &format!("scenario=audit {words}"));
    strace.arg("--console").arg(format!("file={}", console.display())).args(["--timeout", "60", "--disk"]);
    strace.arg(image.disk(&format!("cache={mode},engine=sync")));
    let what = format!("cache={mode} {words}");
    run(&mut strace, b"").expect(status, &what);
    let trace = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
    assert_eq!(trace.contains("(INJECTED)"), !faults.is_empty(), "{what}: did the fault strike?");
    let console = File::Path(console.to_str().unwrap().into());
    Audit::of(&trace, image.path.to_str().unwrap(), &console).unwrap_or_else(|e| panic!("{what}: {e}"))
}

#[test]
fn every_mode_keeps_what_it_acknowledges_and_unsafe_does_not() {
    if !kvm() || !strace_is_here() {
        return;
    }
    for (mode, write_cache, honours_flush) in modes() {
        for (words, stable_with_cache) in NEGOTIATIONS {
            let audit = audit(mode, words);
            println!("cache={mode} {words:14} {audit}");
            let what = format!("cache={mode} {words}: {audit}");
            let flushes = !words.contains("noflush");
            let stable = stable_with_cache || !write_cache;
            assert_eq!(audit.writes, 8, "{what}");
            assert_eq!(audit.flushes, if flushes { 6 } else { 0 }, "{what}");
            assert_eq!(audit.stable_writes, if stable { 8 } else { 0 }, "{what}");
            if honours_flush {
                // Not even a FLUSH that has nothing to do goes without a sync of its own.
                assert_eq!(audit.findings, [], "{what}");
            } else {
                must_find_everything(&audit, flushes, stable, &what);
            }
        }
    }
}

#[test]
fn a_sync_that_fails_is_told_and_no_later_one_is_trusted() {
    if !kvm() || !strace_is_here() {
        return;
    }
    for mode in ["none", "writeback"] {
        // strace counts in each thread: the worker's second fdatasync is the second FLUSH's.
        let fault = "inject=fdatasync:error=EIO:when=2";
        let audit = audit_with(mode, "", &[fault], FAILURE);
        assert_eq!((audit.writes, audit.flushes), (8, 1), "cache={mode}: {audit}");
        assert_eq!(audit.findings, [], "cache={mode}: {audit}");
        // Its first is for the cache that was turned off. Writes that must be stable fail from there on.
        let audit = audit_with(mode, "wb=0", &[fault], FAILURE);
        assert_eq!((audit.writes, audit.flushes), (2, 0), "cache={mode} wb=0: {audit}");
        assert_eq!(audit.findings, [], "cache={mode} wb=0: {audit}");
    }
}

#[test]
fn a_stable_write_that_fails_is_a_failed_sync() {
    if !kvm() || !strace_is_here() {
        return;
    }
    // The first FLUSH comes before the third write.
    for (mode, words, flushes) in
        [("writethrough", "", 1), ("directsync", "", 1), ("none", "noflush nowce", 0)]
    {
        let audit = audit_with(mode, words, &["inject=pwritev2:error=EIO:when=3"], FAILURE);
        assert_eq!((audit.writes, audit.flushes), (2, flushes), "cache={mode} {words}: {audit}");
        assert_eq!(audit.findings, [], "cache={mode} {words}: {audit}");
    }
}

#[test]
fn calls_that_are_interrupted_are_made_again() {
    if !kvm() || !strace_is_here() {
        return;
    }
    for (mode, call) in [("writeback", "pwritev"), ("writethrough", "pwritev2"), ("none", "fdatasync")] {
        let fault = format!("inject={call}:error=EINTR:when=2+2");
        let audit = audit_with(mode, "", &[&fault], exit(0x2a));
        assert_eq!((audit.writes, audit.flushes), (8, 6), "cache={mode}: {audit}");
        assert_eq!(audit.findings, [], "cache={mode}: {audit}");
    }
}

/// The control: where nothing is ever synced, each promise is broken and each is found.
pub fn must_find_everything(audit: &Audit, flushes: bool, stable: bool, what: &str) {
    let count = |wanted: fn(&Finding) -> bool| audit.findings.iter().filter(|f| wanted(f)).count();
    let not_stable = count(|f| matches!(f, Finding::WriteNotStable { .. }));
    assert_eq!(not_stable, if stable { 8 } else { 0 }, "{what}");
    let elided = count(|f| matches!(f, Finding::NoSyncOfItsOwn { .. }));
    assert_eq!(elided, if flushes { 6 } else { 0 }, "{what}");
    // Writes complete before each FLUSH: 2, 4, 6, 6 (the one in flight not among them), 7, 7.
    let uncovered = count(|f| matches!(f, Finding::FlushDoesNotCover { .. }));
    assert_eq!(uncovered, if flushes { 32 } else { 0 }, "{what}");
    assert_eq!(audit.verdict(), "broken promises", "{what}");
}
