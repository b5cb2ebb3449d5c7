//! The report on a vCPU that KVM cannot run any further.
//!
//! Owns what the report says: the reason, the registers, the instruction, and what to do about it.

use std::fmt;
use std::sync::OnceLock;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::run_page::{InternalError, RunPage};
use crate::mem::{self, Ram};

/// Why KVM stopped running a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// KVM_EXIT_INTERNAL_ERROR.
    Internal(InternalError),
    /// KVM_EXIT_FAIL_ENTRY: the hardware's reason, and the host CPU.
    FailEntry(u64, u32),
    /// KVM_EXIT_SHUTDOWN: a fault during the delivery of a double fault.
    TripleFault,
    /// KVM_EXIT_MEMORY_FAULT, at this guest physical address.
    MemoryFault(u64),
    /// An exit that a machine like this one never causes.
    Unexpected(String),
    /// KVM_RUN itself failed with this errno.
    Run(i32),
}

/// The whole report. Its `Display` has several lines.
#[derive(Debug)]
pub struct Failure {
    cpu: u8,
    reason: Reason,
    registers: Option<(kvm_regs, kvm_sregs)>,
    instruction: Vec<u8>,
}

/// KVM_INTERNAL_ERROR_EMULATION: KVM would have to emulate an instruction, and cannot.
const EMULATION: u32 = 1;
/// Flag in the first data word: the bytes of the instruction follow.
const HAS_BYTES: u64 = 1;
/// The length of the longest x86 instruction, in bytes.
const INSTRUCTION_BYTES_MAX: usize = 15;

impl Failure {
    /// Gathers what KVM still reports about `vcpu`.
    pub fn new(cpu: u8, reason: Reason, vcpu: &VcpuFd, ram: &Ram) -> Self {
        let registers = vcpu.get_regs().ok().zip(vcpu.get_sregs().ok());
        let given = match &reason {
            Reason::Internal(error) => instruction_bytes(error),
            _ => None,
        };
        let instruction = given.unwrap_or_else(|| match registers {
            Some((regs, sregs)) => read_instruction(vcpu, ram, sregs.cs.base.wrapping_add(regs.rip)),
            None => Vec::new(),
        });
        Self { cpu, reason, registers, instruction }
    }

    /// Gathers the report after KVM_EXIT_INTERNAL_ERROR.
    pub fn internal(cpu: u8, page: &RunPage, vcpu: &VcpuFd, ram: &Ram) -> Self {
        Self::new(cpu, Reason::Internal(page.internal_error()), vcpu, ram)
    }
}

/// Returns the instruction bytes that KVM supplies with an emulation failure, if it does. They are in struct
/// kvm_run's `emulation_failure`: flags, then a count byte and fifteen bytes.
fn instruction_bytes(error: &InternalError) -> Option<Vec<u8>> {
    let (EMULATION, [flags, words @ ..]) = (error.suberror, error.data.as_slice()) else { return None };
    if flags & HAS_BYTES == 0 {
        return None;
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (&count, bytes) = bytes.split_first()?;
    Some(bytes.iter().copied().take(usize::from(count).min(INSTRUCTION_BYTES_MAX)).collect())
}

/// Returns the bytes at linear address `at`, translated by the vCPU's own page tables. The result ends at the
/// first byte that is not mapped.
fn read_instruction(vcpu: &VcpuFd, ram: &Ram, at: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for offset in 0..INSTRUCTION_BYTES_MAX as u64 {
        let Ok(translation) = vcpu.translate_gva(at.wrapping_add(offset)) else { break };
        let mut byte = [0];
        if translation.valid == 0 || mem::read_bytes(ram, translation.physical_address, &mut byte).is_err() {
            break;
        }
        bytes.extend(byte);
    }
    bytes
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Internal(error) => {
                let kind = match error.suberror {
                    EMULATION => "KVM cannot emulate an instruction",
                    2 => "simultaneous exceptions",
                    3 => "an event could not be delivered",
                    4 => "an exit that KVM does not know",
                    _ => "of unknown kind",
                };
                write!(
                    f,
                    "internal error of KVM (KVM_EXIT_INTERNAL_ERROR, suberror {}): {kind}",
                    error.suberror
                )?;
                if error.suberror != EMULATION && !error.data.is_empty() {
                    write!(f, ", data {:#x?}", error.data)?;
                }
                Ok(())
            }
            Self::FailEntry(reason, cpu) => {
                write!(
                    f,
                    "the processor refuses to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, host CPU {cpu})"
                )
            }
            Self::TripleFault => {
                write!(f, "triple fault (KVM_EXIT_SHUTDOWN), and the guest had not asked for a reset")
            }
            Self::MemoryFault(at) => write!(f, "KVM has no memory for guest address {at:#x}"),
            Self::Unexpected(exit) => write!(f, "unexpected exit from KVM: {exit}"),
            Self::Run(errno @ libc::EAGAIN) => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "KVM_RUN has failed for a second: {error}")
            }
            Self::Run(errno) => write!(f, "KVM_RUN: {}", std::io::Error::from_raw_os_error(*errno)),
        }
    }
}

impl Reason {
    /// Returns what the user can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Internal(_) if hardware().is_none() => {
                "this host's KVM works without hardware virtualization (no vmx or svm in /proc/cpuinfo): it \
                 emulates kernel code, and lacks instructions that Linux uses. Run Linux guests in the emulated \
                 host (guest-images/emuhost run -- minivmm ...), or on a machine with VMX or SVM"
            }
            Self::Internal(_) => {
                "the guest ran into something that this host's KVM does not support; a newer kernel on the host \
                 may. guest-images/emuhost runs the same command line in an emulated host"
            }
            Self::FailEntry(..) => {
                "the CPU state is invalid for this processor; please report it with the lines above and the \
                 kernel image"
            }
            Self::TripleFault => {
                "the kernel crashed before it could handle exceptions; look at its last console lines \
                 (--append earlyprintk=serial), and whether image and --memory fit. On AMD processors KVM has \
                 reset the registers by now. (With reboot=t on its command line it is taken for a reset.)"
            }
            Self::Run(libc::EAGAIN | libc::ENOMEM) => {
                "the host refuses KVM a kernel thread, or memory, that it needs to run a guest. Mostly this user's \
                 limit of processes (`ulimit -u`) or the cgroup's (pids.max, memory.max) is reached: raise it, or end \
                 other processes. In a container look at its --pids-limit"
            }
            Self::Run(libc::EFAULT | libc::EHWPOISON) => {
                "KVM cannot get a page of the guest's memory: the host is short of memory, or the page is broken \
                 (dmesg of the host tells)"
            }
            Self::MemoryFault(_) | Self::Unexpected(_) | Self::Run(_) => {
                "please report it with the lines above; dmesg of the host may say more"
            }
        }
    }
}

/// Returns the processor's virtualization extension, vmx or svm, as /proc/cpuinfo names it. The file is read
/// once. A VM calls this before its guest runs, because afterwards nothing can be opened.
pub fn hardware() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&str>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = info.lines().find(|line| line.starts_with("flags"))?;
        ["vmx", "svm"].into_iter().find(|name| flags.split_whitespace().any(|flag| flag == *name))
    })
}

impl std::error::Error for Failure {}

impl Reason {
    /// Returns the reason in a few words.
    pub fn in_short(&self) -> String {
        match self {
            Self::Internal(error) if error.suberror == EMULATION => {
                "KVM cannot emulate it (KVM_EXIT_INTERNAL_ERROR, suberror 1)".into()
            }
            reason => reason.to_string(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "CPU {} cannot go on: {}", self.cpu, self.reason)?;
        if let Some((r, s)) = &self.registers {
            writeln!(f, "  rip {:016x}  rsp {:016x}  rflags {:08x}", r.rip, r.rsp, r.rflags)?;
            writeln!(f, "  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx)?;
            writeln!(f, "  rsi {:016x}  rdi {:016x}  rbp {:016x}", r.rsi, r.rdi, r.rbp)?;
            writeln!(f, "  r8  {:016x}  r9  {:016x}  r10 {:016x}  r11 {:016x}", r.r8, r.r9, r.r10, r.r11)?;
            writeln!(f, "  r12 {:016x}  r13 {:016x}  r14 {:016x}  r15 {:016x}", r.r12, r.r13, r.r14, r.r15)?;
            writeln!(
                f,
                "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:04x}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.efer
            )?;
            writeln!(
                f,
                "  cs {:04x} base {:x} limit {:x} {}  ss {:04x}",
                s.cs.selector,
                s.cs.base,
                s.cs.limit,
                if s.cs.l != 0 {
                    "64-bit"
                } else if s.cs.db != 0 {
                    "32-bit"
                } else {
                    "16-bit"
                },
                s.ss.selector
            )?;
        }
        write!(f, "  instruction bytes:")?;
        match self.instruction.as_slice() {
            [] => write!(f, " not readable")?,
            bytes => bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?,
        }
        write!(f, "\n  advice: {}", self.reason.advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_is_taken_from_where_kvm_puts_it() {
        let error = |suberror, data: &[u64]| InternalError { suberror, data: data.to_vec() };
        let bytes = instruction_bytes(&error(1, &[1, 0x0000_0000_0fc7_4c02, 0x1111]));
        assert_eq!(bytes, Some(vec![0x4c, 0xc7]));
        let all = instruction_bytes(&error(1, &[1, u64::MAX, u64::MAX])).unwrap();
        assert_eq!(all.len(), INSTRUCTION_BYTES_MAX);
        for without in [error(1, &[0, 5, 5]), error(1, &[]), error(3, &[1, 5]), error(1, &[1])] {
            assert_eq!(instruction_bytes(&without), None);
        }
    }

    #[test]
    fn a_host_that_refuses_a_thread_is_named_with_the_limits_to_raise() {
        for errno in [libc::EAGAIN, libc::ENOMEM] {
            let advice = Reason::Run(errno).advice();
            assert!(advice.contains("ulimit -u") && advice.contains("pids.max"), "{advice}");
        }
        assert!(Reason::Run(libc::EAGAIN).to_string().contains("os error 11"));
        assert!(Reason::Run(libc::EIO).advice().contains("report"));
    }

    #[test]
    fn the_report_has_reason_registers_bytes_and_advice() {
        let failure = Failure {
            cpu: 1,
            reason: Reason::Internal(InternalError { suberror: 1, data: vec![] }),
            registers: Some((kvm_regs { rip: 0x1234, ..Default::default() }, kvm_sregs::default())),
            instruction: vec![0xcc],
        };
        let text = failure.to_string();
        for word in ["CPU 1", "KVM_EXIT_INTERNAL_ERROR", "suberror 1", "0000000000001234", " cc", "emuhost"] {
            assert!(text.contains(word), "{word} is missing in:\n{text}");
        }
    }
}
