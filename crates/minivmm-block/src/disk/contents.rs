//! The block size that an image's content was made for, found in its partition table or its file system.
//!
//! Owns the warning that the guest's disk will have another block size. Only that warning depends on bytes that
//! a guest could have written (R21).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::geometry::Geometry;

/// Block sizes that real disks have.
const SIZES: [u32; 2] = [512, 4096];

/// What is at the beginning of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// The content, in words.
    what: &'static str,
    /// The block size in bytes that it was made for.
    block: u32,
    /// `true` if it is found only on a disk with exactly that block size. `false` if smaller blocks do too.
    is_exact: bool,
}

/// Returns a warning for the user if the content does not fit the block size of the guest's disk.
pub fn warning(plain: &File, path: &Path, geometry: &Geometry) -> Option<String> {
    let content = find(&|offset, len| read(plain, offset, len))?;
    let logical = geometry.logical_block;
    let fits = if content.is_exact { content.block == logical } else { content.block >= logical };
    if fits {
        return None;
    }
    let wanted = if content.block < 4096 { 512 } else { 4096 };
    let effect = match content.is_exact {
        true => "the guest will find no partitions",
        false => "the guest cannot mount it",
    };
    let remedy = match wanted >= geometry.alignment.offset {
        true => format!("say block-size={wanted}"),
        false => format!(
            "O_DIRECT needs blocks of {} bytes here: use cache=writeback,block-size={wanted} (or writethrough, unsafe), or \
             an image that was made on a disk with such blocks",
            geometry.alignment.offset
        ),
    };
    Some(format!(
        "{}: its {} was made for blocks of {} bytes, and the guest's disk has blocks of {logical}: {effect}. {}{}",
        path.display(),
        content.what,
        content.block,
        remedy[..1].to_uppercase(),
        &remedy[1..]
    ))
}

/// Reads that many bytes at an offset; returns `None` beyond the end.
type ReadAt<'a> = &'a dyn Fn(u64, usize) -> Option<Vec<u8>>;

fn read(mut file: &File, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    // Seek and read, not pread, so that strace shows pread only for the guest's own requests.
    file.seek(SeekFrom::Start(offset)).ok()?;
    file.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn find(read: ReadAt<'_>) -> Option<Content> {
    let exact = |what, block| Some(Content { what, block, is_exact: true });
    // UEFI 2.10, 5.3.2: the header is in the second block and holds its own block number.
    let has_gpt = |block: &u32| {
        read(u64::from(*block), 32)
            .is_some_and(|head| head.starts_with(b"EFI PART") && number(&head, 24, 8) == 1)
    };
    let gpts: Vec<u32> = SIZES.into_iter().filter(has_gpt).collect();
    match gpts[..] {
        [block] => return exact("partition table (GPT)", block),
        [] => {}
        _ => return None,
    }
    if let Some((what, block)) = file_system(read, 0) {
        return Some(Content { what, block, is_exact: false });
    }
    let table = read(446, 66).filter(|table| table.ends_with(&[0x55, 0xaa]))?;
    // An MBR counts in blocks but does not name their size. The size is right if it leads to a file system.
    let starts = table.chunks_exact(16).filter(|entry| entry[4] != 0).map(|entry| number(entry, 8, 4));
    let leads = |block: &u32| {
        starts.clone().any(|start| start > 0 && file_system(read, start * u64::from(*block)).is_some())
    };
    let sizes: Vec<u32> = SIZES.into_iter().filter(leads).collect();
    match sizes[..] {
        [block] => exact("partition table (MBR)", block),
        _ => None,
    }
}

/// Returns the file system that begins at `start`, and the smallest unit in bytes in which it reads its disk.
fn file_system(read: ReadAt<'_>, start: u64) -> Option<(&'static str, u32)> {
    let size = |bytes: u64| {
        u32::try_from(bytes).ok().filter(|it| it.is_power_of_two() && (512..=65536).contains(it))
    };
    let first = read(start, 512)?;
    if first.starts_with(b"XFSB") {
        return Some(("xfs", size(u64::from(u16::from_be_bytes([first[102], first[103]])))?));
    }
    if first.ends_with(&[0x55, 0xaa]) {
        let sector = size(number(&first, 11, 2));
        match &first[3..11] {
            b"NTFS    " => return Some(("NTFS", sector?)),
            b"EXFAT   " => return Some(("exFAT", size(1 << first[108].min(16))?)),
            _ if first[54..57] == *b"FAT" || first[82..85] == *b"FAT" => return Some(("FAT", sector?)),
            _ => {}
        }
    }
    // fs/ext4/ext4.h: s_magic and s_log_block_size.
    if let Some(superblock) = read(start + 1024, 64)
        && number(&superblock, 56, 2) == 0xef53
    {
        return Some(("ext4", size(1024 << number(&superblock, 24, 4).min(6))?));
    }
    // include/uapi/linux/btrfs_tree.h: magic and sectorsize.
    if let Some(superblock) = read(start + 0x10000, 0x94)
        && superblock[0x40..0x48] == *b"_BHRfS_M"
    {
        return Some(("btrfs", size(number(&superblock, 0x90, 4))?));
    }
    read(start + 32769, 5).filter(|name| name == b"CD001").map(|_| ("ISO 9660", 2048))
}

/// Returns the little-endian number of `len` bytes.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let digits = bytes.get(at..at + len).unwrap_or_default();
    digits.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::geometry::Alignment;

    /// Returns an image with these bytes at these offsets.
    fn image(pieces: &[(usize, &[u8])]) -> Vec<u8> {
        let mut image = vec![0; 1 << 20];
        for (at, piece) in pieces {
            image[*at..*at + piece.len()].copy_from_slice(piece);
        }
        image
    }

    fn found(pieces: &[(usize, &[u8])]) -> Option<(&'static str, u32, bool)> {
        let image = image(pieces);
        let read = |offset: u64, len: usize| {
            let offset = usize::try_from(offset).ok()?;
            image.get(offset..offset + len).map(<[u8]>::to_vec)
        };
        find(&read).map(|it| (it.what, it.block, it.is_exact))
    }

    const GPT: &[u8] = b"EFI PART\0\0\x01\0\x5c\0\0\0aaaa\0\0\0\0\x01\0\0\0\0\0\0\0";
    /// One entry of type 0x83 that begins at block 8, and the signature.
    const MBR: [u8; 66] = {
        let mut table = [0; 66];
        (table[4], table[8], table[12], table[64], table[65]) = (0x83, 8, 100, 0x55, 0xaa);
        table
    };

    #[test]
    fn partition_tables_tell_their_block_size() {
        let gpt = "partition table (GPT)";
        assert_eq!(found(&[(512, GPT)]), Some((gpt, 512, true)));
        assert_eq!(found(&[(4096, GPT)]), Some((gpt, 4096, true)));
        assert_eq!(found(&[(512, GPT), (4096, GPT)]), None, "both: nobody knows");
        assert_eq!(found(&[(4096, b"EFI PART")]), None, "not at its own place");
        let mbr = "partition table (MBR)";
        assert_eq!(
            found(&[(446, &MBR), (8 * 512, b"XFSB"), (8 * 512 + 102, &[2, 0])]),
            Some((mbr, 512, true))
        );
        assert_eq!(found(&[(446, &MBR), (8 * 4096 + 1080, &[0x53, 0xef])]), Some((mbr, 4096, true)));
        assert_eq!(found(&[(446, &MBR)]), None, "it leads to nothing that is known");
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn file_systems_tell_the_smallest_block_that_they_read() {
        for (pieces, expected) in [
            (&[(1080, &[0x53, 0xef][..]), (1048, &[2])][..], ("ext4", 4096)),
            (&[(1080, &[0x53, 0xef]), (1048, &[0])], ("ext4", 1024)),
            (&[(0, b"XFSB"), (102, &[2, 0])], ("xfs", 512)),
            (&[(0, b"XFSB"), (102, &[16, 0])], ("xfs", 4096)),
            (&[(0x10040, b"_BHRfS_M"), (0x10090, &[0, 16, 0, 0])], ("btrfs", 4096)),
            (&[(11, &[0, 2]), (54, b"FAT16"), (510, &[0x55, 0xaa])], ("FAT", 512)),
            (&[(11, &[0, 16]), (82, b"FAT32"), (510, &[0x55, 0xaa])], ("FAT", 4096)),
            (&[(3, b"NTFS    "), (11, &[0, 2]), (510, &[0x55, 0xaa])], ("NTFS", 512)),
            (&[(3, b"EXFAT   "), (108, &[12]), (510, &[0x55, 0xaa])], ("exFAT", 4096)),
            (&[(32769, b"CD001")], ("ISO 9660", 2048)),
        ] {
            assert_eq!(found(pieces), Some((expected.0, expected.1, false)));
        }
        assert_eq!(found(&[(0, b"XFSB"), (102, &[2, 1])]), None, "no size");
        assert_eq!(found(&[(0, b"XFSB")]), None, "no size");
    }

    #[test]
    fn only_blocks_that_do_not_fit_are_told_with_what_helps() {
        use std::io::Write;
        let told = |pieces: &[(usize, &[u8])], logical_block, offset| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&image(pieces)).unwrap();
            let alignment = Alignment { memory: 512, offset, found_by: "test" };
            let geometry =
                Geometry { capacity_sectors: 2048, logical_block, physical_block: 4096, alignment };
            warning(&file, Path::new("a.img"), &geometry)
        };
        let has = |told: Option<String>, words: &[&str]| {
            let told = told.unwrap();
            assert!(words.iter().all(|word| told.contains(word)), "{told}");
        };
        assert_eq!(told(&[(512, GPT)], 512, 512), None);
        assert_eq!(told(&[(4096, GPT)], 4096, 4096), None);
        has(told(&[(4096, GPT)], 512, 512), &["a.img", "4096", "no partitions", "Say block-size=4096"]);
        // A 4Kn host, in mode none.
        has(told(&[(512, GPT)], 4096, 4096), &["no partitions", "cache=writeback,block-size=512"]);
        has(told(&[(512, GPT)], 4096, 512), &["Say block-size=512"]);
        has(told(&[(0, b"XFSB"), (102, &[2, 0])], 4096, 4096), &["its xfs", "cannot mount"]);
        assert_eq!(told(&[(0, b"XFSB"), (102, &[16, 0])], 512, 512), None, "smaller blocks do too");
        assert_eq!(told(&[(1080, &[0x53, 0xef]), (1048, &[2])], 4096, 4096), None);
    }
}
