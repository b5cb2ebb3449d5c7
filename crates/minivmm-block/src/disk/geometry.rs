//! The image's size, and how transfers to it must be aligned.
//!
//! Owns capacity checks (R11) and the probing of O_DIRECT's alignment, in this order: STATX_DIOALIGN, the block
//! device's logical block, trial reads, 4096 (D1). Knows nothing of cache modes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::blocking::BlockingEngine;
use super::engine::{Engine, HostOp, OpToken, Wake};
use crate::mem::{AlignedBuffer, Iov};

/// Bytes in a sector, whatever the block size (virtio 5.2.6).
pub const SECTOR: u64 = 512;

/// A range that [`Geometry::check`] has found to be inside the image. No other code can construct one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectorRange {
    offset: u64,
    bytes: u64,
}

impl SectorRange {
    /// Returns the offset in the image, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the length in bytes, a multiple of 512.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The alignment that the host requires of direct transfers, in bytes. Both numbers are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Alignment of the address and length of each piece of memory.
    pub memory: u32,
    /// Alignment of offsets and lengths in the image.
    pub offset: u32,
    /// How the alignment was found.
    pub found_by: &'static str,
}

/// The size and block sizes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Logical block in bytes; the guest sees it as blk_size.
    pub logical_block: u32,
    /// Physical block in bytes: the unit that the host below rewrites as a whole.
    pub physical_block: u32,
    /// The alignment that transfers need.
    pub alignment: Alignment,
}

impl Geometry {
    /// Returns the range of `bytes` from `sector`, if it consists of whole sectors inside the capacity.
    pub fn check(&self, sector: u64, bytes: u64) -> Option<SectorRange> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(bytes)?;
        let capacity = self.capacity_sectors.checked_mul(SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= capacity).then_some(SectorRange { offset, bytes })
    }

    /// Returns `true` if the range begins and ends at multiples of the required alignment.
    pub fn is_aligned(&self, range: SectorRange) -> bool {
        // It is a power of two: a mask instead of a division.
        (range.offset | range.bytes) & (u64::from(self.alignment.offset) - 1) == 0
    }
}

/// The alignment of buffered transfers: nothing beyond the sector.
pub const BUFFERED: Alignment = Alignment { memory: 1, offset: 512, found_by: "page cache" };

/// Finds the alignment of direct transfers on `file`, which is open with O_DIRECT. Returns `None` if the host
/// says that the file does not support them.
pub fn probe_direct_alignment(file: &Arc<File>) -> io::Result<Option<Alignment>> {
    match statx_dio_alignment(file)? {
        StatxDio::Alignment(found) => return Ok(Some(found)),
        StatxDio::Unsupported => return Ok(None),
        StatxDio::NotReported => {}
    }
    if let Some(block) = logical_block_of_device(file) {
        let memory = block.min(512);
        return Ok(Some(Alignment { memory, offset: block, found_by: "BLKSSZGET" }));
    }
    Ok(Some(probe_by_reading(file)))
}

/// Returns the block in bytes that direct transfers on `file` would need, whatever flags it is open with.
/// Returns `None` if only a trial would tell.
pub fn direct_block(file: &File) -> Option<u32> {
    match statx_dio_alignment(file) {
        Ok(StatxDio::Alignment(found)) => Some(found.offset),
        _ => None,
    }
}

enum StatxDio {
    Alignment(Alignment),
    Unsupported,
    NotReported,
}

fn statx_dio_alignment(file: &File) -> io::Result<StatxDio> {
    // SAFETY: statx is plain numbers, for which all zeroes are valid.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor; `found` is valid for writes.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut found)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if found.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(StatxDio::NotReported);
    }
    let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        return Ok(StatxDio::Unsupported);
    }
    if !memory.is_power_of_two() || !offset.is_power_of_two() {
        return Ok(StatxDio::NotReported);
    }
    // XFS and DMA engines accept memory aligned to 4 bytes. But no piece of memory may be shorter than a block
    // either way, and 512 costs nothing: every Linux guest aligns its buffers to 512.
    let found_by = "STATX_DIOALIGN";
    Ok(StatxDio::Alignment(Alignment { memory: memory.max(512), offset: offset.max(512), found_by }))
}

/// Returns the logical block of a block device in bytes; `None` for other files.
pub fn logical_block_of_device(file: &File) -> Option<u32> {
    device_number(file, libc::BLKSSZGET)
}

/// Returns the physical block of a block device in bytes; `None` for other files.
pub fn physical_block_of_device(file: &File) -> Option<u32> {
    device_number(file, libc::BLKPBSZGET)
}

/// Returns `true` if a block device can make a single write stable by itself (FUA); `None` if sysfs does not
/// say.
pub fn has_fua(file: &File) -> Option<bool> {
    let rdev = file.metadata().ok()?.rdev();
    let device = format!("/sys/dev/block/{}:{}", libc::major(rdev), libc::minor(rdev));
    // A partition shares its disk's queue.
    let read = |path| std::fs::read_to_string(format!("{device}/{path}")).ok();
    let text = read("queue/fua").or_else(|| read("../queue/fua"))?;
    Some(text.trim() == "1")
}

fn device_number(file: &File, request: libc::Ioctl) -> Option<u32> {
    let mut number: libc::c_int = 0;
    // SAFETY: both requests write one int to the pointer, which is valid for it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut number) };
    let number = u32::try_from(number).ok()?;
    (result == 0 && number.is_power_of_two()).then_some(number)
}

/// Returns `true` if reads and writes of `file` may have these RWF_* flags. `end` is the file's size in bytes.
///
/// The read begins where the file ends, so it moves nothing. It has a length all the same: Linux completes a read of
/// length 0 before it looks at the flags (fs/read_write.c).
pub fn takes_rw_flags(file: &Arc<File>, end: u64, rw_flags: libc::c_int) -> io::Result<bool> {
    let buffer = AlignedBuffer::new(512, 512)?;
    let iov = Iov::from_buffer(&Arc::new(buffer), 512);
    let mut engine = BlockingEngine::with_flags(Arc::clone(file), rw_flags);
    let mut ended = Vec::new();
    // A new engine has room for one operation.
    let _ = engine.submit(OpToken(0), HostOp::Readv { iov, offset: end });
    engine.wait(Wake::Now, &mut ended)?;
    match ended.pop().map(|end| end.result) {
        Some(Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Some(Err(error)) => Err(error),
        _ => Ok(true),
    }
}

/// Tries reads at ever coarser alignments. If none succeeds, assumes 4096, which suits every disk.
fn probe_by_reading(file: &Arc<File>) -> Alignment {
    let coarsest = Alignment { memory: 4096, offset: 4096, found_by: "assumed" };
    let Ok(buffer) = AlignedBuffer::new(8192, 4096) else { return coarsest };
    let whole = Iov::from_buffer(&Arc::new(buffer), 8192);
    let reads = |skip: u32, len: u32| {
        let mut engine = BlockingEngine::new(Arc::clone(file));
        let mut ended = Vec::new();
        let iov = whole.part(u64::from(skip), u64::from(len), 1);
        let sent = engine.submit(OpToken(0), HostOp::Readv { iov, offset: 0 }).is_ok();
        sent && engine.wait(Wake::Now, &mut ended).is_ok() && ended.iter().all(|end| end.result.is_ok())
    };
    let sizes = [512u32, 1024, 2048, 4096];
    let Some(offset) = sizes.into_iter().find(|&len| reads(0, len)) else { return coarsest };
    let memory = sizes.into_iter().find(|&skip| reads(skip, offset)).unwrap_or(4096);
    Alignment { memory, offset, found_by: "reads that tried" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(capacity_sectors: u64, offset: u32) -> Geometry {
        let alignment = Alignment { memory: 512, offset, found_by: "test" };
        Geometry { capacity_sectors, logical_block: offset, physical_block: 4096, alignment }
    }

    /// Shows R11.
    #[test]
    fn only_whole_sectors_inside_the_capacity_are_ranges() {
        let disk = geometry(16, 512);
        for (sector, bytes, inside) in [
            (0, 8192, true),
            (15, 512, true),
            (16, 0, true),
            (15, 1024, false),
            (16, 512, false),
            (17, 0, false),
            (0, 511, false),
            (u64::MAX, 512, false),
            (u64::MAX / 512, 512, false),
            (1 << 55, 512, false),
            (0, u64::MAX - 511, false),
            // A shift would wrap these to sector 0.
            (1 << 55, 0, false),
            ((1 << 55) + 1, 512, false),
        ] {
            assert_eq!(disk.check(sector, bytes).is_some(), inside, "{sector} {bytes}");
        }
    }

    /// Shows D1, where neither statx nor the device reports an alignment.
    #[test]
    fn the_finest_reads_that_succeed_are_the_alignment_and_without_any_it_is_4096() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let readable = File::open(file.path()).unwrap();
        let found = probe_by_reading(&Arc::new(readable));
        assert_eq!(found, Alignment { memory: 512, offset: 512, found_by: "reads that tried" });
        let unreadable = File::options().write(true).open(file.path()).unwrap();
        let assumed = probe_by_reading(&Arc::new(unreadable));
        assert_eq!(assumed, Alignment { memory: 4096, offset: 4096, found_by: "assumed" });
    }

    #[test]
    fn flags_that_the_kernel_does_not_know_are_not_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let file = Arc::new(File::open(file.path()).unwrap());
        assert!(takes_rw_flags(&file, 8192, 0).unwrap());
        // linux/fs.h has no such flag.
        assert!(!takes_rw_flags(&file, 8192, 0x4000_0000).unwrap());
    }

    #[test]
    fn a_range_is_aligned_when_both_ends_are() {
        let disk = geometry(64, 4096);
        for (sector, bytes, aligned) in [(0, 4096, true), (8, 8192, true), (1, 4096, false), (8, 512, false)]
        {
            assert_eq!(disk.is_aligned(disk.check(sector, bytes).unwrap()), aligned, "{sector} {bytes}");
        }
    }
}
