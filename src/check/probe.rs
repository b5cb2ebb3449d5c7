//! Guests of a few instructions, each alone in its own VM: which of a kernel's needs does this KVM serve?
//!
//! Owns the instructions, and how their results are read. A KVM without hardware virtualization emulates
//! privileged code, and lacks instructions that every Linux kernel uses. A missing instruction ends its VM.
//! Each probe therefore has its own VM, and none hides the results of the others.

use std::arch::global_asm;
use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::boot::{Entry, cpu};
use crate::kvm::cpuid::{Place, Supported};
use crate::kvm::failure::Reason;
use crate::kvm::run_page::RunPage;
use crate::kvm::{self, KvmError};
use crate::layout;
use crate::mem::{self, Ram};

/// The RAM of a probe: the tables are below 1 MiB, the code is above.
const RAM_BYTES: u64 = 2 * layout::MIB;
/// The interrupt descriptor table, and the code to which its entries point. Both lie between what
/// [`cpu::set_up`] uses.
const IDT: u64 = 0x1000;
const STUBS: u64 = 0x1800;
const STUB_BYTES: u64 = 8;
/// The number of the processor's exceptions.
const VECTORS: u8 = 32;
/// A cell for cmpxchg16b, and an area for xsave.
const CELL: u32 = 0x3000;
const AREA: u32 = 0x4000;
/// The port to which a probe writes its result.
const PORT: u16 = 0xf4;
/// Result: it worked.
const DONE: u8 = 1;
/// Result: the instruction ran, but did something else.
const WRONG: u8 = 2;
/// Result: the processor has no such instruction, and a kernel does without it.
const NEEDLESS: u8 = 3;
/// Result: an exception occurred; its number is added.
const EXCEPTION: u8 = 0x80;
/// The number of the breakpoint exception.
const BREAKPOINT: u8 = 3;
/// The time limit of a probe, longer than any takes on a KVM that works.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long signals, and a host that refuses KVM a thread, are tolerated.
const PASSING_MAX: Duration = Duration::from_secs(1);

global_asm!(
    ".pushsection .rodata.minivmm_probes, \"a\"",
    "minivmm_probe_cmpxchg16b:",
    "    mov edi, {CELL}",
    "    xor eax, eax",
    "    xor edx, edx",
    "    mov ebx, 5",
    "    mov ecx, 6",
    "    lock cmpxchg16b [rdi]",
    "    jnz 2f",
    "    cmp qword ptr [rdi], 5",
    "    jne 2f",
    "    mov al, {DONE}",
    "    out {PORT}, al",
    "2:  mov al, {WRONG}",
    "    out {PORT}, al",
    "    hlt",
    "minivmm_probe_int3:",
    "    int3",
    "    mov al, {WRONG}",
    "    out {PORT}, al",
    "    hlt",
    "minivmm_probe_xsave:",
    "    mov eax, 1",
    "    xor ecx, ecx",
    "    cpuid",
    "    test ecx, 1 << 26",
    "    jz 3f",
    "    mov rax, cr4",
    "    or eax, (1 << 18) | (1 << 9)",
    "    mov cr4, rax",
    "    mov edi, {AREA}",
    "    mov eax, 3",
    "    xor edx, edx",
    "    xsave64 [rdi]",
    "    mov eax, 3",
    "    xor edx, edx",
    "    xrstor64 [rdi]",
    "    mov al, {DONE}",
    "    out {PORT}, al",
    "3:  mov al, {NEEDLESS}",
    "    out {PORT}, al",
    "    hlt",
    "minivmm_probe_iretq:",
    "    mov rdx, rsp",
    "    mov rcx, ss",
    "    push rcx",
    "    push rdx",
    "    pushfq",
    "    mov rcx, cs",
    "    push rcx",
    "    lea rcx, [rip + 2f]",
    "    push rcx",
    "    iretq",
    "    mov al, {WRONG}",
    "    out {PORT}, al",
    "2:  mov al, {DONE}",
    "    out {PORT}, al",
    "    hlt",
    "minivmm_probe_loop:",
    "2:  dec rcx",
    "    jnz 2b",
    "    mov al, {DONE}",
    "    out {PORT}, al",
    "    hlt",
    "minivmm_probes_end:",
    ".popsection",
    CELL = const CELL,
    AREA = const AREA,
    PORT = const PORT,
    DONE = const DONE,
    WRONG = const WRONG,
    NEEDLESS = const NEEDLESS,
);

// SAFETY: these are labels of the block above, in the order of their addresses, in constant data.
unsafe extern "C" {
    static minivmm_probe_cmpxchg16b: u8;
    static minivmm_probe_int3: u8;
    static minivmm_probe_xsave: u8;
    static minivmm_probe_iretq: u8;
    static minivmm_probe_loop: u8;
    static minivmm_probes_end: u8;
}

/// What a probe executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// `lock cmpxchg16b`.
    Cmpxchg16b,
    /// A breakpoint through the interrupt descriptor table.
    Int3,
    /// `xsave64` and `xrstor64`.
    Xsave,
    /// A return from an interrupt.
    Iretq,
}

impl Probe {
    /// All probes, with their keys and what Linux needs them for.
    pub const ALL: [(Probe, &'static str, &'static str); 4] = [
        (Probe::Cmpxchg16b, "cmpxchg16b", "the slab allocator"),
        (Probe::Int3, "int3", "patching of its own code"),
        (Probe::Xsave, "xsave", "switching tasks"),
        (Probe::Iretq, "iretq", "every return from an interrupt"),
    ];

    fn code(self) -> &'static [u8] {
        match self {
            Probe::Cmpxchg16b => between(&raw const minivmm_probe_cmpxchg16b),
            Probe::Int3 => between(&raw const minivmm_probe_int3),
            Probe::Xsave => between(&raw const minivmm_probe_xsave),
            Probe::Iretq => between(&raw const minivmm_probe_iretq),
        }
    }

    fn expected(self) -> u8 {
        if self == Probe::Int3 { EXCEPTION + BREAKPOINT } else { DONE }
    }
}

/// Returns the bytes from a label to the end of the block. What follows a probe is never reached.
fn between(from: *const u8) -> &'static [u8] {
    let to = &raw const minivmm_probes_end;
    // SAFETY: both labels are in one section of constant data, `from` before `to`, and nothing ever writes
    // there.
    unsafe { std::slice::from_raw_parts(from, (to as usize).saturating_sub(from as usize)) }
}

/// Why a probe failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failed {
    /// KVM cannot run these instructions.
    Instructions(String),
    /// The host refuses what any guest needs, whatever its instructions.
    Host {
        /// What the host refuses.
        what: String,
        /// What the user can do about it.
        remedy: &'static str,
    },
    /// KVM did not return in time: it hangs, or this machine is very busy.
    TimedOut,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instructions(what) | Self::Host { what, .. } => f.write_str(what),
            Self::TimedOut => write!(f, "it has not ended after {} s", PATIENCE.as_secs()),
        }
    }
}

impl From<KvmError> for Failed {
    fn from(error: KvmError) -> Self {
        let remedy = match error {
            KvmError::Busy(_) => kvm::STOP_IT,
            _ => "dmesg of this machine may tell why",
        };
        let what = std::error::Error::source(&error)
            .map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
        Self::Host { what, remedy }
    }
}

/// Runs `probe` in its own VM. The error describes the failure.
pub fn run(probe: Probe, cpuid: &Arc<Supported>) -> Result<&'static str, Failed> {
    match start(probe.code(), 0, cpuid)?.0 {
        said if said == probe.expected() => Ok("runs"),
        NEEDLESS => Ok("the processor has none, and Linux does without"),
        said if said >= EXCEPTION => Err(Failed::Instructions(format!("exception {}", said - EXCEPTION))),
        said => Err(Failed::Instructions(format!("runs, but does something else ({said})"))),
    }
}

/// Returns how many instructions per second the guest's kernel code executes.
pub fn instructions_per_second(cpuid: &Arc<Supported>) -> Result<u64, Failed> {
    // The number of turns grows until the entry, the warm-up and other load no longer matter; the best result
    // counts. This is quick both on a KVM that emulates and on one that does not.
    const TURNS: [u64; 4] = [10_000, 40_000, 400_000, 10_000_000];
    const LONG_ENOUGH: Duration = Duration::from_millis(50);
    let mut best = 0;
    for turns in TURNS {
        let (_, took) = start(between(&raw const minivmm_probe_loop), turns, cpuid)?;
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        // Two instructions per turn; the product is at most 2 * 10^16.
        best = best.max(turns * 2_000_000_000 / nanos);
        if took >= LONG_ENOUGH {
            break;
        }
    }
    Ok(best)
}

/// Runs `code` on its own thread, which is abandoned if KVM never returns. Returns the value written to the
/// port, and the time that it took.
fn start(code: &'static [u8], count: u64, cpuid: &Arc<Supported>) -> Result<(u8, Duration), Failed> {
    let (answer, answered) = mpsc::channel();
    let cpuid = Arc::clone(cpuid);
    let work = move || {
        // The receiver may have given up.
        let _ = answer.send(execute(code, count, &cpuid));
    };
    thread::Builder::new().name("probe".into()).spawn(work).map_err(|error| Failed::Host {
        what: format!("cannot start a thread: {error}"),
        remedy: "this user's limit of processes (`ulimit -u`) or the cgroup's (pids.max) is reached: raise it",
    })?;
    answered.recv_timeout(PATIENCE).unwrap_or(Err(Failed::TimedOut))
}

fn execute(code: &[u8], count: u64, cpuid: &Supported) -> Result<(u8, Duration), Failed> {
    let kvm = Kvm::new().map_err(refused("its device"))?;
    let ram = mem::map_ram(&[(0, RAM_BYTES)]).map_err(host)?;
    let vm = machine(&kvm, &ram)?;
    load(&ram, code).map_err(host)?;
    let mut vcpu = kvm::create_vcpu(&vm, 0)?;
    prepare(cpuid, &vcpu, &ram, count)?;
    let page = RunPage::new(&vcpu).map_err(host)?;
    let begin = Instant::now();
    let reason = loop {
        break match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [said])) => return Ok((*said, begin.elapsed())),
            Ok(VcpuExit::InternalError) => Reason::Internal(page.internal_error()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Reason::FailEntry(reason, cpu),
            Ok(VcpuExit::Shutdown) => Reason::TripleFault,
            Ok(other) => Reason::Unexpected(format!("{other:?}")),
            Err(error) if is_passing(error) && begin.elapsed() < PASSING_MAX => {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => Reason::Run(error.errno()),
        };
    };
    Err(match reason {
        Reason::Run(_) => Failed::Host { what: reason.to_string(), remedy: reason.advice() },
        reason => Failed::Instructions(reason.in_short()),
    })
}

/// Returns `true` if KVM_RUN is worth another try after this error, for a while.
fn is_passing(error: kvm_ioctls::Error) -> bool {
    matches!(error.errno(), libc::EINTR | libc::EAGAIN)
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Failed {
    move |error| KvmError::Refused(what, error).into()
}

fn host(error: impl fmt::Display) -> Failed {
    Failed::Host { what: error.to_string(), remedy: "this machine may be short of memory" }
}

/// Creates a VM with memory and nothing else.
fn machine(kvm: &Kvm, ram: &Ram) -> Result<VmFd, Failed> {
    let vm = kvm::empty_vm(kvm)?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or_default();
    vm.set_tss_address(tss).map_err(refused("the task segment's place"))?;
    for (slot, (guest_phys_addr, userspace_addr, memory_size)) in (0..).zip(ram.regions()) {
        let region =
            kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: the range is a mapping of `ram`, which `execute` creates before the VM and so drops after
        // it.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("the guest's memory"))?;
    }
    Ok(vm)
}

/// Writes the code to the start of high RAM, and an interrupt table whose every entry writes its number to
/// the port.
fn load(ram: &Ram, code: &[u8]) -> Result<(), mem::OutsideRam> {
    const INTERRUPT_GATE: u64 = 0x8e00;
    const CODE_SELECTOR: u64 = 0x10;
    mem::write_bytes(ram, layout::HIGH_RAM, code)?;
    for vector in 0..VECTORS {
        let stub = STUBS + u64::from(vector) * STUB_BYTES;
        // mov al, EXCEPTION + vector; out PORT, al; hlt
        let port = PORT.to_le_bytes()[0];
        mem::write_bytes(ram, stub, &[0xb0, EXCEPTION + vector, 0xe6, port, 0xf4])?;
        let gate = (stub & 0xffff) | CODE_SELECTOR << 16 | INTERRUPT_GATE << 32 | (stub >> 16 & 0xffff) << 48;
        let at = IDT + u64::from(vector) * 16;
        mem::write_bytes(ram, at, &gate.to_le_bytes())?;
        mem::write_bytes(ram, at + 8, &(stub >> 32).to_le_bytes())?;
    }
    Ok(())
}

/// Sets up the CPU in the state in which a kernel starts, with the interrupt table.
fn prepare(cpuid: &Supported, vcpu: &VcpuFd, ram: &Ram, count: u64) -> Result<(), Failed> {
    cpuid.set_up(vcpu, Place { id: 0, cpus: 1 })?;
    cpu::set_up(vcpu, ram, Entry::Long64 { rip: layout::HIGH_RAM }).map_err(host)?;
    let mut system = vcpu.get_sregs().map_err(refused("its system registers"))?;
    system.idt.base = IDT;
    system.idt.limit = u16::from(VECTORS) * 16 - 1;
    vcpu.set_sregs(&system).map_err(refused("its system registers"))?;
    let mut registers = vcpu.get_regs().map_err(refused("its registers"))?;
    registers.rcx = count;
    vcpu.set_regs(&registers).map_err(refused("its registers"))
}

const _: () = assert!(IDT + 16 * VECTORS as u64 <= STUBS && layout::GDT + 0x100 <= IDT);
const _: () = assert!(STUBS + STUB_BYTES * VECTORS as u64 <= CELL as u64 && CELL < AREA);
const _: () = assert!((AREA as u64) + 0x1000 < layout::PVH_START_INFO && layout::PORT_EXIT == PORT as u64);
