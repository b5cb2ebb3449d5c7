//! minivmm: a minimal KVM hypervisor whose virtio-blk can be trusted.
//!
//! The subcommands that run no guest of their own (`top`, `log`, `crash`, `bench`, `study`) are in the crate
//! minivmm-lab, and `export` is in minivmm-export; both depend on this one.
//!
//! This table is the map of the crate. `tests/tidy.rs` has which module may use which, and fails on any other use
//! and on every cycle. The disk's device, what it does to files, and guest memory are in the crate
//! [`minivmm_block`]; this crate re-exports most of its modules.
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | arguments, `--help`, exit statuses | |
//! | [`disk_options`] | the syntax of `--disk` | KVM |
//! | [`disks`] | a process's disks: opened, watched, reported, closed | KVM, devices |
//! | [`check`] | can this machine run Linux guests? | |
//! | [`hosts`] | where a Linux guest runs: here, or in the emulated host | devices |
//! | [`vmm`] | builds the machine in order, runs it, stops it in order | |
//! | [`job`] | a command for the guest: its archive, libraries, messages, status file | KVM, devices |
//! | [`terminal`] | the terminal's raw mode, its restoration, signals that stop the process | |
//! | [`stats`] | statistics of a run as JSON and text | how they are counted |
//! | [`vcpu`] | the KVM_RUN loop | virtio, disks |
//! | [`kvm`] | the VM's memory, irqfd, ioeventfd, CPUID, MSRs | virtio, disks |
//! | [`boot`] | kernel, initrd, command line, zero page, CPU state, ACPI | devices' insides |
//! | [`bus`] | port and MMIO dispatch | KVM |
//! | [`devices`] | serial, power, RTC | KVM |
//! | [`virtio`] | register core, mmio and pci transports | blocks, files |
//! | [`observe`] | what caches hold and what the host's disk does, before and during a run | guests' internals, KVM |
//! | [`explain`] | describes what a disk will do, without doing it | KVM |
//! | [`console`] | virtio-console: ports, their control messages, the host's streams | KVM, transports |
//! | [`pci`] | configuration space, host bridge, MSI-X | virtio, KVM |
//! | [`sandbox`] | what every thread gives up before the guest runs | everything but the terminal |
//! | [`layout`] | the address map | everything |
//! | [`text`] | wrapped lines | everything |
//! | [`program`] | where the two binaries are, and how one execs the other | everything |
//! | [`signals`] | signals that ask the process to end | everything |
//!
//! `docs/architecture.md` follows one write through these modules and back.

pub use minivmm_block::{blk, disk, doorbell, files, mem, ratelimit, slab, sync, warn_limited};

pub mod boot;
pub mod bus;
pub mod check;
pub mod cli;
pub mod console;
pub mod devices;
pub mod disk_options;
pub mod disks;
pub mod explain;
pub mod hosts;
pub mod job;
pub mod kvm;
pub mod layout;
pub mod observe;
pub mod pci;
pub mod program;
pub mod sandbox;
pub mod signals;
pub mod stats;
pub mod terminal;
pub mod text;
pub mod vcpu;
pub mod virtio;
pub mod vmm;
