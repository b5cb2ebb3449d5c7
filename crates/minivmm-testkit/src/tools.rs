//! minivmm with the binaries that it hands over to beside it: minivmm-tools has `top`, `log`, `crash`, `bench` and
//! `study`, minivmm-export has `export`.
//!
//! cargo builds the binaries of a test's own package only, and those are other packages'. Once a process, they are built
//! here as the sources are now: a test never runs an old one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::places;

/// What minivmm hands over to.
const BINARIES: [&str; 2] = ["minivmm-tools", "minivmm-export"];

static BUILT: OnceLock<PathBuf> = OnceLock::new();

/// Returns minivmm's path.
pub fn minivmm() -> &'static Path {
    BUILT.get_or_init(|| {
        let minivmm = places::minivmm();
        // Set where cargo runs the test. `tests/as-user` has built them before; its user cannot.
        if let Some(cargo) = std::env::var_os("CARGO") {
            build(Command::new(cargo), &minivmm);
        }
        for name in BINARIES {
            let binary = minivmm.with_file_name(name);
            assert!(binary.exists(), "{} is missing: `make build` builds it", binary.display());
        }
        minivmm
    })
}

/// Builds them with the profile, and for the target, of minivmm at `target/[TARGET/]PROFILE/minivmm`.
fn build(mut cargo: Command, minivmm: &Path) {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let directory = minivmm.parent().unwrap();
    let profile = match name(directory) {
        debug if debug == "debug" => "dev".to_owned(),
        profile => profile,
    };
    cargo.args(["build", "--locked", "--quiet", "--profile", &profile]);
    cargo.args(BINARIES.iter().flat_map(|name| ["--bin", name]));
    let above = directory.parent().unwrap();
    if Some(above) != places::tmp().parent() {
        cargo.args(["--target", &name(above)]);
    }
    let built = cargo.current_dir(places::root()).output().unwrap();
    assert!(
        built.status.success(),
        "{BINARIES:?} cannot be built: {}",
        String::from_utf8_lossy(&built.stderr)
    );
}
