//! The processor's name, leaves 0x8000_0002 to 0x8000_0004.
//!
//! KVM's list has zeroes there, and Linux then shows family and model ("06/3c").

use kvm_bindings::kvm_cpuid_entry2;

const LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
/// Which extended leaf is the last.
const EXTENDED_MAX: u32 = 0x8000_0000;

/// 48 bytes as the registers of the three leaves have them.
pub type Brand = [[u32; 4]; 3];

/// The host's own; zeroes where its processor has no name.
pub fn of_host() -> Brand {
    if host(EXTENDED_MAX)[0] < LEAVES[2] {
        return Brand::default();
    }
    LEAVES.map(host)
}

fn host(leaf: u32) -> [u32; 4] {
    #[allow(unused_unsafe, reason = "newer compilers know it to be safe")]
    // SAFETY: every CPU that this is built for (x86-64) has the instruction.
    let said = unsafe { std::arch::x86_64::__cpuid(leaf) };
    [said.eax, said.ebx, said.ecx, said.edx]
}

/// Puts `brand` where KVM says nothing, on processors that have such leaves.
pub fn put(leaves: &mut Vec<kvm_cpuid_entry2>, brand: Brand) {
    let max = leaves.iter().find(|leaf| leaf.function == EXTENDED_MAX).map_or(0, |leaf| leaf.eax);
    let named = leaves
        .iter()
        .any(|leaf| LEAVES.contains(&leaf.function) && leaf.eax | leaf.ebx | leaf.ecx | leaf.edx != 0);
    if max < LEAVES[2] || named {
        return;
    }
    leaves.retain(|leaf| !LEAVES.contains(&leaf.function));
    leaves.extend(LEAVES.into_iter().zip(brand).map(|(function, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }));
}
