//! QEMU with the same guest, so the same driver, beside minivmm. Where the two differ in what is
//! stable, or in which sync is made, the difference is one of [`KNOWN`], which docs/results/qemu-calls.md
//! explains; a new one fails.
//!
//! `MINIVMM_QEMU` names another emulator than the installed one. Its guest is emulated: it needs no
//! KVM.

use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_testkit::machine::*;
use serde_json::Value;

use super::log::{self, Log, stages};
use super::{calls, explain, words};

/// The modes that QEMU has too.
const MODES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];

/// The last of microvm's virtio-mmio slots, which it fills first.
const SLOT: &str = "VIRTIO_MMIO_BASE=0xfeb02e00";

/// (modes, of which drivers, at which request, what minivmm does, what QEMU does).
type Difference = (&'static [&'static str], fn(&Value) -> bool, &'static str, Sync, Sync);

/// What a request has done for stability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sync {
    /// Nothing.
    No,
    /// fdatasync, or RWF_DSYNC.
    Yes,
}

const KNOWN: [Difference; 6] = [
    // A driver with FLUSH alone takes the cache for a write-back one, and QEMU lets it.
    (&["writethrough", "directsync"], only_flush, "wrote", Sync::Yes, Sync::No),
    (&["writethrough", "directsync"], only_flush, "zeroed", Sync::Yes, Sync::No),
    // CONFIG_WCE without FLUSH begins as write-through (virtio 5.2.5.2); in QEMU it does not.
    (&["none", "writeback"], only_config_wce, "wrote", Sync::Yes, Sync::No),
    (&["none", "writeback"], only_config_wce, "zeroed", Sync::Yes, Sync::No),
    // QEMU has no stable discard.
    (&MODES, any, "discarded", Sync::Yes, Sync::No),
    // QEMU leaves a FLUSH out where it has synced since the last write; minivmm never does.
    (&MODES, is_write_through, "flushed", Sync::Yes, Sync::No),
];

fn only_flush(driver: &Value) -> bool {
    driver["negotiates_flush"] == true && driver["negotiates_config_wce"] == false
}

fn only_config_wce(driver: &Value) -> bool {
    driver["negotiates_flush"] == false && driver["negotiates_config_wce"] == true
}

fn is_write_through(driver: &Value) -> bool {
    driver["writeback"] == 0
}

fn any(_: &Value) -> bool {
    true
}

fn emulator() -> PathBuf {
    std::env::var_os("MINIVMM_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into()).into()
}

/// Its version, if it is there.
fn version() -> Option<String> {
    let output = Command::new(emulator()).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

fn guest() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bare-microvm-explain");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/bare/build.sh");
    assert!(Command::new(script).arg(&directory).arg(SLOT).status().unwrap().success());
    directory.join("pvh.elf")
}

/// One driver in QEMU: its exit code, and the log.
fn trace(kernel: &Path, image: &Image, mode: &str, words: &str) -> (i32, Log) {
    let path = image.path.with_extension("strace");
    let mut command = log::strace(&path);
    command.arg(emulator()).args([
        "-accel",
        "tcg",
        "-M",
        "microvm,x-option-roms=off,rtc=off,pit=off,pic=off",
    ]);
    command.args(["-m", "64", "-nodefaults", "-no-reboot", "-display", "none"]);
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    command.args([
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-device",
        "virtio-blk-device,drive=d",
    ]);
    command
        .arg("-drive")
        .arg(format!("id=d,if=none,format=raw,discard=unmap,cache={mode},file={}", image.path.display()));
    command.arg("-serial").arg(format!("file:{}", log::console(&image.path).display()));
    command.arg("-kernel").arg(kernel).arg("-append").arg(format!("scenario=io {words}"));
    let ran = run(&mut command, b"");
    (ran.status >> 1, Log::read(&path, &image.path))
}

fn sync(calls: &[String]) -> Sync {
    let syncs = |call: &String| {
        ["fdatasync", "fsync"].contains(&call.as_str())
            || call.contains("FSYNC")
            || call.contains("RWF_DSYNC")
    };
    let synced = calls.iter().any(syncs);
    if synced { Sync::Yes } else { Sync::No }
}

#[test]
fn qemu_with_the_same_driver_differs_only_where_the_docs_say_so() {
    let (Some(version), true) = (version(), Command::new("strace").arg("-V").output().is_ok()) else {
        skip("qemu", "QEMU or strace is not installed, nothing stands beside");
        return;
    };
    let kernel = guest();
    let mut table = format!("{version}\n");
    let mut new = Vec::new();
    for mode in MODES {
        let image = Image::new();
        let told = explain(&image.disk(&format!("cache={mode},engine=sync")));
        for driver in told["calls"]["drivers"].as_array().unwrap() {
            let words = words(driver).replace(" twice", "");
            let what = format!("cache={mode} {words}");
            let (code, log) = trace(&kernel, &image, mode, &words);
            let byte_stays =
                driver["sets_writeback"].is_null() || driver["sets_writeback"] == driver["writeback"];
            if code == 0x25 || !byte_stays {
                table += &format!("{what}: the byte stays: {byte_stays} here, {} there\n", code == 0x20);
                continue;
            }
            assert_eq!(code, 0x20, "{what}: {log:?}");
            let mine = stages(driver);
            let all = [vec![("start", vec![])], mine.clone()].concat();
            let theirs = log.cut(&all, &what);
            for ((stage, ours), (_, theirs)) in mine.iter().zip(&theirs[1..]) {
                table += &format!("{what}: {stage}: {ours:?} here, {theirs:?} there\n");
                let (here, there) = (sync(ours), sync(theirs));
                let known = KNOWN.iter().any(|(modes, drivers, at, ours, theirs)| {
                    modes.contains(&mode)
                        && drivers(driver)
                        && at == stage
                        && (*ours, *theirs) == (here, there)
                });
                if here != there && !known {
                    new.push(format!("{what}: {stage}: {ours:?} here, {theirs:?} there"));
                }
            }
        }
    }
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("beside-qemu.txt"), table).unwrap();
    assert!(new.is_empty(), "{version} differs in what no document explains:\n{}", new.join("\n"));
}

#[test]
fn calls_are_judged_by_their_syncs() {
    let told: Value = serde_json::json!(["pwritev", "fdatasync"]);
    assert_eq!(sync(&calls(&told)), Sync::Yes);
    for (call, expected) in [
        ("pwritev", Sync::No),
        ("pwritev2(RWF_DSYNC)", Sync::Yes),
        ("pwritev2(RWF_NOWAIT), else pwritev if alone, else IORING_OP_WRITE", Sync::No),
        ("IORING_OP_WRITE(RWF_DSYNC)", Sync::Yes),
        ("IORING_OP_FSYNC(IORING_FSYNC_DATASYNC)", Sync::Yes),
    ] {
        assert_eq!(sync(&[call.into()]), expected, "{call}");
    }
}
