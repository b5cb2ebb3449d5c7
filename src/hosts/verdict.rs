//! The verdict of `check`, kept for this boot of the machine.
//!
//! Owns the file $XDG_RUNTIME_DIR/minivmm/kvm.json, or the same in $XDG_CACHE_HOME or ~/.cache. The file is
//! valid only for the boot, the /dev/kvm and the minivmm version with which it was made. It is also valid
//! only if nobody but this user could have written it. Without a valid file the probes simply run again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const NAME: &str = "kvm.json";
/// The maximum size in bytes, far more than the file ever has.
const BYTES_MAX: u64 = 64 << 10;

/// The result of `check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// `true` if Linux runs here.
    pub linux_runs: bool,
    /// The verdict in the words of `check`.
    pub verdict: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    of: Circumstances,
    #[serde(flatten)]
    verdict: Verdict,
}

/// The circumstances under which a verdict is valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Circumstances {
    /// The kernel's id of this boot.
    boot: String,
    /// The identity of the device node: reloading the module makes another one.
    device: (u64, u64, u64, i64, i64),
    /// The minivmm version that ran the probes.
    version: String,
}

impl Circumstances {
    fn now() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let node = fs::metadata("/dev/kvm")?;
        let device = (node.dev(), node.ino(), node.rdev(), node.ctime(), node.ctime_nsec());
        Ok(Self { boot, device, version: env!("CARGO_PKG_VERSION").into() })
    }
}

/// Returns the kept verdict if it is still valid.
pub fn known() -> Option<Verdict> {
    let now = Circumstances::now().ok()?;
    read(&directory()?, &now)
        .inspect_err(|error| log::debug!("no verdict on KVM is kept for this boot: {error}"))
        .ok()
}

/// Keeps the verdict. If that fails, the probes run again next time.
pub fn keep(verdict: &Verdict) {
    let Some(directory) = directory() else { return };
    let written = Circumstances::now().and_then(|now| write(&directory, &now, verdict));
    if let Err(error) = written {
        log::debug!("the verdict on KVM is not kept in {}: {error}", directory.display());
    }
}

fn directory() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let place = absolute("XDG_RUNTIME_DIR")
        .or_else(|| absolute("XDG_CACHE_HOME"))
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(place.join("minivmm"))
}

fn read(directory: &Path, now: &Circumstances) -> io::Result<Verdict> {
    must_be_ours(&fs::symlink_metadata(directory)?)?;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(directory.join(NAME))?;
    must_be_ours(&file.metadata()?)?;
    let mut text = String::new();
    file.take(BYTES_MAX).read_to_string(&mut text)?;
    let kept: Kept = serde_json::from_str(&text)?;
    if kept.of != *now {
        return Err(io::Error::other("it is of another boot, device or version"));
    }
    Ok(kept.verdict)
}

/// Returns an error if another user could have written the file or directory.
fn must_be_ours(found: &fs::Metadata) -> io::Result<()> {
    // SAFETY: the call takes nothing, touches no memory, and cannot fail.
    let me = unsafe { libc::geteuid() };
    let is_known = found.is_dir() || found.is_file();
    if !is_known || found.uid() != me || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("others could have written it"));
    }
    Ok(())
}

fn write(directory: &Path, now: &Circumstances, verdict: &Verdict) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    must_be_ours(&fs::symlink_metadata(directory)?)?;
    let kept = Kept { of: now.clone(), verdict: verdict.clone() };
    // Written whole or not at all, under a name that nobody can have prepared.
    let part = directory.join(format!("{NAME}.{}", std::process::id()));
    let mut file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&part)?;
    let written = file.write_all(serde_json::to_string(&kept)?.as_bytes());
    written.and_then(|()| fs::rename(&part, directory.join(NAME))).inspect_err(|_| _ = fs::remove_file(&part))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn circumstances(boot: &str) -> Circumstances {
        Circumstances { boot: boot.into(), device: (1, 2, 3, 4, 5), version: "1".into() }
    }

    #[test]
    fn a_verdict_counts_for_its_own_boot_device_and_version() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a/minivmm");
        let (now, verdict) = (circumstances("b"), Verdict { linux_runs: false, verdict: "no".into() });
        assert!(read(&directory, &now).is_err());
        write(&directory, &now, &verdict).unwrap();
        assert_eq!(read(&directory, &now).unwrap(), verdict);
        let better = Verdict { linux_runs: true, ..verdict };
        write(&directory, &now, &better).unwrap();
        assert_eq!(read(&directory, &now).unwrap(), better);
        for other in [
            circumstances("c"),
            Circumstances { device: (1, 2, 3, 4, 6), ..now.clone() },
            Circumstances { version: "2".into(), ..now.clone() },
        ] {
            assert!(read(&directory, &other).is_err(), "{other:?}");
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no part is left");
    }

    #[test]
    fn what_others_could_have_written_does_not_count() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("minivmm");
        let (now, verdict) = (circumstances("b"), Verdict { linux_runs: true, verdict: "yes".into() });
        write(&directory, &now, &verdict).unwrap();
        let file = directory.join(NAME);
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        mode(&file, 0o622);
        assert!(read(&directory, &now).is_err());
        mode(&file, 0o600);
        mode(&directory, 0o777);
        assert!(read(&directory, &now).is_err());
        assert!(write(&directory, &now, &verdict).is_err());
        mode(&directory, 0o700);
        assert!(read(&directory, &now).is_ok());
        fs::rename(&file, directory.join("real")).unwrap();
        symlink(directory.join("real"), &file).unwrap();
        assert!(read(&directory, &now).is_err(), "a link is not followed");
        fs::remove_file(&file).unwrap();
        fs::write(&file, "{").unwrap();
        assert!(read(&directory, &now).is_err(), "half a file is none");
    }
}
