//! The features that KVM offers and the guest does not get.
//!
//! Owns the table, which `docs/reference/cpuid.md` shows; a test compares the two. KVM_GET_SUPPORTED_CPUID
//! lists what KVM *can* provide. Some of it enlarges what a hostile guest can attack. Some needs set-up by
//! the VMM that minivmm does not do, so a guest that uses it fails.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Bits of one register: leaf, subleaf, register, mask.
#[derive(Debug, Clone, Copy)]
pub struct Bits(pub u32, pub u32, pub Register, pub u32);

impl Bits {
    /// Returns the register in `leaf`, or `None` if these bits belong to another leaf.
    pub fn register<'a>(&self, leaf: &'a mut kvm_cpuid_entry2) -> Option<&'a mut u32> {
        if (leaf.function, leaf.index) != (self.0, self.1) {
            return None;
        }
        Some(match self.2 {
            Eax => &mut leaf.eax,
            Ebx => &mut leaf.ebx,
            Ecx => &mut leaf.ecx,
            Edx => &mut leaf.edx,
        })
    }
}

/// A row of the table: a feature, where CPUID shows it, and why the guest does not get it.
#[derive(Debug)]
pub struct Withheld {
    /// The feature's name.
    pub name: &'static str,
    /// The bits that are cleared.
    pub bits: &'static [Bits],
    /// Leaves that are cleared: every register of every subleaf.
    pub leaves: &'static [u32],
    /// Why the guest does not get it.
    pub reason: &'static str,
}

/// Everything that is withheld on every host. XSAVE components are in `xsave`.
pub const WITHHELD: [Withheld; 15] = [
    Withheld {
        name: "VMX, SMX",
        bits: &[Bits(1, 0, Ecx, 1 << 5 | 1 << 6)],
        leaves: &[],
        reason: "nested virtualization is the part of KVM with the most code that a hostile guest can reach",
    },
    Withheld {
        name: "SVM, SKINIT",
        bits: &[Bits(0x8000_0001, 0, Ecx, 1 << 2 | 1 << 12)],
        leaves: &[0x8000_000a],
        reason: "the same on AMD and Hygon",
    },
    Withheld {
        name: "SME, SEV",
        bits: &[],
        leaves: &[0x8000_001f, 0x8000_0025],
        reason: "only a guest that was launched with a key may use them",
    },
    Withheld {
        name: "performance counters",
        bits: &[
            Bits(1, 0, Ecx, 1 << 2 | 1 << 4 | 1 << 15),
            Bits(1, 0, Edx, 1 << 21),
            Bits(7, 0, Edx, 1 << 19),
            Bits(7, 1, Eax, 1 << 8),
            Bits(0x8000_0001, 0, Ecx, 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28),
        ],
        leaves: &[0xa, 0x1c, 0x23, 0x8000_001b, 0x8000_0022],
        reason: "the host's perf needs the counters, and a guest could measure its neighbours with them",
    },
    Withheld {
        name: "Processor Trace",
        bits: &[Bits(7, 0, Ebx, 1 << 25)],
        leaves: &[0x14],
        reason: "a guest could only use it where the host gives up its own",
    },
    Withheld {
        name: "SGX",
        bits: &[Bits(7, 0, Ebx, 1 << 2), Bits(7, 0, Ecx, 1 << 30), Bits(7, 0, Edx, 1 << 1)],
        leaves: &[0x12],
        reason: "minivmm gives the guest no enclave memory (/dev/sgx_vepc)",
    },
    Withheld {
        name: "TSX",
        bits: &[Bits(7, 0, Ebx, 1 << 4 | 1 << 11), Bits(7, 0, Edx, 1 << 11 | 1 << 13 | 1 << 16)],
        leaves: &[],
        reason: "aborted transactions can leak other programs' data (TAA); Linux switches them off by default",
    },
    Withheld {
        name: "MONITOR, MWAIT, MWAITX",
        bits: &[Bits(1, 0, Ecx, 1 << 3), Bits(0x8000_0001, 0, Ecx, 1 << 29)],
        leaves: &[5],
        reason: "KVM executes them as no operation, so an idle guest would spin",
    },
    Withheld {
        name: "power and heat",
        bits: &[
            Bits(1, 0, Ecx, 1 << 7 | 1 << 8),
            Bits(1, 0, Edx, 1 << 22 | 1 << 29 | 1 << 31),
            // All but ARAT: the APIC timer runs in every idle state.
            Bits(6, 0, Eax, !(1 << 2)),
            Bits(6, 0, Ebx, u32::MAX),
            Bits(6, 0, Ecx, u32::MAX),
            Bits(6, 0, Edx, u32::MAX),
            // All but the invariant TSC.
            Bits(0x8000_0007, 0, Edx, !(1 << 8)),
        ],
        leaves: &[],
        reason: "KVM does not have the MSRs (HWP, thermal, SpeedStep, turbo)",
    },
    Withheld {
        name: "hybrid processors",
        bits: &[Bits(7, 0, Edx, 1 << 15)],
        leaves: &[0x1a],
        reason: "a guest's CPU may run on every core of the host, so all must look alike",
    },
    Withheld {
        name: "resource control",
        bits: &[Bits(7, 0, Ebx, 1 << 12 | 1 << 15), Bits(0x8000_0008, 0, Ebx, 1 << 6)],
        leaves: &[0xf, 0x10, 0x8000_0020],
        reason: "the host divides its caches and memory bandwidth, not the guest",
    },
    Withheld {
        name: "key locker, PASID, user interrupts, PCONFIG",
        bits: &[Bits(7, 0, Ecx, 1 << 23 | 1 << 29), Bits(7, 0, Edx, 1 << 5 | 1 << 18)],
        leaves: &[0x19, 0x1b, 0x20],
        reason: "KVM does not keep their state for a guest",
    },
    Withheld {
        name: "APIC extensions, watchdog, LWP",
        bits: &[Bits(0x8000_0001, 0, Ecx, 1 << 3 | 1 << 13 | 1 << 15)],
        leaves: &[0x8000_001c],
        reason: "KVM does not emulate them",
    },
    Withheld {
        name: "NUMA nodes of the package",
        bits: &[Bits(0x8000_0001, 0, Ecx, 1 << 19)],
        leaves: &[],
        reason: "the guest has one node, and KVM does not have the node MSR",
    },
    Withheld { name: "TDX", bits: &[], leaves: &[0x21], reason: "the guest is not a trust domain" },
];

/// Clears everything in [`WITHHELD`], and logs which of it KVM had offered.
pub fn withhold(leaves: &mut [kvm_cpuid_entry2]) {
    for row in &WITHHELD {
        let mut offered = false;
        for leaf in leaves.iter_mut() {
            let before = *leaf;
            if row.leaves.contains(&leaf.function) {
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
            }
            clear(leaf, row.bits);
            offered |= *leaf != before;
        }
        if offered {
            log::debug!("the guest does not get {}: {}", row.name, row.reason);
        }
    }
}

/// Clears those of `bits` that belong to this leaf.
pub fn clear(leaf: &mut kvm_cpuid_entry2, bits: &[Bits]) {
    for bits in bits {
        if let Some(register) = bits.register(leaf) {
            *register &= !bits.3;
        }
    }
}
