//! The least of bpf(2) that watching needs: instructions, maps, loading, attaching to tracepoints, and
//! the ring that a program writes its records to.
//!
//! Owns the encodings and the descriptors: everything is gone when they are closed, so that a test
//! that dies leaves nothing behind in the kernel.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const MAP_ARRAY: u32 = 2;
const MAP_RING: u32 = 27;
const PROG_RAW_TRACEPOINT: u32 = 17;
/// Helpers, by number.
pub const MAP_LOOKUP: i32 = 1;
pub const PID_TGID: i32 = 14;
pub const CURRENT_TASK: i32 = 35;
pub const READ_USER: i32 = 112;
pub const READ_KERNEL: i32 = 113;
pub const RING_OUTPUT: i32 = 130;

/// A register; 0 has results, 1 to 5 arguments, 6 to 9 outlive calls, 10 is the stack's end.
pub type Reg = u8;

/// A program in the making.
#[derive(Default)]
pub struct Code {
    instructions: Vec<u64>,
    /// Jumps to the end, which is not known yet.
    to_end: Vec<usize>,
}

impl Code {
    fn push(&mut self, op: u8, dst: Reg, src: Reg, off: i16, imm: i32) -> &mut Self {
        let bytes = [[op, dst | src << 4], off.to_le_bytes()].concat();
        let low = u32::from_le_bytes(bytes.try_into().unwrap());
        self.instructions.push(u64::from(low) | u64::from(imm.cast_unsigned()) << 32);
        self
    }

    pub fn mov(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(0xbf, dst, src, 0, 0)
    }

    /// The lower half, the upper one cleared.
    pub fn mov_low(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(0xbc, dst, src, 0, 0)
    }

    pub fn set(&mut self, dst: Reg, value: i32) -> &mut Self {
        self.push(0xb7, dst, 0, 0, value)
    }

    pub fn add(&mut self, dst: Reg, value: i32) -> &mut Self {
        self.push(0x07, dst, 0, 0, value)
    }

    pub fn add_reg(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(0x0f, dst, src, 0, 0)
    }

    pub fn shift_left(&mut self, dst: Reg, bits: i32) -> &mut Self {
        self.push(0x67, dst, 0, 0, bits)
    }

    pub fn shift_right(&mut self, dst: Reg, bits: i32) -> &mut Self {
        self.push(0x77, dst, 0, 0, bits)
    }

    pub fn load(&mut self, dst: Reg, from: Reg, off: i16) -> &mut Self {
        self.push(0x79, dst, from, off, 0)
    }

    pub fn store(&mut self, to: Reg, off: i16, src: Reg) -> &mut Self {
        self.push(0x7b, to, src, off, 0)
    }

    pub fn store_value(&mut self, to: Reg, off: i16, value: i32) -> &mut Self {
        self.push(0x7a, to, 0, off, value)
    }

    pub fn call(&mut self, helper: i32) -> &mut Self {
        self.push(0x85, 0, 0, 0, helper)
    }

    pub fn map(&mut self, dst: Reg, map: &OwnedFd) -> &mut Self {
        self.push(0x18, dst, 1, 0, map.as_raw_fd()).push(0, 0, 0, 0, 0)
    }

    /// Skips `by` instructions where the register has the value.
    pub fn skip_if(&mut self, reg: Reg, value: i32, by: i16) -> &mut Self {
        self.push(0x15, reg, 0, by, value)
    }

    pub fn skip_unless(&mut self, reg: Reg, value: i32, by: i16) -> &mut Self {
        self.push(0x55, reg, 0, by, value)
    }

    pub fn skip_unless_above(&mut self, reg: Reg, value: i32, by: i16) -> &mut Self {
        self.push(0xb5, reg, 0, by, value)
    }

    pub fn skip_if_same(&mut self, a: Reg, b: Reg, by: i16) -> &mut Self {
        self.push(0x1d, a, b, by, 0)
    }

    pub fn skip(&mut self, by: i16) -> &mut Self {
        self.push(0x05, 0, 0, by, 0)
    }

    pub fn leave(&mut self) -> &mut Self {
        self.to_end.push(self.instructions.len());
        self.skip(0)
    }

    fn finish(mut self) -> Vec<u64> {
        let end = self.instructions.len();
        for at in self.to_end.drain(..) {
            let off = u64::from(u16::try_from(end - at - 1).unwrap());
            self.instructions[at] |= off << 16;
        }
        self.set(0, 0).push(0x95, 0, 0, 0, 0);
        self.instructions
    }
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads so many bytes of the attributes, whose pointers lead to live memory.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(libc::c_int::try_from(result).unwrap()) }
}

fn owned(fd: io::Result<libc::c_int>) -> io::Result<OwnedFd> {
    // SAFETY: the kernel has just made the descriptor, for us alone.
    fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn make_map(kind: u32, key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    owned(bpf(MAP_CREATE, &[kind, key, value, entries, 0, 0, 0, 0, 0, 0, 0, 0]))
}

/// One number that programs read.
pub fn make_cell() -> io::Result<OwnedFd> {
    make_map(MAP_ARRAY, 4, 8, 1)
}

/// Sets it. Allocates nothing: a child may do it between fork and exec.
pub fn set_cell(cell: RawFd, value: u64) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u64,
        key: *const u32,
        value: *const u64,
        flags: u64,
    }
    let update = Update { map: u64::from(cell.cast_unsigned()), key: &0, value: &value, flags: 0 };
    bpf(MAP_UPDATE, &update).map(drop)
}

/// A program at work; it ends when this is dropped.
pub struct Probe {
    _program: OwnedFd,
    _link: OwnedFd,
}

impl Probe {
    /// Has the program run at each pass of the tracepoint.
    pub fn attach(tracepoint: &str, code: Code) -> Result<Self, String> {
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: *const u64,
            license: *const libc::c_char,
            log_level: u32,
            log_size: u32,
            log: *mut u8,
            version_and_flags: [u32; 2],
            name: [u8; 16],
        }
        #[repr(C)]
        struct Open {
            name: *const libc::c_char,
            program: u64,
        }
        let instructions = code.finish();
        let mut log = vec![0_u8; 1 << 16];
        let load = Load {
            kind: PROG_RAW_TRACEPOINT,
            count: u32::try_from(instructions.len()).unwrap(),
            instructions: instructions.as_ptr(),
            // What the kernel wants to read of a program that reads its memory.
            license: c"Dual MIT/GPL".as_ptr(),
            log_level: 1,
            log_size: 1 << 16,
            log: log.as_mut_ptr(),
            version_and_flags: [0; 2],
            name: *b"minivmm_eye\0\0\0\0\0",
        };
        let program = owned(bpf(PROG_LOAD, &load)).map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            let tail: Vec<_> = log.trim_end_matches('\0').lines().rev().take(4).collect();
            format!("the kernel refuses the program for {tracepoint}: {error} {tail:?}")
        })?;
        let name = std::ffi::CString::new(tracepoint).unwrap();
        let program_number = u64::from(program.as_raw_fd().cast_unsigned());
        let link = owned(bpf(RAW_TRACEPOINT_OPEN, &Open { name: name.as_ptr(), program: program_number }))
            .map_err(|error| format!("no tracepoint {tracepoint}: {error}"))?;
        Ok(Self { _program: program, _link: link })
    }
}

/// The ring of records. It is read once, at the end: what does not fit is lost, and said.
pub struct Ring {
    pub map: OwnedFd,
    bytes: usize,
    pages: *const u8,
}

// SAFETY: the mapping belongs to this value alone and is only read.
unsafe impl Send for Ring {}

const PAGE: usize = 4096;

impl Ring {
    pub fn new(bytes: usize) -> io::Result<Self> {
        let map = make_map(MAP_RING, 0, 0, u32::try_from(bytes).unwrap())?;
        let off = libc::off_t::try_from(PAGE).unwrap();
        // SAFETY: a new mapping for reading: the producer's page and, twice in a row, the data.
        let pages = unsafe {
            let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), PAGE + 2 * bytes, read, shared, map.as_raw_fd(), off)
        };
        if pages == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { map, bytes, pages: pages.cast() })
    }

    /// All records, in the one order that the kernel has given them.
    pub fn records(&self) -> Result<Vec<Vec<u8>>, String> {
        // SAFETY: the page begins with the producer's position, which the kernel writes atomically.
        let produced = unsafe { &*self.pages.cast::<AtomicU64>() }.load(Ordering::Acquire);
        let produced = usize::try_from(produced).unwrap();
        if produced + PAGE > self.bytes {
            return Err(format!("more than {} bytes of records: some may be lost", self.bytes));
        }
        // SAFETY: so many bytes of data have been produced, and nobody changes them: nothing was consumed.
        let data = unsafe { std::slice::from_raw_parts(self.pages.add(PAGE), produced) };
        let (mut at, mut found) = (0, Vec::new());
        while at + 8 <= data.len() {
            let head = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            let len = (head & 0x3fff_ffff) as usize;
            match head >> 30 {
                0 => found.push(data[at + 8..at + 8 + len].to_vec()),
                1 => {}
                _ => return Err("a record is still being written".into()),
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nobody else has the address.
        unsafe { libc::munmap(self.pages.cast_mut().cast(), PAGE + 2 * self.bytes) };
    }
}
