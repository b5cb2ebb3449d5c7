//! The bundled test guest: where its kernel and initrd are looked for.

use std::env;
use std::path::{Path, PathBuf};

const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd.cpio";
/// Names a directory, and then that one only.
const VARIABLE: &str = "MINIVMM_GUEST";

/// The files of the test guest.
#[derive(Debug, PartialEq, Eq)]
pub struct TestGuest {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
}

/// It is nowhere.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot find the test guest ({}): looked in {}; `make guest` builds it, or give --kernel PATH and --initrd \
     PATH (or none)",
    .files.join(" and "),
    .places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
)]
pub struct GuestNotFound {
    files: Vec<&'static str>,
    places: Vec<PathBuf>,
}

/// Looks for the test guest, of which the kernel or the initrd or both are needed.
pub fn find(needs_kernel: bool, needs_initrd: bool) -> Result<TestGuest, GuestNotFound> {
    let places = match env::var_os(VARIABLE) {
        Some(directory) => vec![directory.into()],
        None => places(env::current_exe().ok().as_deref().and_then(Path::parent)),
    };
    let mut files = Vec::new();
    files.extend(needs_kernel.then_some(KERNEL));
    files.extend(needs_initrd.then_some(INITRD));
    find_in(&places, &files).ok_or(GuestNotFound { files, places })
}

fn find_in(places: &[PathBuf], files: &[&str]) -> Option<TestGuest> {
    let place = places.iter().find(|place| files.iter().all(|file| place.join(file).is_file()))?;
    Some(TestGuest { kernel: place.join(KERNEL), initrd: place.join(INITRD) })
}

/// Beside the binary as installed, in the working directory's tree, and in the tree that the binary
/// was built in (target/release, or target/TRIPLE/release).
fn places(binary: Option<&Path>) -> Vec<PathBuf> {
    let built = "guest-images/build";
    let mut places = Vec::new();
    if let Some(directory) = binary {
        places.push(directory.join("../share/minivmm"));
        places.push(directory.into());
    }
    places.push(built.into());
    if let Some(directory) = binary {
        places.push(directory.join("../..").join(built));
        places.push(directory.join("../../..").join(built));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_has_all_that_is_needed_wins() {
        let root = tempfile::tempdir().unwrap();
        let places: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| root.path().join(name)).collect();
        for place in &places {
            std::fs::create_dir(place).unwrap();
        }
        std::fs::write(places[0].join(KERNEL), "").unwrap();
        for place in &places[1..] {
            std::fs::write(place.join(KERNEL), "").unwrap();
            std::fs::write(place.join(INITRD), "").unwrap();
        }
        assert_eq!(find_in(&places, &[KERNEL, INITRD]).unwrap().kernel, places[1].join(KERNEL));
        assert_eq!(find_in(&places, &[KERNEL]).unwrap().kernel, places[0].join(KERNEL));
        assert_eq!(find_in(&places, &[INITRD]).unwrap().initrd, places[1].join(INITRD));
        assert_eq!(find_in(&places[..1], &[KERNEL, INITRD]), None);
    }

    #[test]
    fn the_error_says_where_it_looked_and_what_to_do() {
        let places = places(Some(Path::new("/opt/minivmm/bin")));
        let error = GuestNotFound { files: vec![KERNEL, INITRD], places }.to_string();
        for word in [
            "vmlinuz and initrd.cpio",
            "/opt/minivmm/bin/../share/minivmm",
            "guest-images/build",
            "make guest",
        ] {
            assert!(error.contains(word), "{word} is missing in: {error}");
        }
    }
}
