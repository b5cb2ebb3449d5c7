//! The back end under test: `minivmm export`, or QEMU's storage daemon in its place.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minivmm_testkit::{machine, tools};

/// Longer than a back end takes to open its disks on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who exports the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exporter {
    Minivmm,
    /// `qemu-storage-daemon`, with the nearest that it has to each mode.
    Qemu,
}

/// Returns the back end that `MINIVMM_EXPORTER` names.
pub fn exporter() -> Exporter {
    match std::env::var("MINIVMM_EXPORTER").as_deref() {
        Ok("qemu-storage-daemon") => Exporter::Qemu,
        Ok(other) => panic!("MINIVMM_EXPORTER={other}: only qemu-storage-daemon is known"),
        Err(_) => Exporter::Minivmm,
    }
}

/// One disk on one socket, both in the test's directory.
#[derive(Debug, Clone)]
pub struct Export {
    /// `NAME.img` is exported on `NAME.sock`, with the serial number NAME.
    pub name: String,
    pub mode: &'static str,
    pub queues: u32,
    pub readonly: bool,
    /// More keys of `--disk`, each with a comma before it.
    pub keys: String,
}

impl Export {
    /// Describes a disk with one queue and nothing but its mode.
    pub fn new(name: &str, mode: &'static str) -> Self {
        Self { name: name.to_owned(), mode, queues: 1, readonly: false, keys: String::new() }
    }

    pub fn queues(self, queues: u32) -> Self {
        Self { queues, ..self }
    }

    pub fn readonly(self) -> Self {
        Self { readonly: true, ..self }
    }

    pub fn keys(self, keys: &str) -> Self {
        Self { keys: keys.to_owned(), ..self }
    }

    pub fn image(&self) -> String {
        format!("{}.img", self.name)
    }

    pub fn socket(&self) -> String {
        format!("{}.sock", self.name)
    }

    fn minivmm(&self, command: &mut Command) {
        let Self { name, mode, queues, keys, .. } = self;
        let readonly = if self.readonly { ",readonly" } else { "" };
        command
            .arg("--disk")
            .arg(format!("{name}.img,cache={mode},serial={name},queues={queues}{readonly}{keys}"));
        command.arg("--socket").arg(self.socket());
    }

    /// What QEMU has no mode for becomes the nearest.
    fn qemu(&self, command: &mut Command) {
        let Self { name, mode, queues, readonly, .. } = self;
        let on = |on| if on { "on" } else { "off" };
        let direct = on(matches!(*mode, "none" | "directsync"));
        let no_flush = on(*mode == "unsafe");
        let cache = format!("cache.direct={direct},cache.no-flush={no_flush},read-only={}", on(*readonly));
        command.arg("--blockdev").arg(format!("file,node-name=f-{name},filename={name}.img,{cache}"));
        command.arg("--blockdev").arg(format!("raw,node-name=r-{name},file=f-{name},{cache}"));
        command.arg("--export").arg(format!(
            "vhost-user-blk,id=e-{name},node-name=r-{name},addr.type=unix,addr.path={name}.sock,writable={},num-queues={queues}",
            on(!readonly)
        ));
    }
}

/// A running back end.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    exports: Vec<Export>,
    more: Vec<String>,
}

impl Daemon {
    /// Starts a back end with these disks, and with `more` arguments, in `dir`; returns when its sockets are there.
    pub fn start(dir: &Path, exports: &[Export], more: &[&str]) -> Self {
        Self::start_under(&[], dir, exports, more)
    }

    /// The same under another program: `strace` with its arguments, say.
    pub fn start_under(wrapper: &[&str], dir: &Path, exports: &[Export], more: &[&str]) -> Self {
        let more = more.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let child = spawn(wrapper, dir, exports, &more);
        let mut daemon = Self { child, dir: dir.to_owned(), exports: exports.to_vec(), more };
        daemon.wait_for_sockets();
        daemon
    }

    fn wait_for_sockets(&mut self) {
        let begin = Instant::now();
        while !self.exports.iter().all(|export| self.dir.join(export.socket()).exists()) {
            self.is_alive();
            assert!(begin.elapsed() < PATIENCE, "no socket after {PATIENCE:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Fails, with what it has said, unless the back end runs.
    #[track_caller]
    pub fn is_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the back end has ended with {status}: {}", self.log());
        }
    }

    /// Ends it with SIGKILL, in whatever it does.
    pub fn kill(&mut self) {
        self.is_alive();
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{}", self.log());
    }

    /// Starts it again after [`Self::kill`], with the sockets of the dead one lying about.
    pub fn restart(&mut self) {
        self.child = spawn(&[], &self.dir, &self.exports, &self.more);
    }

    /// Ends it in order; returns what it has said.
    pub fn stop(mut self) -> String {
        self.is_alive();
        machine::kill(i32::try_from(self.child.id()).unwrap(), libc::SIGTERM);
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < PATIENCE, "it does not end after SIGTERM: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        };
        // minivmm says of itself what a shell says of a program that a signal has ended.
        let orderly = match exporter() {
            Exporter::Minivmm => 128 + libc::SIGTERM,
            Exporter::Qemu => 0,
        };
        assert_eq!(status.code(), Some(orderly), "{status}: {}", self.log());
        self.log()
    }

    /// Returns what it has said so far.
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("daemon.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program under test, with minivmm-export beside it; `MINIVMM_BINARY` names another.
fn minivmm() -> PathBuf {
    std::env::var_os("MINIVMM_BINARY").map_or_else(|| tools::minivmm().to_owned(), PathBuf::from)
}

fn spawn(wrapper: &[&str], dir: &Path, exports: &[Export], more: &[String]) -> Child {
    let (program, first) = match exporter() {
        Exporter::Minivmm => (minivmm(), Some("export")),
        Exporter::Qemu => ("qemu-storage-daemon".into(), None),
    };
    let mut command = match wrapper.split_first() {
        Some((outer, arguments)) => {
            let mut command = Command::new(outer);
            command.args(arguments).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.args(first);
    for export in exports {
        match exporter() {
            Exporter::Minivmm => export.minivmm(&mut command),
            Exporter::Qemu => export.qemu(&mut command),
        }
    }
    // QEMU's has none of our options.
    if exporter() == Exporter::Minivmm {
        command.args(more);
    }
    let log = File::options().append(true).create(true).open(dir.join("daemon.log")).unwrap();
    command.current_dir(dir).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}
