//! The processor's name, leaves 0x8000_0002 to 0x8000_0004.
//!
//! Owns what these leaves show. KVM's list has zeroes there, and Linux then shows family and model ("06/3c").

use kvm_bindings::kvm_cpuid_entry2;

const LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
/// The leaf that holds the number of the last extended leaf.
const EXTENDED_MAX: u32 = 0x8000_0000;

/// The 48 bytes of the name, as the registers of the three leaves hold them.
pub type Brand = [[u32; 4]; 3];

/// Returns the host's name; zeroes if its processor has none.
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

/// Inserts `brand` if KVM's list has no name and the processor has such leaves.
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
