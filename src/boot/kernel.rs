//! A kernel image: which format it has.
//!
//! Owns the choice between bzImage and ELF, and the words for a file that is neither.

use std::path::Path;

use super::kernel_file::{Image, Kernel, KernelError};
use super::{bzimage, elf};
use crate::mem::Ram;

/// Loads the image at `path` into `ram`.
pub fn load(ram: &Ram, path: &Path) -> Result<Kernel, KernelError> {
    let image = Image::open(path)?;
    let len = usize::try_from(image.len().min(START_BYTES as u64)).unwrap_or(START_BYTES);
    let start = image.bytes(0, len, "the image's start")?;
    if start.starts_with(elf::MAGIC) {
        elf::load(ram, &image)
    } else if bzimage::is_one(&start) {
        bzimage::load(ram, &image)
    } else {
        Err(KernelError::Format(guess(&start)))
    }
}

/// The number of bytes at an image's start that identify its format.
const START_BYTES: usize = 0x210;

/// Guesses what a file is that is no supported kernel.
fn guess(start: &[u8]) -> &'static str {
    let known: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", "gzip-compressed (unpack it first)"),
        (b"\xfd7zXZ", "xz-compressed (unpack it first)"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed (unpack it first)"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"!<arch>", "an archive (a .deb?)"),
        (b"MZ", "an EFI program without a Linux boot header"),
    ];
    match known.iter().find(|(magic, _)| start.starts_with(magic)) {
        Some((_, name)) => name,
        None if start.is_empty() => "empty",
        None => "of unknown format",
    }
}

#[cfg(test)]
pub mod tests {
    use std::io::Write;

    use super::*;
    use crate::layout::{MIB, ram_regions};
    use crate::mem;

    pub fn load_bytes(ram_bytes: u64, bytes: &[u8]) -> Result<Kernel, KernelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        load(&mem::map_ram(&ram_regions(ram_bytes)).unwrap(), file.path())
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        for (bytes, name) in [
            (&b""[..], "empty"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"MZ", "EFI"),
            (b"hello", "unknown format"),
            (&[0; 4096], "unknown format"),
        ] {
            let error = load_bytes(16 * MIB, bytes).err().unwrap().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(load(&mem::map_ram(&ram_regions(MIB)).unwrap(), Path::new("/")).is_err());
    }
}
