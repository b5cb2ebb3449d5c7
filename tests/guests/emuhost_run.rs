//! `emuhost run`: one command line in an emulated host that is kept for the next. What comes in and back, streams
//! whose reader goes away, files that grow, which host serves a run, and its end.
//!
//! Needs the emulated host, and no root. Where guests run directly on this machine and no emulated host is
//! built, it says so and looks at nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use minivmm_testkit::skips::skip;

/// Long on purpose: an emulated host on a busy machine takes a minute to boot.
const PATIENCE: Duration = Duration::from_secs(300);

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A directory for one test, with kept hosts of its own.
struct Rig {
    dir: tempfile::TempDir,
    /// One emulator after the other.
    _turn: MutexGuard<'static, ()>,
}

impl Rig {
    /// None, and a word why, where there is no emulated host.
    fn new() -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        static USABLE: OnceLock<bool> = OnceLock::new();
        let usable = *USABLE.get_or_init(|| {
            let here = Command::new(tree("guest-images/which-host")).output().unwrap();
            !here.stdout.starts_with(b"directly") || tree("guest-images/build/host/manifest").exists()
        });
        if !usable {
            skip("emuhost", "no emulated host is built, and none is needed here (make emuhost)");
            return None;
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir =
            tempfile::Builder::new().prefix("emuhost-run-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        Some(Self { dir, _turn: turn })
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// A script of bash, with `emuhost`, in the directory that is brought along.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "20", "600", "bash", "-c", script]).current_dir(self.work());
        let path = format!("{}:{}", tree("guest-images").display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("TMPDIR", self.dir.path()).stdin(Stdio::null());
        command.env("MINIVMM_BINARY", env!("CARGO_BIN_EXE_minivmm")).env_remove("EMUHOST_KEEP_SECONDS");
        command
    }

    /// What a script says, which must succeed.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        let output = self.output(script);
        assert!(output.status.success(), "{script}: {output:#?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn output(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    fn put(&self, name: &str, text: &str) {
        let path = self.work().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn get(&self, name: &str) -> String {
        std::fs::read_to_string(self.work().join(name)).unwrap_or_default()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.output("emuhost stop --all");
    }
}

/// The number of the boot that a run is in.
const BOOT: &str = "emuhost run -- cat /proc/sys/kernel/random/boot_id";

#[test]
fn files_and_directories_come_in_and_back_and_streams_are_the_commands() {
    let Some(rig) = Rig::new() else { return };
    rig.put("named/a", "first\n");
    rig.put("named/sub/b", "second\n");
    rig.put("added/c", "third\n");
    assert_eq!(rig.sh("emuhost run -- ls named").trim(), "a\nsub");
    let seen = rig.sh(
        "emuhost run --add added:elsewhere/c-dir -- sh -c 'cat named/sub/b elsewhere/c-dir/c; pwd
            echo more >>named/a; mkdir named/new; echo made >named/new/d; echo top >top' named; echo status:$?",
    );
    assert_eq!(seen, format!("second\nthird\n{}\nstatus:0\n", rig.work().display()));
    assert_eq!(rig.get("named/a"), "first\nmore\n");
    assert_eq!((rig.get("named/new/d"), rig.get("top")), ("made\n".into(), "top\n".into()));
    assert_eq!(rig.get("named/sub/b"), "second\n");

    // A reader that goes away, a status, a signal, input.
    let pipe = rig.sh("emuhost run -- sh -c 'yes; echo after:$? >&2; exit 7' 2>told | head -2; echo ${PIPESTATUS[0]}; cat told");
    assert_eq!(pipe, "y\ny\n7\nafter:141\n");
    let pipe = rig.sh("{ emuhost run -- sh -c 'yes >&2; echo after:$?'; } 2>&1 >out | head -1; cat out");
    assert_eq!(pipe, "y\nafter:141\n");
    assert_eq!(
        rig.sh("seq 30000 | emuhost run -- sh -c 'cat; exit 3' | sha256sum; echo ${PIPESTATUS[1]}"),
        { rig.sh("seq 30000 | sha256sum; echo 3") }
    );
    assert_eq!(rig.output("emuhost run --timeout 3 -- sleep 1000").status.code(), Some(121));
    assert!(rig.sh("emuhost run -- cat /sys/fs/cgroup/cgroup.controllers").contains("memory"));
}

#[test]
fn a_guests_output_whose_reader_goes_away_is_a_broken_pipe_in_the_guest() {
    let Some(rig) = Rig::new() else { return };
    let seen = rig.sh("emuhost run -- minivmm --timeout 300 -- yes | head -2; echo ${PIPESTATUS[0]}");
    assert_eq!(seen, "y\ny\n141\n");
}

#[test]
fn a_file_is_seen_while_it_grows() {
    let Some(rig) = Rig::new() else { return };
    let script =
        "emuhost run -- sh -c 'echo one >grows; until [ -e /tmp/never ] || [ $((n += 1)) -gt 40 ]; do sleep 1
        echo $n >>grows; done; echo last >>grows'";
    let mut run = rig.command(script).spawn().unwrap();
    let begin = Instant::now();
    while !rig.get("grows").starts_with("one\n1\n2\n") {
        assert!(begin.elapsed() < PATIENCE, "nothing has grown: {:?}", rig.get("grows"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(run.try_wait().unwrap().is_none(), "the command still runs");
    assert!(!rig.get("grows").contains("last"));
    assert!(run.wait().unwrap().success());
    assert!(rig.get("grows").ends_with("\n39\n40\nlast\n"), "{}", rig.get("grows"));
}

#[test]
fn a_host_is_kept_for_the_next_run_which_sees_nothing_of_the_last() {
    let Some(rig) = Rig::new() else { return };
    let first = rig.sh(BOOT);
    rig.sh("emuhost run -- sh -c 'setsid sleep 4321 >/dev/null 2>&1 & echo x >/tmp/junk; echo x >/data/junk; echo x >here'");
    std::fs::remove_file(rig.work().join("here")).unwrap();
    let next = rig.sh(&format!("{BOOT}; emuhost run -- sh -c 'ls -d /tmp/junk /data/junk here; ps' 2>&1"));
    assert!(next.starts_with(&first), "the same host: {next}");
    for junk in ["/tmp/junk", "/data/junk", "here"] {
        assert!(next.contains(&format!("ls: {junk}: No such file")), "{next}");
    }
    assert!(!next.contains("4321"), "{next}");

    // Two at once do not meet; a fresh one is nobody's.
    let both = rig.sh(&format!("{BOOT} >a & {BOOT} >b; wait; cat a b; {BOOT} --fresh 2>/dev/null; true"));
    let boots: Vec<&str> = both.lines().collect();
    assert!(boots[0] != boots[1] && boots[..2].contains(&first.trim()), "{both}");
    let fresh = rig.sh(&BOOT.replace("run", "run --fresh"));
    assert!(!both.contains(&fresh), "{both} {fresh}");

    // One that hangs is thrown away.
    let stopped = rig.output(&format!("for pid in $TMPDIR/emuhost-*/?/pid; do kill -STOP -- -$(ps -o pgid= $(cat $pid) | tr -d ' '); done; {BOOT}"));
    let told = String::from_utf8_lossy(&stopped.stderr);
    assert!(stopped.status.success() && told.contains("does not answer"), "{stopped:#?}");
    assert!(!both.contains(String::from_utf8_lossy(&stopped.stdout).trim()), "another host: {stopped:#?}");
    assert!(rig.sh("emuhost status --all").contains("running, idle"));
    rig.sh("emuhost stop --all");
    assert_eq!(rig.sh("emuhost status --all; ls $TMPDIR/emuhost-*/"), "0.lock\n1.lock\n");
}

#[test]
fn a_host_that_nobody_uses_ends() {
    let Some(rig) = Rig::new() else { return };
    rig.sh("EMUHOST_KEEP_SECONDS=2 emuhost run -- true");
    let begin = Instant::now();
    while !rig.sh("emuhost status --all").is_empty() {
        assert!(begin.elapsed() < PATIENCE, "{}", rig.sh("emuhost status --all"));
        std::thread::sleep(Duration::from_millis(200));
    }
    // None is kept where none is wanted.
    rig.sh("EMUHOST_KEEP_SECONDS=0 emuhost run -- true");
    assert_eq!(rig.sh("emuhost status --all"), "");
}

#[test]
fn a_state_directory_of_somebody_elses_is_refused_and_help_is_given() {
    let Some(rig) = Rig::new() else { return };
    for make in ["mkdir -m 755", "ln -s /tmp", "touch"] {
        let run =
            rig.output(&format!("d=$TMPDIR/emuhost-$(id -u); rm -rf $d; {make} $d; emuhost status --all"));
        let told = String::from_utf8_lossy(&run.stderr);
        assert!(
            run.status.code() == Some(1) && told.contains("not a directory of yours alone"),
            "{make}: {run:#?}"
        );
    }
    rig.sh("rm -rf $TMPDIR/emuhost-*");
    for command in ["run", "exec", "start", "warm", "stop"] {
        assert!(rig.sh(&format!("emuhost {command} --help")).starts_with("usage: emuhost run"), "{command}");
    }
    assert_eq!(rig.output("emuhost run --add nothing -- true").status.code(), Some(1));
    assert_eq!(rig.output("emuhost run").status.code(), Some(2));
}
