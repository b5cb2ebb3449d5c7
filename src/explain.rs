//! `--explain`: says what minivmm would do with a disk, without doing it.
//!
//! Owns the description of one disk, and its two forms, JSON and text. It contains no second table of modes:
//! the host calls come from the device's own parser, the disk's own state machine and the engine's own names
//! (`dry_run`). `place` finds the file system of the image, and `layers` the host's disks below it.

mod dry_run;
mod layers;
mod place;
mod print;

use std::sync::Arc;

use serde::Serialize;

use crate::blk::config;
use crate::disk::cache::WriteCache;
use crate::disk::choice::{EngineKind, choose};
use crate::disk::config::EngineChoice;
use crate::disk::geometry::{self, SECTOR};
use crate::disk::{DiskConfig, Image, ImageError};

pub use dry_run::{Driver, RequestOutcome};
pub use layers::{Layer, below, below_device};
pub use place::Place;
pub use print::to_text;

/// Everything that is known about one disk before a run. `docs/reference/explain-json.md` describes the keys.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The image, as the user gave it.
    pub image: String,
    /// `file` or `block device`.
    pub kind: &'static str,
    /// Size of the disk.
    pub bytes: u64,
    /// Name of the cache mode.
    pub cache: &'static str,
    /// True if the disk is read-only.
    pub readonly: bool,
    /// The flags with which the image is opened.
    pub open_flags: String,
    /// The features that the guest is offered.
    pub features: Vec<&'static str>,
    /// Number of queues.
    pub queues: u16,
    /// The value of config.writeback after a reset.
    pub writeback: u8,
    /// Block sizes and alignment.
    pub blocks: Blocks,
    /// Name of the engine: `io_uring` or `sync`.
    pub engine: &'static str,
    /// How writes that must be stable are made stable.
    pub stable: &'static str,
    /// The host's system calls and the operations of the ring.
    pub calls: Calls,
    /// Where the image lies.
    pub place: Place,
    /// The host's disks below it, from the top down.
    pub host_disks: Vec<Layer>,
    /// Whether a FLUSH reaches the disk.
    pub flush_reaches_disk: FlushReach,
    /// What the user should know before the run.
    pub warnings: Vec<String>,
    /// Why a run would be refused.
    pub refusals: Vec<String>,
}

/// Block sizes and alignment in bytes.
#[derive(Debug, Serialize)]
pub struct Blocks {
    /// Logical block size (`blk_size`).
    pub logical: u32,
    /// Physical block size: what the host rewrites as a whole.
    pub physical: u32,
    /// Alignment that transfers need in memory.
    pub memory_alignment: u32,
    /// Alignment that transfers need in the file, for offsets and lengths.
    pub offset_alignment: u32,
    /// How the alignment was found.
    pub found_by: &'static str,
    /// `blk_size` in the other modes: the cached ones if this one is direct, and the direct ones if it is
    /// cached. Null if it is the same or unknown.
    pub other_modes: Option<u32>,
}

/// The host's system calls on the image, named as strace names them.
#[derive(Debug, Serialize)]
pub struct Calls {
    /// Before the guest runs.
    pub start: Vec<&'static str>,
    /// While the guest runs, for each possible driver.
    pub drivers: Vec<Driver>,
    /// After the guest has ended.
    pub end: Vec<&'static str>,
}

/// Whether a FLUSH of the guest is expected to reach the host's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlushReach {
    /// `yes`, `no`, `not needed` (according to the host, the disk has no volatile cache) or `unknown`.
    pub answer: &'static str,
    /// The reason.
    pub because: String,
}

/// Inspects the disk that `config` describes. Returns an error if minivmm could not start with it.
pub fn explain(config: &DiskConfig) -> Result<Explanation, ImageError> {
    let image = Arc::new(Image::look(config)?);
    let place = Place::of(&image);
    let host_disks = layers::below(&image, &place);
    let policy = image.config().cache;
    let mut warnings = image.warnings().to_vec();
    let mut refusals: Vec<String> = image.refusals().iter().map(ToString::to_string).collect();
    if std::env::var("LD_PRELOAD").is_ok_and(|libraries| libraries.contains("eatmydata")) {
        warnings.push("LD_PRELOAD names libeatmydata: fdatasync will do nothing".into());
    }
    let queues = image.config().queue_count();
    let engine = match choose(&image, None, queues) {
        Ok(chosen) => {
            warnings.extend(chosen.why.map(|why| format!("engine=sync is used: {why}")));
            chosen.kind
        }
        Err(error) => {
            let why =
                std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            refusals.push(format!("{error}{why}"));
            match image.config().engine {
                EngineChoice::Blocking => EngineKind::Blocking,
                EngineChoice::Auto | EngineChoice::Uring => EngineKind::Uring,
            }
        }
    };
    let writeback = config::space(&image, queues, WriteCache::new(policy).writeback())[config::WRITEBACK];
    let geometry = image.geometry();
    Ok(Explanation {
        image: config.path.display().to_string(),
        kind: if image.file().is_device() { "block device" } else { "file" },
        bytes: geometry.capacity_sectors * SECTOR,
        cache: policy.name,
        readonly: image.config().readonly,
        open_flags: image.file().wanted_flags(),
        features: config::names(config::offered(&image, queues)),
        queues,
        writeback,
        blocks: Blocks {
            logical: geometry.logical_block,
            physical: geometry.physical_block,
            memory_alignment: geometry.alignment.memory,
            offset_alignment: geometry.alignment.offset,
            found_by: geometry.alignment.found_by,
            other_modes: other_modes(&image, config),
        },
        engine: engine.name(),
        stable: image.config().stable.name(),
        calls: Calls {
            start: dry_run::at_start(&image),
            drivers: dry_run::drivers(&image, engine),
            end: dry_run::at_end(&image),
        },
        flush_reaches_disk: reach(policy.honour_flush, &place, &host_disks),
        place,
        host_disks,
        warnings,
        refusals,
    })
}

/// Returns the logical block size in the modes that use the page cache if this one does not, or the reverse;
/// `None` if it is the same or unknown.
fn other_modes(image: &Image, config: &DiskConfig) -> Option<u32> {
    if config.block_size.is_some() || image.file().is_device() {
        return None;
    }
    let other = if image.config().cache.direct {
        512
    } else {
        geometry::direct_block(image.file().descriptor())?.max(512)
    };
    (other != image.geometry().logical_block).then_some(other)
}

/// Returns the explanations as a JSON list.
pub fn to_json(disks: &[Explanation]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(disks)
}

/// Follows a FLUSH down through the cache mode, the file system and the disks. The first that stops it decides.
fn reach(honoured: bool, place: &Place, disks: &[Layer]) -> FlushReach {
    let say = |answer, because: &str| FlushReach { answer, because: because.into() };
    if !honoured {
        return say("no", "this cache mode ignores FLUSH");
    }
    if let Some(why) = &place.flush_stops {
        return say("no", why);
    }
    if let Some(why) = &place.flush_unknown {
        return say("unknown", why);
    }
    if let Some(memory) = disks.iter().find(|disk| disk.is_memory()) {
        return say("no", &format!("{} keeps its data in memory", memory.name));
    }
    if disks.is_empty() || disks.iter().any(|disk| disk.write_cache.is_none()) {
        return say("unknown", "the host does not tell of the disk below (no queue/write_cache in sysfs)");
    }
    match disks.iter().find(|disk| disk.write_cache.as_deref() != Some("write back")) {
        Some(disk) => say(
            "not needed",
            &format!(
                "the host says that {} has no volatile write cache (queue/write_cache is \"{}\") and sends it none; \
                 whoever sets that by hand must be right",
                disk.name,
                disk.write_cache.as_deref().unwrap_or_default()
            ),
        ),
        None => say("yes", "fdatasync, the file system and every disk below pass it on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, write_cache: Option<&str>) -> Layer {
        Layer { name: name.into(), write_cache: write_cache.map(str::to_owned), ..Layer::default() }
    }

    #[test]
    fn the_first_that_stops_a_flush_decides() {
        let plain = Place::default();
        let stops = Place { flush_stops: Some("volatile".into()), ..Place::default() };
        let network = Place { flush_unknown: Some("network".into()), ..Place::default() };
        let (on, off) = (disk("sda", Some("write back")), disk("sdb", Some("write through")));
        for (honoured, place, disks, answer) in [
            (true, &plain, vec![on.clone()], "yes"),
            (false, &plain, vec![on.clone()], "no"),
            (true, &stops, vec![on.clone()], "no"),
            (true, &network, vec![], "unknown"),
            (true, &plain, vec![], "unknown"),
            (true, &plain, vec![on.clone(), off.clone()], "not needed"),
            (true, &plain, vec![on.clone(), disk("x", None)], "unknown"),
            (true, &plain, vec![disk("ram0", Some("write back"))], "no"),
        ] {
            assert_eq!(reach(honoured, place, &disks).answer, answer, "{place:?} {disks:?}");
        }
    }
}
