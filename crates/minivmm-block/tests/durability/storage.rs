//! Simulated storage: page cache, disk cache and media, a sector at a time. The engine above it is `engine`'s.
//!
//! Owns the host's side of the proof: what each operation does to the three tiers, and the *host
//! floor*, computed from operations alone. Knows nothing of requests, features or modes, but for
//! the claims of I7: who may write which sector now.

use std::collections::VecDeque;
use std::io;

use minivmm_block::disk::engine::{Ended, HostOp, OpToken};
use minivmm_block::mem::{self, Iov, Ram, Segment};

use super::mistakes::is_made;

/// Sectors of the simulated disk.
pub const SECTORS: usize = 32;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Sectors of the blocks that the unlocked read-modify-write changes.
const BLOCK: usize = 8;

/// What a sector is full of: the number of the request that wrote it.
pub type Tag = u64;
/// All zero.
pub const ZEROES: Tag = 0;
/// Before the first write.
pub const INITIAL: Tag = 1;
/// What no request has written, or not to this sector.
pub const FOREIGN: Tag = Tag::MAX;

/// Something that happens to an operation at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Eintr,
    Eio,
    Enospc,
    Short,
    Unsupported,
    /// With this errno.
    Fails(i32),
}

/// One content of one sector, as the operations made it.
#[derive(Debug, Clone, Copy)]
struct Version {
    tag: Tag,
    started: u64,
    ended: Option<u64>,
    /// Whatever is synced later, this is not: its operation or its sync has failed.
    lost: bool,
    stable: bool,
}

/// The three tiers of a sector, and what a read gives.
#[derive(Debug, Clone, Copy)]
struct Tiers {
    current: Tag,
    page_cache: Option<Tag>,
    disk_cache: Option<Tag>,
    media: Tag,
    /// When the current content came.
    current_at: u64,
    /// When the oldest content that is not on the media came.
    pending_since: Option<u64>,
}

pub struct Running {
    pub queue: usize,
    pub token: OpToken,
    pub op: HostOp,
    pub started: Option<u64>,
    /// (sector, index of its version) that this operation writes.
    pub writes: Vec<(usize, usize)>,
    /// Others' syncs that end with this one (a mutant).
    pub riders: Vec<(usize, OpToken)>,
}

impl Running {
    pub fn new(queue: usize, token: OpToken, op: HostOp) -> Self {
        Self { queue, token, op, started: None, writes: Vec::new(), riders: Vec::new() }
    }
}

/// A call of fdatasync.
#[derive(Debug, Clone, Copy)]
pub struct Sync {
    pub started: u64,
    pub ended: Option<u64>,
    pub ok: bool,
}

/// A request in flight may write this to these sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    pub tag: Tag,
    pub from: usize,
    pub to: usize,
}

pub struct Storage {
    pub now: u64,
    direct: bool,
    tiers: Vec<Tiers>,
    versions: Vec<Vec<Version>>,
    pub running: Vec<Running>,
    pub ended: Vec<Vec<Ended>>,
    pub syncs: Vec<Sync>,
    pub claims: Vec<Claim>,
    /// When the first sync, or write that was one, failed.
    pub first_failure: Option<u64>,
    /// What is still to fail, by the number of ends, and by the number of ends of syncs.
    faults: VecDeque<(u32, Fault)>,
    sync_faults: VecDeque<(u32, Fault)>,
    ends: u32,
    sync_ends: u32,
    dice: u64,
    scratch: Ram,
    pub violations: Vec<String>,
    pub trace: Option<Vec<String>>,
}

fn number(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

impl Storage {
    pub fn new(
        queues: usize,
        direct: bool,
        [faults, sync_faults]: [Vec<(u32, Fault)>; 2],
        dice: u64,
        scratch: Ram,
    ) -> Self {
        let tiers = Tiers {
            current: INITIAL,
            page_cache: None,
            disk_cache: None,
            media: INITIAL,
            current_at: 0,
            pending_since: None,
        };
        let first = Version { tag: INITIAL, started: 0, ended: Some(0), lost: false, stable: true };
        Self {
            now: 1,
            direct,
            tiers: vec![tiers; SECTORS],
            versions: vec![vec![first]; SECTORS],
            running: Vec::new(),
            ended: (0..queues).map(|_| Vec::new()).collect(),
            syncs: Vec::new(),
            claims: Vec::new(),
            first_failure: None,
            faults: faults.into(),
            sync_faults: sync_faults.into(),
            ends: 0,
            sync_ends: 0,
            dice: dice | 1,
            scratch,
            violations: Vec::new(),
            trace: None,
        }
    }

    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>4}  {}", line()));
        }
    }

    /// A number below `limit`, the same in every run of the same plan.
    pub fn roll(&mut self, limit: usize) -> usize {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        number(self.dice % u64::try_from(limit.max(1)).unwrap())
    }

    /// Whether nothing is in flight, and every end was heard of.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.ended.iter().all(Vec::is_empty)
    }

    pub fn in_flight(&self, queue: usize) -> usize {
        let rides = |op: &Running| op.riders.iter().any(|&(rider, _)| rider == queue);
        self.running.iter().filter(|op| op.queue == queue || rides(op)).count()
    }

    /// Whether an operation that has not ended writes `tag`.
    pub fn still_writes(&self, tag: Tag) -> bool {
        self.running.iter().any(|op| {
            let started = op.writes.iter().any(|&(sector, at)| self.versions[sector][at].tag == tag);
            started || (op.started.is_none() && self.tags(&op.op).iter().any(|&(_, other)| other == tag))
        })
    }

    /// Legal content of a sector after a power failure now: everything that is not older than
    /// something stable. A version is dead only if a stable one that started after it ended covers
    /// the sector.
    pub fn legal_after_crash(&self, sector: usize) -> Vec<Tag> {
        let versions = &self.versions[sector];
        let is_dead =
            |v: &Version| versions.iter().any(|w| w.stable && v.ended.is_some_and(|ended| ended < w.started));
        versions.iter().filter(|v| !is_dead(v)).map(|v| v.tag).collect()
    }

    /// What the tiers themselves could leave of a sector, for the check of the model.
    pub fn possible_after_crash(&self, sector: usize) -> Vec<Tag> {
        let tiers = &self.tiers[sector];
        let mut tags = vec![tiers.media];
        tags.extend(tiers.disk_cache);
        tags.extend(tiers.page_cache);
        for op in &self.running {
            let of_sector = op.writes.iter().filter(|&&(written, _)| written == sector);
            tags.extend(of_sector.map(|&(_, at)| self.versions[sector][at].tag));
        }
        tags.sort_unstable();
        tags.dedup();
        tags
    }

    /// Starts or ends one operation, of `queue` or of any; whether there was one.
    pub fn progress(&mut self, queue: Option<usize>) -> bool {
        let candidates: Vec<usize> =
            (0..self.running.len()).filter(|&at| queue.is_none_or(|q| self.running[at].queue == q)).collect();
        if candidates.is_empty() {
            return false;
        }
        let at = candidates[self.roll(candidates.len())];
        self.tick();
        if self.running[at].started.is_none() {
            self.start(at);
        } else {
            let op = self.running.swap_remove(at);
            self.end(op);
        }
        true
    }

    /// The host writes something back on its own account.
    pub fn write_back(&mut self, sector: usize) {
        let tiers = &mut self.tiers[sector];
        if let Some(tag) = tiers.page_cache.take() {
            tiers.disk_cache = Some(tag);
        } else if let Some(tag) = tiers.disk_cache.take() {
            tiers.media = tag;
        }
    }

    fn tags(&self, op: &HostOp) -> Vec<(usize, Tag)> {
        match op {
            HostOp::Writev { iov, offset, .. } => {
                let first = number(offset / SECTOR);
                (0..number(iov.bytes() / SECTOR))
                    .map(|i| (first + i, self.tag_in(iov, i, first + i)))
                    .collect()
            }
            HostOp::PunchHole { offset, len, .. } | HostOp::ZeroRange { offset, len } => {
                let first = number(offset / SECTOR);
                (first..first + number(len / SECTOR)).map(|sector| (sector, ZEROES)).collect()
            }
            HostOp::Readv { .. } | HostOp::Fdatasync => Vec::new(),
        }
    }

    fn start(&mut self, at: usize) {
        let now = self.now;
        self.running[at].started = Some(now);
        let op = self.running[at].op.clone();
        let mut tags = self.tags(&op);
        if is_made("unlocked-rmw") {
            self.widen_to_blocks(&mut tags);
        }
        let queue = self.running[at].queue;
        self.say(|| format!("host, queue {queue}: {} starts", words(&op)));
        for (sector, tag) in tags {
            if sector >= SECTORS {
                self.violations.push(format!("I7: sector {sector} is written, beyond the end"));
                continue;
            }
            let claimed =
                self.claims.iter().any(|claim| claim.tag == tag && (claim.from..claim.to).contains(&sector));
            if !claimed {
                self.violations.push(format!(
                    "I7: sector {sector} is written with {}, which no request in flight asked for",
                    name(tag)
                ));
            }
            let version = Version { tag, started: now, ended: None, lost: false, stable: false };
            self.versions[sector].push(version);
            let index = self.versions[sector].len() - 1;
            self.running[at].writes.push((sector, index));
        }
        if matches!(op, HostOp::Fdatasync) && is_real_sync() {
            self.syncs.push(Sync { started: now, ended: None, ok: false });
        }
    }

    /// What a read-modify-write without a lock would write: the whole block, as it is now.
    fn widen_to_blocks(&self, tags: &mut Vec<(usize, Tag)>) {
        let (Some(&(first, _)), Some(&(last, _))) = (tags.first(), tags.last()) else { return };
        let whole = first / BLOCK * BLOCK..(last / BLOCK + 1) * BLOCK;
        for sector in whole.filter(|sector| !(first..=last).contains(sector)) {
            tags.push((sector, self.tiers[sector].current));
        }
    }

    fn end(&mut self, op: Running) {
        self.ends += 1;
        self.sync_ends += u32::from(op.op.is_sync());
        let of_syncs = if op.op.is_sync() { next_fault(&mut self.sync_faults, self.sync_ends) } else { None };
        let fault = of_syncs.or_else(|| next_fault(&mut self.faults, self.ends));
        let started = op.started.unwrap_or(self.now);
        let result = match (&op.op, fault) {
            (HostOp::Fdatasync, fault) => self.end_sync(started, fault),
            (HostOp::Readv { .. }, Some(fault @ (Fault::Eintr | Fault::Eio))) => Err(errno(fault)),
            (HostOp::Readv { iov, offset }, fault) => Ok(self.end_read(iov, *offset, fault)),
            (HostOp::PunchHole { .. } | HostOp::ZeroRange { .. }, Some(Fault::Unsupported)) => {
                self.abandon(&op.writes, 0);
                Err(errno(Fault::Unsupported))
            }
            (_, Some(fault @ (Fault::Eintr | Fault::Eio | Fault::Enospc | Fault::Fails(_)))) => {
                self.abandon(&op.writes, if fault == Fault::Eintr { 0 } else { 2 });
                if matches!(op.op, HostOp::Writev { dsync: true, .. }) && fault != Fault::Eintr {
                    self.first_failure.get_or_insert(self.now);
                }
                Err(errno(fault))
            }
            (HostOp::Writev { iov, dsync, .. }, fault) => Ok(self.end_write(&op, iov, *dsync, fault)),
            _ => {
                self.apply(&op.writes, false);
                Ok(0)
            }
        };
        self.say(|| {
            let outcome = match &result {
                Ok(count) => format!("{count}"),
                Err(error) => format!("error {error}"),
            };
            format!("host, queue {}: {} ends: {outcome}", op.queue, words(&op.op))
        });
        for (queue, token) in op.riders {
            let result = result
                .as_ref()
                .map(|&count| count)
                .map_err(|error| io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)));
            self.ended[queue].push(Ended { token, result });
        }
        self.ended[op.queue].push(Ended { token: op.token, result });
    }

    fn end_read(&mut self, iov: &Iov, offset: u64, fault: Option<Fault>) -> usize {
        let all = number(iov.bytes() / SECTOR);
        let count = if fault == Some(Fault::Short) && all > 1 { 1 + self.roll(all - 1) } else { all };
        for index in 0..count {
            let sector = number(offset / SECTOR) + index;
            let tag = self.tiers.get(sector).map_or(FOREIGN, |tiers| tiers.current);
            self.put_tag(iov, index, sector, tag);
        }
        count * number(SECTOR)
    }

    fn end_write(&mut self, op: &Running, iov: &Iov, dsync: bool, fault: Option<Fault>) -> usize {
        let all = number(iov.bytes() / SECTOR);
        let count = if fault == Some(Fault::Short) && all > 1 { 1 + self.roll(all - 1) } else { all };
        let written = count.min(op.writes.len());
        self.apply(&op.writes[..written], dsync);
        self.abandon(&op.writes[written..], 0);
        count * number(SECTOR)
    }

    /// The operation has really written these.
    fn apply(&mut self, writes: &[(usize, usize)], stable: bool) {
        let now = self.now;
        for &(sector, at) in writes {
            let version = &mut self.versions[sector][at];
            version.ended = Some(now);
            version.stable = stable;
            let tag = version.tag;
            let tiers = &mut self.tiers[sector];
            (tiers.current, tiers.current_at) = (tag, now);
            if stable {
                (tiers.page_cache, tiers.disk_cache, tiers.pending_since) = (None, None, None);
                tiers.media = tag;
                continue;
            }
            if self.direct {
                (tiers.page_cache, tiers.disk_cache) = (None, Some(tag));
            } else {
                tiers.page_cache = Some(tag);
            }
            tiers.pending_since.get_or_insert(now);
        }
    }

    /// The operation has failed: each sector may have got the new content, one in `chance`, or
    /// none where `chance` is 0. Nothing later makes it stable.
    fn abandon(&mut self, writes: &[(usize, usize)], chance: usize) {
        let now = self.now;
        for &(sector, at) in writes {
            let version = &mut self.versions[sector][at];
            (version.ended, version.lost) = (Some(now), true);
            let tag = version.tag;
            if chance > 0 && self.roll(chance) == 0 {
                let tiers = &mut self.tiers[sector];
                (tiers.current, tiers.current_at) = (tag, now);
                tiers.disk_cache = Some(tag);
            }
        }
    }

    fn end_sync(&mut self, started: u64, fault: Option<Fault>) -> io::Result<usize> {
        if !is_real_sync() {
            if is_made("sync-file-range") || is_made("blk-fls-buf") {
                for tiers in &mut self.tiers {
                    if let Some(tag) = tiers.page_cache.take() {
                        tiers.disk_cache = Some(tag);
                    }
                }
            }
            return Ok(0);
        }
        let now = self.now;
        let failed = matches!(fault, Some(Fault::Eio | Fault::Enospc | Fault::Fails(_)));
        if let Some(sync) = self.syncs.iter_mut().find(|sync| sync.started == started && sync.ended.is_none())
        {
            (sync.ended, sync.ok) = (Some(now), fault.is_none() || !failed && fault != Some(Fault::Eintr));
        }
        if fault == Some(Fault::Eintr) {
            return Err(errno(Fault::Eintr));
        }
        for sector in 0..SECTORS {
            let tiers = &mut self.tiers[sector];
            if tiers.pending_since.is_some_and(|since| since < started) {
                if !failed {
                    tiers.media = tiers.current;
                }
                if failed && tiers.current_at > started {
                    // What came after the sync began is still to be written, since the first of it.
                    let came = self.versions[sector].iter().filter(|version| !version.lost);
                    let after = came.filter_map(|version| version.ended).filter(|&ended| ended > started);
                    tiers.pending_since = after.min().or(Some(tiers.current_at));
                } else {
                    // The fsync trap: what failed to be written is called clean, and is gone.
                    (tiers.page_cache, tiers.disk_cache, tiers.pending_since) = (None, None, None);
                }
            }
            for version in &mut self.versions[sector] {
                if !version.stable && !version.lost && version.ended.is_some_and(|ended| ended < started) {
                    (version.stable, version.lost) = (!failed, failed);
                }
            }
        }
        if failed {
            self.first_failure.get_or_insert(now);
            return Err(errno(fault.unwrap_or(Fault::Eio)));
        }
        Ok(0)
    }

    /// The tag of the sector that begins `index` sectors into the memory.
    fn tag_in(&self, iov: &Iov, index: usize, sector: usize) -> Tag {
        iov.part(u64::try_from(index).unwrap() * SECTOR, SECTOR, usize::MAX).copy_to(&self.scratch());
        let mut bytes = [0; 16];
        mem::read_bytes(&self.scratch, 0, &mut bytes).unwrap();
        read_tag(&bytes, sector)
    }

    fn put_tag(&self, iov: &Iov, index: usize, sector: usize, tag: Tag) {
        mem::write_bytes(&self.scratch, 0, &[0; 512]).unwrap();
        mem::write_bytes(&self.scratch, 0, &tag_bytes(tag, sector)).unwrap();
        self.scratch().copy_to(&iov.part(u64::try_from(index).unwrap() * SECTOR, SECTOR, usize::MAX));
    }

    fn scratch(&self) -> Iov {
        Iov::new(&self.scratch, &[Segment { addr: 0, len: 512 }]).unwrap()
    }
}

/// The fault of the end of this number, if there is one.
fn next_fault(faults: &mut VecDeque<(u32, Fault)>, ends: u32) -> Option<Fault> {
    let &(_, fault) = faults.front().filter(|&&(at, _)| at <= ends)?;
    faults.pop_front();
    Some(fault)
}

/// Whether what the device calls fdatasync is one: by some mistakes it calls something else.
fn is_real_sync() -> bool {
    !["file-flush", "sync-file-range", "blk-fls-buf", "wrong-descriptor"].into_iter().any(is_made)
}

/// What a sector with this tag begins with.
pub fn tag_bytes(tag: Tag, sector: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    if tag != ZEROES {
        bytes[..8].copy_from_slice(&tag.to_le_bytes());
        bytes[8..].copy_from_slice(&u64::try_from(sector).unwrap().to_le_bytes());
    }
    bytes
}

/// The tag that a sector begins with.
pub fn read_tag(bytes: &[u8; 16], sector: usize) -> Tag {
    let half = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().unwrap());
    match (half(0), half(8)) {
        (0, 0) => ZEROES,
        (tag, of) if of == u64::try_from(sector).unwrap() && tag != 0 => tag,
        _ => FOREIGN,
    }
}

pub fn name(tag: Tag) -> String {
    match tag {
        ZEROES => "zeroes".into(),
        INITIAL => "what was there at first".into(),
        FOREIGN => "what nobody wrote".into(),
        tag => format!("request {tag}'s data"),
    }
}

fn words(op: &HostOp) -> String {
    let sectors = |offset: &u64, len: u64| format!("sectors {}+{}", offset / SECTOR, len / SECTOR);
    match op {
        HostOp::Readv { iov, offset } => format!("preadv of {}", sectors(offset, iov.bytes())),
        HostOp::Writev { iov, offset, dsync } => {
            let how = if *dsync { "pwritev2(RWF_DSYNC)" } else { "pwritev" };
            format!("{how} of {}", sectors(offset, iov.bytes()))
        }
        HostOp::Fdatasync => "fdatasync".into(),
        HostOp::PunchHole { offset, len, .. } => format!("punch hole of {}", sectors(offset, *len)),
        HostOp::ZeroRange { offset, len } => format!("zero range of {}", sectors(offset, *len)),
    }
}

fn errno(fault: Fault) -> io::Error {
    io::Error::from_raw_os_error(match fault {
        Fault::Eintr => libc::EINTR,
        Fault::Fails(errno) => errno,
        Fault::Enospc => libc::ENOSPC,
        Fault::Unsupported => libc::EOPNOTSUPP,
        Fault::Eio | Fault::Short => libc::EIO,
    })
}
