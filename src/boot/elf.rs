//! ELF vmlinux: loading by its program headers, entry by PVH's note or by `e_entry`.
//!
//! Owns the ELF checks and the search for XEN_ELFNOTE_PHYS32_ENTRY. linux-loader's own ELF loader is not
//! used, because it adds file offsets without checking for overflow, and lets segments overlap.

use std::mem::size_of;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr};
use vm_memory::ByteValued;

use super::Entry;
use super::kernel_file::{Image, Kernel, KernelError, check_room};
use crate::layout;
use crate::mem::Ram;

/// The magic number at the start of an ELF file.
pub const MAGIC: &[u8] = b"\x7fELF";

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
/// The segment that holds the path of a program's loader.
const SEGMENT_INTERPRETER: u32 = 3;
const SEGMENT_NOTE: u32 = 4;
/// The maximum number of program headers; a kernel has only a few.
const SEGMENTS_MAX: u16 = 64;
/// The maximum size of the notes; a kernel's take a few hundred bytes.
const NOTES_BYTES_MAX: u64 = 1 << 20;
/// The type of the Xen note that holds PVH's 32-bit entry.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_XEN: &[u8] = b"Xen\0";

/// Loads the image.
pub fn load(ram: &Ram, image: &Image) -> Result<Kernel, KernelError> {
    let header: Elf64_Ehdr = read(image, 0, "its ELF header")?;
    check_header(&header)?;
    let segments = read_segments(image, &header)?;
    check_no_program(&segments)?;
    let loads: Vec<&Elf64_Phdr> =
        segments.iter().filter(|s| s.p_type == SEGMENT_LOAD && s.p_memsz > 0).collect();
    check_loads(ram, &loads)?;
    for load in &loads {
        image.copy(load.p_offset, load.p_filesz, "a segment", ram, load.p_paddr)?;
    }
    let entry = match find_pvh_entry(image, &segments)? {
        Some(eip) => Entry::Pvh32 { eip },
        None => Entry::Long64 { rip: header.e_entry },
    };
    let start = match entry {
        Entry::Pvh32 { eip } => u64::from(eip),
        Entry::Long64 { rip } => rip,
    };
    if !loads.iter().any(|load| (load.p_paddr..load.p_paddr + load.p_memsz).contains(&start)) {
        return Err(KernelError::Unusable(format!("its entry, {start:#x}, is in no segment")));
    }
    Ok(Kernel {
        entry,
        end: loads.iter().map(|load| load.p_paddr + load.p_memsz).max().unwrap_or_default(),
        bytes: loads.iter().map(|load| load.p_memsz).sum(),
        initrd_limit: layout::RAM_HOLE,
        cmdline_bytes_max: usize::try_from(layout::CMDLINE_MAX - 1).unwrap_or_default(),
        header: Default::default(),
    })
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), KernelError> {
    let unusable = |why: &str| Err(KernelError::Unusable(why.into()));
    let [_, _, _, _, class, data, ..] = header.e_ident;
    if class != CLASS_64 || data != LITTLE_ENDIAN || header.e_machine != MACHINE_X86_64 {
        return unusable("it is an ELF file for another machine than x86-64");
    }
    if header.e_type != TYPE_EXECUTABLE && header.e_type != TYPE_SHARED {
        return unusable("it is an ELF file, but no executable (a kernel module?)");
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return unusable("its program headers have an unknown size");
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return unusable("it has no program headers, or more than any kernel");
    }
    Ok(())
}

fn read_segments(image: &Image, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let what = "its program headers";
    let offset_of = |index: u16| {
        let offset = u64::from(index) * size_of::<Elf64_Phdr>() as u64;
        header.e_phoff.checked_add(offset).ok_or(KernelError::Truncated { what, file_bytes: image.len() })
    };
    (0..header.e_phnum).map(|index| read(image, offset_of(index)?, what)).collect()
}

/// Refuses a program for Linux: like every dynamic program, it names a loader.
fn check_no_program(segments: &[Elf64_Phdr]) -> Result<(), KernelError> {
    match segments.iter().any(|segment| segment.p_type == SEGMENT_INTERPRETER) {
        true => Err(KernelError::Unusable("it is a program for Linux (it names its loader)".into())),
        false => Ok(()),
    }
}

/// Checks that every segment is in RAM, above the first MiB, which we use, and that none overlaps another.
fn check_loads(ram: &Ram, loads: &[&Elf64_Phdr]) -> Result<(), KernelError> {
    for (index, load) in loads.iter().enumerate() {
        if load.p_filesz > load.p_memsz {
            return Err(KernelError::Unusable("a segment is longer in the file than in memory".into()));
        }
        check_room(ram, "a segment", load.p_paddr, load.p_memsz)
            .map_err(|error| to_the_last(error, loads))?;
        let overlaps = |other: &&&Elf64_Phdr| {
            load.p_paddr < other.p_paddr + other.p_memsz && other.p_paddr < load.p_paddr + load.p_memsz
        };
        if let Some(other) = loads.iter().take(index).find(overlaps) {
            let (one, two) = (load.p_paddr, other.p_paddr);
            return Err(KernelError::Unusable(format!("the segments at {one:#x} and {two:#x} overlap")));
        }
    }
    if loads.is_empty() { Err(KernelError::Unusable("it has nothing to load".into())) } else { Ok(()) }
}

/// Extends the reported need for memory to the end of the last segment.
fn to_the_last(error: KernelError, loads: &[&Elf64_Phdr]) -> KernelError {
    match error {
        KernelError::NoRoom { what: _, from, to } => {
            let ends = loads.iter().map(|load| load.p_paddr.saturating_add(load.p_memsz));
            KernelError::NoRoom { what: "the kernel", from, to: ends.max().unwrap_or(to) }
        }
        error => error,
    }
}

fn find_pvh_entry(image: &Image, segments: &[Elf64_Phdr]) -> Result<Option<u32>, KernelError> {
    for segment in segments.iter().filter(|segment| segment.p_type == SEGMENT_NOTE) {
        let len = usize::try_from(segment.p_filesz.min(NOTES_BYTES_MAX)).unwrap_or_default();
        let notes = image.bytes(segment.p_offset, len, "its notes")?;
        if let Some(entry) = pvh_entry(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Finds the 32-bit entry in `notes`. Each note is a header, a name and a description, the latter two padded
/// to 4 bytes.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let mut rest = notes;
    loop {
        let (header, after) = rest.split_at_checked(size_of::<Elf64_Nhdr>())?;
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(header);
        let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(4);
        let (name, after) = after.split_at_checked(padded(note.n_namesz)?)?;
        let (description, after) = after.split_at_checked(padded(note.n_descsz)?)?;
        if note.n_type == NOTE_PHYS32_ENTRY && name == NOTE_XEN {
            // Linux writes 8 bytes; the address is in the first four.
            return Some(u32::from_le_bytes(*description.first_chunk()?));
        }
        rest = after;
    }
}

fn read<T: ByteValued + Default>(image: &Image, offset: u64, what: &'static str) -> Result<T, KernelError> {
    let mut value = T::default();
    let bytes = image.bytes(offset, size_of::<T>(), what)?;
    value.as_mut_slice().copy_from_slice(&bytes);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::kernel::tests::load_bytes;
    use super::*;
    use crate::layout::MIB;

    fn note(kind: u32, name: &[u8], description: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend(u32::try_from(description.len()).unwrap().to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for part in [name, description] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    fn segment(p_type: u32, p_offset: u64, p_paddr: u64, p_filesz: u64, p_memsz: u64) -> Elf64_Phdr {
        Elf64_Phdr { p_type, p_offset, p_paddr, p_filesz, p_memsz, ..Default::default() }
    }

    fn image(segments: &[Elf64_Phdr], notes: &[u8]) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_type: TYPE_EXECUTABLE,
            e_machine: MACHINE_X86_64,
            e_entry: 0x10_0010,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: u16::try_from(segments.len()).unwrap(),
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', CLASS_64, LITTLE_ENDIAN]);
        let mut bytes = header.as_slice().to_vec();
        for segment in segments {
            bytes.extend(segment.as_slice());
        }
        bytes.resize(1024, 0x90);
        bytes[512..512 + notes.len()].copy_from_slice(notes);
        bytes
    }

    fn plain() -> Vec<Elf64_Phdr> {
        vec![segment(SEGMENT_LOAD, 0, 0x10_0000, 1024, 4096)]
    }

    #[test]
    fn entry_is_by_pvh_where_the_note_is_and_by_e_entry_elsewhere() {
        let kernel = load_bytes(4 * MIB, &image(&plain(), &[])).unwrap();
        assert_eq!(kernel.entry, Entry::Long64 { rip: 0x10_0010 });
        assert_eq!(kernel.end, 0x10_1000);
        let notes = note(NOTE_PHYS32_ENTRY, NOTE_XEN, &0x10_0020_u64.to_le_bytes());
        let mut segments = plain();
        segments.push(segment(SEGMENT_NOTE, 512, 0, notes.len() as u64, 0));
        // A second note segment, without the note that matters, does not hide the first.
        segments.push(segment(SEGMENT_NOTE, 1000, 0, 8, 0));
        let kernel = load_bytes(4 * MIB, &image(&segments, &notes)).unwrap();
        assert_eq!(kernel.entry, Entry::Pvh32 { eip: 0x10_0020 });
    }

    #[test]
    fn the_note_is_found_among_others_and_garbage_is_no_note() {
        let mut notes = note(NOTE_PHYS32_ENTRY, b"GNU\0", &[1; 5]);
        notes.extend(note(1, NOTE_XEN, &[]));
        assert_eq!(pvh_entry(&notes), None);
        notes.extend(note(NOTE_PHYS32_ENTRY, NOTE_XEN, &[4, 3, 2, 1]));
        assert_eq!(pvh_entry(&notes), Some(0x0102_0304));
        for cut in 0..notes.len() {
            assert_eq!(pvh_entry(&notes[..cut]), None, "cut at {cut}");
        }
        assert_eq!(pvh_entry(&[0xff; 64]), None);
        assert_eq!(pvh_entry(&[0; 64]), None);
    }

    #[test]
    fn segments_that_lie_badly_are_refused() {
        let load = |offset, paddr, filesz, memsz| segment(SEGMENT_LOAD, offset, paddr, filesz, memsz);
        for (reason, segments) in [
            ("1 MiB", vec![load(0, 0x8000, 10, 10)]),
            ("--memory", vec![load(0, 4 * MIB - 1, 2, 2)]),
            ("--memory", vec![load(0, u64::MAX, 1, 4096)]),
            ("overlap", vec![load(0, 0x10_0000, 10, 4096), load(0, 0x10_0fff, 10, 10)]),
            ("longer in the file", vec![load(0, 0x10_0000, 11, 10)]),
            ("truncated", vec![load(u64::MAX, 0x10_0000, 10, 4096)]),
            ("truncated", vec![load(1020, 0x10_0000, 10, 4096)]),
            ("in no segment", vec![load(0, 0x20_0000, 10, 10)]),
            ("nothing to load", vec![load(0, 0x10_0000, 0, 0)]),
            ("truncated", vec![plain()[0], segment(SEGMENT_NOTE, u64::MAX, 0, 16, 0)]),
        ] {
            let error = load_bytes(4 * MIB, &image(&segments, &[])).err().unwrap().to_string();
            assert!(error.contains(reason), "{error}, not {reason}");
        }
    }

    #[test]
    fn no_cut_and_no_garbage_panics() {
        let notes = note(NOTE_PHYS32_ENTRY, NOTE_XEN, &0x10_0020_u64.to_le_bytes());
        let mut segments = plain();
        segments.push(segment(SEGMENT_NOTE, 512, 0, notes.len() as u64, 0));
        let whole = image(&segments, &notes);
        for cut in 0..600 {
            assert!(load_bytes(4 * MIB, &whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 4..64 + 2 * 56 {
            for value in [0x00, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = load_bytes(4 * MIB, &bytes);
            }
        }
    }
}
