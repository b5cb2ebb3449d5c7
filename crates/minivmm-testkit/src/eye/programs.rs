//! The four programs that watch: a system call's beginning and end, a ring entry's submission and end.
//!
//! Owns what is recorded, and where. Each record is written with one helper call, which orders them all
//! in one ring: a beginning is recorded before the kernel does anything, an end after it has done it
//! and before the process can know.

use std::os::fd::OwnedFd;

use super::bpf::{CURRENT_TASK, Code, MAP_LOOKUP, PID_TGID, READ_KERNEL, READ_USER, RING_OUTPUT, Reg};
use super::btf::Btf;

/// The first word of a record.
pub const ENTER: u64 = 1;
pub const EXIT: u64 = 2;
pub const SUBMIT: u64 = 3;
pub const COMPLETE: u64 = 4;

/// Where things are in a record, in bytes: its kind, the thread, then, by kind, the number of the call,
/// its result, or the address of the request.
pub const THREAD: usize = 8;
pub const WHAT: usize = 16;
/// ENTER and COMPLETE: the file.
pub const INODE: usize = 24;
pub const FILE_FLAGS: usize = 32;
/// COMPLETE: the result.
pub const RESULT: usize = 40;
/// ENTER: all registers, and what a write writes.
pub const REGISTERS: usize = 40;
pub const BYTES: usize = REGISTERS + 168;
pub const BYTES_MAX: usize = 128;
/// SUBMIT: the request itself.
pub const REQUEST: usize = 24;
pub const REQUEST_BYTES: usize = 256;

/// Registers in `pt_regs` by their use: the six arguments.
pub const ARGUMENTS: [usize; 6] = [112, 104, 96, 56, 72, 64];

/// The calls that are recorded.
pub const CALLS: [libc::c_long; 21] = [
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_msync,
    libc::SYS_mmap,
    libc::SYS_fallocate,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    libc::SYS_io_submit,
    libc::SYS_ioctl,
    MARK,
];

/// With which a watcher shows a file of its own: it changes nothing, and hardly anybody makes it.
pub const MARK: libc::c_long = libc::SYS_fadvise64;

/// Of all ioctls: it writes past all that is seen elsewhere.
pub const BLKZEROOUT: i32 = 0x127f;

const STACK: Reg = 10;
/// A record begins here on the stack, which ends at 0; above it a word to read into, and an iovec.
const RECORD: i16 = -384;
const SCRATCH: i16 = -16;
const PIECE: i16 = -40;

fn at(offset: usize) -> i16 {
    RECORD + i16::try_from(offset).unwrap()
}

/// What the programs share.
pub struct Shared<'a> {
    pub btf: &'a Btf,
    /// Holds the number of the process that is watched.
    pub process: &'a OwnedFd,
    pub ring: &'a OwnedFd,
}

impl Shared<'_> {
    /// r6 = the context, r9 = process and thread; goes to the end unless the process is the one that is
    /// watched, or (`own`) thread `own` makes a mark.
    fn begin(&self, own: Option<i32>) -> Code {
        let mut code = Code::default();
        code.mov(6, 1).call(PID_TGID).mov(9, 0);
        code.store_value(STACK, SCRATCH, 0).map(1, self.process).mov(2, STACK).add(2, SCRATCH.into());
        code.call(MAP_LOOKUP).skip_unless(0, 0, 1).leave().load(8, 0, 0);
        code.mov(1, 9).shift_right(1, 32);
        match own {
            None => code.skip_if_same(1, 8, 1).leave(),
            Some(thread) => code
                .skip_if_same(1, 8, 6)
                .mov_low(1, 9)
                .skip_if(1, thread, 1)
                .leave()
                .load(2, 6, 8)
                .skip_if(2, i32::try_from(MARK).unwrap(), 1)
                .leave(),
        };
        code
    }

    fn head(code: &mut Code, kind: u64) {
        code.store_value(STACK, at(0), i32::try_from(kind).unwrap()).store(STACK, at(THREAD), 9);
    }

    fn send(&self, mut code: Code, bytes: usize) -> Code {
        code.map(1, self.ring).mov(2, STACK).add(2, RECORD.into());
        code.set(3, i32::try_from(bytes).unwrap()).set(4, 0).call(RING_OUTPUT);
        code
    }

    /// r3 = the word that lies `offset` behind r3; 0 where nothing can be read.
    fn follow(&self, code: &mut Code, structure: &str, field: &str) -> Result<(), String> {
        code.add(3, self.btf.offset(structure, field)?);
        follow(code);
        Ok(())
    }

    /// Records whose file r3 is.
    fn tell_file(&self, code: &mut Code) -> Result<(), String> {
        code.mov(8, 3);
        self.follow(code, "file", "f_inode")?;
        code.store(STACK, at(INODE), 3).mov(3, 8);
        self.follow(code, "file", "f_flags")?;
        code.store(STACK, at(FILE_FLAGS), 3);
        Ok(())
    }

    /// A system call begins: the context has its registers and its number.
    pub fn enter(&self, own: i32) -> Result<Code, String> {
        let mut code = self.begin(Some(own));
        code.load(7, 6, 8);
        for (index, call) in CALLS.iter().enumerate() {
            let to_go = i16::try_from(CALLS.len() - index).unwrap();
            code.skip_if(7, i32::try_from(*call).unwrap(), to_go);
        }
        code.leave();
        Self::head(&mut code, ENTER);
        code.store(STACK, at(WHAT), 7);
        for word in 0..BYTES_MAX / 8 {
            code.store_value(STACK, at(BYTES + 8 * word), 0);
        }
        code.load(3, 6, 0).set(2, 168);
        read_kernel(&mut code, at(REGISTERS));
        let argument = |number: usize| at(REGISTERS + ARGUMENTS[number]);
        code.skip_unless(7, i32::try_from(libc::SYS_ioctl).unwrap(), 3);
        code.load(1, STACK, argument(1)).skip_if(1, BLKZEROOUT, 1).leave();
        // The descriptor that is written to, by call.
        code.load(8, STACK, argument(0));
        for (call, number) in [(libc::SYS_mmap, 4), (libc::SYS_copy_file_range, 2), (libc::SYS_splice, 2)] {
            code.skip_unless(7, i32::try_from(call).unwrap(), 1).load(8, STACK, argument(number));
        }
        code.mov_low(8, 8).shift_left(8, 3).call(CURRENT_TASK).mov(3, 0);
        self.follow(&mut code, "task_struct", "files")?;
        self.follow(&mut code, "files_struct", "fdt")?;
        self.follow(&mut code, "fdtable", "fd")?;
        code.add_reg(3, 8);
        follow(&mut code);
        self.tell_file(&mut code)?;
        let most = i32::try_from(BYTES_MAX).unwrap();
        // Where the bytes are, and how many: two arguments, or the first piece of a vector.
        code.load(3, STACK, argument(1)).load(2, STACK, argument(2));
        code.skip_if(7, i32::try_from(libc::SYS_write).unwrap(), 7);
        code.skip_unless(7, i32::try_from(libc::SYS_writev).unwrap(), 11);
        code.set(2, 16).mov(1, STACK).add(1, PIECE.into()).call(READ_USER);
        code.load(3, STACK, PIECE).load(2, STACK, PIECE + 8);
        code.skip_unless_above(2, most, 1).set(2, most);
        code.mov(1, STACK).add(1, at(BYTES).into()).call(READ_USER);
        Ok(self.send(code, BYTES + BYTES_MAX))
    }

    /// A system call ends: registers and result.
    pub fn exit(&self) -> Code {
        let mut code = self.begin(None);
        Self::head(&mut code, EXIT);
        code.load(1, 6, 8).store(STACK, at(WHAT), 1);
        self.send(code, WHAT + 8)
    }

    /// A ring's entry is submitted, and has been taken apart by the kernel: the request.
    pub fn submit(&self) -> Code {
        let mut code = self.begin(None);
        Self::head(&mut code, SUBMIT);
        code.load(3, 6, 0).store(STACK, at(WHAT), 3).set(2, i32::try_from(REQUEST_BYTES).unwrap());
        read_kernel(&mut code, at(REQUEST));
        self.send(code, REQUEST + REQUEST_BYTES)
    }

    /// A ring's entry has ended: ring, request and, by kernel version, the completion or its parts. It may
    /// run in another process than that of the ring.
    pub fn complete(&self) -> Result<Code, String> {
        let mut code = Code::default();
        code.mov(6, 1).call(PID_TGID).mov(9, 0);
        Self::head(&mut code, COMPLETE);
        code.load(3, 6, 8).store(STACK, at(WHAT), 3);
        self.follow(&mut code, "io_kiocb", "file")?;
        self.tell_file(&mut code)?;
        if self.btf.tracepoint_arguments("io_uring_complete")? == 3 {
            code.load(3, 6, 16);
            self.follow(&mut code, "io_uring_cqe", "res")?;
        } else {
            code.load(3, 6, 24);
        }
        code.store(STACK, at(RESULT), 3);
        Ok(self.send(code, RESULT + 8))
    }
}

fn read_kernel(code: &mut Code, to: i16) {
    code.mov(1, STACK).add(1, to.into()).call(READ_KERNEL);
}

fn follow(code: &mut Code) {
    code.set(2, 8);
    read_kernel(code, SCRATCH);
    code.load(3, STACK, SCRATCH);
}
