//! The command lines: the same kernel, initramfs, kernel parameters, memory and images for each VMM,
//! and the serial line on standard input and output.
//!
//! Owns where the programs are and what each is given. QEMU gets an iothread and its modern
//! virtio-mmio, neither of which is its default.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::plan::{Kind, Mode};

/// Guest memory.
pub const MEMORY_MIB: u64 = 512;

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// minivmm.
    pub minivmm: PathBuf,
    /// QEMU, if there is one.
    pub qemu: Option<Qemu>,
}

/// An installed QEMU, or one that `guest-images/pack-qemu` has packed.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    pack: Option<PathBuf>,
}

impl Qemu {
    /// The installed one, if it starts.
    pub fn installed() -> Option<Self> {
        Self { program: "qemu-system-x86_64".into(), pack: None }.working()
    }

    /// The one in this pack, if it starts.
    pub fn packed(pack: &Path) -> Option<Self> {
        Self { program: pack.join("bin/qemu-system-x86_64"), pack: Some(pack.into()) }.working()
    }

    fn working(self) -> Option<Self> {
        version(&mut self.command()).is_ok().then_some(self)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(pack) = &self.pack {
            command.env("LD_LIBRARY_PATH", pack.join("lib"));
            command.arg("-L").arg(pack.join("share"));
        }
        command
    }
}

impl Programs {
    /// Their versions, of those that are there.
    pub fn versions(&self) -> Result<Vec<String>> {
        let mut versions = vec![version(&mut Command::new(&self.minivmm))?];
        if let Some(qemu) = &self.qemu {
            versions.push(version(&mut qemu.command())?);
        }
        Ok(versions)
    }
}

fn version(command: &mut Command) -> Result<String> {
    let output = command.arg("--version").output();
    let output = output.with_context(|| format!("{} cannot be started", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} does not run: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// What every VMM boots.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// An ELF vmlinux with a PVH note.
    pub kernel: &'a Path,
    /// The test guest's, with the job behind it.
    pub initrd: &'a Path,
    /// Kernel parameters, all of them.
    pub parameters: &'a str,
}

/// The disks of a guest that runs jobs.
#[derive(Debug, Clone, Copy)]
pub struct Disks<'a> {
    /// What is measured.
    pub image: &'a Path,
    /// How.
    pub mode: &'a Mode,
    /// Where the guest writes what fio says.
    pub results: &'a Path,
}

/// The command line for the jobs.
pub fn for_jobs(programs: &Programs, kind: Kind, guest: &Guest<'_>, disks: &Disks<'_>) -> Result<Command> {
    match kind {
        Kind::Minivmm(transport) => {
            let mut command = minivmm(programs, guest);
            command.args(["--transport", transport]);
            for (path, mode, serial) in disks.both() {
                command.arg("--disk").arg(format!("{},cache={mode},serial={serial}", quoted(path)));
            }
            Ok(command)
        }
        Kind::Qemu { machine, device, aio } => {
            let mut command = qemu(programs, machine, guest)?;
            command.args(["-global", "virtio-mmio.force-legacy=false", "-object", "iothread,id=io"]);
            for (path, mode, id) in disks.both() {
                // The disk for results is in the page cache, where aio=native cannot be had.
                let (aio, thread) = if id == BENCH { (aio, ",iothread=io") } else { ("threads", "") };
                command
                    .arg("-drive")
                    .arg(format!("file={},format=raw,if=none,id={id},cache={mode},aio={aio}", quoted(path)));
                command.arg("-device").arg(format!("{device},drive={id},serial={id}{thread}"));
            }
            Ok(command)
        }
        Kind::HostFio => anyhow::bail!("fio on the host is no VMM"),
    }
}

/// Serials by which the guest finds its disks, whatever their order.
const BENCH: &str = "bench";
const RESULTS: &str = "results";

impl<'a> Disks<'a> {
    fn both(&self) -> [(&'a Path, &'a str, &'static str); 2] {
        [(self.image, self.mode.name, BENCH), (self.results, "writeback", RESULTS)]
    }
}

/// The command line for a boot to init, without a disk.
pub fn for_boot(programs: &Programs, machine: Option<&str>, guest: &Guest<'_>) -> Result<Command> {
    match machine {
        None => Ok(minivmm(programs, guest)),
        Some(machine) => qemu(programs, machine, guest),
    }
}

fn minivmm(programs: &Programs, guest: &Guest<'_>) -> Command {
    let mut command = Command::new(&programs.minivmm);
    command.arg("--kernel").arg(guest.kernel).arg("--initrd").arg(guest.initrd);
    command.args(["--cmdline", guest.parameters, "--memory", &format!("{MEMORY_MIB}M"), "--quiet"]);
    command
}

fn qemu(programs: &Programs, machine: &str, guest: &Guest<'_>) -> Result<Command> {
    let qemu = programs.qemu.as_ref().context("there is no QEMU (Debian package qemu-system-x86)")?;
    let mut command = qemu.command();
    command.args(["-machine", machine, "-accel", "kvm", "-cpu", "host", "-m", &format!("{MEMORY_MIB}M")]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(guest.kernel).arg("-initrd").arg(guest.initrd);
    command.args(["-append", guest.parameters]);
    Ok(command)
}

/// A path in a list that commas part, as both VMMs read it.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
