//! Where this machine's KVM cannot run Linux: the whole harness goes into one emulated host, with
//! minivmm, QEMU and the guest images, and measures there. Nothing is timed from outside.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use vmm_sys_util::signal::register_signal_handler;

use crate::machine;

/// The emulated host's memory, in MiB: a guest, its image in the page cache, and room.
const MEMORY_MIB: &str = "4096";
const HARNESS: &str = "bin/guest-bench";

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Where guests run, as `guest-images/which-host` says; and whether that is in the emulated host.
pub fn which_host() -> Result<(String, bool)> {
    let output = Command::new(tree("guest-images/which-host")).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "guest-images/which-host has failed");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let emulated = !text.starts_with("directly");
    Ok((text, emulated))
}

/// What is to be done inside.
pub struct Inside<'a> {
    /// minivmm.
    pub minivmm: &'a Path,
    /// A directory for the emulated host and the packed QEMU.
    pub dir: &'a Path,
    /// Whether QEMU is wanted.
    pub qemu: bool,
    /// Arguments for the harness.
    pub arguments: Vec<String>,
    /// Where the JSON goes.
    pub json: &'a Path,
}

/// Ends the emulated host, whatever has happened.
struct Host(PathBuf);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = emuhost("kill").arg(&self.0).status();
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn emuhost(command: &str) -> Command {
    let mut emuhost = Command::new(tree("guest-images/emuhost"));
    emuhost.arg(command);
    emuhost
}

/// Runs the harness in an emulated host.
pub fn run(inside: &Inside<'_>) -> Result<()> {
    std::fs::create_dir_all(inside.dir)?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // emuhost passes it on and ends; then the emulated host is ended here.
        register_signal_handler(signal, nothing).context("a signal cannot be handled")?;
    }
    let qemu = inside.dir.join("qemu");
    let packed = inside.qemu && pack_qemu(&qemu);
    let host = Host(inside.dir.join(format!("guest-host-{}", std::process::id())));
    let harness = std::env::current_exe().context("this program's own file is not known")?;
    let mut start = emuhost("start");
    start.args(["--memory", MEMORY_MIB, "--timeout", "0", "--binary"]).arg(inside.minivmm);
    start.arg("--put").arg(format!("{}:{HARNESS}", harness.display()));
    if packed {
        start.arg("--put").arg(format!("{}:qemu", qemu.display()));
    }
    let started = start.arg(&host.0).status().context("guest-images/emuhost cannot be started")?;
    ensure!(started.success(), "the emulated host did not start");

    let mut exec = emuhost("exec");
    exec.args(["--no-tty", "--timeout", "0"]).arg(&host.0);
    exec.args(["--", &format!("/data/{HARNESS}"), "--dir=/data/bench", "--minivmm=/data/bin/minivmm"]);
    exec.args(["--guest=/data/guest/6.12", "--json=/data/bench/guest.json"]);
    exec.arg(if packed { "--qemu=/data/qemu" } else { "--qemu=none" });
    exec.arg(format!("--emulated-on={}", around())).args(&inside.arguments);
    let ran = exec.stdin(Stdio::null()).status()?;
    ensure!(ran.success(), "the benchmark in the emulated host has ended with {ran}");
    let pulled = emuhost("pull").arg(&host.0).arg("bench/guest.json").arg(inside.json).status()?;
    ensure!(pulled.success(), "{} was not brought back", inside.json.display());
    println!("JSON: {}", inside.json.display());
    Ok(())
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The emulator itself is the QEMU that is measured there. Without it there is only minivmm.
fn pack_qemu(into: &Path) -> bool {
    let packed = Command::new(tree("guest-images/pack-qemu")).arg(into).stdout(Stdio::null()).status();
    packed.is_ok_and(|status| status.success())
}

/// The machine around the emulated host, in a line.
fn around() -> String {
    let machine = machine::Machine::look(Path::new("."), String::new());
    format!("{}, {} CPUs, load {}", machine.cpu, machine.cpus, machine.load_at_start)
}
