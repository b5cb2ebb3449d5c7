//! The sandbox: what every thread of a VM gives up before its guest executes an instruction.
//!
//! Owns the order. [`arm`] prepares the process before its first thread is started. Each thread has a
//! [`SandboxEntry`] that names its [`Role`], gives up its own part, and reports that. No CPU runs before all
//! threads have done so ([`wait_for_all`]). Without [`arm`], or with `--sandbox=off`, nothing is given up:
//! devices in tests have threads too.
//!
//! Three things are given up. The first is privileges that an executed program could bring ([`privileges`]).
//! The second is every path, TCP port and process outside ([`ground`]: Landlock). The third is every system
//! call that [`roles`] does not list for that thread ([`filter`]: seccomp). [`trap`] reports forbidden calls.
//! `docs/security.md` describes the sandbox.

pub mod filter;
pub mod ground;
pub mod privileges;
pub mod roles;
pub mod trap;

use std::fs::File;
use std::io;
use std::sync::{Condvar, Mutex, OnceLock};

use seccompiler::BpfProgram;

use crate::sync::unpoisoned;

pub use roles::Role;

/// The modes of `--sandbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A forbidden call is reported and ends minivmm.
    On,
    /// A forbidden call is reported once per role and call, and is made all the same. Landlock, the threads'
    /// capabilities and the process's limits stay as they are.
    Log,
    /// Nothing is given up.
    Off,
}

impl Mode {
    /// All modes, with their names for `--sandbox`.
    pub const ALL: [(&'static str, Mode); 3] = [("on", Mode::On), ("log", Mode::Log), ("off", Mode::Off)];

    /// Returns the mode of this name, or `None`.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }
}

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused a part of it.
    #[error("the sandbox cannot be entered: cannot {what} (--sandbox=off runs the guest without it)")]
    Refused {
        /// What was attempted.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The table cannot be translated into a filter, which is an error in minivmm.
    #[error("the sandbox's table makes no filter for {role}: {why}; this is an error in minivmm")]
    Table {
        /// The role of the thread.
        role: &'static str,
        /// The library's error.
        why: String,
    },
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Refused { what, source }
}

struct Armed {
    mode: Mode,
    /// How many more descriptors than at the entry the process may open.
    spare_descriptors: u64,
    /// The filters of the roles that the process has.
    programs: Vec<(Role, BpfProgram)>,
}

/// Set once, by [`arm`].
static ARMED: OnceLock<Armed> = OnceLock::new();

/// The number of threads that have not entered yet.
static PENDING: Mutex<usize> = Mutex::new(0);
static CHANGED: Condvar = Condvar::new();

/// Limits the C library's allocator to one arena. It takes effect only before a second thread has allocated
/// anything. When the allocator returns memory of an arena other than the first, it opens a file in /proc,
/// which no thread may do in the sandbox. One arena is enough: nothing is allocated for a request.
pub fn one_arena() {
    // SAFETY: the call sets a number of the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// How many more descriptors a VM may open than it has when it enters: the guest can cause no open, but room for an
/// eventfd or two costs nothing.
pub const VM_SPARE_DESCRIPTORS: u64 = 16;

/// Prepares the process, whose threads have these `roles`. It may open `spare_descriptors` more than are open when
/// its main thread enters. Call it once, before any of these threads is started.
pub fn arm(mode: Mode, roles: &[Role], spare_descriptors: u64) -> Result<(), SandboxError> {
    if mode == Mode::Off {
        return Ok(());
    }
    one_arena();
    privileges::renounce_new().map_err(refused("renounce new privileges (no_new_privs)"))?;
    let program = |role: &Role| Ok((*role, filter::program(*role, mode)?));
    let programs = roles.iter().map(program).collect::<Result<_, SandboxError>>()?;
    trap::install().map_err(refused("handle SIGSYS"))?;
    // A second VM in one process keeps the settings of the first.
    let _ = ARMED.set(Armed { mode, spare_descriptors, programs });
    Ok(())
}

/// Stands for a thread that is to enter the sandbox. Whoever starts the thread creates it. When it is
/// dropped, nobody waits for the thread any more.
#[derive(Debug)]
pub struct SandboxEntry {
    role: Role,
}

impl SandboxEntry {
    /// Creates a entry for a thread with this role.
    pub fn new(role: Role) -> Self {
        *unpoisoned(PENDING.lock()) += 1;
        Self { role }
    }

    /// Gives up what this thread's role does not need. The guest has not run yet, so minivmm ends here if the
    /// kernel refuses.
    pub fn enter(self) {
        self.enter_removing(&[]);
    }

    /// Enters like [`SandboxEntry::enter`], but the thread may still remove files from these directories.
    pub fn enter_removing(self, directories: &[File]) {
        if let Some(armed) = ARMED.get()
            && let Err(error) = enter(self.role, armed, directories)
        {
            crate::terminal::restore();
            eprintln!("minivmm: {error}{}", cause(&error));
            std::process::exit(trap::EXIT_STATUS);
        }
    }
}

impl Drop for SandboxEntry {
    fn drop(&mut self) {
        *unpoisoned(PENDING.lock()) -= 1;
        CHANGED.notify_all();
    }
}

fn cause(error: &SandboxError) -> String {
    std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default()
}

/// Blocks until every thread has entered.
pub fn wait_for_all() {
    let mut pending = unpoisoned(PENDING.lock());
    while *pending > 0 {
        pending = unpoisoned(CHANGED.wait(pending));
    }
}

fn enter(role: Role, armed: &Armed, removing: &[File]) -> Result<(), SandboxError> {
    trap::this_thread_is(role);
    if armed.mode == Mode::On {
        ground::leave(removing)?;
        privileges::drop_capabilities().map_err(refused("drop this thread's capabilities"))?;
        if matches!(role, Role::Main | Role::Export) {
            privileges::limit(armed.spare_descriptors).map_err(refused("lower the process's limits"))?;
        }
    }
    let program = armed.programs.iter().find(|(of, _)| *of == role).map(|(_, program)| program.as_slice());
    let program = program.ok_or_else(|| SandboxError::Table {
        role: role.name(),
        why: "the process was not prepared for this role".to_owned(),
    })?;
    seccompiler::apply_filter(program).map_err(|error| SandboxError::Refused {
        what: "filter system calls (seccomp)",
        source: io::Error::other(error),
    })
}
