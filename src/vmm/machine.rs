//! What a built machine consists of.
//!
//! Owns the order in which it is dropped. [`super::build`] makes it, [`super::running`] runs it.

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::hvc::HvcEnd;
use super::job::JobEnd;
use crate::devices::console::{Panicked, Stopping};
use crate::devices::serial::SerialPort;
use crate::disks::OpenDisk;
use crate::mem::Ram;
use crate::observe::guest::GuestEnd;
use crate::vcpu::{Exits, Vcpu};
use crate::virtio::{Transport, TransportChoice, VirtioDevice};

/// Everything that lives as long as the VM.
pub struct Machine {
    /// The CPUs, until they are started.
    pub vcpus: Vec<Vcpu>,
    /// The virtio devices.
    pub transports: Vec<Arc<Mutex<dyn Transport>>>,
    /// The disks.
    pub disks: Vec<OpenDisk>,
    /// The serial port.
    pub serial: SerialEnd,
    /// What the command's launcher reports arrives here; taken when the machine runs.
    pub job: Option<JobEnd>,
    /// Our end of hvc0, if the terminal is one; taken when the machine runs.
    pub hvc: Option<HvcEnd>,
    /// Our end of the port that asks the guest for its view; taken when the observation begins.
    pub observed: Option<GuestEnd>,
    /// Counts the reasons why the CPUs left KVM_RUN.
    pub exits: Arc<Exits>,
    /// Set when the stop begins.
    pub stopping: Stopping,
    /// Declared after the CPUs and before the memory, so that it is dropped after the CPUs and before the
    /// memory it uses.
    pub(super) _vm: Arc<VmFd>,
    pub(super) _ram: Ram,
}

/// The main thread's end of the serial port.
#[derive(Clone)]
pub struct SerialEnd {
    /// The port itself.
    pub port: Arc<Mutex<SerialPort>>,
    /// Written when the guest has room for input again.
    pub wants_input: Arc<EventFd>,
    /// Set when the guest's output says that its kernel panicked.
    pub panicked: Panicked,
    /// Written when `panicked` is set.
    pub alarm: Arc<EventFd>,
}

/// A virtio device, and the transport that the guest uses for it.
pub type Planned = (Box<dyn VirtioDevice>, TransportChoice);
