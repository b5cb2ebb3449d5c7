//! Sees from outside what a process has the kernel do with its files, through io_uring as well as by
//! system calls: small BPF programs at the kernel's tracepoints record both in one order.
//!
//! Owns what a record means. strace does not see into a ring, and the tracepoints' own text leaves out
//! offset, length and flags of an entry; the programs read them from the kernel's request, after the
//! kernel has copied them from the entry. Files are told apart by the kernel's inode, not by name.
//! Needs root, BPF and BTF; [`Eye::open`] says what is missing.

mod bpf;
mod btf;
mod programs;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use bpf::{Probe, Ring};
use btf::Btf;
use programs::{
    ARGUMENTS, BYTES, BYTES_MAX, COMPLETE, ENTER, EXIT, FILE_FLAGS, INODE, MARK, REGISTERS, REQUEST, RESULT,
    SUBMIT, Shared, THREAD, WHAT,
};

/// A kernel that records more than this of one process has lost something.
const RECORDS_BYTES: usize = 8 << 20;

/// One thing that the process had the kernel do.
#[derive(Debug, Clone)]
pub struct Operation {
    /// As strace, or linux/io_uring.h, has it.
    pub name: &'static str,
    /// The file, as a number among those shown by [`Eye::shows`].
    pub file: Option<usize>,
    /// open(2)'s flags of the file.
    pub file_flags: u64,
    /// In bytes, from the file's begin.
    pub offset: u64,
    /// In bytes; for vectors in pieces.
    pub length: u64,
    /// RWF_*, the mode of fallocate, IORING_FSYNC_*; of mmap the protection and, above, its flags.
    pub flags: u64,
    /// The entry waits for others of its ring (IOSQE_IO_LINK, IOSQE_IO_DRAIN): nobody knows when it began.
    pub waits: bool,
    /// What `write`, or the first piece of `writev`, writes: as many bytes as are kept.
    pub bytes: Vec<u8>,
    /// Before it begins, and after it has ended: places in the one order of all.
    pub entry: usize,
    /// `None` for what has not ended.
    pub exit: Option<usize>,
    /// A count, or a negative errno.
    pub result: i64,
}

impl Operation {
    /// Returns whether it has ended with this errno.
    pub fn has_failed_with(&self, errno: i32) -> bool {
        self.exit.is_some() && self.result == -i64::from(errno)
    }

    /// Makes an operation of which nothing else is known yet.
    pub fn new(name: &'static str, entry: usize) -> Self {
        Self {
            name,
            file: None,
            file_flags: 0,
            offset: 0,
            length: 0,
            flags: 0,
            waits: false,
            bytes: Vec::new(),
            entry,
            exit: None,
            result: 0,
        }
    }
}

/// Watches one process at a time, from one thread.
pub struct Eye {
    btf: Btf,
    process: OwnedFd,
    ring: Ring,
    _probes: Vec<Probe>,
    /// Held open, so that their inodes stay.
    shown: Vec<File>,
}

impl Eye {
    /// The error says in words why nothing is seen.
    pub fn open() -> Result<Self, String> {
        let btf = Btf::read()?;
        let refused = |what: &str| {
            let what = what.to_owned();
            move |error| format!("no {what}: {error}")
        };
        let process = bpf::make_cell().map_err(refused("BPF maps (root only)"))?;
        let ring = Ring::new(RECORDS_BYTES).map_err(refused("BPF ring buffer"))?;
        let shared = Shared { btf: &btf, process: &process, ring: &ring.map };
        // SAFETY: takes nothing.
        let own = unsafe { libc::gettid() };
        let submit = ["io_uring_submit_req", "io_uring_submit_sqe"]
            .into_iter()
            // Only those kernels hand over the request first.
            .find(|name| btf.tracepoint_arguments(name).is_ok_and(|count| count <= 2))
            .ok_or("this kernel has no tracepoint of submissions to io_uring, or another one")?;
        let probes = vec![
            Probe::attach("io_uring_complete", shared.complete()?)?,
            Probe::attach(submit, shared.submit())?,
            Probe::attach("sys_exit", shared.exit())?,
            Probe::attach("sys_enter", shared.enter(own)?)?,
        ];
        Ok(Self { btf, process, ring, _probes: probes, shown: Vec::new() })
    }

    /// Tells files apart: the first shown is number 0. From the thread that has opened the eye.
    pub fn shows(&mut self, path: &Path) {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // SAFETY: advice about no bytes, to a descriptor of ours.
        let result = unsafe { libc::syscall(MARK, file.as_raw_fd(), 0, 0, libc::POSIX_FADV_NORMAL) };
        assert_eq!(result, 0, "{}", path.display());
        self.shown.push(file);
    }

    /// The command's process is the one that is watched, from before its program begins.
    pub fn watches(&self, command: &mut Command) {
        let cell = self.process.as_raw_fd();
        // SAFETY: between fork and exec it makes two system calls and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                // SAFETY: takes nothing.
                let process = libc::getpid();
                bpf::set_cell(cell, u64::from(process.cast_unsigned()))
            });
        }
    }

    /// All that it did, by the beginnings. The process must have ended.
    pub fn operations(&self) -> Result<Vec<Operation>, String> {
        let request = RequestLayout::of(&self.btf)?;
        let mut files: HashMap<u64, usize> = HashMap::new();
        let mut found: Vec<Operation> = Vec::new();
        // What has not ended, by thread and by request.
        let (mut calls, mut entries) = (HashMap::new(), HashMap::new());
        for (place, record) in self.ring.records()?.iter().enumerate() {
            let (thread, what) = (word(record, THREAD), word(record, WHAT));
            match word(record, 0) {
                ENTER if what == MARK.cast_unsigned() => {
                    if thread >> 32 == u64::from(std::process::id()) {
                        let next = files.len();
                        files.entry(word(record, INODE)).or_insert(next);
                    }
                }
                ENTER => {
                    let mut call = call(record, what, place);
                    call.file = files.get(&word(record, INODE)).copied();
                    calls.insert(thread, found.len());
                    found.push(call);
                }
                EXIT => {
                    if let Some(at) = calls.remove(&thread) {
                        let call: &mut Operation = &mut found[at];
                        (call.exit, call.result) = (Some(place), what.cast_signed());
                    }
                }
                SUBMIT => {
                    entries.insert(what, found.len());
                    found.push(request.entry(&record[REQUEST..], place));
                }
                COMPLETE => {
                    // Of another process where it was not submitted here.
                    let Some(at) = entries.remove(&what) else { continue };
                    let entry: &mut Operation = &mut found[at];
                    entry.file = files.get(&word(record, INODE)).copied();
                    entry.file_flags = word(record, FILE_FLAGS) & 0xffff_ffff;
                    let low = u32::try_from(word(record, RESULT) & 0xffff_ffff).unwrap();
                    (entry.exit, entry.result) = (Some(place), low.cast_signed().into());
                }
                kind => return Err(format!("a record of kind {kind}")),
            }
        }
        if files.len() < self.shown.len() {
            return Err(format!("{} files shown, {} told apart", self.shown.len(), files.len()));
        }
        Ok(found)
    }
}

fn word(record: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(record[at..at + 8].try_into().unwrap())
}

/// A system call that begins.
fn call(record: &[u8], number: u64, place: usize) -> Operation {
    let argument = |number: usize| word(record, REGISTERS + ARGUMENTS[number]);
    let (name, length, offset, flags) = match number.cast_signed() {
        libc::SYS_write => ("write", argument(2), 0, 0),
        libc::SYS_writev => ("writev", argument(2), 0, 0),
        libc::SYS_pwrite64 => ("pwrite64", argument(2), argument(3), 0),
        libc::SYS_pwritev => ("pwritev", argument(2), argument(3), 0),
        libc::SYS_pwritev2 => ("pwritev2", argument(2), argument(3), argument(5)),
        libc::SYS_pread64 => ("pread64", argument(2), argument(3), 0),
        libc::SYS_preadv => ("preadv", argument(2), argument(3), 0),
        libc::SYS_preadv2 => ("preadv2", argument(2), argument(3), argument(5)),
        libc::SYS_fsync => ("fsync", 0, 0, 0),
        libc::SYS_fdatasync => ("fdatasync", 0, 0, 0),
        libc::SYS_sync => ("sync", 0, 0, 0),
        libc::SYS_syncfs => ("syncfs", 0, 0, 0),
        libc::SYS_msync => ("msync", 0, 0, 0),
        libc::SYS_mmap => ("mmap", argument(1), argument(5), argument(2) | argument(3) << 32),
        libc::SYS_fallocate => ("fallocate", argument(3), argument(2), argument(1)),
        libc::SYS_sendfile => ("sendfile", argument(3), 0, 0),
        libc::SYS_copy_file_range => ("copy_file_range", argument(4), 0, 0),
        libc::SYS_splice => ("splice", argument(4), 0, 0),
        libc::SYS_io_submit => ("io_submit", argument(1), 0, 0),
        libc::SYS_ioctl => ("ioctl(BLKZEROOUT)", 0, 0, 0),
        _ => ("another call", 0, 0, 0),
    };
    let writes = ["write", "writev"].contains(&name);
    let bytes = if writes { record[BYTES..BYTES + BYTES_MAX].to_vec() } else { Vec::new() };
    let file_flags = word(record, FILE_FLAGS) & 0xffff_ffff;
    Operation { length, offset, flags, bytes, file_flags, ..Operation::new(name, place) }
}

/// Where this kernel keeps what an entry said.
struct RequestLayout {
    opcode: usize,
    flags: usize,
    /// Offset, length and flags of reads and writes; of fsync; of fallocate.
    transfer: [usize; 3],
    sync: [usize; 3],
    allocate: [usize; 3],
}

impl RequestLayout {
    fn of(btf: &Btf) -> Result<Self, String> {
        let offset = |structure: &str, field: &str| {
            btf.offset(structure, field).map(|at| usize::try_from(at).unwrap())
        };
        let fields = |structure: &str, names: [&str; 3]| -> Result<[usize; 3], String> {
            let [a, b, c] = names.map(|name| offset(structure, name));
            Ok([a?, b?, c?])
        };
        Ok(Self {
            opcode: offset("io_kiocb", "opcode")?,
            flags: offset("io_kiocb", "flags")?,
            transfer: fields("io_rw", ["kiocb.ki_pos", "len", "flags"])?,
            sync: fields("io_sync", ["off", "len", "flags"])?,
            allocate: fields("io_sync", ["off", "len", "mode"])?,
        })
    }

    fn entry(&self, request: &[u8], place: usize) -> Operation {
        let nothing = (None, false);
        // The kernel's structure, and whether the length is 64 bits.
        let (name, (fields, wide)) = match request[self.opcode] {
            1 => ("IORING_OP_READV", (Some(self.transfer), false)),
            2 => ("IORING_OP_WRITEV", (Some(self.transfer), false)),
            3 => ("IORING_OP_FSYNC", (Some(self.sync), true)),
            4 => ("IORING_OP_READ_FIXED", (Some(self.transfer), false)),
            5 => ("IORING_OP_WRITE_FIXED", (Some(self.transfer), false)),
            8 => ("IORING_OP_SYNC_FILE_RANGE", nothing),
            17 => ("IORING_OP_FALLOCATE", (Some(self.allocate), true)),
            22 => ("IORING_OP_READ", (Some(self.transfer), false)),
            23 => ("IORING_OP_WRITE", (Some(self.transfer), false)),
            30 => ("IORING_OP_SPLICE", nothing),
            6 | 7 | 11..=16 | 29 => ("a poll, timeout or cancellation", nothing),
            _ => ("another entry", nothing),
        };
        let mut entry = Operation::new(name, place);
        // IO_DRAIN, IO_LINK, IO_HARDLINK.
        entry.waits = word(request, self.flags) & 0b1110 != 0;
        if let Some([offset, length, flags]) = fields {
            entry.offset = word(request, offset);
            entry.length = word(request, length) & if wide { u64::MAX } else { 0xffff_ffff };
            entry.flags = word(request, flags) & 0xffff_ffff;
        }
        entry
    }
}
