//! minivmm with minivmm-tools beside it, which has `top`, `log`, `crash`, `bench` and `study`.
//!
//! cargo builds the binaries of a test's own package only, and minivmm-tools is another package's. Once a process, it
//! is built here as the sources are now: a test never runs an old one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::places;

static BUILT: OnceLock<PathBuf> = OnceLock::new();

/// Returns minivmm's path.
pub fn minivmm() -> &'static Path {
    BUILT.get_or_init(|| {
        let minivmm = places::minivmm();
        // Set where cargo runs the test. `tests/as-user` has built minivmm-tools before; its user cannot.
        if let Some(cargo) = std::env::var_os("CARGO") {
            build(Command::new(cargo), &minivmm);
        }
        let tools = minivmm.with_file_name("minivmm-tools");
        assert!(tools.exists(), "{} is missing: `make build` builds it", tools.display());
        minivmm
    })
}

/// Builds minivmm-tools with the profile, and for the target, of minivmm at `target/[TARGET/]PROFILE/minivmm`.
fn build(mut cargo: Command, minivmm: &Path) {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let directory = minivmm.parent().unwrap();
    let profile = match name(directory) {
        debug if debug == "debug" => "dev".to_owned(),
        profile => profile,
    };
    let binaries = ["--bin", "minivmm-tools", "--bin", "minivmm-export"];
    cargo.args(["build", "--locked", "--quiet"]).args(binaries).args(["--profile", &profile]);
    let above = directory.parent().unwrap();
    if Some(above) != places::tmp().parent() {
        cargo.args(["--target", &name(above)]);
    }
    let built = cargo.current_dir(places::root()).output().unwrap();
    assert!(
        built.status.success(),
        "minivmm-tools cannot be built: {}",
        String::from_utf8_lossy(&built.stderr)
    );
}
