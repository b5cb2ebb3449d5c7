//! The bundled test guest: where its kernel and initrd are searched for.
//!
//! Owns the choice between a kernel's two images, too. The ELF image has nothing to unpack and boots sooner.
//! It is used only if it is no older than the bzImage beside it, from which it is made. An ELF image left
//! behind by another kernel would not match the initrd's modules.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const KERNEL: &str = "vmlinuz";
const KERNEL_ELF: &str = "vmlinux";
const INITRD: &str = "initrd.cpio";
const MODULES: &str = "modules.cpio";
/// The environment variable that names a directory, which is then the only one searched.
const VARIABLE: &str = "MINIVMM_GUEST";

/// The files of the test guest.
#[derive(Debug, PartialEq, Eq)]
pub struct TestGuest {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
}

/// The test guest was not found.
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

/// The kernel's other modules were not found beside the test guest.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot find the kernel's other modules ({}): `make guest` builds them beside the test guest; or give \
     --modules=PATH, an archive with lib/modules/VERSION",
    .0.display()
)]
pub struct ModulesNotFound(PathBuf);

/// Returns the archive of modules beside `kernel`. It looks first where the kernel's links lead, since
/// modules belong to one kernel, and then beside the link itself.
pub fn modules_beside(kernel: &Path) -> Result<PathBuf, ModulesNotFound> {
    let real = kernel.canonicalize().unwrap_or_else(|_| kernel.into());
    let places = [real.with_file_name(MODULES), kernel.with_file_name(MODULES)];
    let [first, _] = &places;
    places.iter().find(|place| place.is_file()).ok_or_else(|| ModulesNotFound(first.clone())).cloned()
}

/// Returns the test guest that the environment names, as arguments, because the emulated host has another
/// environment. Empty if it does not exist, which the run reports.
pub fn named_as_arguments(kernel: bool, initrd: bool) -> Vec<OsString> {
    let named = env::var_os(VARIABLE).and_then(|_| find(kernel, initrd).ok());
    let Some(found) = named else { return Vec::new() };
    let kernel = kernel.then(|| ["--kernel".into(), found.kernel.into()]);
    let initrd = initrd.then(|| ["--initrd".into(), found.initrd.into()]);
    kernel.into_iter().chain(initrd).flatten().collect()
}

/// Searches for the test guest, of which the kernel, the initrd or both are needed.
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
    Some(TestGuest { kernel: kernel_in(place), initrd: place.join(INITRD) })
}

/// Returns the ELF image, or the bzImage if the ELF image is missing or older.
fn kernel_in(place: &Path) -> PathBuf {
    let (packed, elf) = (place.join(KERNEL), place.join(KERNEL_ELF));
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
    match (modified(&elf), modified(&packed)) {
        (Ok(elf_at), Ok(packed_at)) if elf_at >= packed_at => elf,
        (Ok(_), _) => {
            log::info!("{} is older than {KERNEL} beside it: not used", elf.display());
            packed
        }
        _ => packed,
    }
}

/// Returns the places to search: beside the binary as installed, in the working directory's tree, and in the
/// tree in which the binary was built (target/release, or target/TRIPLE/release).
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
    fn the_elf_image_is_taken_unless_it_is_older_than_the_bzimage() {
        let root = tempfile::tempdir().unwrap();
        let (packed, elf) = (root.path().join(KERNEL), root.path().join(KERNEL_ELF));
        std::fs::write(&packed, "").unwrap();
        assert_eq!(kernel_in(root.path()), packed);
        std::fs::write(&elf, "").unwrap();
        let second = std::time::Duration::from_secs(1);
        let packed_at = std::fs::metadata(&packed).unwrap().modified().unwrap();
        let elf_file = std::fs::File::options().write(true).open(&elf).unwrap();
        for (elf_at, taken) in [(packed_at - second, &packed), (packed_at, &elf), (packed_at + second, &elf)]
        {
            elf_file.set_modified(elf_at).unwrap();
            assert_eq!(&kernel_in(root.path()), taken);
        }
        // The ELF image alone is no test guest: a user who wants it must name it.
        std::fs::remove_file(&packed).unwrap();
        assert_eq!(find_in(&[root.path().into()], &[KERNEL]), None);
    }

    #[test]
    fn modules_are_those_of_the_kernel_that_a_link_leads_to() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("6.12");
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join(KERNEL), "").unwrap();
        let link = root.path().join(KERNEL);
        std::os::unix::fs::symlink("6.12/vmlinuz", &link).unwrap();
        let missing = modules_beside(&link).unwrap_err().to_string();
        assert!(missing.contains("6.12/modules.cpio") && missing.contains("make guest"), "{missing}");
        std::fs::write(own.join(MODULES), "x").unwrap();
        assert_eq!(modules_beside(&link).unwrap(), own.canonicalize().unwrap().join(MODULES));
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
