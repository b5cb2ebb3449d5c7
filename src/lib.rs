//! minivmm: a minimal KVM hypervisor whose virtio-blk can be trusted.
//!
//! The subcommands that run no guest of their own (`top`, `log`, `crash`, `bench`, `study`) are another crate's,
//! minivmm-lab, which stands on this one.
//!
//! This is the map of the crate. Dependencies point down the list, never up
//! (`tests/tidy.rs` enforces it by reading the `use crate::` lines):
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | arguments, `--help`, exit statuses | |
//! | [`check`] | can this machine run Linux guests? | |
//! | [`hosts`] | where a Linux guest runs: here, or in the emulated host | devices |
//! | [`vmm`] | builds the machine in order, runs it, stops it in order | |
//! | [`job`] | a command for the guest: its archive, libraries, messages, status file | KVM, devices |
//! | [`terminal`] | the terminal's raw mode, its restoration, signals that stop the process | |
//! | [`stats`] | statistics of a run as JSON and text | how they are counted |
//! | [`vcpu`], [`kvm`] | the KVM_RUN loop, irqfd, ioeventfd, CPUID, MSRs | virtio, disks |
//! | [`boot`] | kernel, initrd, command line, zero page, CPU state, ACPI | devices' insides |
//! | [`bus`], [`devices`] | port and MMIO dispatch; serial, power, RTC | KVM |
//! | [`virtio`] | device trait, register core, mmio and pci transports, virtqueues | blocks, files |
//! | [`observe`] | what caches hold and the host's disk does, before and during a run | guests' internals, KVM |
//! | [`explain`] | describes what a disk will do, without doing it | KVM |
//! | [`blk`] | virtio-blk: features, config space, requests, the worker | KVM, transports |
//! | [`console`] | virtio-console: ports, their control messages, the host's streams | KVM, transports |
//! | [`pci`] | configuration space, host bridge, MSI-X | virtio, KVM |
//! | [`disk`] | one host image: flags, locking, policy, engines, sticky error | virtio, KVM |
//! | [`sandbox`] | what every thread gives up before the guest runs | everything |
//! | [`files`] | which files are the same, who uses one, and every open for output | guests, disks |
//! | [`layout`], [`mem`] | the address map; guest memory and pieces of it | everything |
//! | [`ratelimit`], [`slab`], [`text`], [`program`], [`mutants`], [`sync`], [`doorbell`] | rate-limited logs; private numbers; wrapped lines; where the binaries are; deliberate mistakes; std's atomics and mutex, which tests may watch; how an eventfd is rung | everything |
//! | [`signals`] | signals that ask the process to end | everything |
//!
//! `docs/architecture.md` follows one write through these modules and back.

pub mod blk;
pub mod boot;
pub mod bus;
pub mod check;
pub mod cli;
pub mod console;
pub mod devices;
pub mod disk;
pub mod doorbell;
pub mod explain;
pub mod files;
pub mod hosts;
pub mod job;
pub mod kvm;
pub mod layout;
pub mod mem;
pub mod mutants;
pub mod observe;
pub mod pci;
pub mod program;
pub mod ratelimit;
pub mod sandbox;
pub mod signals;
pub mod slab;
pub mod stats;
pub mod sync;
pub mod terminal;
pub mod text;
pub mod vcpu;
pub mod virtio;
pub mod vmm;
