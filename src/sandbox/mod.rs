//! The sandbox: what every thread of a VM gives up before its guest executes an instruction.
//!
//! Owns the order. [`arm`] prepares the process before its first thread is started; each thread, whose
//! [`Ticket`] names its [`Role`], gives up its own part and says so; no CPU runs before all have
//! ([`wait_for_all`]). Without [`arm`], or with `--sandbox=off`, nothing of it happens: devices in tests
//! have threads too.
//!
//! What is given up: privileges that a program could bring ([`privileges`]), every path, TCP port and
//! process outside ([`ground`]: Landlock), and every system call that [`roles`] does not have for that
//! thread ([`filter`]: seccomp; [`trap`] names what is not). `docs/security.md` is its description.

pub mod filter;
pub mod ground;
pub mod privileges;
pub mod roles;
pub mod trap;

use std::io;
use std::sync::{Condvar, Mutex, OnceLock};

use seccompiler::BpfProgram;

use crate::sync::unpoisoned;

pub use roles::Role;

/// What `--sandbox` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A forbidden call ends minivmm, and is named.
    On,
    /// A forbidden call is named, once for each thread's role, and made all the same; nothing else is given up.
    Log,
    /// Nothing is given up.
    Off,
}

impl Mode {
    /// All of them, with the names that `--sandbox` has for them.
    pub const ALL: [(&'static str, Mode); 3] = [("on", Mode::On), ("log", Mode::Log), ("off", Mode::Off)];

    /// By its name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refuses a part of it.
    #[error("the sandbox cannot be entered: cannot {what} (--sandbox=off runs the guest without it)")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A filter cannot be made of the table: an error of ours.
    #[error("the sandbox's table makes no filter for {role}: {why}; this is an error in minivmm")]
    Table {
        /// For which thread.
        role: &'static str,
        /// As the library says it.
        why: String,
    },
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Refused { what, source }
}

struct Armed {
    mode: Mode,
    /// By role.
    programs: Vec<BpfProgram>,
}

/// Set once, by [`arm`].
static ARMED: OnceLock<Armed> = OnceLock::new();

/// Threads that have not entered yet.
static PENDING: Mutex<usize> = Mutex::new(0);
static CHANGED: Condvar = Condvar::new();

/// Keeps the C library's allocator to one arena; takes effect only before a second thread has allocated anything. The
/// allocator opens a file of /proc when it gives back memory of an arena that is not the first, which no thread may in
/// the sandbox. One arena is enough: nothing is allocated for a request.
pub fn one_arena() {
    // SAFETY: sets a number of the allocator's.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Prepares the process: to be called once, before any thread of the VM is started.
pub fn arm(mode: Mode) -> Result<(), SandboxError> {
    if mode == Mode::Off {
        return Ok(());
    }
    one_arena();
    privileges::renounce_new().map_err(refused("renounce new privileges (no_new_privs)"))?;
    let programs = Role::ALL.iter().map(|role| filter::program(*role, mode)).collect::<Result<_, _>>()?;
    trap::install().map_err(refused("handle SIGSYS"))?;
    // A second VM in one process has the first one's.
    let _ = ARMED.set(Armed { mode, programs });
    Ok(())
}

/// A thread that is to enter. Made by whoever starts the thread; dropped, nobody waits for it.
#[derive(Debug)]
pub struct Ticket {
    role: Role,
}

impl Ticket {
    /// For a thread that does this.
    pub fn new(role: Role) -> Self {
        *unpoisoned(PENDING.lock()) += 1;
        Self { role }
    }

    /// Gives up what this thread's role does not need. The guest has not run yet, so a kernel that
    /// refuses ends minivmm here.
    pub fn enter(self) {
        if let Some(armed) = ARMED.get()
            && let Err(error) = enter(self.role, armed)
        {
            crate::terminal::restore();
            eprintln!("minivmm: {error}{}", cause(&error));
            std::process::exit(trap::EXIT_STATUS);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        *unpoisoned(PENDING.lock()) -= 1;
        CHANGED.notify_all();
    }
}

fn cause(error: &SandboxError) -> String {
    std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default()
}

/// Returns when no thread is left that has not entered.
pub fn wait_for_all() {
    let mut pending = unpoisoned(PENDING.lock());
    while *pending > 0 {
        pending = unpoisoned(CHANGED.wait(pending));
    }
}

fn enter(role: Role, armed: &Armed) -> Result<(), SandboxError> {
    trap::this_thread_is(role);
    if armed.mode == Mode::On {
        ground::leave()?;
        privileges::drop_capabilities().map_err(refused("drop this thread's capabilities"))?;
        if role == Role::Main {
            privileges::limit().map_err(refused("lower the process's limits"))?;
        }
    }
    let program = armed.programs.get(role as usize).map_or(&[][..], Vec::as_slice);
    seccompiler::apply_filter(program).map_err(|error| SandboxError::Refused {
        what: "filter system calls (seccomp)",
        source: io::Error::other(error),
    })
}
