//! Which thread may make which system call, and why: the sandbox's one table.
//!
//! Owns the table. `docs/reference/sandbox-calls.md` shows it; `tests/program/sandbox.rs` compares the two and runs
//! guests under strace. A call that is not in the table is trapped. `--sandbox=log` finds calls that a change
//! to minivmm needs.

use std::ffi::c_int;

/// The task of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Waits for events, passes input to the serial port, writes the statistics, stops the machine.
    Main,
    /// Runs a CPU of the guest.
    Vcpu,
    /// Serves a queue of a disk.
    Worker,
    /// Serves the console device.
    Console,
    /// Samples the caches (`--observe`).
    Observe,
    /// Drains the devices and closes the images at the end.
    End,
    /// Wakes a worker when a deliberate fault's delay is over.
    Delays,
    /// Main thread of an export: waits for signals, writes the statistics, stops the disks, removes the sockets.
    Export,
    /// Serves a front end's messages on the socket of an exported disk.
    Socket,
}

/// The condition under which a call passes.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// With any arguments.
    Always,
    /// ioctl: only with these requests.
    Request(&'static [(&'static str, u32)]),
    /// fcntl: only with these commands.
    Command(&'static [(&'static str, c_int)]),
    /// mmap, mprotect: only for memory that is not executable.
    NotExecutable,
    /// tgkill: only for threads of this process.
    ThisProcess,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The name of the call in the manual.
    pub name: &'static str,
    /// The number of the call on x86-64.
    pub number: i64,
    /// The condition under which it passes.
    pub when: When,
    /// What the call is needed for.
    pub reason: &'static str,
}

macro_rules! calls {
    ($($name:ident $when:expr, $reason:literal;)*) => {
        &[$(Call { name: stringify!($name), number: number::$name, when: $when, reason: $reason }),*]
    };
}

/// The numbers of the calls, under their names in the manual.
#[allow(non_upper_case_globals, reason = "the names are the manual's")]
mod number {
    macro_rules! numbers {
        ($($name:ident $libc:ident)*) => { $(pub const $name: i64 = libc::$libc;)* };
    }
    numbers! {
        accept4 SYS_accept4  brk SYS_brk  clock_gettime SYS_clock_gettime  clock_nanosleep SYS_clock_nanosleep  close SYS_close
        eventfd2 SYS_eventfd2  exit SYS_exit  exit_group SYS_exit_group  fallocate SYS_fallocate  fcntl SYS_fcntl
        fdatasync SYS_fdatasync  flock SYS_flock  fstat SYS_fstat  fstatfs SYS_fstatfs  ftruncate SYS_ftruncate  futex SYS_futex
        getpid SYS_getpid  getrandom SYS_getrandom  getsockopt SYS_getsockopt  gettid SYS_gettid  io_uring_enter SYS_io_uring_enter
        io_uring_register SYS_io_uring_register  ioctl SYS_ioctl  lseek SYS_lseek  madvise SYS_madvise
        memfd_create SYS_memfd_create  mincore SYS_mincore  mmap SYS_mmap  mprotect SYS_mprotect  mremap SYS_mremap  munmap SYS_munmap  newfstatat SYS_newfstatat
        poll SYS_poll  ppoll SYS_ppoll  pread64 SYS_pread64  preadv SYS_preadv  preadv2 SYS_preadv2
        pwrite64 SYS_pwrite64  pwritev SYS_pwritev  pwritev2 SYS_pwritev2  read SYS_read  readv SYS_readv
        recvmsg SYS_recvmsg          restart_syscall SYS_restart_syscall  rt_sigaction SYS_rt_sigaction  rt_sigprocmask SYS_rt_sigprocmask
        rt_sigreturn SYS_rt_sigreturn  sched_yield SYS_sched_yield  sendmsg SYS_sendmsg
        shutdown SYS_shutdown  sigaltstack SYS_sigaltstack
        statx SYS_statx  tgkill SYS_tgkill  unlinkat SYS_unlinkat  wait4 SYS_wait4  write SYS_write  writev SYS_writev
    }
    /// Newer than the tables of some C libraries.
    pub const cachestat: i64 = 451;
}

use When::{Always, Command, NotExecutable, Request, ThisProcess};

/// KVM's requests, with their numbers from `linux/kvm.h`.
const KVM_RUN: (&str, u32) = ("KVM_RUN", 0xae80);
const KVM_GET_REGS: (&str, u32) = ("KVM_GET_REGS", 0x8090_ae81);
const KVM_GET_SREGS: (&str, u32) = ("KVM_GET_SREGS", 0x8138_ae83);
const KVM_GET_MP_STATE: (&str, u32) = ("KVM_GET_MP_STATE", 0x8004_ae98);
const KVM_TRANSLATE: (&str, u32) = ("KVM_TRANSLATE", 0xc018_ae85);
const KVM_SET_GSI_ROUTING: (&str, u32) = ("KVM_SET_GSI_ROUTING", 0x4008_ae6a);
const KVM_IRQFD: (&str, u32) = ("KVM_IRQFD", 0x4020_ae76);
const KVM_IOEVENTFD: (&str, u32) = ("KVM_IOEVENTFD", 0x4040_ae79);
/// A terminal's requests, with their numbers from `asm-generic/ioctls.h`.
const TCGETS: (&str, u32) = ("TCGETS", 0x5401);
const TCSETS: (&str, u32) = ("TCSETS", 0x5402);
const TIOCGWINSZ: (&str, u32) = ("TIOCGWINSZ", 0x5413);
/// A socket's.
const FIONREAD: (&str, u32) = ("FIONREAD", 0x541b);
/// A block device's requests, with their numbers from `linux/fs.h`.
const BLKDISCARD: (&str, u32) = ("BLKDISCARD", 0x1277);
const BLKZEROOUT: (&str, u32) = ("BLKZEROOUT", 0x127f);

const GETFL: (&str, c_int) = ("F_GETFL", libc::F_GETFL);
const SETFL: (&str, c_int) = ("F_SETFL", libc::F_SETFL);
const DUPFD: (&str, c_int) = ("F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC);
const ADD_SEALS: (&str, c_int) = ("F_ADD_SEALS", libc::F_ADD_SEALS);

/// What every thread needs: memory, locks, messages, its end.
const ALL: &[Call] = calls! {
    write Always, "messages on standard error; eventfds";
    futex Always, "locks";
    mmap NotExecutable, "memory";
    munmap Always, "memory that is given back";
    mremap Always, "memory that grows";
    mprotect NotExecutable, "the allocator's memory";
    madvise Always, "memory that is given back; a stack at the end of a thread";
    brk Always, "memory";
    rt_sigprocmask Always, "a thread's end; signals to a thread";
    rt_sigreturn Always, "the end of a signal's handler";
    rt_sigaction Always, "passing on a fatal signal after the terminal is restored";
    sigaltstack Always, "a thread's end";
    sched_yield Always, "locks";
    clock_gettime Always, "time, where the vDSO has none";
    getrandom Always, "hash tables";
    getpid Always, "a thread that ends the process (abort)";
    gettid Always, "the same";
    tgkill ThisProcess, "the signal that stops a CPU; abort; the stop that SIGTSTP asks for";
    restart_syscall Always, "a call that SIGSTOP has interrupted";
    ioctl Request(&[TCGETS, TCSETS]), "restoring the terminal when a thread panics or SIGTSTP stops the process";
    close Always, "a descriptor that is no longer needed";
    exit Always, "a thread's end";
    exit_group Always, "the process's end";
};

const MAIN: &[Call] = calls! {
    poll Always, "waiting for events";
    ppoll Always, "waiting for events";
    read Always, "signals, eventfds, standard input";
    clock_nanosleep Always, "waiting until threads end";
    fstat Always, "the statistics' file";
    statx Always, "the statistics' file";
    flock Always, "the statistics' file: a reader sees all of it";
    ftruncate Always, "the statistics' file";
    lseek Always, "the statistics' file";
    fcntl Command(&[GETFL, SETFL]), "restoring the flags of streams";
    wait4 Always, "the process that removes the memory limit's cgroup";
    io_uring_enter Always, "closing rings";
    ioctl Request(&[TIOCGWINSZ]), "the terminal's size";
};

const VCPU: &[Call] = calls! {
    ioctl Request(&[
        KVM_RUN, KVM_GET_MP_STATE, KVM_GET_REGS, KVM_GET_SREGS, KVM_TRANSLATE, KVM_SET_GSI_ROUTING, KVM_IRQFD,
        KVM_IOEVENTFD
    ]),
        "the guest; whether its CPU is started; its registers and instructions when it failed; interrupts by message; doorbells that follow a PCI function";
    read Always, "eventfds";
    poll Always, "a console whose reader is slow";
    ppoll Always, "a console whose reader is slow";
    clock_nanosleep Always, "a guest that waits for a device";
};

const WORKER: &[Call] = calls! {
    io_uring_enter Always, "requests, and waiting for their completion";
    io_uring_register Always, "enabling a ring; releasing its registered files";
    read Always, "the doorbell";
    poll Always, "waiting for the doorbell";
    ppoll Always, "waiting for the doorbell";
    preadv Always, "reads";
    preadv2 Always, "reads of what the page cache has; reads that it does not keep (RWF_DONTCACHE)";
    pread64 Always, "reads around a piece that is not aligned";
    pwritev Always, "writes";
    pwritev2 Always, "writes that are stable when they complete (RWF_DSYNC), or that the page cache does not keep (RWF_DONTCACHE)";
    pwrite64 Always, "zeroes";
    fdatasync Always, "FLUSH";
    fallocate Always, "DISCARD, WRITE_ZEROES";
    ftruncate Always, "a write log that grows";
    ioctl Request(&[BLKDISCARD, BLKZEROOUT]), "the same on a block device";
    fcntl Command(&[GETFL, SETFL]), "making a doorbell blocking, for the ring's read of it";
    fstat Always, "the image's size";
    statx Always, "the image's size";
    lseek Always, "where a file has holes";
    clock_nanosleep Always, "delays of `fault=delay`";
};

const CONSOLE: &[Call] = calls! {
    poll Always, "waiting for doorbells and streams";
    ppoll Always, "waiting for doorbells and streams";
    read Always, "eventfds, streams";
    readv Always, "input for the guest";
    writev Always, "the guest's output";
    fcntl Command(&[GETFL, SETFL]), "restoring the flags of streams";
};

const OBSERVE: &[Call] = calls! {
    cachestat Always, "the host's cache of an image";
    mincore Always, "the same on older kernels";
    pread64 Always, "the host's disk; this process's I/O";
    read Always, "the guest's answers";
    poll Always, "waiting for the guest's answers";
    ppoll Always, "waiting for the guest's answers";
    fstat Always, "an image's size";
    statx Always, "an image's size";
    lseek Always, "a block device's size";
};

const END: &[Call] = calls! {
    fdatasync Always, "the last sync of an image";
    io_uring_enter Always, "closing rings";
    read Always, "eventfds";
    pwrite64 Always, "the end of a write log";
    pwritev Always, "the end of a write log: writes that were still queued";
    ftruncate Always, "the end of a write log";
    ioctl Request(&[KVM_SET_GSI_ROUTING, KVM_IRQFD]), "unbinding interrupts";
};

const DELAYS: &[Call] = &[];

const EXPORT: &[Call] = calls! {
    poll Always, "waiting for events";
    ppoll Always, "waiting for events";
    read Always, "signals, changes of the images' names";
    clock_nanosleep Always, "waiting until threads end";
    fstat Always, "the statistics' file";
    statx Always, "the statistics' file; the images' names and sizes";
    newfstatat Always, "whether a socket's name is still ours";
    flock Always, "the statistics' file: a reader sees all of it";
    ftruncate Always, "the statistics' file";
    lseek Always, "the statistics' file";
    io_uring_enter Always, "closing rings";
    shutdown Always, "ending a connection";
    unlinkat Always, "removing a socket at the end";
};

const SOCKET: &[Call] = calls! {
    poll Always, "waiting for messages; whether an eventfd can be written";
    ppoll Always, "waiting for messages";
    read Always, "eventfds";
    accept4 Always, "the next front end";
    getsockopt Always, "who the front end is, for messages";
    recvmsg Always, "messages, and the descriptors that come with them";
    ioctl Request(&[FIONREAD]), "whether a whole message has arrived";
    clock_nanosleep Always, "waiting for the rest of a message";
    sendmsg Always, "replies, and the descriptor of an inflight region";
    shutdown Always, "ending a connection";
    eventfd2 Always, "doorbells of queues";
    fcntl Command(&[GETFL, DUPFD, ADD_SEALS]), "whether an eventfd waits; the connection; an inflight region that nobody cuts";
    fstat Always, "what the front end has sent";
    statx Always, "what the front end has sent";
    fstatfs Always, "which file system the front end's memory is on";
    memfd_create Always, "an inflight region";
    ftruncate Always, "an inflight region";
};

impl Role {
    /// All roles, in their order.
    pub const ALL: [Role; 9] = [
        Self::Main,
        Self::Vcpu,
        Self::Worker,
        Self::Console,
        Self::Observe,
        Self::End,
        Self::Delays,
        Self::Export,
        Self::Socket,
    ];
    /// The roles of a VM's threads.
    pub const OF_VM: [Role; 7] =
        [Self::Main, Self::Vcpu, Self::Worker, Self::Console, Self::Observe, Self::End, Self::Delays];
    /// The roles of the threads of an export.
    pub const OF_EXPORT: [Role; 6] =
        [Self::Export, Self::Socket, Self::Worker, Self::Observe, Self::End, Self::Delays];

    /// Returns the role's name in messages and in the documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Worker => "worker",
            Self::Console => "console",
            Self::Observe => "observe",
            Self::End => "end",
            Self::Delays => "fault-delays",
            Self::Export => "export",
            Self::Socket => "socket",
        }
    }

    /// Returns the calls that this role may make in addition to the common ones.
    pub fn own(self) -> &'static [Call] {
        match self {
            Self::Main => MAIN,
            Self::Vcpu => VCPU,
            Self::Worker => WORKER,
            Self::Console => CONSOLE,
            Self::Observe => OBSERVE,
            Self::End => END,
            Self::Delays => DELAYS,
            Self::Export => EXPORT,
            Self::Socket => SOCKET,
        }
    }

    /// Returns the calls that every role may make.
    pub fn common() -> &'static [Call] {
        ALL
    }

    /// Returns all calls that this role may make. A call that is listed twice passes under either condition.
    pub fn calls(self) -> impl Iterator<Item = &'static Call> {
        ALL.iter().chain(self.own())
    }
}
