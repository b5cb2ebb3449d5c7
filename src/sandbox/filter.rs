//! Translates a role's table into a seccomp filter.
//!
//! Owns the translation, by `seccompiler`, and the exception that `--sandbox=log` makes for the handler,
//! which performs a forbidden call all the same.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::roles::{Call, Role, When};
use super::{Mode, SandboxError, trap};

/// Returns the filter of a role.
pub fn program(role: Role, mode: Mode) -> Result<BpfProgram, SandboxError> {
    let wrong =
        |error: seccompiler::BackendError| SandboxError::Table { role: role.name(), why: error.to_string() };
    // A tracer that suppresses a call (strace's inject) changes it to this number, which no call has.
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::from([(i64::from(u32::MAX), Vec::new())]);
    for call in role.calls() {
        let conditions = conditions(call).map_err(wrong)?;
        let is_new = !rules.contains_key(&call.number);
        let rules = rules.entry(call.number).or_default();
        // A call without a rule always passes, whatever another row says.
        if conditions.is_empty() || !is_new && rules.is_empty() {
            rules.clear();
            continue;
        }
        for condition in conditions {
            rules.push(SeccompRule::new(vec![condition]).map_err(wrong)?);
        }
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    let program = filter.and_then(BpfProgram::try_from).map_err(wrong)?;
    Ok(if mode == Mode::Log { with_passage(program) } else { program })
}

/// Returns conditions of which any one lets the call pass; an empty list lets it always pass.
fn conditions(call: &Call) -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    let on = |argument, op, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    match call.when {
        When::Always => Ok(Vec::new()),
        When::Request(requests) => {
            requests.iter().map(|(_, request)| on(1, SeccompCmpOp::Eq, u64::from(*request))).collect()
        }
        When::Command(commands) => commands
            .iter()
            .map(|(_, command)| on(1, SeccompCmpOp::Eq, u64::from(command.unsigned_abs())))
            .collect(),
        When::NotExecutable => {
            let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
            Ok(vec![on(2, SeccompCmpOp::MaskedEq(executable), 0)?])
        }
        When::ThisProcess => Ok(vec![on(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]),
    }
}

/// Lets every call pass that the handler itself makes, which it does with the one instruction in [`trap`].
fn with_passage(program: BpfProgram) -> BpfProgram {
    /// Offsets in `struct seccomp_data` of the low and the high half of the instruction pointer.
    const POINTER: [u32; 2] = [8, 12];
    // BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K.
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let address = trap::passage() as u64;
    let half = |shift: u32| u32::try_from(address >> shift & 0xffff_ffff).unwrap_or_default();
    let step = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    let mut whole = vec![
        step(LOAD, 0, POINTER[0]),
        step(EQUAL, 3, half(0)),
        step(LOAD, 0, POINTER[1]),
        step(EQUAL, 1, half(32)),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    whole.extend(program);
    whole
}
