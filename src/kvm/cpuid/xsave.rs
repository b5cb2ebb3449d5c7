//! Leaf 0xd: the state components that XSAVE saves, offered whole or not at all.
//!
//! Owns which components and features belong together, and the sizes that follow. KVM filters components one
//! by one. If a process has no permission for AMX's tile data, Linux 5.17 to 6.3 still list its tile
//! configuration. A guest that enables what is listed then gets a #GP when it boots.

use kvm_bindings::kvm_cpuid_entry2;

use super::withheld::Register::{Eax, Ebx, Ecx, Edx};
use super::withheld::{self, Bits};

const LEAF: u32 = 0xd;
/// The size in bytes of the legacy region and the header, with which every XSAVE area begins.
const HEADER_END: u32 = 576;
/// The first component that has a subleaf: 0 and 1 (x87, SSE) are in the legacy region.
const FIRST_EXTENDED: u32 = 2;
const LEGACY: u64 = 0b11;
/// Subleaf 1, EAX: XSAVEC, XSAVES.
const COMPACTS: u32 = 1 << 1 | 1 << 3;
/// Subleaf of a component, ECX: the component is aligned to 64 bytes in the compacted form.
const ALIGNED: u32 = 1 << 1;

/// Components that are useful only together, and what CPUID says of the features that need them.
struct Group {
    /// The components of this group, as bits of XCR0 or IA32_XSS.
    components: u64,
    /// The components of other groups that this group needs.
    needs: u64,
    features: &'static [Bits],
    /// Leaves that describe only these features.
    leaves: &'static [u32],
}

/// Every known component. The others (trace, PASID, user interrupts, LBR, HWP, future ones) are withheld with
/// their features.
const GROUPS: [Group; 7] = [
    // AVX, and what is encoded like it (VEX, XOP).
    Group {
        components: 1 << 2,
        needs: 0,
        features: &[
            Bits(1, 0, Ecx, 1 << 12 | 1 << 28 | 1 << 29),
            Bits(7, 0, Ebx, 1 << 5),
            Bits(7, 0, Ecx, 1 << 9 | 1 << 10),
            Bits(7, 1, Eax, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 23),
            Bits(7, 1, Edx, 1 << 4 | 1 << 5 | 1 << 10),
            Bits(0x8000_0001, 0, Ecx, 1 << 11 | 1 << 16),
        ],
        leaves: &[],
    },
    // MPX.
    Group { components: 1 << 3 | 1 << 4, needs: 0, features: &[Bits(7, 0, Ebx, 1 << 14)], leaves: &[] },
    // AVX-512 and AVX10.
    Group {
        components: 1 << 5 | 1 << 6 | 1 << 7,
        needs: 1 << 2,
        features: &[
            Bits(7, 0, Ebx, 1 << 16 | 1 << 17 | 1 << 21 | 0b111 << 26 | 1 << 30 | 1 << 31),
            Bits(7, 0, Ecx, 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14),
            Bits(7, 0, Edx, 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23),
            Bits(7, 1, Eax, 1 << 5),
            Bits(7, 1, Edx, 1 << 19),
        ],
        leaves: &[0x24],
    },
    // Protection keys of user pages.
    Group { components: 1 << 9, needs: 0, features: &[Bits(7, 0, Ecx, 1 << 3)], leaves: &[] },
    // Shadow stacks and indirect branch tracking (IA32_XSS).
    Group {
        components: 1 << 11 | 1 << 12,
        needs: 0,
        features: &[Bits(7, 0, Ecx, 1 << 7), Bits(7, 0, Edx, 1 << 20)],
        leaves: &[],
    },
    // AMX, and faults on first use (XFD), which are offered only together with AMX. KVM lists the tile data
    // only to a process that has asked for it (ARCH_REQ_XCOMP_GUEST_PERM).
    Group {
        components: 1 << 17 | 1 << 18,
        needs: 0,
        features: &[
            Bits(7, 0, Edx, 1 << 22 | 1 << 24 | 1 << 25),
            Bits(7, 1, Eax, 1 << 21),
            Bits(7, 1, Edx, 1 << 8),
            Bits(LEAF, 1, Eax, 1 << 4),
        ],
        leaves: &[0x1d, 0x1e],
    },
    // APX.
    Group { components: 1 << 19, needs: 0, features: &[Bits(7, 1, Edx, 1 << 21)], leaves: &[0x29] },
];

/// Withholds every group of components that is not whole, and sets the sizes for what is left.
pub fn make_whole(leaves: &mut Vec<kvm_cpuid_entry2>) {
    let offered = (user(leaves) & !supervisor(leaves), supervisor(leaves));
    let described = described(leaves);
    let all = (offered.0 | offered.1) & (described | LEGACY);
    let mut whole = all & LEGACY;
    // Each group comes after the groups that it needs.
    for group in &GROUPS {
        let wanted = group.components | group.needs;
        if all & group.components == group.components && whole & group.needs == group.needs {
            whole |= group.components;
            continue;
        }
        log::debug!("XSAVE components {wanted:#x} are not all there: the guest gets none of their features");
        for leaf in leaves.iter_mut() {
            withheld::clear(leaf, group.features);
            if group.leaves.contains(&leaf.function) {
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
            }
        }
    }
    leaves.retain(|leaf| leaf.function != LEAF || leaf.index < FIRST_EXTENDED || has(whole, leaf.index));
    let (user, supervisor) = (offered.0 & whole, offered.1 & whole);
    let sizes = (standard_bytes(leaves, user), compacted_bytes(leaves, user | supervisor));
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF) {
        match leaf.index {
            0 => {
                (leaf.eax, leaf.edx) = halves(user);
                (leaf.ebx, leaf.ecx) = (sizes.0, sizes.0);
            }
            1 => {
                (leaf.ecx, leaf.edx) = halves(supervisor);
                leaf.ebx = if leaf.eax & COMPACTS == 0 { 0 } else { sizes.1 };
            }
            _ => {}
        }
    }
}

/// Returns the components that XCR0 may have.
fn user(leaves: &[kvm_cpuid_entry2]) -> u64 {
    subleaf(leaves, 0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
}

/// Returns the components that IA32_XSS may have.
fn supervisor(leaves: &[kvm_cpuid_entry2]) -> u64 {
    subleaf(leaves, 1).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.ecx))
}

/// Returns the components whose size is listed.
fn described(leaves: &[kvm_cpuid_entry2]) -> u64 {
    let described = leaves
        .iter()
        .filter(|leaf| leaf.function == LEAF && (FIRST_EXTENDED..64).contains(&leaf.index) && leaf.eax > 0);
    described.fold(0, |all, leaf| all | 1 << leaf.index)
}

fn subleaf(leaves: &[kvm_cpuid_entry2], index: u32) -> Option<&kvm_cpuid_entry2> {
    leaves.iter().find(|leaf| leaf.function == LEAF && leaf.index == index)
}

fn has(components: u64, index: u32) -> bool {
    components.checked_shr(index).is_some_and(|rest| rest & 1 != 0)
}

fn halves(components: u64) -> (u32, u32) {
    let [low, high] = [components & u64::from(u32::MAX), components >> 32];
    (u32::try_from(low).unwrap_or_default(), u32::try_from(high).unwrap_or_default())
}

/// Returns the length in bytes of an XSAVE area with these components, each at its fixed offset.
fn standard_bytes(leaves: &[kvm_cpuid_entry2], components: u64) -> u32 {
    let extended = (FIRST_EXTENDED..64).filter(|&index| has(components, index));
    let ends =
        extended.filter_map(|index| subleaf(leaves, index)).map(|leaf| leaf.ebx.saturating_add(leaf.eax));
    ends.fold(HEADER_END, u32::max)
}

/// Returns the length in bytes of an XSAVE area with these components, packed one after the other.
fn compacted_bytes(leaves: &[kvm_cpuid_entry2], components: u64) -> u32 {
    let extended = (FIRST_EXTENDED..64).filter(|&index| has(components, index));
    extended.filter_map(|index| subleaf(leaves, index)).fold(HEADER_END, |end, leaf| {
        let start = if leaf.ecx & ALIGNED == 0 { end } else { end.next_multiple_of(64) };
        start.saturating_add(leaf.eax)
    })
}
