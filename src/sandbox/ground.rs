//! Landlock: denies paths, TCP ports and other processes to this thread and to threads that it starts.
//!
//! Owns the one ruleset, which has no rule, except for a thread that removes sockets at its end. Open descriptors stay usable: images, standard streams, reports.
//! A kernel without Landlock (before 5.13, or without it in its `lsm=` list) is no error, since the filter of
//! system calls already prevents every open. That is logged once.

use std::fs::File;
use std::sync::Once;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

use super::SandboxError;

/// The newest ABI that is requested. The library leaves out what the kernel does not support.
const NEWEST: ABI = ABI::V6;

/// Gives up access to every path. Files can still be removed from the directories `removing`.
pub fn leave(removing: &[File]) -> Result<(), SandboxError> {
    static TOLD: Once = Once::new();
    let status = ruleset(removing).map_err(|error| SandboxError::Refused {
        what: "give up the file system (Landlock)",
        source: std::io::Error::other(error),
    })?;
    TOLD.call_once(|| match status.ruleset {
        RulesetStatus::NotEnforced => {
            log::warn!("this kernel has no Landlock: that nothing is opened rests on the filter of system calls alone");
        }
        // The kernel is not asked which ABI it has: the first threads already have their filters.
        RulesetStatus::PartiallyEnforced => {
            log::info!("Landlock: no path; this kernel's lacks something of ABI {}", NEWEST as i32);
        }
        RulesetStatus::FullyEnforced => {
            log::info!("Landlock, ABI {}: no path, TCP port, signal or abstract socket outside", NEWEST as i32);
        }
    });
    Ok(())
}

fn ruleset(removing: &[File]) -> Result<landlock::RestrictionStatus, landlock::RulesetError> {
    let rule = |directory| Ok::<_, landlock::RulesetError>(PathBeneath::new(directory, AccessFs::RemoveFile));
    Ruleset::default()
        .set_compatibility(landlock::CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rules(removing.iter().map(rule))?
        .restrict_self()
}

/// Returns the version of this kernel's Landlock, or 0 if it has none.
pub fn version() -> i64 {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag the call reads no memory and returns a number (landlock_create_ruleset(2)).
    let answer = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            VERSION_FLAG,
        )
    };
    answer.max(0)
}
