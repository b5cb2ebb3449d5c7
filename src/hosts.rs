//! Where a Linux guest runs: on this machine's KVM, or in the emulated host.
//!
//! Owns `--host`, the decision, and the refusal with the line to type. What KVM can do is `check`'s; the verdict is
//! kept for this boot in [`verdict`]; the emulated host's script is found and called by [`emulated`]. Guests without
//! Linux ([`linux`] tells) always run here: a KVM without vmx or svm serves them.

mod emulated;
mod linux;
mod verdict;

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::check;
use crate::kvm::failure;
use crate::text::shell_word;
use emulated::Found;
use verdict::Verdict;

/// What `--host` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostChoice {
    /// Nothing: on this machine; where its KVM cannot run Linux, a refusal.
    #[default]
    Here,
    /// On this machine where its KVM runs Linux, else in the emulated host.
    Auto,
    /// On this machine, whatever its KVM can do.
    Direct,
    /// In the emulated host.
    Emulated,
}

impl HostChoice {
    /// The names that `--host` has for them.
    pub const NAMES: [(&'static str, HostChoice); 3] =
        [("auto", HostChoice::Auto), ("direct", HostChoice::Direct), ("emulated", HostChoice::Emulated)];

    /// By its name.
    pub fn by_name(name: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, choice)| *choice).ok_or_else(|| "it is auto, direct or emulated".into())
    }
}

/// How `minivmm check` ends where no Linux runs (`cli::ExitStatus::NoLinux`).
const NO_LINUX: i32 = 1;

/// Why no Linux guest is started.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// This machine's KVM cannot run it, and nobody has asked for another host.
    #[error(
        "{verdict}. In the emulated host it does; type:{steps}\n(--host=direct tries it here all the same; `minivmm \
         check` tells more)"
    )]
    Refused {
        /// As `check` says it.
        verdict: String,
        /// Lines to type.
        steps: String,
    },
    /// The emulated host is not there.
    #[error("{why}the emulated host is not built; type:{steps}")]
    NotBuilt {
        /// Why it is needed; empty where the user has asked for it.
        why: String,
        /// Lines to type.
        steps: String,
    },
    /// Its script does not start.
    #[error("cannot start the emulated host, {path}")]
    NotStarted {
        /// The script.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What is to be run, as the decision needs it.
#[derive(Debug)]
pub struct Asked<'a> {
    /// What `--host` says.
    pub choice: HostChoice,
    /// The kernel; `None` for the test guest's.
    pub kernel: Option<&'a Path>,
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// Arguments that the emulated host needs in addition.
    pub more: Vec<OsString>,
}

impl Asked<'static> {
    /// For a tool that boots test guests of ordinary size, and works on what they leave.
    pub fn for_tool(choice: HostChoice) -> Self {
        Asked { choice, kernel: None, memory_mib: TOOL_MIB, more: Vec::new() }
    }
}

/// What a tool's guests and its own work take together, in MiB.
const TOOL_MIB: u64 = 3072;

/// The command that is to take this process's place; `None` where the guest runs here.
pub fn decide(asked: &Asked<'_>) -> Result<Option<Command>, HostError> {
    let typed: Vec<OsString> = std::env::args_os().collect();
    if asked.choice == HostChoice::Direct {
        return Ok(None);
    }
    if asked.choice == HostChoice::Emulated {
        let found = emulated::find();
        let Found::Built(script) = &found else {
            return Err(HostError::NotBuilt { why: String::new(), steps: steps(&found, &typed, "emulated") });
        };
        return Ok(Some(emulated::command(script, &typed, asked)));
    }
    let is_linux = || asked.kernel.is_none_or(linux::is_linux);
    let Some(verdict) = obstacle(asked.choice, is_linux) else { return Ok(None) };
    match (asked.choice, emulated::find()) {
        (HostChoice::Auto, Found::Built(script)) => {
            log::warn!("{verdict}: handing over to the emulated host, {}", script.display());
            Ok(Some(emulated::command(&script, &typed, asked)))
        }
        (HostChoice::Auto, found) => {
            Err(HostError::NotBuilt { why: format!("{verdict}, and "), steps: steps(&found, &typed, "auto") })
        }
        (_, found) => Err(HostError::Refused { verdict, steps: steps(&found, &typed, "auto") }),
    }
}

/// Puts `command` in this process's place. Returns only where that fails.
pub fn replace(command: &mut Command) -> HostError {
    let path = command.get_program().to_string_lossy().into_owned();
    HostError::NotStarted { path, source: std::os::unix::process::CommandExt::exec(command) }
}

/// `check`, whose verdict is kept for this boot.
pub fn check() -> check::Report {
    let report = check::check();
    if report.is_certain {
        verdict::keep(&Verdict { linux_runs: report.linux_runs, verdict: report.verdict.clone() });
    }
    report
}

/// Why no Linux kernel runs here; `None` where one does, where nothing speaks against it, or where the guest is none.
fn obstacle(choice: HostChoice, is_linux: impl FnOnce() -> bool) -> Option<String> {
    if let Some(known) = verdict::known() {
        return (!known.linux_runs && is_linux()).then_some(known.verdict);
    }
    // With vmx or svm a VM is tried at once: what is wrong then tells itself, and quickly. Who has asked for the
    // emulated host where KVM is not to be had (no device, no permission) is not helped by an error.
    let kvm_opens = || crate::kvm::open_device().is_ok();
    if failure::hardware().is_some() && (choice != HostChoice::Auto || kvm_opens()) {
        return None;
    }
    if is_linux() { probe() } else { None }
}

/// Why no Linux kernel runs here, as `minivmm check` finds it in a process of its own. This one may become a VMM: the
/// probes' threads would have made the C library's allocator divide memory between threads, for which it opens
/// files, before the sandbox could forbid that (`sandbox::arm`).
fn probe() -> Option<String> {
    let program = crate::program::beside(crate::program::VMM).ok()?;
    let found = Command::new(program)
        .args(["check", "--quiet"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .inspect_err(|error| log::debug!("minivmm check does not start: {error}"))
        .ok()?;
    let verdict = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    (found.status.code() == Some(NO_LINUX) && !verdict.is_empty()).then_some(verdict)
}

/// The lines to type, each with a line break before it.
fn steps(found: &Found, typed: &[OsString], choice: &str) -> String {
    let line = emulated::typed_with_host(typed, choice);
    match found {
        Found::Built(_) => format!("\n  {line}"),
        Found::Script(script) => {
            let tree = script.ancestors().nth(2).unwrap_or(Path::new("."));
            format!("\n  make -C {} emuhost\n  {line}", shell_word(tree))
        }
        Found::Nothing => {
            // That tree has a binary of its own.
            let mut typed = typed.to_vec();
            if let Some(program) = typed.first_mut()
                && let Some(name) = Path::new(&program).file_name()
            {
                *program = name.to_owned();
            }
            let line = emulated::typed_with_host(&typed, choice);
            format!("\n  make emuhost     (in minivmm's source tree)\n  TREE/target/release/{line}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_has_a_name_but_the_default() {
        for (name, choice) in HostChoice::NAMES {
            assert_eq!(HostChoice::by_name(name), Ok(choice));
        }
        assert!(HostChoice::by_name("here").unwrap_err().contains("auto"));
        assert_eq!(HostChoice::default(), HostChoice::Here);
    }

    #[test]
    fn the_steps_are_lines_that_can_be_typed() {
        let typed: Vec<OsString> = ["minivmm", "--disk", "my img,cache=none"].map(Into::into).into();
        let line = "minivmm --host=auto --disk 'my img,cache=none'";
        assert_eq!(
            steps(&Found::Built("/t/guest-images/emuhost".into()), &typed, "auto"),
            format!("\n  {line}")
        );
        let built_first = steps(&Found::Script("/t/guest-images/emuhost".into()), &typed, "auto");
        assert_eq!(built_first, format!("\n  make -C /t emuhost\n  {line}"));
        for program in ["minivmm", "/opt/minivmm", "../minivmm"] {
            let typed: Vec<OsString> = [program, "--disk", "my img,cache=none"].map(Into::into).into();
            let told = steps(&Found::Nothing, &typed, "auto");
            assert!(told.contains("make emuhost"), "{told}");
            assert!(told.ends_with(&format!("\n  TREE/target/release/{line}")), "{told}");
        }
    }
}
