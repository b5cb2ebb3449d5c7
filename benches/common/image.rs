//! The image that everybody works on, one after the other.
//!
//! Owns the words in which the benchmarks speak of it; the making (every block written, no hole, no unwritten
//! extent) and the state of the host's page cache before a run are [`minivmm_lab::measuring::image`]'s.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use minivmm::observe::Residency;
use minivmm::observe::control::HostCache;
use minivmm_lab::measuring::image;

/// What is in the host's page cache when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resident {
    /// Nothing: written back and dropped.
    None,
    /// All of it, clean.
    All,
}

/// A file that is written from end to end.
pub struct BenchImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Pieces on the disk; 0 where the file system does not tell.
    pub extents: u64,
}

impl BenchImage {
    /// The image at `path`, the one that is there already if it is as it should be. It is the benchmarks' own:
    /// one of another size is replaced.
    pub fn ready(path: PathBuf, bytes: u64) -> Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let there = std::fs::metadata(&path).map(|there| there.len()).ok();
        if there.is_some_and(|there| there != bytes) {
            std::fs::remove_file(&path)?;
        }
        if there != Some(bytes) {
            eprintln!("writing {} ({} MiB)", path.display(), bytes >> 20);
        }
        let layout = image::ready(&path, bytes, &mut |_| (), &AtomicBool::new(false))?;
        Ok(Self { path, bytes, extents: layout.extents.unwrap_or(0) })
    }

    /// Brings the page cache into this state; the pages that are then resident, if the host tells.
    pub fn settle(&self, resident: Resident) -> Result<Option<u64>> {
        let wish = match resident {
            Resident::None => HostCache::Drop,
            Resident::All => HostCache::Warm,
        };
        Ok(image::settle(&self.path, wish)?.map(|found| found.cached))
    }

    /// Bytes of it that are in the page cache, if the host tells.
    #[allow(dead_code, reason = "one benchmark prints it")]
    pub fn cached_bytes(&self) -> Option<u64> {
        let found = File::open(&self.path).ok().and_then(|file| Residency::of(&file).ok());
        found.map(|found| found.cached_bytes())
    }
}
