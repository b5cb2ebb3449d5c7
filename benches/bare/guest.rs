//! The competitors: their command lines, and the guest's answer.
//!
//! Owns what QEMU is given so that it is at its best, and the clock that the guest counts by.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::report::Figures;
use crate::{Load, Place, fio};

/// The guest's exit code, as both VMMs turn it into a status.
const ALL_IS_WELL: i32 = 0x10 << 1 | 1;
const WARM_UP_MS: u32 = 100;
/// Longer than any run.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the VMMs have their virtio-mmio devices (src/layout.rs; QEMU's hw/i386/microvm.c).
const MINIVMM_MMIO: &str = "mmio=0xd0000000";
const QEMU_MMIO: &str = "mmio=0xfeb00000 mmio_count=24 mmio_step=0x200";

/// Who runs.
pub struct Competitor {
    /// In the tables.
    pub name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Minivmm { transport: &'static str },
    Qemu { machine: &'static str, device: &'static str, transport: &'static str, aio: &'static str },
    Fio,
}

impl Competitor {
    /// Linux' own AIO wants O_DIRECT; QEMU refuses it without.
    pub fn wants_direct(&self) -> bool {
        matches!(self.kind, Kind::Qemu { aio: "native", .. })
    }
}

/// All of them, minivmm's default first: ratios are its.
pub fn competitors(alone: bool) -> Vec<Competitor> {
    let microvm = |aio| Kind::Qemu {
        machine: "microvm,pit=off,pic=off,rtc=off",
        device: "virtio-blk-device",
        transport: "mmio",
        aio,
    };
    let q35 = |aio| Kind::Qemu { machine: "q35", device: "virtio-blk-pci", transport: "pci", aio };
    let mut all = vec![
        Competitor { name: "minivmm pci", kind: Kind::Minivmm { transport: "pci" } },
        Competitor { name: "minivmm mmio", kind: Kind::Minivmm { transport: "mmio" } },
    ];
    if !alone {
        all.push(Competitor { name: "QEMU microvm io_uring", kind: microvm("io_uring") });
        all.push(Competitor { name: "QEMU microvm native", kind: microvm("native") });
        all.push(Competitor { name: "QEMU q35 io_uring", kind: q35("io_uring") });
        all.push(Competitor { name: "fio on the host", kind: Kind::Fio });
    }
    all
}

/// What all runs share.
pub struct Bench {
    guest: PathBuf,
    keys: String,
    tsc_khz: u64,
    /// Only code at CPL 3 runs on the processor.
    ring: u8,
}

impl Bench {
    /// Builds the guest into `dir`; `keys` are minivmm's.
    pub fn new(dir: &Path, keys: &str) -> Result<Self> {
        let guest = dir.join("bench-guest.elf");
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images");
        let script = images.join("freestanding/build.sh");
        let built = Command::new(&script)
            .arg(&guest)
            .arg(images.join("bench"))
            .status()
            .context("the guest cannot be built")?;
        ensure!(built.success(), "{} failed", script.display());
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
        let ring = if has("vmx") || has("svm") { 0 } else { 3 };
        Ok(Self { guest, keys: keys.to_owned(), tsc_khz: tsc_khz(), ring })
    }

    /// For the head of the table.
    pub fn describe(&self) -> String {
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        let version = |output: Output| {
            String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
        };
        format!(
            "{}; the guest's loop runs at CPL {}{}",
            qemu.map_or("no QEMU here".into(), version),
            self.ring,
            if self.ring == 3 { ", since this KVM emulates CPL 0" } else { "" }
        )
    }

    /// One run of `ms` milliseconds.
    pub fn run(
        &self,
        who: &Competitor,
        load: &Load,
        place: &Place<'_>,
        ms: u32,
        round: u32,
    ) -> Result<Figures> {
        let (transport, mmio) = match who.kind {
            Kind::Fio => return fio::run(load, place, ms),
            Kind::Minivmm { transport } => (transport, MINIVMM_MMIO),
            Kind::Qemu { transport, .. } => (transport, QEMU_MMIO),
        };
        let cmdline = format!(
            "rw={} bs={} depth={} ms={ms} warm_ms={WARM_UP_MS} tsc_khz={} seed={} ring={} transport={transport} {mmio}",
            load.pattern,
            load.block_bytes,
            load.depth,
            self.tsc_khz,
            round + 1,
            self.ring
        );
        let mut command = match who.kind {
            Kind::Qemu { machine, device, aio, .. } => self.qemu((machine, device, aio), place, &cmdline),
            _ => self.minivmm(transport, place, &cmdline),
        };
        parse(&end_of(&mut command)?)
    }

    fn qemu(&self, (machine, device, aio): (&str, &str, &str), place: &Place<'_>, cmdline: &str) -> Command {
        let on = |on: bool| if on { "on" } else { "off" };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", machine, "-accel", "kvm", "-cpu", "host,arch-capabilities=off", "-m", "128M"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-object", "iothread,id=io", "-global", "virtio-mmio.force-legacy=false"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device"])
            .arg(format!("{device},drive=disk,iothread=io"))
            .arg("-blockdev")
            .arg(format!(
                "driver=file,filename={},node-name=disk,aio={aio},cache.direct={}",
                escaped(place),
                on(place.direct)
            ))
            .arg("-kernel")
            .arg(&self.guest)
            .args(["-append", cmdline]);
        command
    }

    fn minivmm(&self, transport: &str, place: &Place<'_>, cmdline: &str) -> Command {
        let comma = if self.keys.is_empty() { "" } else { "," };
        let cache = if place.direct { "none" } else { "writeback" };
        let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
        command
            .args(["--quiet", "--memory", "128M", "--initrd", "none", "--transport", transport, "--kernel"])
            .arg(&self.guest)
            .args(["--cmdline", cmdline, "--disk"])
            .arg(format!("{},cache={cache}{comma}{}", escaped(place), self.keys));
        command
    }
}

fn escaped(place: &Place<'_>) -> String {
    place.path.display().to_string().replace(',', ",,")
}

/// Waits for it, but not for ever.
fn end_of(command: &mut Command) -> Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("{:?} cannot be started", command.get_program()))?;
    let begin = Instant::now();
    while child.try_wait()?.is_none() {
        if begin.elapsed() > PATIENCE {
            child.kill()?;
            bail!("it did not end within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child.wait_with_output()?)
}

/// The line that begins with `result`.
fn parse(output: &Output) -> Result<Figures> {
    let said = String::from_utf8_lossy(&output.stdout);
    let told = || format!("{}{}", said.trim(), String::from_utf8_lossy(&output.stderr).trim());
    ensure!(output.status.code() == Some(ALL_IS_WELL), "it ended with {}: {}", output.status, told());
    let line = said.lines().find(|line| line.starts_with("result ")).with_context(told)?;
    let number = |name: &str| -> Result<f64> {
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        Ok(word.with_context(|| format!("no {name} in {line:?}"))?.parse()?)
    };
    let ops = number("ops")?;
    ensure!(number("verified")? == 1.0, "the guest has verified nothing");
    Ok(Figures {
        iops: ops / (number("ns")? / 1e9),
        p50_us: number("p50")? / 1e3,
        p99_us: number("p99")? / 1e3,
        p999_us: number("p999")? / 1e3,
        doorbells_per_io: Some(number("doorbells")? / ops.max(1.0)),
    })
}

/// The processor's time stamp counter, which the guest has as well, in kHz: the median of a few looks.
fn tsc_khz() -> u64 {
    let look = || {
        let (begin, from) = (Instant::now(), tsc());
        std::thread::sleep(Duration::from_millis(40));
        let (took, to) = (begin.elapsed(), tsc());
        (to - from) as f64 / took.as_secs_f64() / 1e3
    };
    let looks = (0..5).map(|_| look()).collect();
    crate::median::median(looks).unwrap_or_default() as u64
}

fn tsc() -> u64 {
    // SAFETY: rdtsc reads a register, and every x86-64 has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
