//! Disk images for tests, on a file system with O_DIRECT where the build directory has one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use minivmm::disk::cache::{CachePolicy, POLICIES};
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use tempfile::TempDir;

use crate::{dontcache, places};

/// An image of its own in a directory of its own, gone with it.
pub struct TestImage {
    /// Where the image is.
    pub path: PathBuf,
    _dir: TempDir,
}

/// A directory where O_DIRECT works if it works anywhere in the build tree.
pub fn test_dir() -> TempDir {
    tempfile::tempdir_in(places::tmp()).unwrap()
}

/// The rows of all modes that a file of the build tree can have.
pub fn policies() -> Vec<&'static CachePolicy> {
    let all: Vec<_> = POLICIES.iter().collect();
    dontcache::those_here(&all, |policy| policy.name == "dontcache")
}

/// Their names.
pub fn modes() -> Vec<&'static str> {
    policies().into_iter().map(|policy| policy.name).collect()
}

impl TestImage {
    /// `bytes` bytes that say where they are: sector n is full of the byte n + 1.
    pub fn new(bytes: u64) -> Self {
        let dir = test_dir();
        let path = dir.path().join("test.img");
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        for sector in 0..bytes / 512 {
            file.write_all_at(&[pattern(sector); 512], sector * 512).unwrap();
        }
        file.sync_all().unwrap();
        Self { path, _dir: dir }
    }

    /// What is in the file now, past any cache of ours.
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// `make test` runs the suites once for each engine and each way to stable writes: MINIVMM_KEYS
    /// says which, in the words of `--disk`.
    pub fn options(&self, mode: &str) -> DiskConfig {
        let keys = std::env::var("MINIVMM_KEYS").unwrap_or_else(|_| "engine=auto".to_owned());
        let keyed = disk_options::parse(format!("x,{keys}")).unwrap().config;
        let cache = CachePolicy::by_name(mode).unwrap();
        DiskConfig { cache, path: self.path.clone(), ..keyed }
    }

    /// Opens the image in this mode, with the keys of `MINIVMM_KEYS`.
    pub fn open(&self, mode: &str) -> Arc<Image> {
        Arc::new(Image::open(&self.options(mode)).unwrap())
    }
}

/// The byte that sector `sector` of a new image is full of.
pub fn pattern(sector: u64) -> u8 {
    u8::try_from(sector % 251).unwrap() + 1
}
