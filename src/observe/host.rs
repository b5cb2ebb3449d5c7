//! What the host's disk below an image does, and what this process makes disks do.
//!
//! Owns the parsing of the disk's stat file in sysfs (Documentation/block/stat.rst) and of /proc/self/io. The
//! first counts for everybody who uses that disk, and the second for all disks of this VM. Neither is about one
//! image alone; docs/observing.md explains what follows.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::disk::Image;
use crate::explain::{Layer, Place, below, below_device};

/// Size of a sector in the stat file, whatever the sector size of the disk is.
const SECTOR_BYTES: u64 = 512;

/// The disk of the host on which an image lies.
#[derive(Debug, Clone)]
pub struct HostDisk {
    name: String,
    stat: Arc<File>,
}

/// Counters of a disk since it appeared: completed I/Os.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskIo {
    /// Number of reads, after merging.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Number of writes, after merging.
    pub writes: u64,
    /// Bytes of those.
    pub written_bytes: u64,
    /// Number of FLUSHes, each of which may serve several concurrent syncs. `None` before Linux 5.5. Stays 0
    /// for a disk without a write cache, because the kernel sends it none.
    pub flushes: Option<u64>,
}

impl HostDisk {
    /// Finds the disk below `image`. For a partition it is the whole disk. device-mapper and md count no
    /// FLUSHes, so the first other disk below them is taken, which of a mirror is one half.
    pub fn of(image: &Image) -> Option<Self> {
        Self::lowest(&below(image, &Place::of(image)))
    }

    fn lowest(layers: &[Layer]) -> Option<Self> {
        let real = |layer: &&Layer| !["dm-", "md"].iter().any(|prefix| layer.name.starts_with(prefix));
        let name = layers.iter().find(real).or(layers.first())?.name.clone();
        // The file is opened now, because the sandbox does not allow that later.
        let stat = Arc::new(File::open(format!("/sys/block/{name}/stat")).ok()?);
        Some(Self { stat, name })
    }

    /// Finds the disk below a file that is not an open image.
    pub fn below(file: &File) -> Option<Self> {
        Self::lowest(&below_device(Place::of_file(file).device?))
    }

    /// Returns the kernel's name of the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the counters of the disk.
    pub fn io(&self) -> Option<DiskIo> {
        parse_stat(&reread(&self.stat).ok()?)
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

/// I/O that this process has caused, on all disks and files together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessIo {
    /// Bytes that were read from a disk, including read-ahead. What the page cache supplied does not count.
    pub read_bytes: u64,
    /// Bytes of pages that were made dirty, and of O_DIRECT writes.
    pub written_bytes: u64,
}

/// The I/O accounting of this process.
#[derive(Debug)]
pub struct IoAccounting(File);

impl IoAccounting {
    /// Opens the accounting; `None` if the kernel has none (CONFIG_TASK_IO_ACCOUNTING).
    pub fn of_this_process() -> Option<Self> {
        File::open("/proc/self/io").ok().map(Self)
    }

    /// Returns the I/O that this process has caused so far.
    pub fn now(&self) -> Option<ProcessIo> {
        parse_io(&reread(&self.0).ok()?)
    }
}

/// Reads a small file of procfs or sysfs again. The kernel generates it for each read from its beginning.
fn reread(file: &File) -> io::Result<String> {
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
