//! bzImage: the checks of the setup header, and loading by the 64-bit boot protocol.
//!
//! Owns what Documentation/arch/x86/boot.rst says of the header. The structures are linux-loader's; the
//! checks are made here, because the file may contain anything.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::Entry;
use super::kernel_file::{Image, Kernel, KernelError, check_room};
use crate::layout;
use crate::mem::Ram;

/// Where the setup header begins.
const HEADER: usize = 0x1f1;
/// The position of the header's magic number.
const MAGIC_AT: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// The byte that, added to 0x202, gives the header's end.
const HEADER_LEN_AT: usize = 0x201;
/// Boot protocol 2.12 (Linux 3.8) added xloadflags, which say whether there is a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
/// Flag in xloadflags: there is a 64-bit entry, at 0x200 bytes from the load address.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
/// Flag in loadflags: the protected-mode code is loaded at 1 MiB, so it is no zImage.
const LOADED_HIGH: u8 = 1 << 0;
const SECTOR: u64 = 512;

/// Returns `true` if an image that starts with `start` is a bzImage.
pub fn is_one(start: &[u8]) -> bool {
    start.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Loads the image.
pub fn load(ram: &Ram, image: &Image) -> Result<Kernel, KernelError> {
    let header = read_header(image)?;
    check_header(&header)?;
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_bytes = (sectors + 1) * SECTOR;
    let code = "the kernel's code";
    let bytes = match image.len().checked_sub(setup_bytes) {
        None | Some(0) => return Err(KernelError::Truncated { what: code, file_bytes: image.len() }),
        Some(bytes) => bytes,
    };
    // `syssize` counts 16-byte units of the code. Signatures may follow the code, but none of it may be
    // missing.
    if u64::from(header.syssize) * 16 > bytes.next_multiple_of(16) {
        return Err(KernelError::Truncated { what: code, file_bytes: image.len() });
    }
    image.copy(setup_bytes, bytes, code, ram, layout::HIGH_RAM)?;
    let runtime = runtime_start(&header);
    let init_size = u64::from(header.init_size);
    check_room(ram, "the kernel, unpacked,", runtime, init_size)?;
    Ok(Kernel {
        entry: Entry::Long64 { rip: layout::HIGH_RAM + ENTRY_64 },
        end: (layout::HIGH_RAM + bytes).max(runtime + init_size),
        bytes: init_size,
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
        cmdline_bytes_max: cmdline_bytes_max(&header),
        header,
    })
}

/// Reads as much of the header as the file says there is. Fields that an older kernel lacks stay zero.
fn read_header(image: &Image) -> Result<setup_header, KernelError> {
    let what = "its setup header";
    let len = image.bytes(HEADER_LEN_AT as u64, 1, what)?;
    let end = MAGIC_AT + usize::from(len.first().copied().unwrap_or_default());
    let mut header = setup_header::default();
    let len = end.saturating_sub(HEADER).min(header.as_slice().len());
    let bytes = image.bytes(HEADER as u64, len, what)?;
    if let Some(target) = header.as_mut_slice().get_mut(..len) {
        target.copy_from_slice(&bytes);
    }
    Ok(header)
}

fn check_header(header: &setup_header) -> Result<(), KernelError> {
    let unusable = |why: String| Err(KernelError::Unusable(why));
    let (version, xloadflags, alignment) = (header.version, header.xloadflags, header.kernel_alignment);
    if version < VERSION_MIN {
        return unusable(format!(
            "its boot protocol is {}.{:02}, and the 64-bit entry came with 2.12 (Linux 3.8): use a newer kernel",
            version >> 8,
            version & 0xff
        ));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return unusable("it has no 64-bit entry: it is a 32-bit kernel".into());
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return unusable("it is a zImage, which is loaded below 1 MiB".into());
    }
    if header.relocatable_kernel != 0 && !alignment.is_power_of_two() {
        return unusable(format!("its alignment, {alignment:#x}, is no power of two"));
    }
    Ok(())
}

/// Returns where the kernel unpacks itself, unless it chooses a random place.
fn runtime_start(header: &setup_header) -> u64 {
    let preferred = header.pref_address;
    if header.relocatable_kernel == 0 {
        return preferred;
    }
    layout::HIGH_RAM.next_multiple_of(u64::from(header.kernel_alignment)).max(preferred)
}

fn cmdline_bytes_max(header: &setup_header) -> usize {
    let ours = layout::CMDLINE_MAX - 1;
    usize::try_from(u64::from(header.cmdline_size).min(ours)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::kernel::tests::load_bytes;
    use super::*;
    use crate::layout::MIB;

    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            syssize: 64,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            relocatable_kernel: 1,
            kernel_alignment: 0x20_0000,
            pref_address: 0x100_0000,
            init_size: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            ..Default::default()
        }
    }

    fn image(header: &setup_header) -> Vec<u8> {
        let mut bytes = vec![0; 1024 + 1024];
        bytes[HEADER..HEADER + header.as_slice().len()].copy_from_slice(header.as_slice());
        bytes[HEADER_LEN_AT] = 0x6a;
        bytes
    }

    #[test]
    fn a_good_image_starts_at_its_64_bit_entry() {
        let kernel = load_bytes(32 * MIB, &image(&header())).unwrap();
        assert_eq!(kernel.entry, Entry::Long64 { rip: 0x10_0200 });
        assert_eq!(kernel.end, 0x110_0000);
        assert_eq!(kernel.initrd_limit, 0x8000_0000);
        assert_eq!(kernel.cmdline_bytes_max, 2047);
    }

    #[test]
    fn what_cannot_be_booted_is_refused_with_its_reason() {
        type Change = fn(&mut setup_header);
        let cases: [(&str, Change); 7] = [
            ("2.06", |h| h.version = 0x0206),
            ("64-bit entry", |h| h.xloadflags = 0),
            ("zImage", |h| h.loadflags = 0),
            ("power of two", |h| h.kernel_alignment = 3),
            ("truncated", |h| h.syssize = 65),
            ("--memory", |h| h.init_size = u32::MAX),
            ("--memory", |h| h.pref_address = u64::MAX),
        ];
        for (reason, change) in cases {
            let mut header = header();
            change(&mut header);
            let error = load_bytes(32 * MIB, &image(&header)).err().unwrap().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn no_cut_and_no_garbage_panics() {
        let whole = image(&header());
        // The code is padded to 16 bytes, and a lack of padding goes unnoticed.
        for len in (0..whole.len() - 16).step_by(7) {
            assert!(load_bytes(32 * MIB, &whole[..len]).is_err(), "cut at {len}");
        }
        for at in HEADER..HEADER + 0x7b {
            let mut bytes = whole.clone();
            for value in [0x00, 0x7f, 0xff] {
                bytes[at] = value;
                let _ = load_bytes(32 * MIB, &bytes);
            }
        }
    }
}
