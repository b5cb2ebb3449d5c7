//! Where a Linux guest runs: on this machine's KVM, or in the emulated host.
//!
//! Owns `--host`, the decision, and the refusal with the command to type. What KVM can do is `check`'s.
//! `verdict` keeps the verdict for this boot. `emulated` finds and calls the emulated host's script.
//! Guests that are not Linux (`linux` recognizes it) always run here: a KVM without vmx or svm can run
//! them.

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

/// The value of `--host`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostChoice {
    /// Not given: run on this machine, and refuse a Linux guest if KVM cannot run it.
    #[default]
    Here,
    /// Run on this machine if its KVM runs Linux, otherwise in the emulated host.
    Auto,
    /// Run on this machine, whatever its KVM can do.
    Direct,
    /// Run in the emulated host.
    Emulated,
}

impl HostChoice {
    /// The choices with their names for `--host`.
    pub const NAMES: [(&'static str, HostChoice); 3] =
        [("auto", HostChoice::Auto), ("direct", HostChoice::Direct), ("emulated", HostChoice::Emulated)];

    /// Returns the choice of this name.
    pub fn by_name(name: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, choice)| *choice).ok_or_else(|| "it is auto, direct or emulated".into())
    }
}

/// The exit status of `minivmm check` if Linux does not run (`cli::ExitStatus::NoLinux`).
const NO_LINUX: i32 = 1;

/// Why no Linux guest is started.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// This machine's KVM cannot run Linux, and no other host was asked for.
    #[error(
        "{verdict}. In the emulated host it does; type:{steps}\n(--host=direct tries it here anyway; `minivmm \
         check` says more)"
    )]
    Refused {
        /// The verdict of `check`.
        verdict: String,
        /// The lines to type.
        steps: String,
    },
    /// The emulated host does not exist.
    #[error("{why}the emulated host is not built; type:{steps}")]
    NotBuilt {
        /// Why it is needed; empty if the user asked for it.
        why: String,
        /// The lines to type.
        steps: String,
    },
    /// The emulated host's script could not be started.
    #[error("cannot start the emulated host, {path}")]
    NotStarted {
        /// The script.
        path: String,
        /// Why it could not be started.
        source: std::io::Error,
    },
}

/// What the decision must know of the requested run.
#[derive(Debug)]
pub struct Asked<'a> {
    /// The value of `--host`.
    pub choice: HostChoice,
    /// The kernel; `None` for the test guest's kernel.
    pub kernel: Option<&'a Path>,
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// Additional arguments that the emulated host needs.
    pub more: Vec<OsString>,
}

impl Asked<'static> {
    /// Describes a tool that boots test guests of ordinary size, and processes what they leave.
    pub fn for_tool(choice: HostChoice) -> Self {
        Asked { choice, kernel: None, memory_mib: TOOL_MIB, more: Vec::new() }
    }
}

/// The memory in MiB that a tool's guests and its own work take together.
const TOOL_MIB: u64 = 3072;

/// Returns the command that is to replace this process, or `None` if the guest runs here.
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

/// Replaces this process with `command`. Returns only if that fails.
pub fn replace(command: &mut Command) -> HostError {
    let path = command.get_program().to_string_lossy().into_owned();
    HostError::NotStarted { path, source: std::os::unix::process::CommandExt::exec(command) }
}

/// Runs `check`, and keeps its verdict for this boot if it is certain.
pub fn check() -> check::CheckReport {
    let report = check::check();
    if report.is_certain {
        verdict::keep(&Verdict { linux_runs: report.linux_runs, verdict: report.verdict.clone() });
    }
    report
}

/// Returns why no Linux kernel runs here. `None` if one does, if nothing suggests otherwise, or if the guest
/// is not Linux.
fn obstacle(choice: HostChoice, is_linux: impl FnOnce() -> bool) -> Option<String> {
    if let Some(known) = verdict::known() {
        return (!known.linux_runs && is_linux()).then_some(known.verdict);
    }
    // With vmx or svm a VM is tried at once: what is wrong then shows quickly by itself. With --host=auto
    // that requires that KVM opens: an error would not help a user without the device or the permission who
    // asked for the emulated host.
    let kvm_opens = || crate::kvm::open_device().is_ok();
    if failure::hardware().is_some() && (choice != HostChoice::Auto || kvm_opens()) {
        return None;
    }
    if is_linux() { probe() } else { None }
}

/// Returns why no Linux kernel runs here, as found by `minivmm check` in a separate process. This process may
/// become a VMM. The probes' threads would make the C library's allocator divide memory between threads, for
/// which it opens files. `sandbox::arm` can prevent that only if it comes first.
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

/// Returns the lines to type, each after a line break.
fn steps(found: &Found, typed: &[OsString], choice: &str) -> String {
    let line = emulated::typed_with_host(typed, choice);
    match found {
        Found::Built(_) => format!("\n  {line}"),
        Found::Script(script) => {
            let tree = script.ancestors().nth(2).unwrap_or(Path::new("."));
            format!("\n  make -C {} emuhost\n  {line}", shell_word(tree))
        }
        Found::Nothing => {
            // The source tree has its own binary.
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
