//! The benchmark guest (`guest-images/bench`), alone and briefly: that it measures what was done. How fast
//! it was is `make bench-bare`'s business.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use minivmm_testkit::machine::*;

/// The guest's exit code if what it wrote is what it read.
const ALL_IS_WELL: i32 = 0x10;

fn guest() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| freestanding("bench"))
}

/// One load, of a second unless the words say another time; the guest's clock runs at a nominal 1 GHz, so its times are cycles.
fn load(image: &Image, transport: &str, words: &str) -> Ran {
    let ring = if hardware_virtualization() { 0 } else { 3 };
    let mmio = if transport == "mmio" { "mmio=0xd0000000" } else { "" };
    let cmdline = format!("{words} warm_ms=20 tsc_khz=1000000 ring={ring} transport={transport} {mmio}");
    let mut command = minivmm();
    command.args([
        "--quiet",
        "--console",
        "stdio",
        "--memory",
        "128M",
        "--timeout",
        "60",
        "--initrd",
        "none",
    ]);
    command.args(["--transport", transport, "--cmdline", &cmdline, "--kernel"]).arg(guest());
    run(command.arg("--disk").arg(image.disk("cache=none")), b"")
}

fn figures(console: &str) -> HashMap<&str, f64> {
    let line = console.lines().find_map(|line| line.strip_prefix("result ")).unwrap();
    let words = line.split_whitespace().filter_map(|word| word.split_once('='));
    words.filter_map(|(name, figure)| Some((name, figure.parse().ok()?))).collect()
}

#[test]
fn every_load_ends_with_figures_that_can_be_and_nothing_is_lost() {
    if !kvm() {
        return;
    }
    for transport in ["pci", "mmio"] {
        for pattern in ["randread", "randwrite", "seqread", "seqwrite", "mixed", "writeflush"] {
            for depth in [1_u32, 32] {
                let what = format!("{pattern}, depth {depth}, {transport}");
                let image = Image::new();
                // Other tests keep the host's disk busy meanwhile: so long until each place in the queue has had its turn.
                let ran = [100, 2000, 20_000].into_iter().find_map(|ms| {
                    let words = format!("rw={pattern} bs=4096 depth={depth} ms={ms}");
                    let ran = load(&image, transport, &words).expect(exit(ALL_IS_WELL), &what);
                    let ops = figures(&ran.console)["ops"];
                    (ops >= f64::from(depth)).then_some(ran)
                });
                let ran = ran.unwrap_or_else(|| panic!("{what}: hardly anything in twenty seconds"));
                let figures = figures(&ran.console);
                let figure = |name: &str| figures[name];
                assert_eq!(figure("verified"), 1.0, "{what}");
                assert!(figure("p50") > 0.0, "{what}: {figures:?}");
                assert!(
                    figure("p50") <= figure("p99") && figure("p99") <= figure("p999"),
                    "{what}: {figures:?}"
                );
                // In flight are never more than the depth (Little's law), whatever the histogram says.
                let in_flight = figure("ops") * figure("p50") / figure("ns");
                assert!(in_flight <= 2.0 * f64::from(depth), "{what}: {in_flight} in flight, {figures:?}");
                // A FLUSH rings as well.
                assert!(figure("doorbells") <= 2.0 * figure("ops") + 2.0, "{what}: {figures:?}");
            }
        }
    }
}

#[test]
fn a_load_that_cannot_be_is_refused_by_the_guest() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    for words in ["rw=upwards bs=4096 depth=1", "rw=randread bs=4097 depth=1", "rw=randread bs=4096 depth=0"]
    {
        let ran = load(&image, "pci", words);
        assert_eq!(ran.status, exit(1), "{words}: {}{}", ran.console, ran.log);
        assert!(!ran.console.contains("result"), "{words}: {}", ran.console);
    }
    image.must_hold(&Image::before(), "loads that were refused");
}
