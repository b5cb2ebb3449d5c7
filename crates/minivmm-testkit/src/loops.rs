//! Loop devices over files of ours, and a file system too small for what is written to it.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::skips::skip;

/// A block device of our own; gone with this.
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// `None`, said aloud, where this machine or user cannot have one.
    pub fn new(file: &Path, sector_bytes: u32) -> Option<Self> {
        let sector_bytes = sector_bytes.to_string();
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector_bytes])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            other => {
                // The answer names a file of this run: one line in the list of skips is enough.
                println!("losetup: {other:?}");
                skip("root", "no loop device can be had here (root only)");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A mounted file system; unmounted with this.
pub struct Mounted {
    /// Where it is mounted.
    pub dir: TempDir,
}

impl Mounted {
    /// A tmpfs of `bytes` bytes, or `None`, said aloud.
    pub fn tmpfs(bytes: u64) -> Option<Self> {
        Self::mount(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
    }

    /// A file system that has no O_DIRECT.
    pub fn ramfs() -> Option<Self> {
        Self::mount(&["-t", "ramfs", "ramfs"])
    }

    /// What is on a block device.
    pub fn device(device: &Path) -> Option<Self> {
        Self::mount(&[device.to_str().unwrap()])
    }

    fn mount(what: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount").args(what).arg(dir.path()).status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Self { dir });
        }
        skip("root", "this user cannot mount (root only)");
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}
