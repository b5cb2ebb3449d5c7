//! The auditor's own logic, on small traces of our making: good ones, and each way to break a promise.

use super::host::File;
use super::parse::{Answer, Position, bytes, calls, descriptor};
use super::rules::{Audit, Finding};

const IMAGE: &str = "/t/disk.img";

/// A line of the guest's log, as a VMM's thread 7 writes it out.
fn say(text: &str) -> String {
    format!("7 12:00:00.000001 write(1</t/console>, \"{text}\\r\\n\", {}) = {0} <0.000010>", text.len() + 2)
}

/// A trace of these lines: `@…` is said by the guest, the rest is strace's, by thread 9 where it names
/// none. `IMG` stands for the image's descriptor.
fn trace(lines: &[&str]) -> String {
    let line = |line: &&str| match line {
        said if said.starts_with('@') => say(said),
        call if call.starts_with(|c: char| c.is_ascii_digit()) => (*call).to_owned(),
        call => format!("9 12:00:00.000002 {call}"),
    };
    lines.iter().map(line).map(|line| line.replace("IMG", "4</t/disk.img>") + "\n").collect()
}

fn audit(lines: &[&str]) -> Audit {
    Audit::of(&trace(lines), IMAGE, &File::Path("/t/console".into())).unwrap()
}

fn refusal(lines: &[&str]) -> String {
    Audit::of(&trace(lines), IMAGE, &File::Path("/t/console".into())).unwrap_err()
}

/// The findings without their times: what, and which requests.
fn found(lines: &[&str]) -> Vec<(&'static str, u64, u64)> {
    let short = |finding: &Finding| match *finding {
        Finding::FlushDoesNotCover { flush, write, .. } => ("does not cover", flush, write),
        Finding::WriteNotStable { write, .. } => ("not stable", write, 0),
        Finding::NotWritten { write, .. } => ("not written", write, 0),
        Finding::AfterFailedSync { request, .. } => ("after failed sync", request, 0),
        Finding::NoSyncOfItsOwn { flush, .. } => ("no sync of its own", flush, 0),
        Finding::Unseen { write, .. } => ("unseen", write, 0),
    };
    audit(lines).findings.iter().map(short).collect()
}

const BACK: &str = "@N 01 01 01";
const THROUGH: &str = "@N 01 01 00";
const WRITE: &str = "pwrite64(IMG, \"x\"..., 4096, 4096) = 4096 <0.000010>";
const SYNC: &str = "fdatasync(IMG) = 0 <0.000100>";

/// A write of the eight sectors at 8 and, behind it, a FLUSH, with these calls while each is in flight.
fn write_and_flush<'a>(mode: &'a str, during_write: &[&'a str], during_flush: &[&'a str]) -> Vec<&'a str> {
    let parts: [&[&str]; 5] =
        [&[mode, "@S 01 W 0008 08"], during_write, &["@A 01 00", "@S 02 F"], during_flush, &["@A 02 00"]];
    parts.concat()
}

#[test]
fn what_keeps_the_promise_passes() {
    let vector = "pwritev(IMG, [{iov_base=\"a, (b)\", iov_len=4096}], 1, 4096) = 4096 <0.000010>";
    let dsync = "pwritev2(IMG, [{iov_base=\"x\"..., iov_len=4096}], 1, 4096, RWF_DSYNC) = 4096 <0.000010>";
    let two = [
        "pwrite64(IMG, \"x\"..., 4096, 4096) = 512 <0.000010>",
        "pwrite64(IMG, \"x\"..., 3584, 4608) = 3584",
    ];
    for (mode, during_write, during_flush) in [
        (BACK, vec![WRITE], vec![SYNC]),
        (BACK, vec![vector], vec!["fsync(IMG) = 0 <0.000100>"]),
        (BACK, two.to_vec(), vec![SYNC]),
        (BACK, vec!["pwrite64(IMG, \"x\"..., 8192, 0) = 8192"], vec![SYNC]),
        (BACK, vec!["fallocate(IMG, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 4096, 4096) = 0"], vec![SYNC]),
        (THROUGH, vec![WRITE, SYNC], vec![SYNC]),
        (THROUGH, vec![dsync], vec![SYNC]),
        (
            THROUGH,
            vec!["openat(AT_FDCWD</>, \"disk.img\", O_RDWR|O_DSYNC) = 4</t/disk.img> <0.1>", WRITE],
            vec![SYNC],
        ),
        // Interrupted, and done again.
        (THROUGH, vec![WRITE, "fdatasync(IMG) = -1 EINTR (Interrupted system call) <0.1>", SYNC], vec![SYNC]),
        (
            THROUGH,
            vec!["pwrite64(IMG, \"x\"..., 4096, 4096) = ? ERESTARTSYS (To be restarted)", WRITE, SYNC],
            vec![SYNC],
        ),
        // A sync through another descriptor of the same file.
        (BACK, vec![WRITE], vec!["fdatasync(11</t/disk.img>) = 0 <0.000100>"]),
    ] {
        assert_eq!(found(&write_and_flush(mode, &during_write, &during_flush)), [], "{during_write:?}");
    }
}

#[test]
fn each_broken_promise_is_found() {
    let none = [("no sync of its own", 2, 0), ("does not cover", 2, 1)];
    let unstable = [("not stable", 1, 0)];
    for (mode, during_write, during_flush, expected) in [
        (BACK, vec![WRITE], vec![], &none[..]),
        // Starting write-out, dropping caches, syncing something else.
        (BACK, vec![WRITE], vec!["sync_file_range(IMG, 0, 0, SYNC_FILE_RANGE_WRITE) = 0 <0.1>"], &none),
        (BACK, vec![WRITE], vec!["ioctl(IMG, BLKFLSBUF, 0) = 0 <0.1>"], &none),
        (BACK, vec![WRITE], vec!["fdatasync(5</t/other.img>) = 0 <0.1>"], &none),
        (BACK, vec![WRITE], vec!["fdatasync(5</t/disk.img.bak>) = 0 <0.1>"], &none),
        // The sync began before the write had ended; before the FLUSH was submitted.
        (
            BACK,
            vec!["8 fdatasync(IMG <unfinished ...>", WRITE, "8 <... fdatasync resumed>) = 0 <0.1>"],
            vec![],
            &none,
        ),
        (
            BACK,
            vec![WRITE, "8 fdatasync(IMG <unfinished ...>"],
            vec!["8 <... fdatasync resumed>) = 0"],
            &none[..1],
        ),
        (THROUGH, vec![WRITE], vec![SYNC], &unstable),
        (THROUGH, vec![SYNC, WRITE], vec![SYNC], &unstable),
        (THROUGH, vec![WRITE, "fdatasync(5</t/other.img>) = 0 <0.1>"], vec![SYNC], &unstable),
        // O_DIRECT alone; O_DSYNC of a descriptor that is closed; half of it.
        (
            THROUGH,
            vec!["openat(AT_FDCWD</>, \"disk.img\", O_RDWR|O_DIRECT) = 4</t/disk.img>", WRITE],
            vec![SYNC],
            &unstable,
        ),
        (
            THROUGH,
            vec!["openat(AT_FDCWD</>, \"d\", O_RDWR|O_SYNC) = 4</t/disk.img>", "close(IMG) = 0 <0.1>", WRITE],
            vec![SYNC],
            &unstable,
        ),
        (
            THROUGH,
            vec![
                "pwritev2(IMG, [{iov_base=\"x\"..., iov_len=512}], 1, 4096, RWF_DSYNC) = 512",
                "pwrite64(IMG, \"x\"..., 3584, 4608) = 3584",
            ],
            vec![SYNC],
            &unstable,
        ),
        // Errors and short transfers that are called OK.
        (
            THROUGH,
            vec!["pwrite64(IMG, \"x\"..., 4096, 4096) = -1 EIO (Input/output error)", SYNC],
            vec![SYNC],
            &[("not written", 1, 0)],
        ),
        (BACK, vec!["pwrite64(IMG, \"x\"..., 4096, 4096) = 512 <0.1>"], vec![SYNC], &[("not written", 1, 0)]),
        // Through a way that a trace does not show, or to another place: nothing is said.
        (
            BACK,
            vec!["io_uring_enter(3<anon_inode:[io_uring]>, 1, 1, 0, NULL, 8) = 1"],
            vec![SYNC],
            &[("unseen", 1, 0)],
        ),
        (BACK, vec!["pwrite64(IMG, \"x\"..., 4096, 8192) = 4096"], vec![SYNC], &[("unseen", 1, 0)]),
    ] {
        assert_eq!(
            found(&write_and_flush(mode, &during_write, &during_flush)),
            expected,
            "{during_write:?} {during_flush:?}"
        );
    }
}

#[test]
fn a_failed_sync_is_never_followed_by_an_acknowledgement() {
    let failed = "fdatasync(IMG) = -1 EIO (Input/output error) <0.1>";
    let lines = [
        BACK,
        "@S 01 W 0008 08",
        WRITE,
        "@A 01 00",
        "@S 02 F",
        failed,
        "@A 02 01",
        "@S 03 F",
        SYNC,
        "@A 03 00",
        "@S 04 W 0008 08",
        WRITE,
        "@A 04 00",
    ];
    // Under a write cache a write promises nothing.
    assert_eq!(found(&lines), [("after failed sync", 3, 0)]);
    assert_eq!(audit(&lines).flushes, 1, "the one that reported the error is not acknowledged");
    // Tried again at once, and called good: the second sync says nothing of the first one's data.
    let retried = write_and_flush(BACK, &[WRITE], &[failed, SYNC]);
    assert_eq!(found(&retried), [("after failed sync", 2, 0)]);
}

#[test]
fn a_failed_stable_write_is_a_failed_sync() {
    let vector = "[{iov_base=\"x\"..., iov_len=4096}], 1, 4096, RWF_DSYNC)";
    let by_flag = format!("pwritev2(IMG, {vector} = -1 EIO (Input/output error) <0.1>");
    let full = format!("pwritev2(IMG, {vector} = -1 ENOSPC (No space left on device) <0.1>");
    let again = format!("pwritev2(IMG, {vector} = 4096 <0.1>");
    let opened = "openat(AT_FDCWD</t>, \"disk.img\", O_RDWR|O_DSYNC) = 4</t/disk.img>";
    let by_descriptor = "pwrite64(IMG, \"x\"..., 4096, 4096) = -1 EIO (Input/output error) <0.1>";
    let after = |first: &'static str, failed: &str, next: &str| {
        let lines =
            [first, THROUGH, "@S 01 W 0008 08", failed, "@A 01 01", "@S 02 W 0008 08", next, "@A 02 00"];
        found(&[&lines[..], &["@S 03 F", SYNC, "@A 03 00"]].concat())
    };
    let both = [("after failed sync", 2, 0), ("after failed sync", 3, 0)];
    assert_eq!(after("", &by_flag, &again), both);
    assert_eq!(after("", &full, &again), both);
    assert_eq!(after(opened, by_descriptor, WRITE), both);
    // A plain write that fails has lost nothing but itself; one that was interrupted, nothing.
    assert_eq!(after("", by_descriptor, &again), []);
    let interrupted = format!("pwritev2(IMG, {vector} = ? ERESTARTSYS (To be restarted)");
    assert_eq!(after("", &interrupted, &again), []);
}

#[test]
fn a_write_in_flight_need_not_be_covered_and_a_completed_one_must() {
    let lines = [
        BACK,
        "@S 01 W 0008 08",
        "@S 02 F",
        "8 fdatasync(IMG <unfinished ...>",
        WRITE,
        "8 <... fdatasync resumed>) = 0 <0.1>",
        "@A 02 00",
        "@A 01 00",
        "@S 03 F",
        SYNC,
        "@A 03 00",
    ];
    assert_eq!(found(&lines), []);
    let without = [&lines[..9], &["@A 03 00"]].concat();
    assert_eq!(found(&without), [("no sync of its own", 3, 0), ("does not cover", 3, 1)]);
}

#[test]
fn threads_interleave_and_their_calls_are_put_together() {
    let lines = [
        THROUGH,
        "@S 01 W 0008 08",
        "@S 02 W 0010 08",
        "8 12:00:00.000003 pwrite64(IMG, \") = 4096 <unfinished ...>\", 4096, 4096 <unfinished ...>",
        "9 12:00:00.000004 pwrite64(IMG, \"x\"..., 4096, 8192) = 4096 <0.000001>",
        "9 12:00:00.000005 fdatasync(IMG <unfinished ...>",
        "8 12:00:00.000006 <... pwrite64 resumed>) = 4096 <0.000003>",
        "9 12:00:00.000007 <... fdatasync resumed>) = 0 <0.000002>",
        "@A 02 00",
        "@A 01 00",
    ];
    assert_eq!(found(&lines), [("not stable", 1, 0)], "the sync began before the first write had ended");
}

#[test]
fn equal_or_backward_clocks_change_nothing() {
    let lines = ["11:59:59.0 pwrite64(IMG, \"x\"..., 4096, 4096) = 4096", "11:00:00.0 fdatasync(IMG) = 0"];
    let lines = lines.map(|line| format!("9 {line}"));
    assert_eq!(found(&write_and_flush(THROUGH, &[&lines[0], &lines[1]], &[SYNC])), []);
}

#[test]
fn the_negotiation_in_force_decides_what_a_write_promises() {
    for (negotiated, promises) in [
        ("@N 00 00 00", true),
        ("@N 01 00 00", false),
        ("@N 00 01 00", true),
        ("@N 01 01 00", true),
        ("@N 01 01 01", false),
    ] {
        let audit = audit(&[negotiated, "@S 01 W 0008 08", WRITE, "@A 01 00"]);
        assert_eq!(
            (audit.stable_writes, audit.findings.len()),
            (promises.into(), promises.into()),
            "{negotiated}"
        );
    }
    let toggled = [BACK, "@S 01 W 0008 08", WRITE, "@A 01 00", THROUGH, "@S 02 W 0008 08", WRITE, "@A 02 00"];
    assert_eq!(found(&toggled), [("not stable", 2, 0)]);
}

#[test]
fn an_audit_that_cannot_be_made_says_why() {
    for (lines, reason) in [
        (vec![WRITE], "is not in what was written"),
        (vec!["@S 01 W 0008 08"], "no @N"),
        (vec!["@A 01 00"], "never submitted"),
        (vec![BACK, "@S 01 F", "@S 01 F"], "was there before"),
        (vec![BACK, "@S 01 F", "@A 01 00", "@A 01 00"], "ended before"),
        (vec![BACK, "@S 01 X"], "neither W nor F"),
        (vec![BACK, "@S 01 W 8"], "a hexadecimal number is missing"),
        (vec![BACK, "@S 01 W ffffffffffffffff 08"], "too far out"),
        (
            vec![BACK, "write(1</t/console>, \"@S 01 F\\n@A 01 00\\n\", 17) = 17 <0.1>"],
            "the console is buffered",
        ),
        (vec!["write(1</t/console>, \"@S 01\"..., 9) = 9 <0.1>"], "give it -s 4096"),
        (vec!["fdatasync 4"], "line 1 of the trace: not understood"),
    ] {
        let refusal = refusal(&lines);
        assert!(refusal.contains(reason), "{lines:?}: {refusal}");
    }
}

#[test]
fn a_console_may_come_byte_by_byte_by_vectors_or_through_a_pipe() {
    let mut lines = String::new();
    for byte in "@N 01 01 00\n@S 01 W 0008 08\n".bytes() {
        let byte = if byte == b'\n' { "\\n".into() } else { char::from(byte).to_string() };
        lines += &format!("7 writev(2<pipe:[5]>, [{{iov_base=\"{byte}\", iov_len=1}}], 1) = 1\n");
    }
    lines += &trace(&[WRITE]);
    lines +=
        "7 writev(2<pipe:[5]>, [{iov_base=\"@A 01\", iov_len=5}, {iov_base=\" 00\\n\", iov_len=4}], 2) = 9\n";
    let audit = Audit::of(&lines, IMAGE, &File::Number(2)).unwrap();
    assert_eq!(audit.findings.len(), 1, "{audit}");
    assert_eq!(audit.verdict(), "broken promises");
    assert!(audit.to_string().contains("write 0x1 acknowledged"), "{audit}");
}

#[test]
fn a_verdict_says_what_could_not_be_seen() {
    let hidden = "io_submit(0x7f0000000000, 1, [{aio_data=0, aio_lio_opcode=IOCB_CMD_PWRITEV}]) = 1";
    let audit = audit(&write_and_flush(BACK, &[hidden, hidden], &[SYNC]));
    assert_eq!(audit.verdict(), "inconclusive");
    assert!(audit.to_string().contains("not seen into: io_submit (2 times)"), "{audit}");
    assert!(audit.broken_promises().is_empty());
}

#[test]
fn lines_of_strace_are_understood() {
    let one = |line: &str| calls(line).unwrap().remove(0);
    let call = one(
        "[pid    12] 12:00:01.5 pwrite64(4</t/a, \\76(b)>, \"\\1\\\"),\\n\\377\\x41\"..., 4096, 0) = 4096 <0.1>",
    );
    assert_eq!((call.name.as_str(), call.time.as_str(), call.arguments.len()), ("pwrite64", "12:00:01.5", 4));
    assert_eq!((call.entry, call.exit, call.number(2)), (0, 1, Some(4096)));
    assert_eq!(bytes("\"\\1\\\"),\\n\\377\\x41\""), Some(b"\x01\"),\n\xffA".to_vec()));
    assert_eq!(bytes(call.argument(1)), None, "cut short");
    assert_eq!(bytes("[{iov_base=\"a\", iov_len=1}, {iov_base=\"b\", iov_len=1}]"), Some(b"ab".to_vec()));

    let opened = one("openat(AT_FDCWD</t>, \"d g\", O_RDWR) = 4</t/d g> <0.1>");
    assert_eq!(opened.answer, Answer::Ok(4, "/t/d g".into()));
    assert_eq!(
        one("mmap(NULL, 1, PROT_READ, MAP_SHARED, 3</d>, 0) = 0x7f00").answer,
        Answer::Ok(0x7f00, String::new())
    );
    assert_eq!(one("fsync(3</d>) = -1 EIO (Input/output error)").answer, Answer::Err("EIO".into()));
    let killed = one("8 fsync(3</d>) = ?");
    assert_eq!((killed.answer, killed.exit), (Answer::None, Position::MAX));
    let cut = one("8 1700000000.123456 fsync(3</d> <unfinished ...>");
    assert_eq!((cut.arguments, cut.exit), (vec!["3</d>".to_owned()], Position::MAX));
    assert_eq!(descriptor("3</d (deleted)>"), Some((3, "/d")));
    assert_eq!(descriptor("-1"), None);
    let other =
        "+++ exited with 0 +++\n--- SIGCHLD {si_signo=SIGCHLD} ---\n\n<... read resumed>\"\", 1) = 0\n";
    assert_eq!(calls(other), Ok(vec![]));
}
