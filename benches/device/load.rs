//! What is measured: a load, and who competes at it.
//!
//! Owns the words (`randread-4k-d32-none-plain`) and the full product of the loads. Knows nothing of
//! how they are run.

use serde::Serialize;

use crate::driver::Waits;

/// Order and direction of the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Reads at random blocks.
    RandRead,
    /// Writes at random blocks.
    RandWrite,
    /// Reads, one block after another.
    SeqRead,
    /// Writes, one block after another.
    SeqWrite,
    /// FLUSHes alone: nothing is written in between.
    Flush,
    /// DISCARDs of random blocks.
    Discard,
    /// Reads at random blocks, in all slots but one. In that one a write and a FLUSH take turns; only the reads are
    /// measured.
    ReadBesideFlush,
}

impl Pattern {
    /// As fio calls it. It has none of the last three.
    pub fn fio(self) -> &'static str {
        match self {
            Self::SeqRead => "read",
            Self::SeqWrite => "write",
            other => other.name(),
        }
    }

    /// As the names of loads have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::SeqRead => "seqread",
            Self::SeqWrite => "seqwrite",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::ReadBesideFlush => "readbesideflush",
        }
    }

    /// Whether it writes.
    pub fn writes(self) -> bool {
        matches!(self, Self::RandWrite | Self::SeqWrite)
    }

    /// Whether its blocks are in no order.
    pub fn random(self) -> bool {
        !matches!(self, Self::SeqRead | Self::SeqWrite)
    }

    /// Whether each request moves a block, so that the last one can be checked.
    pub fn moves_data(self) -> bool {
        !matches!(self, Self::Flush | Self::Discard)
    }
}

/// What makes writes stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// Nothing.
    Plain,
    /// A FLUSH after every so many writes, queued like any request: at depth 1 it follows the end of
    /// the write, above it does not wait for it. fio's `fdatasync=N` is the same stream.
    Flush(u32),
    /// The guest's write cache is off: each write is stable when it ends. fio: `sync=dsync`.
    CacheOff,
}

impl Sync {
    fn name(self) -> String {
        match self {
            Self::Plain => "plain".into(),
            Self::Flush(every) => format!("flush{every}"),
            Self::CacheOff => "cacheoff".into(),
        }
    }
}

/// One load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Order and direction.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u16,
    /// The cache mode. fio has O_DIRECT where the mode has it, and beside dontcache.
    pub cache: &'static str,
    /// What makes writes stable.
    pub sync: Sync,
}

impl Load {
    /// Its name, by which `--only` finds it.
    pub fn name(&self) -> String {
        let block = match self.block_bytes {
            bytes if bytes.is_multiple_of(1 << 20) => format!("{}m", bytes >> 20),
            bytes => format!("{}k", bytes >> 10),
        };
        let Self { pattern, depth, cache, sync, .. } = self;
        format!("{}-{block}-d{depth}-{cache}-{}", pattern.name(), sync.name())
    }

    /// Whether the image is opened with O_DIRECT.
    pub fn direct(&self) -> bool {
        matches!(self.cache, "none" | "directsync")
    }

    /// Whether nothing of the image is in the page cache when a run begins, and fio goes past it. Of dontcache the
    /// same is asked; fio has RWF_DONTCACHE in new versions only.
    pub fn begins_uncached(&self) -> bool {
        self.direct() || self.cache == "dontcache"
    }

    /// Whether each write is stable when it ends.
    pub fn stable_writes(&self) -> bool {
        self.sync == Sync::CacheOff || matches!(self.cache, "directsync" | "writethrough")
    }

    /// A FLUSH after so many writes.
    pub fn flush_every(&self) -> Option<u32> {
        match self.sync {
            Sync::Flush(every) if self.pattern.writes() => Some(every),
            _ => None,
        }
    }
}

/// fio's way of doing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FioEngine {
    /// io_uring with a registered file, a system call for each submission (fio's default).
    IoUring,
    /// The same, submitting all that is free and reaping all that is done in one call.
    IoUringBatched,
    /// The same as the first, with registered buffers.
    IoUringFixed,
    /// preadv2 and pwritev2: one at a time, whatever the depth.
    Pvsync2,
    /// No fio, which has no such load: a loop of fdatasync or fallocate, one at a time.
    Loop,
}

impl FioEngine {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "fio io_uring",
            Self::IoUringBatched => "fio io_uring batched",
            Self::IoUringFixed => "fio io_uring fixed",
            Self::Pvsync2 => "fio pvsync2",
            Self::Loop => "host loop",
        }
    }
}

/// Who runs a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// fio on the host.
    Fio(FioEngine),
    /// The device, with more keys of `--disk` ("engine=sync"), and how its driver waits.
    Device {
        /// Keys besides the path and the mode.
        keys: &'static str,
        /// How the driver waits; `None` for what was asked for on the command line.
        waits: Option<Waits>,
    },
}

impl Who {
    /// The device as a user gets it.
    pub const DEVICE: Who = Who::Device { keys: "", waits: None };

    /// The device with these keys of `--disk`.
    pub const fn with(keys: &'static str) -> Who {
        Who::Device { keys, waits: None }
    }

    /// Its name in tables.
    pub fn name(&self) -> String {
        match self {
            Who::Fio(engine) => engine.name().into(),
            Who::Device { keys, waits } => {
                let waits = waits.map(|waits| format!("{waits} driver"));
                let parts: Vec<String> =
                    [Some("device".to_owned()), Some((*keys).to_owned()).filter(|k| !k.is_empty()), waits]
                        .into_iter()
                        .flatten()
                        .collect();
                parts.join(" ")
            }
        }
    }

    /// Whether it is fio.
    pub fn is_fio(&self) -> bool {
        matches!(self, Who::Fio(_))
    }
}

/// A load and its competitors, run in turn within each round.
#[derive(Debug, Clone)]
pub struct Contest {
    /// The load.
    pub load: Load,
    /// Who runs it; the first device is the one of the table's ratio.
    pub who: Vec<Who>,
}

impl Contest {
    /// The device against fio with the same engine.
    fn usual(load: Load) -> Self {
        Self { load, who: vec![Who::Fio(FioEngine::IoUring), Who::DEVICE] }
    }
}

const PATTERNS: [Pattern; 4] = [Pattern::RandRead, Pattern::RandWrite, Pattern::SeqRead, Pattern::SeqWrite];
const SYNCS: [Sync; 4] = [Sync::Plain, Sync::Flush(1), Sync::Flush(32), Sync::CacheOff];

/// Every load: 4 depths, 3 sizes, 4 patterns, 4 kinds of stability, 4 modes, without those that
/// would be another one again (reads have no stability; directsync has no write cache to turn off).
pub fn full() -> Vec<Contest> {
    let mut contests = Vec::new();
    for cache in ["none", "writeback", "directsync", "dontcache"] {
        for block_bytes in [4 << 10, 128 << 10, 1 << 20] {
            for depth in [1, 4, 32, 128] {
                for (pattern, sync) in PATTERNS.iter().flat_map(|&p| SYNCS.map(|s| (p, s))) {
                    let once = pattern.writes() || sync == Sync::Plain;
                    if once && !(cache == "directsync" && sync == Sync::CacheOff) {
                        let load = Load { pattern, block_bytes, depth, cache, sync };
                        contests.push(Contest::usual(load));
                    }
                }
            }
        }
    }
    contests
}

/// Where the host's page cache makes the difference: small random and large sequential transfers, the writes with
/// FLUSHes, each in none, dontcache and writeback.
pub fn modes() -> Vec<Contest> {
    let of_modes = |pattern, block_bytes, depth, sync| {
        let load = move |cache| Load { pattern, block_bytes, depth, cache, sync };
        ["none", "dontcache", "writeback"].map(|cache| Contest::usual(load(cache)))
    };
    [
        of_modes(Pattern::RandRead, 4 << 10, 32, Sync::Plain),
        of_modes(Pattern::RandWrite, 4 << 10, 32, Sync::Flush(32)),
        of_modes(Pattern::SeqRead, 128 << 10, 4, Sync::Plain),
        of_modes(Pattern::SeqWrite, 128 << 10, 4, Sync::Flush(32)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What is run where nothing else is asked for: each dimension is there, not each product.
pub fn usual() -> Vec<Contest> {
    let wanted = |load: &Load| {
        let Load { pattern, block_bytes, depth, cache, sync } = *load;
        let kib = block_bytes >> 10;
        match (cache, kib, sync) {
            ("none", 4, Sync::Plain) => depth != 128 || pattern == Pattern::RandRead,
            ("none", 128, Sync::Plain) => depth == 32 && !pattern.random(),
            ("none", 1024, Sync::Plain) => depth == 4 && !pattern.random(),
            ("none", 4, _) => pattern == Pattern::RandWrite && matches!(depth, 1 | 32),
            ("writeback", 4, Sync::Plain) => pattern.random() && matches!(depth, 1 | 32),
            ("writeback", 4, Sync::Flush(1)) => pattern == Pattern::RandWrite && depth == 1,
            ("writeback", 128, Sync::Plain) => !pattern.random() && depth == 32,
            ("directsync", 4, Sync::Plain) => pattern == Pattern::RandWrite && matches!(depth, 1 | 32),
            _ => false,
        }
    };
    full().into_iter().filter(|contest| wanted(&contest.load)).collect()
}
