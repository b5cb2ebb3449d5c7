//! Recognizes whether a kernel image is Linux.
//!
//! Owns the two marks that identify it: the magic number of the x86 boot protocol, which only Linux has, and
//! the banner that every ELF vmlinux contains.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// "HdrS" at 0x202 (Documentation/arch/x86/boot.rst).
const MAGIC_AT: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// `linux_banner` (init/version.c).
const BANNER: &[u8] = b"Linux version ";
const ELF: &[u8] = b"\x7fELF";

/// Returns `true` if the file at `path` is a Linux kernel. An unreadable file counts as none; the loader
/// reports why.
pub fn is_linux(path: &Path) -> bool {
    // Opening a FIFO would block.
    path.is_file() && File::open(path).and_then(look).unwrap_or(false)
}

fn look(mut file: impl Read) -> std::io::Result<bool> {
    let mut buffer = vec![0; 1 << 20];
    // The number of bytes kept from the end of the previous piece, in which the banner may begin.
    let mut kept = 0;
    let mut first = true;
    loop {
        let got = file.read(&mut buffer[kept..])?;
        let filled = kept + got;
        let piece = &buffer[..filled];
        if first {
            if piece.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) == Some(MAGIC) {
                return Ok(true);
            }
            if !piece.starts_with(ELF) {
                return Ok(false);
            }
            first = false;
        }
        if contains(piece, BANNER) {
            return Ok(true);
        }
        if got == 0 {
            return Ok(false);
        }
        kept = filled.min(BANNER.len() - 1);
        buffer.copy_within(filled - kept..filled, 0);
    }
}

/// Returns `true` if `text` contains `words`. Searches for the first byte, then compares the rest.
fn contains(text: &[u8], words: &[u8]) -> bool {
    let Some((first, rest)) = words.split_first() else { return true };
    let mut left = text;
    while let Some(at) = left.iter().position(|byte| byte == first) {
        left = &left[at + 1..];
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a few bytes per read.
    struct Slowly<'a>(&'a [u8]);

    impl Read for Slowly<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let count = self.0.len().min(buffer.len()).min(700);
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn linux_is_known_by_its_marks_wherever_they_are() {
        let mut bz_image = vec![0; 0x400];
        bz_image[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(MAGIC);
        assert!(look(&bz_image[..]).unwrap());
        for at in [10, 695, 700, 5000, (1 << 20) - 3, (1 << 20) + 9] {
            let mut image = vec![b'L'; (1 << 20) + 100];
            image[..4].copy_from_slice(ELF);
            assert!(!look(&image[..]).unwrap(), "{at}");
            image[at..at + BANNER.len()].copy_from_slice(BANNER);
            assert!(look(&image[..]).unwrap(), "{at}");
            assert!(look(Slowly(&image)).unwrap(), "{at}");
        }
        assert!(!look(&b"Linux version of a text"[..]).unwrap());
        assert!(!look(&b""[..]).unwrap());
        assert!(!is_linux(Path::new("/nowhere")));
    }
}
