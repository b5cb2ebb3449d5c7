//! Where test guests with a kernel run: on this machine where its KVM can run Linux, in the emulated
//! host elsewhere. Chosen once a process, said in one line. An emulated host has one CPU, so tests
//! that run side by side get one each, at most [`EMULATED_MAX`].

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{places, tools};

/// Emulated hosts at the same time.
const EMULATED_MAX: usize = 2;

/// A machine that runs minivmm with Linux guests.
pub enum Host {
    /// This machine.
    Direct,
    /// A host of its own in an emulator.
    Emulated(Emulated),
}

/// A running emulated host.
pub struct Emulated {
    dir: PathBuf,
    number: usize,
}

/// A directory of its own on that machine, on a file system with O_DIRECT.
pub struct Place {
    host: &'static Host,
    path: String,
}

/// What a command has done.
#[derive(Debug)]
pub struct Outcome {
    /// The exit status, or -1 after a signal.
    pub status: i32,
    /// What it has written to standard output.
    pub stdout: String,
    /// What it has written to standard error.
    pub stderr: String,
}

/// emuhost's own exit status for an emulator that hung or died.
const EMULATOR_FAILED: i32 = 120;

static DIRECT: OnceLock<Option<Host>> = OnceLock::new();
static EMULATED: [OnceLock<Host>; EMULATED_MAX] = [const { OnceLock::new() }; EMULATED_MAX];
/// Tests that have, or wait for, a place in each.
static BUSY: [AtomicUsize; EMULATED_MAX] = [const { AtomicUsize::new(0) }; EMULATED_MAX];
static PLACES: AtomicU32 = AtomicU32::new(0);

fn tree(path: &str) -> PathBuf {
    places::root().join(path)
}

fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Outcome {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Whether the tests are run by an ordinary user, as minivmm then is in the emulated host too.
fn is_ordinary() -> bool {
    // SAFETY: takes nothing, touches no memory, and cannot fail.
    unsafe { libc::geteuid() != 0 }
}

/// That user's name there.
const ORDINARY: &str = "ordinary";

/// Ends the emulated hosts with the test process.
extern "C" fn end_emulated_hosts() {
    for host in EMULATED.iter().filter_map(OnceLock::get) {
        if let Host::Emulated(Emulated { dir, .. }) = host {
            let _ = Command::new(tree("guest-images/emuhost")).arg("kill").arg(dir).status();
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

/// This machine, if its KVM runs Linux.
fn choose() -> Option<Host> {
    let chosen = run(Command::new(tree("guest-images/which-host")).stderr(Stdio::inherit()));
    assert_eq!(chosen.status, 0, "guest-images/which-host failed");
    println!("guests run {}", chosen.stdout.trim());
    if chosen.stdout.starts_with("directly") {
        return Some(Host::Direct);
    }
    // SAFETY: the function is `extern "C"` and takes nothing.
    unsafe { libc::atexit(end_emulated_hosts) };
    None
}

fn start_emulated(number: usize) -> Host {
    let dir = places::tmp().join(format!("emuhost-{}-{number}", std::process::id()));
    let started = run(Command::new(tree("guest-images/emuhost"))
        .args(["start", "--memory", "4096", "--binary"])
        .arg(tools::minivmm())
        .arg(&dir));
    assert_eq!(started.status, 0, "the emulated host did not start: {}", started.stderr);
    let emulated = Emulated { dir, number };
    if is_ordinary() {
        let line = format!("{ORDINARY}:x:54321:54321::/tmp:/bin/sh");
        let made = run(&mut emulated.exec(&["sh", "-c", &format!("echo {line} >> /etc/passwd")]));
        assert_eq!(made.status, 0, "{}", made.stderr);
        println!("minivmm runs as uid 54321 there");
    }
    Host::Emulated(emulated)
}

impl Host {
    /// This machine, or the emulated host with the fewest tests, for one place; one is started where all
    /// have some.
    pub fn get() -> &'static Host {
        if let Some(host) = DIRECT.get_or_init(choose) {
            return host;
        }
        // Chosen and counted in one step: a host takes seconds to start, and two tests at once would
        // both find it free.
        static CHOOSING: Mutex<()> = Mutex::new(());
        let choosing = CHOOSING.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |number: &usize| BUSY[*number].load(Ordering::SeqCst);
        let number = (0..EMULATED_MAX).min_by_key(busy).unwrap_or_default();
        BUSY[number].fetch_add(1, Ordering::SeqCst);
        drop(choosing);
        EMULATED[number].get_or_init(|| start_emulated(number))
    }

    /// A fresh directory to work in.
    pub fn place(&'static self) -> Place {
        let number = PLACES.fetch_add(1, Ordering::Relaxed);
        let path = match self {
            Host::Direct => {
                let path = places::tmp().join(format!("guest-{}-{number}", std::process::id()));
                std::fs::create_dir_all(&path).unwrap();
                path.into_os_string().into_string().unwrap()
            }
            Host::Emulated(_) => format!("/data/test-{number}"),
        };
        let place = Place { host: self, path };
        if matches!(self, Host::Emulated(_)) {
            let owner = if is_ordinary() { ORDINARY } else { "root" };
            let script = format!("mkdir -p {0} && chown {owner} {0}", place.path);
            let Host::Emulated(host) = self else { return place };
            let made = run(&mut host.exec(&["sh", "-c", &script]));
            assert_eq!(made.status, 0, "{}", made.stderr);
        }
        place
    }
}

impl Place {
    /// A shell command in this directory: `minivmm` is the binary under test, `$GUESTS` the guests'
    /// images, by kernel.
    pub fn sh(&self, script: &str) -> Outcome {
        self.run_in(&self.path, script)
    }

    /// The same on a terminal of its own: what is written to the child's standard input is typed there.
    pub fn on_terminal(&self, script: &str) -> Child {
        let mut command = self.command(&self.path, script, true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    fn run_in(&self, dir: &str, script: &str) -> Outcome {
        let mut outcome = run(&mut self.command(dir, script, false));
        if let (Host::Emulated(Emulated { dir: host, .. }), EMULATOR_FAILED) = (self.host, outcome.status) {
            let log = std::fs::read_to_string(host.join("console.log")).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            outcome.stderr += "the emulated host's last words:\n";
            outcome.stderr.extend(tail.into_iter().rev().flat_map(|line| [line, "\n"]));
        }
        outcome
    }

    fn command(&self, dir: &str, script: &str, on_terminal: bool) -> Command {
        match self.host {
            Host::Direct => {
                let binary = tools::minivmm().parent().unwrap();
                let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
                let mut command;
                if on_terminal {
                    // util-linux's script(1): a pseudo-terminal, and its session.
                    command = Command::new("script");
                    command.args(["-qefc", script, "/dev/null"]).env("SHELL", "/bin/sh");
                } else {
                    command = Command::new("sh");
                    command.args(["-c", script]);
                }
                command.current_dir(dir).env("PATH", path).env("GUESTS", tree("guest-images/build"));
                command
            }
            Host::Emulated(Emulated { dir: host, .. }) => {
                let terminal = if on_terminal { "--tty" } else { "--no-tty" };
                let mut command = Command::new(tree("guest-images/emuhost"));
                command.args(["exec", terminal, "--timeout", "240", "--cwd", dir]).arg(host);
                let script = format!("export GUESTS=/data/guest\n{script}");
                if is_ordinary() {
                    command.args(["--", "su", "-s", "/bin/sh", ORDINARY, "-c", &script]);
                } else {
                    command.args(["--", "sh", "-c", &script]);
                }
                command
            }
        }
    }

    /// Puts a file there.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let local = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(local.path(), bytes).unwrap();
        self.push(local.path(), name);
    }

    /// The same with one of this machine's files; holes stay holes.
    pub fn push(&self, local: &Path, name: &str) {
        let target = format!("{}/{name}", self.path);
        let Host::Emulated(host) = self.host else {
            std::fs::copy(local, target).unwrap();
            return;
        };
        host.transfer("push", local, Path::new(&target));
        if is_ordinary() {
            // Root has brought it, and the test's commands are an ordinary user's.
            let owned = run(&mut host.exec(&["chown", "-R", ORDINARY, &target]));
            assert_eq!(owned.status, 0, "{}", owned.stderr);
        }
    }

    /// Gets a file from there.
    pub fn pull(&self, name: &str, local: &Path) {
        let source = format!("{}/{name}", self.path);
        let Host::Emulated(host) = self.host else {
            std::fs::copy(source, local).unwrap();
            return;
        };
        host.transfer("pull", Path::new(&source), local);
    }

    /// One of this machine's programs and its libraries, under the same paths.
    pub fn bring(&self, program: &str) {
        if matches!(self.host, Host::Direct) {
            return;
        }
        let libraries = run(Command::new("ldd").arg(program));
        assert_eq!(libraries.status, 0, "{}", libraries.stderr);
        let paths = libraries.stdout.split_whitespace().filter(|word| word.starts_with('/'));
        let archive = tempfile::NamedTempFile::new().unwrap();
        let packed = run(Command::new("tar")
            .args(["--dereference", "-C", "/", "-cf"])
            .arg(archive.path())
            .args(std::iter::once(program).chain(paths).map(|path| path.trim_start_matches('/'))));
        assert_eq!(packed.status, 0, "{}", packed.stderr);
        self.push(archive.path(), "program.tar");
        let unpacked = self.sh("tar x -C / -f program.tar && rm program.tar");
        assert_eq!(unpacked.status, 0, "{}", unpacked.stderr);
    }
}

impl Emulated {
    /// A command there, as root.
    fn exec(&self, words: &[&str]) -> Command {
        let mut command = Command::new(tree("guest-images/emuhost"));
        command.args(["exec", "--no-tty", "--timeout", "240"]).arg(&self.dir).arg("--").args(words);
        command
    }

    fn transfer(&self, verb: &str, source: &Path, target: &Path) {
        let done =
            run(Command::new(tree("guest-images/emuhost")).arg(verb).arg(&self.dir).arg(source).arg(target));
        assert_eq!(done.status, 0, "{}", done.stderr);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.run_in("/", &format!("rm -rf {}", self.path));
        }
        if let Host::Emulated(emulated) = self.host {
            BUSY[emulated.number].fetch_sub(1, Ordering::SeqCst);
        }
    }
}
