//! minivmm: a minimal KVM hypervisor whose virtio-blk can be trusted.
//!
//! The subcommands that run no guest of their own (`top`, `log`, `crash`, `bench`, `study`) are another crate's,
//! minivmm-lab, which stands on this one.
//!
//! This is the map of the crate. `tests/tidy.rs` has who may use whom, and fails on anything else and on every
//! circle. The device itself, what it does to files and its guest memory are the crate [`minivmm_block`], most of
//! whose modules can be named here as if they were this crate's:
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | arguments, `--help`, exit statuses | |
//! | [`disk_options`] | the syntax of `--disk` | KVM |
//! | [`check`] | can this machine run Linux guests? | |
//! | [`hosts`] | where a Linux guest runs: here, or in the emulated host | devices |
//! | [`vmm`] | builds the machine in order, runs it, stops it in order | |
//! | [`job`] | a command for the guest: its archive, libraries, messages, status file | KVM, devices |
//! | [`terminal`] | the terminal's raw mode, its restoration, signals that stop the process | |
//! | [`stats`] | statistics of a run as JSON and text | how they are counted |
//! | [`vcpu`], [`kvm`] | the KVM_RUN loop, irqfd, ioeventfd, CPUID, MSRs | virtio, disks |
//! | [`boot`] | kernel, initrd, command line, zero page, CPU state, ACPI | devices' insides |
//! | [`bus`], [`devices`] | port and MMIO dispatch; serial, power, RTC | KVM |
//! | [`virtio`] | register core, mmio and pci transports | blocks, files |
//! | [`observe`] | what caches hold and the host's disk does, before and during a run | guests' internals, KVM |
//! | [`explain`] | describes what a disk will do, without doing it | KVM |
//! | [`console`] | virtio-console: ports, their control messages, the host's streams | KVM, transports |
//! | [`pci`] | configuration space, host bridge, MSI-X | virtio, KVM |
//! | [`sandbox`] | what every thread gives up before the guest runs | everything but the terminal |
//! | [`layout`] | the address map | everything |
//! | [`text`], [`program`] | wrapped lines; where the binaries are | everything |
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
