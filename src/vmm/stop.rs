//! The orderly stop: vCPUs, then the devices' I/O.
//!
//! Owns the wait for each. What the disks' own end is, and the limits, belong to [`crate::disks`].

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::machine::Machine;
use crate::disks::end::{Ender, Patience, StopError, in_flight, wait_until};
use crate::kvm::run_page::RunPage;
use crate::signals::Signals;
use crate::sync::unpoisoned;

/// How often a vCPU's thread is kicked again: the signal may arrive just before a system call.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// A vCPU's thread, and the means to stop it.
pub struct VcpuThread {
    /// The thread.
    pub thread: JoinHandle<()>,
    /// The page that the vCPU shares with KVM.
    pub page: Arc<RunPage>,
}

/// Stops the vCPUs. The caller has already set the flag that they check.
pub fn stop_vcpus(threads: &[VcpuThread], patience: Patience, signals: &Signals) -> Result<(), StopError> {
    let mut kicked: Option<Instant> = None;
    let done = || {
        if kicked.is_none_or(|at| at.elapsed() >= KICK_AGAIN) {
            kicked = Some(Instant::now());
            for vcpu in threads.iter().filter(|vcpu| !vcpu.thread.is_finished()) {
                vcpu.page.set_immediate_exit();
                // The signal is not needed if the thread has ended meanwhile.
                let _ = vcpu.thread.kill(SIGRTMIN());
            }
        }
        threads.iter().all(|vcpu| vcpu.thread.is_finished())
    };
    wait_until(done, || "the guest's CPUs".into(), Some(patience.drain), signals)
}

/// Stops every device. When this returns without an error, no I/O is in flight.
pub fn drain(
    ender: &Ender,
    machine: &Machine,
    patience: Patience,
    signals: &Signals,
) -> Result<(), StopError> {
    let mine = machine.transports.clone();
    let mut work = ender.begin(move || {
        for transport in &mine {
            unpoisoned(transport.lock()).stop();
        }
    });
    wait_until(|| work.is_finished(), || in_flight(&machine.disks), Some(patience.drain), signals)
}
