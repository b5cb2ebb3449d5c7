//! What the host's disk below an image does, and what this process makes it do.
//!
//! Owns the reading of /sys/dev/block/MAJ:MIN/stat (Documentation/block/stat.rst) and /proc/self/io.
//! The first counts for everybody on that disk, the second for all disks of this VM: neither is one
//! image's alone, and docs/observing.md says what that means.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::disk::Image;
use crate::explain::{Layer, Place, below, below_device};

/// A sector of stat's, whatever the disk's own is.
const SECTOR_BYTES: u64 = 512;

/// The disk of the host on which an image lies.
#[derive(Debug, Clone)]
pub struct HostDisk {
    name: String,
    stat: Arc<File>,
}

/// What a disk has done since it was there: I/Os that have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskIo {
    /// Reads, after merging.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes, after merging.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// FLUSHes, which concurrent syncs share. `None` before Linux 5.5. A disk without a write cache is
    /// sent none, and stays at 0.
    pub flushes: Option<u64>,
}

impl HostDisk {
    /// The disk below `image`: the whole disk where it is on a partition. Below device-mapper and md,
    /// which count no FLUSHes, the first disk that does; of a mirror that is one leg.
    pub fn of(image: &Image) -> Option<Self> {
        Self::lowest(&below(image, &Place::of(image)))
    }

    fn lowest(layers: &[Layer]) -> Option<Self> {
        let real = |layer: &&Layer| !["dm-", "md"].iter().any(|prefix| layer.name.starts_with(prefix));
        let name = layers.iter().find(real).or(layers.first())?.name.clone();
        // Opened once: with the sandbox nothing can be opened later.
        let stat = Arc::new(File::open(format!("/sys/block/{name}/stat")).ok()?);
        Some(Self { stat, name })
    }

    /// The same below a file that is no open image.
    pub fn below(file: &File) -> Option<Self> {
        Self::lowest(&below_device(Place::of_file(file).device?))
    }

    /// Its name in the kernel.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has done so far.
    pub fn io(&self) -> Option<DiskIo> {
        parse_stat(&anew(&self.stat).ok()?)
    }
}

fn parse_stat(text: &str) -> Option<DiskIo> {
    let fields: Vec<u64> = text.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let field = |number: usize| fields.get(number - 1).copied();
    Some(DiskIo {
        reads: field(1)?,
        read_bytes: field(3)?.saturating_mul(SECTOR_BYTES),
        writes: field(5)?,
        written_bytes: field(7)?.saturating_mul(SECTOR_BYTES),
        flushes: field(16),
    })
}

/// What this process has caused, all disks and files together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessIo {
    /// Bytes that had to come from a disk, read-ahead included. What the page cache had is not in it.
    pub read_bytes: u64,
    /// Bytes of pages made dirty, and of O_DIRECT writes.
    pub written_bytes: u64,
}

/// Where the kernel accounts for this process.
#[derive(Debug)]
pub struct Accounts(File);

impl Accounts {
    /// This process's; nothing where the kernel does not account for it (CONFIG_TASK_IO_ACCOUNTING).
    pub fn of_this_process() -> Option<Self> {
        File::open("/proc/self/io").ok().map(Self)
    }

    /// Until now.
    pub fn now(&self) -> Option<ProcessIo> {
        parse_io(&anew(&self.0).ok()?)
    }
}

/// A small file of the kernel's, which it writes anew for everybody who reads from its beginning.
fn anew(file: &File) -> io::Result<String> {
    let mut bytes = [0; 1024];
    let mut used = 0;
    while let Some(rest) = bytes.get_mut(used..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, used as u64)? {
            0 => break,
            count => used += count,
        }
    }
    Ok(String::from_utf8_lossy(bytes.get(..used).unwrap_or_default()).into_owned())
}

fn parse_io(text: &str) -> Option<ProcessIo> {
    let value = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    Some(ProcessIo { read_bytes: value("read_bytes")?, written_bytes: value("write_bytes")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_stat_are_those_of_its_documentation() {
        let text = " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n";
        let io =
            DiskIo { reads: 1, read_bytes: 3 * 512, writes: 5, written_bytes: 7 * 512, flushes: Some(16) };
        assert_eq!(parse_stat(text), Some(io));
        let old = "1 2 3 4 5 6 7 8 9 10 11";
        assert_eq!(parse_stat(old), Some(DiskIo { flushes: None, ..io }));
        assert_eq!(parse_stat("1 2 3"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn io_of_a_process_is_what_went_to_a_disk() {
        let text = "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\n\
                    cancelled_write_bytes: 0\n";
        assert_eq!(parse_io(text), Some(ProcessIo { read_bytes: 4096, written_bytes: 8192 }));
        assert_eq!(parse_io("rchar: 1\n"), None);
    }
}
