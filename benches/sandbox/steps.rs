//! How many instructions of a filter a call takes: the program run as the kernel runs it.
//!
//! Owns a classic BPF machine as far as filters of system calls use it. The kernel keeps a map of the calls that a
//! filter always lets pass (Linux 5.11), whatever their arguments, and runs no filter for those.

use minivmm::sandbox::Mode;
use minivmm::sandbox::Role;
use minivmm::sandbox::filter::program;

/// AUDIT_ARCH_X86_64.
const ARCH: u32 = 0xc000_003e;
/// From here on `struct seccomp_data` is more than the call's number and the machine's.
const REST: u32 = 8;

/// What the filter of a role does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Instructions until its answer.
    pub instructions: u32,
    /// The kernel knows the answer, and runs none of them.
    pub kept: bool,
}

/// Runs the filter of `role`; `None` where it does not let the call pass, or does what no filter of ours does.
pub fn of(role: Role, number: i64, arguments: [i64; 6]) -> Option<Steps> {
    let program = program(role, Mode::On).ok()?;
    let word = |at: u32| -> Option<u32> {
        let half = |value: i64, high: bool| {
            u32::try_from((value.cast_unsigned() >> if high { 32 } else { 0 }) & 0xffff_ffff).ok()
        };
        match at {
            0 => u32::try_from(number).ok(),
            4 => Some(ARCH),
            8 | 12 => Some(0),
            _ => {
                let argument = arguments.get(usize::try_from(at.checked_sub(16)? / 8).ok()?)?;
                half(*argument, at % 8 == 4)
            }
        }
    };
    let (mut at, mut accumulator, mut steps) = (0usize, 0u32, Steps { instructions: 0, kept: true });
    loop {
        let step = program.get(at)?;
        steps.instructions += 1;
        let mut jump = 0;
        match step.code {
            // BPF_LD | BPF_W | BPF_ABS
            0x20 => {
                steps.kept &= step.k < REST;
                accumulator = word(step.k)?;
            }
            // BPF_ALU | BPF_AND | BPF_K
            0x54 => accumulator &= step.k,
            // BPF_JMP | BPF_JA
            0x05 => jump = step.k,
            // BPF_JMP | BPF_JEQ, JGT, JGE, JSET | BPF_K
            code @ (0x15 | 0x25 | 0x35 | 0x45) => {
                let holds = match code {
                    0x15 => accumulator == step.k,
                    0x25 => accumulator > step.k,
                    0x35 => accumulator >= step.k,
                    _ => accumulator & step.k != 0,
                };
                jump = u32::from(if holds { step.jt } else { step.jf });
            }
            // BPF_RET | BPF_K
            0x06 => return (step.k == libc::SECCOMP_RET_ALLOW).then_some(steps),
            _ => return None,
        }
        at += 1 + usize::try_from(jump).ok()?;
    }
}
