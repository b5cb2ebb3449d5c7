//! A virtual CPU: its thread's loop around KVM_RUN, from exit to action.
//!
//! Owns the decision what each exit means. Accesses go to the buses, whose devices answer with an outcome;
//! what follows from an outcome is `vmm`'s. Knows nothing of any device.

mod patience;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvm_bindings::{
    KVM_MP_STATE_UNINITIALIZED, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, Outcome};
use crate::kvm::failure::{Failure, Reason};
use crate::kvm::run_page::RunPage;
use crate::mem::Ram;
use patience::{Patience, Verdict};

/// What a vCPU needs to run.
pub struct Vcpu {
    /// The number of the CPU.
    pub id: u8,
    /// KVM's handle for the CPU.
    pub fd: VcpuFd,
    /// The page shared with KVM; whoever stops the CPU holds it too.
    pub page: Arc<RunPage>,
    /// The bus of the ports.
    pub ports: Arc<Bus>,
    /// The bus of the memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Guest memory, for the report of a failure.
    pub ram: Ram,
    /// `true` if this guest resets by a triple fault.
    pub triple_fault_resets: bool,
    /// Exit counters, shared by all CPUs.
    pub exits: Arc<Exits>,
}

/// Counts how often the guest's CPUs left KVM_RUN for user space, by reason. What KVM handles by itself (a
/// doorbell by ioeventfd, a timer, a page fault) is not counted.
#[derive(Debug, Default)]
pub struct Exits {
    /// Reads of memory-mapped registers.
    pub mmio_reads: AtomicU64,
    /// Writes of memory-mapped registers.
    pub mmio_writes: AtomicU64,
    /// Reads of ports.
    pub port_reads: AtomicU64,
    /// Writes of ports.
    pub port_writes: AtomicU64,
    /// All other exits. Signals that interrupt a CPU are not counted.
    pub others: AtomicU64,
}

impl Exits {
    fn count(&self, exit: &VcpuExit<'_>) {
        let counter = match exit {
            VcpuExit::MmioRead(..) => &self.mmio_reads,
            VcpuExit::MmioWrite(..) => &self.mmio_writes,
            VcpuExit::IoIn(..) => &self.port_reads,
            VcpuExit::IoOut(..) => &self.port_writes,
            _ => &self.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Why a vCPU stopped running.
#[derive(Debug)]
pub enum End {
    /// The machine is being stopped.
    Stopped,
    /// A device or KVM returned this outcome.
    Outcome(Outcome),
    /// KVM cannot run the vCPU any further.
    Failed(Box<Failure>),
}

/// What to do after an exit.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Continue,
    End(Outcome),
    Fail(Reason),
    /// Like `Fail`, with the details that KVM left in the shared page.
    FailInternal,
}

impl From<Outcome> for Action {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Continue => Self::Continue,
            outcome => Self::End(outcome),
        }
    }
}

impl Vcpu {
    /// Runs until the guest ends, KVM fails, or `stopping` returns `true` after a kick. A kick sets the
    /// shared page's `immediate_exit` and then sends a signal.
    pub fn run(&mut self, stopping: impl Fn() -> bool) -> End {
        let mut patience = Patience::default();
        while !stopping() {
            let action = match self.fd.run() {
                Ok(exit) => {
                    patience.reset();
                    self.exits.count(&exit);
                    act(exit, &self.page, &self.ports, &self.mmio)
                }
                Err(error) => match error.errno() {
                    // A signal arrived.
                    libc::EINTR => Action::Continue,
                    libc::EAGAIN => self.wait_after_eagain(&mut patience),
                    errno => Action::Fail(Reason::Run(errno)),
                },
            };
            match action {
                Action::Continue => {}
                Action::Fail(Reason::TripleFault) if self.triple_fault_resets => {
                    return End::Outcome(Outcome::Reset);
                }
                Action::End(outcome) => return End::Outcome(outcome),
                Action::Fail(reason) => return self.fail(Failure::new(self.id, reason, &self.fd, &self.ram)),
                Action::FailInternal => {
                    return self.fail(Failure::internal(self.id, &self.page, &self.fd, &self.ram));
                }
            }
        }
        End::Stopped
    }

    /// Pauses before KVM_RUN is called again, or fails if EAGAIN has lasted too long.
    fn wait_after_eagain(&self, patience: &mut Patience) -> Action {
        match patience.judge(Instant::now(), self.is_started()) {
            Verdict::Retry(pause) => {
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
                Action::Continue
            }
            Verdict::GiveUp => Action::Fail(Reason::Run(libc::EAGAIN)),
        }
    }

    /// Returns `false` for a CPU that still waits for another CPU's INIT.
    fn is_started(&self) -> bool {
        self.fd.get_mp_state().map_or(true, |state| state.mp_state != KVM_MP_STATE_UNINITIALIZED)
    }

    fn fail(&self, failure: Failure) -> End {
        End::Failed(Box::new(failure))
    }
}

/// Performs what an exit asks for, and returns what to do next.
fn act(exit: VcpuExit<'_>, page: &RunPage, ports: &Bus, mmio: &Bus) -> Action {
    match exit {
        VcpuExit::IoIn(port, data) => port_in(ports, port, data, page.port_width()),
        VcpuExit::IoOut(port, data) => port_out(ports, port, data, page.port_width()),
        VcpuExit::MmioRead(address, data) => {
            mmio.read(address, data);
            Action::Continue
        }
        VcpuExit::MmioWrite(address, data) => mmio.write(address, data).into(),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Action::End(Outcome::Shutdown),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Action::End(Outcome::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Action::End(Outcome::GuestPanic),
        // The interrupt controllers are in KVM, so HLT waits inside KVM; the other two need no action.
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => Action::Continue,
        VcpuExit::Shutdown => Action::Fail(Reason::TripleFault),
        VcpuExit::FailEntry(reason, cpu) => Action::Fail(Reason::FailEntry(reason, cpu)),
        VcpuExit::MemoryFault { gpa, .. } => Action::Fail(Reason::MemoryFault(gpa)),
        VcpuExit::InternalError => Action::FailInternal,
        other => Action::Fail(Reason::Unexpected(format!("{other:?}"))),
    }
}

/// Reads a port. A string instruction delivers several accesses of one width to one port.
fn port_in(ports: &Bus, port: u16, data: &mut [u8], width: usize) -> Action {
    for access in data.chunks_mut(width) {
        ports.read(u64::from(port), access);
    }
    log::trace!("port {port:#x} -> {data:x?} (width {width})");
    Action::Continue
}

/// Writes a port, as [`port_in`] reads it. No access follows the first one that ends the machine.
fn port_out(ports: &Bus, port: u16, data: &[u8], width: usize) -> Action {
    log::trace!("port {port:#x} <- {data:x?} (width {width})");
    data.chunks(width)
        .map(|access| ports.write(u64::from(port), access))
        .find(|outcome| *outcome != Outcome::Continue)
        .unwrap_or(Outcome::Continue)
        .into()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;

    #[derive(Default)]
    struct Recorder(Vec<Vec<u8>>);

    impl BusDevice for Recorder {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            self.0.push(vec![0; data.len()]);
            data.fill(u8::try_from(self.0.len()).unwrap());
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Outcome {
            self.0.push(data.to_vec());
            if data[0] == 9 { Outcome::Exit(9) } else { Outcome::Continue }
        }
    }

    #[test]
    fn a_string_instruction_is_as_many_accesses_as_it_makes() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut ports = Bus::new();
        ports.place("recorder", 0x10, 2, device.clone()).unwrap();
        let mut data = [0; 6];
        assert_eq!(port_in(&ports, 0x10, &mut data, 2), Action::Continue);
        assert_eq!(data, [1, 1, 2, 2, 3, 3]);
        device.lock().unwrap().0.clear();
        assert_eq!(port_out(&ports, 0x10, &[1, 2, 3], 1), Action::Continue);
        assert_eq!(port_out(&ports, 0x10, &[4, 9, 5], 1), Action::End(Outcome::Exit(9)));
        assert_eq!(device.lock().unwrap().0, [[1], [2], [3], [4], [9]]);
    }
}
