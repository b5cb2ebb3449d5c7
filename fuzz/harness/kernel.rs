//! Kernel images, initial RAM disks and command lines: whatever the files say, they are loaded where
//! they may lie, or refused.

use std::path::Path;

use minivmm::boot::{self, Entry, Guest, MmioDevice, Piece, Tail, cmdline};
use minivmm::layout;
use minivmm::mem;

use super::input::Input;
use super::writelog::{in_memory, path_of};

const MIB: usize = 1 << 20;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let line = command_line(&mut input);
    let more = command_line(&mut input);
    check_command_line(&line, &more);
    let with_initrd = input.flag();
    let pci = input.flag();
    let initrd = vec![0xa5; usize::from(input.u16()) * input.below(16)];
    let tail = if input.flag() { input.bytes(16).to_vec() } else { Vec::new() };
    let image = match input.below(8) {
        0 => input.rest().to_vec(),
        1..=4 => elf(&mut input),
        _ => bzimage(&mut input),
    };
    let (kernel_file, initrd_file) = (in_memory("kernel", &image), in_memory("initrd", &initrd));
    let (kernel, initrd_path) = (path_of(&kernel_file), path_of(&initrd_file));
    let devices = [MmioDevice { base: 0xd000_0000, irq: 5 }];
    let guest = Guest {
        kernel: &kernel,
        initrd: with_initrd.then_some(&*initrd_path),
        initrd_tail: Tail { pieces: vec![Piece::Bytes(&tail)], unpacked_bytes: tail.len() as u64 },
        cmdline: &line,
        cpus: 1,
        devices: &devices,
        pci,
    };
    load(&guest, &initrd, &tail);
}

fn load(guest: &Guest<'_>, initrd: &[u8], tail: &[u8]) {
    let ram = mem::map_ram(&layout::ram_regions(4 * MIB as u64)).expect("RAM");
    let entry = match boot::load(&ram, guest) {
        Err(error) => return assert!(!error.to_string().is_empty()),
        Ok(entry) => entry,
    };
    let start = match entry {
        Entry::Long64 { rip } => rip,
        Entry::Pvh32 { eip } => eip.into(),
    };
    assert!((layout::HIGH_RAM..4 * MIB as u64).contains(&start), "the entry, {start:#x}, is not in RAM");
    let mut low = vec![0; MIB];
    mem::read_bytes(&ram, 0, &mut low).unwrap();
    let used = [
        (layout::PVH_START_INFO, layout::PVH_START_INFO + 0x1000),
        (layout::ZERO_PAGE, layout::ZERO_PAGE + 0x1000),
        (layout::CMDLINE, layout::CMDLINE + layout::CMDLINE_MAX),
        (layout::ACPI, layout::HIGH_RAM),
    ];
    for (at, byte) in (0..).zip(&low) {
        let is_ours = used.iter().any(|(from, to)| (*from..*to).contains(&at));
        assert!(*byte == 0 || is_ours, "below 1 MiB {at:#x} was written");
    }
    let at = usize::try_from(layout::CMDLINE).unwrap();
    let line = cmdline::announce(guest.cmdline, guest.devices);
    assert_eq!(&low[at..at + line.len()], line.as_bytes());
    assert_eq!(low[at + line.len()], 0, "the line ends");
    if guest.initrd.is_some() {
        check_initrd(&ram, &low, entry, initrd, tail);
    }
}

/// It is all there, in RAM, where the kernel is told that it is, with the tail on a multiple of 512.
fn check_initrd(ram: &mem::Ram, low: &[u8], entry: Entry, initrd: &[u8], tail: &[u8]) {
    let word = |at: usize| u64::from(u32::from_le_bytes(low[at..at + 4].try_into().unwrap()));
    let (zero_page, info) = (layout::ZERO_PAGE as usize, layout::PVH_START_INFO as usize);
    let (base, len) = match entry {
        Entry::Long64 { .. } => (word(zero_page + 0x218), word(zero_page + 0x21c)),
        Entry::Pvh32 { .. } => (word(word(info + 16) as usize), word(word(info + 16) as usize + 8)),
    };
    assert!(base >= layout::HIGH_RAM && base + len <= 4 * MIB as u64, "{base:#x}, {len:#x} bytes");
    let padded = if tail.is_empty() { initrd.len() } else { initrd.len().next_multiple_of(512) };
    assert_eq!(len, (padded + tail.len()) as u64);
    let mut found = vec![0; len as usize];
    mem::read_bytes(ram, base, &mut found).unwrap();
    assert!(found.starts_with(initrd) && found.ends_with(tail), "the initrd is not what it was");
}

fn command_line(input: &mut Input<'_>) -> String {
    let mut line = String::new();
    for _ in 0..input.below(16) {
        match input.below(6) {
            0 => line.push_str(" -- "),
            1 => line.push('"'),
            2 => line.push_str("reboot=t"),
            3 => line.push_str(&"x".repeat(usize::from(input.u8()) * 2)),
            4 => line.push(' '),
            _ => line.push_str(&String::from_utf8_lossy(input.bytes(16))),
        }
    }
    line
}

fn check_command_line(line: &str, more: &str) {
    let joined = cmdline::append(line, more);
    assert!(joined.len() <= line.len() + more.len() + 8);
    let again = cmdline::append(&joined, "");
    assert_eq!(cmdline::append(&again, ""), again, "adding nothing changes nothing");
    let _ = cmdline::reboots_by_triple_fault(&joined);
    if cmdline::check(&joined, 100).is_ok() {
        assert!(joined.len() <= 100 && !joined.contains('\0'));
    }
    let _ = (cmdline::for_command(true, false), Path::new(line));
}

fn or_edgy(input: &mut Input<'_>, good: u64) -> u64 {
    if input.once_in(24) { input.edgy() } else { good }
}

fn narrow<const N: usize>(value: u64) -> [u8; N] {
    value.to_le_bytes()[..N].try_into().unwrap()
}

fn elf(input: &mut Input<'_>) -> Vec<u8> {
    let segments = input.below(5);
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend(narrow::<2>(or_edgy(input, 2)));
    bytes.extend(narrow::<2>(or_edgy(input, 62)));
    bytes.extend([1, 0, 0, 0]);
    bytes.extend(narrow::<8>(or_edgy(input, 0x10_0010)));
    bytes.extend(narrow::<8>(or_edgy(input, 64)));
    bytes.extend([0; 14]);
    bytes.extend(narrow::<2>(or_edgy(input, 56)));
    bytes.extend(narrow::<2>(or_edgy(input, segments as u64)));
    bytes.resize(64, 0);
    for index in 0..segments as u64 {
        let is_note = input.once_in(3);
        let (bytes_in_file, bytes_more) = (16 * u64::from(input.u8() & 31), u64::from(input.u8()));
        let filesz = or_edgy(input, if is_note { 64 } else { bytes_in_file });
        let memsz = or_edgy(input, filesz.saturating_add(bytes_more));
        bytes.extend(narrow::<4>(if is_note { 4 } else { or_edgy(input, 1) }));
        bytes.extend([7, 0, 0, 0]);
        bytes.extend(narrow::<8>(or_edgy(input, if is_note { 512 } else { 0 })));
        bytes.extend([0; 8]);
        bytes.extend(narrow::<8>(or_edgy(input, 0x10_0000 + 0x1000 * index)));
        bytes.extend(narrow::<8>(filesz));
        bytes.extend(narrow::<8>(memsz));
        bytes.extend([0; 8]);
    }
    bytes.resize(512, 0x90);
    for _ in 0..input.below(3) {
        let name = input.pick(&[&b"Xen\0"[..], b"GNU\0", b""]);
        let description = or_edgy(input, 0x10_0020);
        bytes.extend(narrow::<4>(or_edgy(input, name.len() as u64)));
        bytes.extend(narrow::<4>(or_edgy(input, 8)));
        bytes.extend(narrow::<4>(or_edgy(input, 18)));
        bytes.extend(name);
        bytes.extend(narrow::<8>(description));
    }
    bytes.resize(1024, 0);
    if input.once_in(16) {
        bytes.truncate(usize::from(input.u16()) % 1024);
    }
    bytes
}

fn bzimage(input: &mut Input<'_>) -> Vec<u8> {
    let sectors = 1 + u64::from(input.u8() & 3);
    let setup_sects = or_edgy(input, sectors) as u8;
    let code = 512 * (1 + input.below(8));
    let setup = 512 * (1 + if setup_sects == 0 { 4 } else { usize::from(setup_sects) });
    let mut bytes = vec![0; setup + code];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0x1f1, &[setup_sects]);
    put(0x1f4, &narrow::<4>(or_edgy(input, code as u64 / 16)));
    put(0x1fe, &[0x55, 0xaa, 0xeb, or_edgy(input, 0x6a) as u8]);
    put(0x202, b"HdrS");
    put(0x206, &narrow::<2>(or_edgy(input, 0x020f)));
    put(0x211, &[or_edgy(input, 1) as u8]);
    put(0x22c, &narrow::<4>(or_edgy(input, 0x7fff_ffff)));
    put(0x230, &narrow::<4>(or_edgy(input, 0x10_0000)));
    put(0x234, &[or_edgy(input, 1) as u8, 21]);
    put(0x236, &narrow::<2>(or_edgy(input, 1)));
    put(0x238, &narrow::<4>(or_edgy(input, 2047)));
    put(0x258, &narrow::<8>(or_edgy(input, 0x10_0000)));
    put(0x260, &narrow::<4>(or_edgy(input, 0x1_0000)));
    if input.once_in(16) {
        bytes.truncate(usize::from(input.u16()) % bytes.len());
    }
    bytes
}
