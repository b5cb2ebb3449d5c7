//! `minivmm crash` and signals: whatever arrives, and however often, its checks end and its scratch files go; what a
//! SIGKILL leaves behind goes with the next run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minivmm::disk::writelog::format::{FLUSH, Header, Superblock};
use minivmm_lab::scratch_dir::PREFIX;
use minivmm_testkit::signalled::{Chance, with_default_signals};
use minivmm_testkit::tools;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

const SECTOR: usize = 512;
/// Longer than anything here takes; who meets it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A log with many flushes, its base, and a place for scratch files.
struct Case {
    dir: TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(dir.path().join("base.img"), vec![255; 64 * SECTOR]).unwrap();
        fs::create_dir(dir.path().join("scratch")).unwrap();
        let entries: u64 = 200;
        let mut bytes = Superblock { entries, sector_bytes: 512 }.encode().to_vec();
        bytes.resize(SECTOR, 0);
        for entry in 0..entries {
            let is_write = entry % 2 == 0;
            let (flags, sectors) = if is_write { (0, 1) } else { (FLUSH, 0) };
            let sector = if is_write { entry % 64 } else { 0 };
            bytes.extend(Header { sector, sectors, flags, text_bytes: 0 }.encode());
            bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
            bytes.extend(vec![7; if is_write { SECTOR } else { 0 }]);
        }
        fs::write(dir.path().join("x.log"), bytes).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `minivmm crash` with this check, in a process group of its own.
    fn start(&self, check: &str) -> Child {
        let mut command = Command::new(tools::minivmm());
        command.current_dir(self.dir.path()).args(["crash", "x.log", "--base", "base.img", "--jobs", "3"]);
        command.args(["--scratch", "scratch", "--check", check]).env("TMPDIR", self.path("scratch"));
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        with_default_signals(&mut command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn scratch(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("scratch")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    /// The processes of all checks.
    fn pids(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.path("pids")).unwrap_or_default();
        // The last line may be half written.
        text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.parse().ok()).collect()
    }

    #[track_caller]
    fn nothing_is_left(&self, what: &str) {
        assert_eq!(self.scratch(), [""; 0], "{what}");
        for pid in self.pids() {
            // A zombie that nobody has waited for yet has ended too.
            let state = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
            let state = state.unwrap_or_default();
            assert!(state.is_empty() || state.contains(") Z"), "{what}: {pid} still runs: {state}");
        }
    }
}

/// A check that no SIGTERM ends, with a child of the same kind, and one that leaves its process group.
const STUBBORN: &str = "trap '' TERM INT HUP QUIT; echo $$ >> pids; sleep 1000 & echo $! >> pids; setsid sh -c 'echo $$ >> pids; sleep 1000'; : {}";

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

#[track_caller]
fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn ended(child: &mut Child) -> std::process::ExitStatus {
    wait_until(|| child.try_wait().unwrap().is_some(), "it does not end");
    child.wait().unwrap()
}

#[test]
fn many_signals_of_all_kinds_end_the_checks_and_leave_no_file() {
    for first in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::ALARM, Signal::USR2] {
        let case = Case::new();
        let mut child = case.start(STUBBORN);
        wait_until(|| case.pids().len() >= 9, "the checks never began");
        let what = format!("{first:?}");
        // Twice at once, as GNU timeout does, then all there is.
        kill_process(pid(&child), first).unwrap();
        kill_process_group(pid(&child), first).unwrap();
        for more in [Signal::TERM, Signal::INT, Signal::QUIT, Signal::USR1, Signal::ALARM, Signal::PIPE] {
            // Not reaped yet, so the number is the child's own.
            if more.as_raw() >= first.as_raw() || more == Signal::USR1 {
                kill_process(pid(&child), more).unwrap();
            }
        }
        assert_eq!(ended(&mut child).code(), Some(128 + first.as_raw()), "{what}");
        case.nothing_is_left(&what);
    }
}

/// From minivmm's first line over the hand-over to minivmm-tools into the midst of the work.
#[test]
fn a_burst_at_any_moment_leaves_nothing() {
    let mut in_order = 0;
    for seed in 1..=40_u64 {
        let mut chance = Chance::new(seed);
        let case = Case::new();
        let mut child = case.start(STUBBORN);
        std::thread::sleep(Duration::from_micros(chance.below(40_000)));
        for _ in 0..1 + chance.below(20) {
            let kinds = [Signal::TERM, Signal::INT, Signal::QUIT, Signal::USR2, Signal::ALARM];
            kill_process_group(pid(&child), kinds[usize::try_from(chance.below(5)).unwrap()]).unwrap();
            std::thread::sleep(Duration::from_micros(chance.below(2000)));
        }
        let status = ended(&mut child);
        // One that a signal has killed was not at its first line.
        if let Some(code) = status.code() {
            assert!([143, 130, 131, 140, 142].contains(&code), "seed {seed}: {status}");
            in_order += 1;
        }
        case.nothing_is_left(&format!("seed {seed}"));
    }
    assert!(in_order > 15, "only {in_order} of 40 had begun");
}

#[test]
fn what_a_sigkill_leaves_goes_with_the_next_run() {
    let case = Case::new();
    let mut child = case.start(STUBBORN);
    wait_until(|| case.pids().len() >= 9, "the checks never began");
    kill_process(pid(&child), Signal::KILL).unwrap();
    assert_eq!(ended(&mut child).code(), None);
    assert!(case.scratch().iter().any(|name| name.starts_with(PREFIX)), "{:?}", case.scratch());
    // Nobody but we can end the checks now.
    for left in case.pids() {
        let _ = kill_process(Pid::from_raw(left).unwrap(), Signal::KILL);
    }
    // Another run's directory that is in use, and one that is not ours to remove.
    let used = minivmm_lab::scratch_dir::ScratchDir::new_in(&case.path("scratch"), "used").unwrap();
    fs::create_dir(case.path("scratch/other")).unwrap();
    let mut next = case.start("true {}");
    assert_eq!(ended(&mut next).code(), Some(0));
    let mut left = case.scratch();
    left.sort();
    let used = used.path().file_name().unwrap().to_string_lossy().into_owned();
    assert_eq!(left, [used, "other".to_owned()]);
}

#[test]
fn an_error_ends_the_other_checks_and_leaves_no_file() {
    let case = Case::new();
    // The third check cannot be run, as the shell says it; the others would take for ever.
    let check = "echo $$ >> pids; test $(wc -l < pids) -lt 3 || exit 127; exec sleep 1000 # {}";
    let mut child = case.start(check);
    assert_eq!(ended(&mut child).code(), Some(125));
    case.nothing_is_left("an error");
}
