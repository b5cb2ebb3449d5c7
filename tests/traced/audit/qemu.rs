//! QEMU audited with the same guest: clean where it is, and a known defect found where it has it.
//!
//! The defect (seen in 7.2): with the write cache off and the `file` node directly below the device, a
//! write's emulated FUA is a flush that runs before the write's generation is counted, so the first
//! write after a FLUSH or after the start is acknowledged without a sync. A `raw` node above hides it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use minivmm_testkit::machine::{Image, exit, kvm, run, skip};

use super::host::File;
use super::rules::{Audit, Finding};
use super::{NEGOTIATIONS, ring, strace, strace_is_here};

/// Where microvm has its virtio-mmio transports.
const MICROVM_MMIO: &str = "VIRTIO_MMIO_BASE=0xfeb00000";

/// Another QEMU than that of the path can be named in `AUDIT_QEMU`.
fn program() -> String {
    std::env::var("AUDIT_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into())
}

/// Major and minor version of QEMU, where it is installed and can be traced.
fn version() -> Option<(u32, u32)> {
    let Ok(output) = Command::new(program()).arg("--version").output() else {
        skip("qemu", &format!("{} is not installed, QEMU is not audited", program()));
        return None;
    };
    if !strace_is_here() {
        return None;
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.split("version ").nth(1)?.split(['.', ' ']).map(|n| n.parse().unwrap_or(0));
    Some((numbers.next()?, numbers.next()?))
}

fn kernel() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bare-microvm-audit");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/bare/build.sh");
        let built = Command::new(&script).arg(&directory).arg(MICROVM_MMIO).status().unwrap();
        assert!(built.success(), "{} failed", script.display());
        directory.join("pvh.elf")
    })
}

/// A block graph below the device.
#[derive(Debug, Clone, Copy)]
struct Graph {
    /// A `raw` node stands above the `file` node.
    raw: bool,
    direct: bool,
    no_flush: bool,
    /// What QEMU calls `aio`.
    aio: &'static str,
}

const PLAIN: Graph = Graph { raw: true, direct: false, no_flush: false, aio: "threads" };

impl Graph {
    fn blockdev(self, image: &Image) -> String {
        let on = |on| if on { "on" } else { "off" };
        let (driver, file) = if self.raw { ("raw", "file.") } else { ("file", "") };
        let cache = format!("cache.direct={},cache.no-flush={}", on(self.direct), on(self.no_flush));
        let below = if self.raw { ",file.driver=file" } else { "" };
        let place = format!("{file}filename={},{file}aio={}", image.path.display(), self.aio);
        format!("driver={driver}{below},{place},node-name=disk,{cache}")
    }
}

fn audit(graph: Graph, write_cache: bool, words: &str) -> Audit {
    audit_with(graph, write_cache, words, &[])
}

/// `faults` are strace's: calls that are not made and seem to fail.
fn audit_with(graph: Graph, write_cache: bool, words: &str, faults: &[&str]) -> Audit {
    let image = Image::new();
    let (log, console) = (image.path.with_extension("strace"), image.path.with_extension("console"));
    let mut strace = strace(&log);
    strace.args(faults.iter().flat_map(|fault| ["-e", fault])).arg(program());
    configure(&mut strace, graph, write_cache, words, &image, &console);
    let what = format!("{graph:?}, write-cache={write_cache}, {words}");
    run(&mut strace, b"").expect(exit(0x2a), &what);
    let trace = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
    assert_eq!(trace.contains("(INJECTED)"), !faults.is_empty(), "{what}: did the fault strike?");
    let console = File::Path(console.to_str().unwrap().into());
    let audit = Audit::of(&trace, image.path.to_str().unwrap(), &console);
    let audit = audit.unwrap_or_else(|error| panic!("{what}: {error}"));
    println!("{what}: {audit}");
    audit
}

/// What QEMU is told of the machine, the guest and the disk.
fn configure(vmm: &mut Command, graph: Graph, write_cache: bool, words: &str, image: &Image, console: &Path) {
    vmm.args(["-M", "microvm,acpi=off,rtc=off,pit=off,pic=off", "-nodefaults", "-no-user-config"]);
    vmm.args(["-accel", if kvm() { "kvm" } else { "tcg" }, "-m", "64", "-display", "none", "-no-reboot"]);
    vmm.arg("-kernel").arg(kernel()).arg("-append").arg(format!("scenario=audit {words}"));
    vmm.args(["-global", "virtio-mmio.force-legacy=false"]);
    vmm.arg("-chardev").arg(format!("file,id=console,path={}", console.display()));
    vmm.args(["-serial", "chardev:console", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    vmm.arg("-blockdev").arg(graph.blockdev(image));
    let cache = if write_cache { "on" } else { "off" };
    vmm.args(["-device", &format!("virtio-blk-device,drive=disk,bus=virtio-mmio-bus.0,write-cache={cache}")]);
}

#[test]
fn qemu_with_a_raw_node_keeps_what_it_acknowledges() {
    if version().is_none() {
        return;
    }
    for direct in [false, true] {
        for write_cache in [true, false] {
            for (words, _) in NEGOTIATIONS {
                let graph = Graph { direct, ..PLAIN };
                let audit = audit(graph, write_cache, words);
                assert_eq!(audit.writes, 8, "{graph:?} {write_cache} {words}: {audit}");
                assert_eq!(audit.verdict(), "kept", "{graph:?} {write_cache} {words}: {audit}");
            }
        }
    }
}

#[test]
fn the_file_node_alone_acknowledges_the_first_write_after_a_flush_unstable() {
    let Some(version) = version() else { return };
    for direct in [false, true] {
        for words in ["", "noflush nowce", "wb=0"] {
            let graph = Graph { raw: false, direct, ..PLAIN };
            let audit = audit(graph, false, words);
            assert_eq!(audit.stable_writes, 8, "{audit}");
            // Between the two, either.
            if version <= (7, 2) {
                let first = |f: &Finding| matches!(f, Finding::WriteNotStable { write: 1, .. });
                assert!(audit.findings.iter().any(first), "the known defect is not found: {words} {audit}");
            } else if version >= (10, 0) {
                assert_eq!(audit.verdict(), "kept", "{graph:?} {words}: {audit}");
            }
        }
    }
}

#[test]
fn qemu_without_flushes_is_found_out() {
    if version().is_none() {
        return;
    }
    let audit = audit(Graph { no_flush: true, ..PLAIN }, true, "");
    let broken = audit.findings.iter().filter(|f| matches!(f, Finding::FlushDoesNotCover { .. })).count();
    assert_eq!(broken, 32, "{audit}");
}

#[test]
fn what_goes_through_a_ring_is_not_judged() {
    if version().is_none() {
        return;
    }
    let audit = audit(Graph { aio: "io_uring", ..PLAIN }, true, "");
    assert_eq!(audit.verdict(), "inconclusive", "{audit}");
    assert!(audit.to_string().contains("not seen into: io_uring_enter"), "{audit}");
}

#[test]
fn a_failed_sync_is_latched_by_qemu_in_the_page_cache_and_not_with_o_direct() {
    if version().is_none() {
        return;
    }
    for direct in [false, true] {
        let graph = Graph { direct, ..PLAIN };
        let audit = audit_with(graph, true, "", &["inject=fdatasync:error=EIO:when=1"]);
        let trusted = audit.findings.iter().any(|f| matches!(f, Finding::AfterFailedSync { .. }));
        assert_eq!(trusted, direct, "{graph:?}: {audit}");
    }
}

fn audit_ring(graph: Graph, write_cache: bool, words: &str) -> Option<Audit> {
    let eye = ring::eye()?;
    let image = Image::new();
    let console = image.path.with_extension("console");
    let mut command = Command::new(program());
    configure(&mut command, graph, write_cache, words, &image, &console);
    let (audit, seen) = ring::audit(eye, &image.path, &console, &mut command, exit(0x2a));
    println!("{graph:?}, write-cache={write_cache}, {words}: {seen:?} {audit}");
    Some(audit)
}

#[test]
fn the_file_nodes_defect_is_found_in_the_ring_too() {
    let Some(version) = version() else { return };
    if !kvm() {
        return;
    }
    for words in ["", "noflush nowce", "wb=0"] {
        let graph = Graph { aio: "io_uring", raw: false, ..PLAIN };
        let Some(audit) = audit_ring(graph, false, words) else { return };
        let first = |f: &Finding| matches!(f, Finding::WriteNotStable { write: 1, .. });
        if version <= (7, 2) {
            assert!(audit.findings.iter().any(first), "the known defect is not found: {words} {audit}");
        } else if version >= (10, 0) {
            assert_eq!(audit.verdict(), "kept", "{graph:?} {words}: {audit}");
        }
    }
}

#[test]
fn qemus_ring_keeps_what_it_acknowledges_and_without_flushes_it_does_not() {
    if version().is_none() || !kvm() {
        return;
    }
    for (direct, no_flush) in [(false, false), (true, false), (false, true)] {
        for write_cache in [true, false] {
            for (words, _) in NEGOTIATIONS {
                let graph = Graph { aio: "io_uring", direct, no_flush, ..PLAIN };
                let Some(audit) = audit_ring(graph, write_cache, words) else { return };
                let what = format!("{graph:?}, write-cache={write_cache}, {words}: {audit}");
                assert_eq!(audit.writes, 8, "{what}");
                let promised = audit.stable_writes > 0 || audit.flushes > 0;
                let expected = if no_flush && promised { "broken promises" } else { "kept" };
                assert_eq!(audit.verdict(), expected, "{what}");
            }
        }
    }
}
