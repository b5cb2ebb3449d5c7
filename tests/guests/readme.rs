//! README.md and then docs/tour.md, typed from top to bottom: every command line of their code blocks, in
//! order, in one directory.
//!
//! Guests run on this machine's KVM where it can run Linux, in the emulated host elsewhere. `make` targets
//! are only looked up here: CI runs `make run` and `make test` themselves.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use minivmm_testkit::host::{Host, Place};

/// How a line is tried, and what has to come of it.
enum Try {
    /// Runs as it stands, with this exit status; all of these texts are in the output.
    Run(i32, &'static [&'static str]),
    /// Runs on a terminal, at which this is typed once this text is there.
    Type { wait_for: &'static str, keys: &'static str, status: i32, says: &'static [&'static str] },
    /// As `Run` with status 0, but shortened: the line in README takes minutes.
    Shortened(&'static str, &'static [&'static str]),
    /// The targets exist.
    Make,
    /// This test has done what it does.
    Done,
}

const SHELL: &str = "/ # ";

/// Each line of the two pages by its beginning; the first that fits.
const LINES: [(&str, Try); 23] = [
    ("make ", Try::Make),
    ("PATH=", Try::Done),
    ("truncate -s 1G img", Try::Run(0, &[])),
    ("minivmm --disk img,cache=none -- fio", Try::Run(0, &["WRITE:", "READ:"])),
    (
        "minivmm --disk img,cache=none",
        Try::Type {
            wait_for: SHELL,
            keys: "lsblk -b 2>/dev/null; cat /sys/block/vda/size; exit\r",
            status: 0,
            says: &["2097152"],
        },
    ),
    ("minivmm check", Try::Run(0, &[])),
    ("minivmm --explain", Try::Run(0, &["O_DIRECT", "RWF_DSYNC"])),
    ("truncate -s 64M a.img b.img", Try::Run(0, &[])),
    (
        "minivmm -v --stats",
        Try::Type {
            wait_for: SHELL,
            keys: "cat /sys/block/vdb/serial; exit\r",
            status: 0,
            says: &["directsync"],
        },
    ),
    ("minivmm --observe run.csv", Try::Run(0, &["64+0 records out"])),
    ("minivmm top run.csv", Try::Type { wait_for: "vda", keys: "q", status: 0, says: &[] }),
    (
        "minivmm bench --disk scratch.img --size 1G --modes none,writeback",
        Try::Shortened(
            "minivmm bench --disk scratch.img --size 64M --modes none,writeback --seconds 1 --rounds 1 --only randread",
            &["none", "writeback"],
        ),
    ),
    (
        "minivmm --kernel ~/linux/vmlinux",
        Try::Type {
            wait_for: SHELL,
            keys: "cat /proc/cmdline; nproc; exit\r",
            status: 0,
            says: &["slub_debug"],
        },
    ),
    (
        "minivmm --disk img,fault=flush-fail=once",
        Try::Run(125, &["dd: /dev/vda: Input/output error", "may be lost"]),
    ),
    ("truncate -s 64M fs.img && mkfs.ext4 -q fs.img && cp fs.img before.img", Try::Run(0, &[])),
    ("minivmm --disk fs.img,log-writes=fs.log", Try::Run(0, &[])),
    ("minivmm log fs.log", Try::Run(0, &["flush"])),
    ("minivmm crash fs.log --base before.img", Try::Run(0, &["good"])),
    (
        "minivmm --disk before.img,readonly --disk scratch.img",
        Try::Type {
            wait_for: SHELL,
            keys: "cat /sys/block/vda/ro /sys/block/vdb/queue/logical_block_size; exit\r",
            status: 0,
            says: &["4096"],
        },
    ),
    (
        "minivmm study --quick --out study",
        Try::Shortened("minivmm study --quick --out study --only T9", &["T9"]),
    ),
    ("guest-images/emuhost run --", Try::Done),
    ("cargo ", Try::Done),
    ("git ", Try::Done),
];

/// The command lines of the code blocks, without comments.
fn command_lines(text: &str) -> Vec<String> {
    let blocks = text.split("\n```").skip(1).step_by(2);
    let lines = blocks.flat_map(|block| block.lines().skip(1));
    let commands = lines.map(|line| line.split(" #").next().unwrap_or_default().trim_end().to_owned());
    commands.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

fn pages() -> String {
    let page = |name| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    ["README.md", "docs/tour.md"].map(page).concat()
}

/// Types `keys` when `wait_for` is there; the status and all that was shown.
fn type_at(place: &Place, line: &str, wait_for: &str, keys: &str) -> (i32, String) {
    // A terminal of a test has no size, and a user's has one.
    let mut child = place.on_terminal(&format!("stty rows 24 cols 100\n{line}"));
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut bytes) {
            if sender.send(bytes[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut shown = Vec::new();
    let mut typed = false;
    while let Ok(bytes) = receiver.recv_timeout(Duration::from_secs(200)) {
        shown.extend(bytes);
        if !typed && String::from_utf8_lossy(&shown).contains(wait_for) {
            typed = true;
            input.write_all(keys.as_bytes()).unwrap();
        }
    }
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(typed, "{line}: {wait_for:?} never came: {shown}");
    drop(input);
    (child.wait().unwrap().code().unwrap_or(-1), shown)
}

fn make_targets_exist(line: &str) {
    let targets = line.split_whitespace().skip(1).take_while(|word| !word.starts_with("&&"));
    for target in targets.filter(|word| !word.contains('=')) {
        let dry = Command::new("make")
            .args(["--dry-run", "--no-print-directory", target])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(dry.status.success(), "{line}: {}", String::from_utf8_lossy(&dry.stderr));
    }
}

fn try_line(place: &Place, line: &str) {
    let Some((_, way)) = LINES.iter().find(|(beginning, _)| line.starts_with(beginning)) else {
        panic!("README has a line that this test does not know: {line}");
    };
    // A `~` of its own: README's example has a kernel there.
    let home = "export HOME=\"$PWD\"\n";
    println!("README: {line}");
    let (status, shown, (expected, says)) = match way {
        Try::Make => return make_targets_exist(line),
        Try::Done => return,
        Try::Run(status, says) => {
            let outcome = place.sh(&format!("{home}{line}"));
            (outcome.status, outcome.stdout + &outcome.stderr, (*status, says))
        }
        Try::Shortened(short, says) => {
            let outcome = place.sh(&format!("{home}{short}"));
            (outcome.status, outcome.stdout + &outcome.stderr, (0, says))
        }
        Try::Type { wait_for, keys, status, says } => {
            let (ended, shown) = type_at(place, &format!("{home}{line}"), wait_for, keys);
            (ended, shown, (*status, says))
        }
    };
    assert_eq!(status, expected, "{line}: {shown}");
    for word in *says {
        assert!(shown.contains(word), "{line}: no {word:?} in {shown}");
    }
}

#[test]
fn every_command_of_the_readme_and_the_tour_does_what_it_says() {
    let place = Host::get().place();
    let made = place.sh("mkdir linux && cp \"$GUESTS/small/vmlinux\" linux/vmlinux");
    assert_eq!(made.status, 0, "{}", made.stderr);
    let lines = command_lines(&pages());
    assert!(lines.len() >= 20, "{lines:?}");
    for line in &lines {
        try_line(&place, line);
    }
}

#[test]
fn fio_that_reads_an_image_with_holes_is_warned_of() {
    let place = Host::get().place();
    let outcome = place.sh(
        "truncate -s 16M holes && minivmm --disk holes -- fio --name=t --filename=/dev/vda --rw=randread --size=1M",
    );
    assert_eq!(outcome.status, 0, "{outcome:?}");
    assert!(
        outcome.stderr.contains("holes: bytes from 0 on (of 16777216) were never written"),
        "{}",
        outcome.stderr
    );
}
