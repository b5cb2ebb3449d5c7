//! What an x86-64 ELF image needs to run: its interpreter, its libraries, and where they are searched for.
//!
//! Owns the reading of the program headers and of the dynamic section (System V ABI, AMD64). Only these are
//! read, whatever the file's length. Nothing in the file is trusted: each table and each string has a limit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The magic number at the start of an ELF image.
const MAGIC: &[u8] = b"\x7fELF";
const HEADER_BYTES: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_BYTES: usize = 56;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_DYNAMIC: u32 = 2;
const SEGMENT_INTERPRETER: u32 = 3;
const DYNAMIC_BYTES: usize = 16;
const TAG_END: u64 = 0;
const TAG_NEEDED: u64 = 1;
const TAG_STRINGS: u64 = 5;
const TAG_RPATH: u64 = 15;
const TAG_RUNPATH: u64 = 29;
/// The maximum number of entries read from a dynamic section. A program with ten thousand libraries would not
/// start.
const DYNAMIC_MAX: u64 = 16 * 1024;
/// The maximum length of a path or a list of paths.
const STRING_BYTES_MAX: usize = 64 * 1024;

/// What an image needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// The dynamic loader; `None` for a static program or a library.
    pub interpreter: Option<String>,
    /// The entries of DT_NEEDED, in order.
    pub libraries: Vec<String>,
    /// The entries of DT_RPATH.
    pub rpaths: Vec<String>,
    /// The entries of DT_RUNPATH.
    pub runpaths: Vec<String>,
}

/// The kind of a file, as far as libraries are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// An x86-64 image.
    Native(Needs),
    /// An ELF image for another machine or word length; none of this host's libraries go with it.
    Foreign,
    /// No ELF image.
    None,
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The host could not read the file.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// The file ends before something that its headers promise.
    #[error("{0} lies beyond its end")]
    Cut(&'static str),
}

/// Returns what `file` needs.
pub fn read(file: &File) -> Result<Image, ElfError> {
    let mut header = [0; HEADER_BYTES];
    let have = read_up_to(file, &mut header, 0)?;
    if !header.starts_with(MAGIC) || have < MAGIC.len() {
        return Ok(Image::None);
    }
    if have < HEADER_BYTES {
        return Err(ElfError::Cut("the ELF header"));
    }
    let is_native =
        header[4] == CLASS_64 && header[5] == LITTLE_ENDIAN && half(&header, 18) == MACHINE_X86_64;
    if !is_native {
        return Ok(Image::Foreign);
    }
    let segments = segments(file, &header)?;
    let mut needs = Needs::default();
    if let Some(segment) = segments.iter().find(|segment| segment.kind == SEGMENT_INTERPRETER) {
        needs.interpreter = Some(string(file, segment.offset, "the name of its interpreter")?);
    }
    if let Some(segment) = segments.iter().find(|segment| segment.kind == SEGMENT_DYNAMIC) {
        read_dynamic(file, segment, &segments, &mut needs)?;
    }
    Ok(Image::Native(needs))
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    len: u64,
}

fn segments(file: &File, header: &[u8]) -> Result<Vec<Segment>, ElfError> {
    let (at, count) = (long(header, 32), usize::from(half(header, 56)));
    let mut bytes = vec![0; count * PROGRAM_HEADER_BYTES];
    exact(file, &mut bytes, at, "the program headers")?;
    let segment = |bytes: &[u8]| Segment {
        kind: u32::from_le_bytes(bytes.first_chunk().copied().unwrap_or_default()),
        offset: long(bytes, 8),
        address: long(bytes, 16),
        len: long(bytes, 32),
    };
    Ok(bytes.chunks_exact(PROGRAM_HEADER_BYTES).map(segment).collect())
}

fn read_dynamic(
    file: &File,
    dynamic: &Segment,
    segments: &[Segment],
    needs: &mut Needs,
) -> Result<(), ElfError> {
    const WHAT: &str = "the dynamic section";
    let count = (dynamic.len / DYNAMIC_BYTES as u64).min(DYNAMIC_MAX);
    let mut bytes = vec![0; usize::try_from(count).unwrap_or_default() * DYNAMIC_BYTES];
    exact(file, &mut bytes, dynamic.offset, WHAT)?;
    let entries: Vec<(u64, u64)> = bytes
        .chunks_exact(DYNAMIC_BYTES)
        .map(|entry| (long(entry, 0), long(entry, 8)))
        .take_while(|(tag, _)| *tag != TAG_END)
        .collect();
    let Some(&(_, address)) = entries.iter().find(|(tag, _)| *tag == TAG_STRINGS) else { return Ok(()) };
    let strings = offset_of(address, segments).ok_or(ElfError::Cut("the string table"))?;
    for (tag, value) in entries {
        let list = match tag {
            TAG_NEEDED => &mut needs.libraries,
            TAG_RPATH => &mut needs.rpaths,
            TAG_RUNPATH => &mut needs.runpaths,
            _ => continue,
        };
        let at = strings.checked_add(value).ok_or(ElfError::Cut("a name"))?;
        list.push(string(file, at, "a name in the string table")?);
    }
    Ok(())
}

/// Returns the file offset of the byte at a virtual address.
fn offset_of(address: u64, segments: &[Segment]) -> Option<u64> {
    let inside = |segment: &&Segment| {
        segment.kind == SEGMENT_LOAD
            && address.checked_sub(segment.address).is_some_and(|at| at < segment.len)
    };
    let segment = segments.iter().find(inside)?;
    segment.offset.checked_add(address - segment.address)
}

/// Returns the NUL-terminated string at `offset`.
fn string(file: &File, offset: u64, what: &'static str) -> Result<String, ElfError> {
    let mut bytes = Vec::new();
    // Most names are short, so one small read gets them.
    for size in [256, STRING_BYTES_MAX] {
        bytes.resize(size, 0);
        let have = read_up_to(file, &mut bytes, offset)?;
        if let Some(end) = bytes.iter().take(have).position(|&byte| byte == 0) {
            bytes.truncate(end);
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    Err(ElfError::Cut(what))
}

fn exact(file: &File, bytes: &mut [u8], offset: u64, what: &'static str) -> Result<(), ElfError> {
    let have = read_up_to(file, bytes, offset)?;
    if have == bytes.len() { Ok(()) } else { Err(ElfError::Cut(what)) }
}

/// Reads until `bytes` is full or the file ends. An offset that no file can have counts as its end.
fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> Result<usize, ElfError> {
    if i64::try_from(offset.saturating_add(bytes.len() as u64)).is_err() {
        return Ok(0);
    }
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + have as u64) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(have)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u16::from_le_bytes(found.copied().unwrap_or_default())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_le_bytes(found.copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read_bytes(bytes: &[u8]) -> Result<Image, ElfError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(&file)
    }

    #[test]
    fn this_test_names_its_loader_and_its_c_library() {
        let program = File::open(std::env::current_exe().unwrap()).unwrap();
        let Image::Native(needs) = read(&program).unwrap() else { panic!("an ELF image") };
        assert!(needs.interpreter.as_deref().is_some_and(|path| path.ends_with("ld-linux-x86-64.so.2")));
        assert!(needs.libraries.iter().any(|name| name == "libc.so.6"), "{needs:?}");
    }

    /// Returns a header, a load segment over the whole file, a dynamic section and its strings.
    fn image() -> Vec<u8> {
        let strings = b"\0libone.so\0$ORIGIN/../lib:/srv\0";
        let mut bytes = vec![0; 512];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 2;
        let mut segment = |at: usize, kind: u8, offset: u64, address: u64, len: u64| {
            bytes[at] = kind;
            for (place, value) in [(8, offset), (16, address), (32, len)] {
                bytes[at + place..at + place + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        segment(64, 1, 0, 0x40_0000, 512);
        segment(120, 2, 200, 0x40_0000 + 200, 64);
        for (index, (tag, value)) in
            [(TAG_NEEDED, 1), (TAG_RUNPATH, 11), (TAG_STRINGS, 0x40_0000 + 300), (TAG_END, 0)]
                .iter()
                .enumerate()
        {
            let at = 200 + index * 16;
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(*tag));
            bytes[at + 8..at + 16].copy_from_slice(&u64::to_le_bytes(*value));
        }
        bytes[300..300 + strings.len()].copy_from_slice(strings);
        bytes
    }

    #[test]
    fn names_are_found_by_the_dynamic_section() {
        let expected = Needs {
            libraries: vec!["libone.so".into()],
            runpaths: vec!["$ORIGIN/../lib:/srv".into()],
            ..Needs::default()
        };
        assert_eq!(read_bytes(&image()).unwrap(), Image::Native(expected));
        let mut foreign = image();
        foreign[18] = 183;
        assert_eq!(read_bytes(&foreign).unwrap(), Image::Foreign);
        assert_eq!(read_bytes(b"#!/bin/sh\n").unwrap(), Image::None);
        assert_eq!(read_bytes(b"").unwrap(), Image::None);
    }

    #[test]
    fn no_cut_and_no_garbage_panics_or_takes_memory() {
        let whole = image();
        for cut in 4..330 {
            assert!(read_bytes(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 4..330 {
            for value in [0x00, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = read_bytes(&bytes);
            }
        }
    }
}
