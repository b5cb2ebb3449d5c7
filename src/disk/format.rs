//! Images that are not raw, known by their first bytes.
//!
//! Owns the refusal; nothing but it ever depends on what a guest could have written (R21).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::image::{ImageProblem, host};

/// First bytes of other formats. A guest could write them to a raw disk of its own, so nothing
/// but this refusal ever depends on them (R21).
static FORMATS: [(&[u8], &str); 6] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"conectix", "vhd"),
    (b"vhdxfile", "vhdx"),
    (b"<<< ", "vdi"),
];

/// The same file through a descriptor without O_DIRECT's alignment.
pub(super) fn read_anew(file: &File) -> io::Result<File> {
    // Through the open descriptor, so that it is the same file.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Refuses what looks like another format than raw.
pub(super) fn refuse(file: &File, path: &Path) -> Result<(), ImageProblem> {
    let mut plain = read_anew(file)
        .map_err(host("it cannot be opened anew through /proc/self/fd (is /proc mounted?)"))?;
    let mut first = [0; 32];
    let filled = read_some(&mut plain, &mut first).map_err(host("its first bytes cannot be read"))?;
    let found =
        FORMATS.iter().find(|(magic, _)| first[..filled].starts_with(magic)).map(|&(_, format)| format);
    match found.or_else(|| has_vhd_footer(&mut plain).then_some("vhd")) {
        None => Ok(()),
        Some(format) => Err(ImageProblem::NotRaw { format, path: path.display().to_string() }),
    }
}

/// A fixed-size vhd is raw but for its last sector.
fn has_vhd_footer(file: &mut File) -> bool {
    let mut footer = [0; 8];
    file.seek(SeekFrom::End(-512)).is_ok()
        && read_some(file, &mut footer).is_ok_and(|filled| filled == footer.len())
        && footer == *b"conectix"
}

/// Fills `buffer` as far as the file reaches.
fn read_some(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
