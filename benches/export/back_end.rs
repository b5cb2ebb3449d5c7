//! The back ends that are compared, each configured at its best.
//!
//! Owns their command lines, and their start and end in each run: two that have the image at once would lock each other
//! out.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use minivmm_testkit::machine::kill;
use minivmm_testkit::tools;
use tempfile::TempDir;

/// Longer than a back end takes to start or to end.
const PATIENCE: Duration = Duration::from_secs(3);
const QEMU: &str = "qemu-storage-daemon";

/// One of those that are compared.
#[derive(Debug, Clone, Copy)]
pub struct Who {
    /// As the report calls it.
    pub name: &'static str,
    /// QEMU's `aio`; `None` for minivmm.
    aio: Option<&'static str>,
}

/// Returns those for a mode, minivmm first.
pub fn all(mode: &str) -> Vec<Who> {
    let qemu = |name, aio| Who { name, aio: Some(aio) };
    let minivmm = Who { name: "minivmm", aio: None };
    // aio=native is for O_DIRECT only.
    let other = if mode == "none" { qemu("qsd native", "native") } else { qemu("qsd threads", "threads") };
    vec![minivmm, qemu("qsd io_uring", "io_uring"), other]
}

/// The minivmm that is measured; `MINIVMM_BINARY` names another.
fn binary() -> PathBuf {
    std::env::var_os("MINIVMM_BINARY").map_or_else(|| tools::minivmm().to_owned(), PathBuf::from)
}

/// Says what is compared.
pub fn describe() -> Result<String> {
    let qemu =
        Command::new(QEMU).arg("--version").output().context("qemu-storage-daemon (make test-deps)")?;
    let qemu = String::from_utf8_lossy(&qemu.stdout).lines().next().unwrap_or_default().to_owned();
    Ok(format!("{}; {qemu}, with an iothread", binary().display()))
}

/// A running back end.
pub struct BackEnd {
    /// Where it listens.
    pub socket: PathBuf,
    child: Child,
    _dir: TempDir,
}

impl BackEnd {
    /// Starts it with one disk of one queue; returns when its socket is there.
    pub fn start(who: &Who, image: &Path, mode: &str, keys: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("s");
        let image = image.canonicalize()?;
        let mut command = match who.aio {
            None => minivmm(&image, &socket, mode, keys),
            Some(aio) => qemu(&image, &socket, mode, aio),
        };
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
        let mut back_end = Self { socket, child, _dir: dir };
        let begin = Instant::now();
        while !back_end.socket.exists() {
            let ended = back_end.child.try_wait()?;
            ensure!(ended.is_none(), "{command:?} has ended: {ended:?}");
            ensure!(begin.elapsed() < PATIENCE, "{command:?} makes no socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(back_end)
    }

    /// Ends it: the next one wants the image. What the front end has been told is measured; a QEMU that hangs now (7.2
    /// does now and then) is killed.
    pub fn stop(mut self) -> Result<()> {
        kill(i32::try_from(self.child.id())?, libc::SIGTERM);
        let begin = Instant::now();
        while self.child.try_wait()?.is_none() && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn minivmm(image: &Path, socket: &Path, mode: &str, keys: &str) -> Command {
    let mut command = Command::new(binary());
    let keys = if keys.is_empty() { String::new() } else { format!(",{keys}") };
    let disk = format!("{},cache={mode},queues=1{keys}", image.display());
    command.args(["export", "--disk", &disk, "--socket"]).arg(socket);
    command
}

fn qemu(image: &Path, socket: &Path, mode: &str, aio: &str) -> Command {
    let direct = if mode == "none" { "on" } else { "off" };
    let mut command = Command::new(QEMU);
    command.args(["--object", "iothread,id=thread", "--blockdev"]);
    command.arg(format!("file,node-name=file,filename={},cache.direct={direct},aio={aio}", image.display()));
    command.args(["--blockdev", &format!("raw,node-name=disk,file=file,cache.direct={direct}"), "--export"]);
    command.arg(format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1,iothread=thread",
        socket.display()
    ));
    command
}
