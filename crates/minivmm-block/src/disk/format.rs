//! Images in other formats than raw, recognised by their first bytes.
//!
//! Owns their refusal. Only this refusal ever depends on bytes that a guest could have written (R21).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::problem::{ImageProblem, host};
use crate::text::shell_word;

/// First bytes of other formats. A guest could write them to its own raw disk, so only this refusal ever
/// depends on them (R21).
static FORMATS: [(&[u8], &str); 6] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"conectix", "vhd"),
    (b"vhdxfile", "vhdx"),
    (b"<<< ", "vdi"),
];

/// First bytes of compressed files, and the command that unpacks them. A read-only guest may have such a file:
/// it may be an archive that the guest unpacks itself.
static COMPRESSED: [(&[u8], &str, &str); 4] = [
    (b"\x1f\x8b\x08", "gzip", "gzip -dc"),
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
];

/// Opens the same file again, without O_DIRECT and its alignment.
pub(super) fn read_anew(file: &File) -> io::Result<File> {
    // Via /proc/self/fd, so that it is the same file even if the path now names another.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Refuses what looks like another format than raw, and compressed files that the guest could write to.
pub(super) fn refuse(file: &File, path: &Path, is_readonly: bool) -> Result<(), ImageProblem> {
    let mut plain = read_anew(file)
        .map_err(host("it cannot be opened anew through /proc/self/fd (is /proc mounted?)"))?;
    let mut first = [0; 32];
    let filled = read_some(&mut plain, &mut first).map_err(host("its first bytes cannot be read"))?;
    let found =
        FORMATS.iter().find(|(magic, _)| first[..filled].starts_with(magic)).map(|&(_, format)| format);
    if let Some(format) = found.or_else(|| has_vhd_footer(&mut plain).then_some("vhd")) {
        let raw = shell_word(with_suffix(path, ".raw"));
        let convert = format!("qemu-img convert -O raw {} {raw}", shell_word(path));
        return Err(ImageProblem::NotRaw { format, convert });
    }
    match COMPRESSED.iter().find(|(magic, ..)| first[..filled].starts_with(magic)) {
        Some(&(_, format, program)) if !is_readonly => {
            let unpack =
                format!("{program} {} > {}", shell_word(path), shell_word(with_suffix(path, ".raw")));
            Err(ImageProblem::Compressed { format, unpack })
        }
        _ => Ok(()),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> OsString {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name
}

/// Returns `true` if the last sector is a vhd footer. A fixed-size vhd is raw but for that sector.
fn has_vhd_footer(file: &mut File) -> bool {
    let mut footer = [0; 8];
    file.seek(SeekFrom::End(-512)).is_ok()
        && read_some(file, &mut footer).is_ok_and(|filled| filled == footer.len())
        && footer == *b"conectix"
}

/// Fills `buffer` as far as the file reaches, and returns the number of bytes read.
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
