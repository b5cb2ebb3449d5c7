//! How a file is laid out on its disk: which parts are written, which are holes and which are only reserved.
//!
//! Owns FIEMAP, and SEEK_HOLE for file systems without it. Reading a hole reads no disk, and the first write to
//! one allocates space, so a benchmark of such a file measures the file system.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::Serialize;

/// _IOWR('f', 11, struct fiemap).
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
/// Makes the kernel write dirty data first, so that its place is allocated.
const FLAG_SYNC: u32 = 0x1;
const EXTENT_LAST: u32 = 0x1;
const EXTENT_ENCODED: u32 = 0x8;
const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENT_SHARED: u32 = 0x2000;
const EXTENTS: usize = 256;

/// The layout of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Size of the file.
    pub bytes: u64,
    /// Ranges without data as (start, end), in order. Reserved but unwritten ranges are included.
    #[serde(skip)]
    pub gaps: Vec<(u64, u64)>,
    /// Bytes in holes.
    pub hole_bytes: u64,
    /// Bytes that are reserved and not written (fallocate). Reading them returns zeroes without reading the
    /// disk.
    pub unwritten_bytes: u64,
    /// Bytes that are shared with another file (reflink). The first write to each copies it elsewhere.
    pub shared_bytes: u64,
    /// Bytes that are compressed or encrypted. The disk transfers a different number of bytes for them.
    pub encoded_bytes: u64,
    /// Number of extents; `None` if SEEK_HOLE was used.
    pub extents: Option<u64>,
    /// Source of the information: "fiemap", "seek" or "device".
    pub told_by: &'static str,
}

impl Layout {
    /// Returns the layout of a file or block device. A block device shows no holes.
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        if found.file_type().is_block_device() {
            let bytes = seek(file, SeekFrom::End(0))?;
            return Ok(Self { bytes, told_by: "device", ..Self::default() });
        }
        let bytes = found.len();
        match by_fiemap(file, bytes) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS)) =>
            {
                by_seek(file, bytes)
            }
            layout => layout,
        }
    }

    /// Returns `true` if every byte is allocated on the disk and written.
    pub fn is_written(&self) -> bool {
        self.bytes > 0 && self.gaps.is_empty()
    }

    /// Returns the number of bytes that are not.
    pub fn gap_bytes(&self) -> u64 {
        self.hole_bytes + self.unwritten_bytes
    }

    fn add_gap(&mut self, from: u64, to: u64, reserved: bool) {
        let to = to.min(self.bytes);
        if from >= to {
            return;
        }
        *(if reserved { &mut self.unwritten_bytes } else { &mut self.hole_bytes }) += to - from;
        match self.gaps.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => self.gaps.push((from, to)),
        }
    }
}

/// struct fiemap with room for its extents (linux/fiemap.h).
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved32: [u32; 3],
}

fn by_fiemap(file: &File, bytes: u64) -> io::Result<Layout> {
    let mut layout = Layout { bytes, told_by: "fiemap", ..Layout::default() };
    let (mut at, mut extents) = (0, 0);
    while at < bytes {
        let mut map = Fiemap {
            start: at,
            length: bytes - at,
            flags: FLAG_SYNC,
            mapped_extents: 0,
            extent_count: 256,
            reserved: 0,
            extents: [FiemapExtent::default(); EXTENTS],
        };
        // SAFETY: `map` is a struct fiemap with room for the `extent_count` extents that it names.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let found = map.extents.iter().take(usize::try_from(map.mapped_extents).unwrap_or(0));
        let mut last = true;
        for extent in found {
            // The kernel reports an extent that begins before the requested range from its beginning.
            let (from, to) =
                (extent.logical.max(at), extent.logical.saturating_add(extent.length).min(bytes));
            layout.add_gap(at, from, false);
            if extent.flags & EXTENT_UNWRITTEN != 0 {
                layout.add_gap(from, to, true);
            }
            let length = to.saturating_sub(from);
            layout.shared_bytes += if extent.flags & EXTENT_SHARED != 0 { length } else { 0 };
            layout.encoded_bytes += if extent.flags & EXTENT_ENCODED != 0 { length } else { 0 };
            extents += 1;
            at = at.max(to);
            last = extent.flags & EXTENT_LAST != 0;
        }
        if last {
            break;
        }
    }
    layout.add_gap(at, bytes, false);
    layout.extents = Some(extents);
    Ok(layout)
}

/// Finds the layout with SEEK_HOLE. Reserved ranges look like holes, or on some file systems like data.
fn by_seek(file: &File, bytes: u64) -> io::Result<Layout> {
    let mut layout = Layout { bytes, told_by: "seek", ..Layout::default() };
    let mut at = 0;
    while at < bytes {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => bytes,
            Err(errno) => return Err(errno.into()),
        };
        layout.add_gap(at, data, false);
        if data >= bytes {
            break;
        }
        at = seek(file, SeekFrom::Hole(data))?;
    }
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    #[test]
    fn holes_and_what_is_only_reserved_are_found() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        const MIB: u64 = 1 << 20;
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(&vec![7; 1 << 20], MIB).unwrap();
        file.sync_all().unwrap();
        let holes = Layout::of(&file).unwrap();
        assert_eq!((holes.bytes, holes.gaps.as_slice()), (4 * MIB, &[(0, MIB), (2 * MIB, 4 * MIB)][..]));
        assert_eq!((holes.hole_bytes, holes.is_written()), (3 * MIB, false));
        let seen = by_seek(&file, 4 * MIB).unwrap();
        assert_eq!((seen.gaps, seen.extents), (holes.gaps, None));
        if fallocate(&file, FallocateFlags::empty(), 0, MIB).is_ok() && holes.told_by == "fiemap" {
            let reserved = Layout::of(&file).unwrap();
            assert_eq!((reserved.unwritten_bytes, reserved.hole_bytes), (MIB, 2 * MIB), "{reserved:?}");
            assert_eq!(reserved.gaps, [(0, MIB), (2 * MIB, 4 * MIB)]);
        }
        file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        file.write_all_at(&vec![7; 2 << 20], 2 * MIB).unwrap();
        let written = Layout::of(&file).unwrap();
        assert!(written.is_written() && written.gap_bytes() == 0, "{written:?}");
    }

    #[test]
    fn an_empty_file_is_no_written_one() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert!(!Layout::of(&file).unwrap().is_written());
    }
}
