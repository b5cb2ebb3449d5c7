//! The threads of the disks: each enters the sandbox before its work.
//!
//! Owns which role of the sandbox a disk's thread has. The disks themselves know no sandbox.

use std::io;
use std::thread::{Builder, JoinHandle};

use minivmm_block::threads::{ThreadKind, Threads};

use crate::sandbox::{Role, SandboxEntry};

/// Starts a disk's threads so that no CPU runs before each of them has entered the sandbox.
#[derive(Debug, Clone, Copy)]
pub struct SandboxedThreads;

impl Threads for SandboxedThreads {
    fn spawn(
        &self,
        kind: ThreadKind,
        builder: Builder,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        let entry = SandboxEntry::new(match kind {
            ThreadKind::Worker => Role::Worker,
            ThreadKind::Delays => Role::Delays,
        });
        builder.spawn(move || {
            entry.enter();
            body();
        })
    }
}
