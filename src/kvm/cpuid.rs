//! CPUID: what KVM supports, minus what a guest must not have, with each CPU's place in the topology.
//!
//! Owns the edits, which are pure functions. Three are made once per machine. Features are withheld
//! (`withheld`). XSAVE's components are offered whole or not at all (`xsave`). The host's brand string is
//! inserted. One is made per CPU: it describes one package, with a core for every CPU and one thread per
//! core. Leaves that KVM makes for its guests (0x4000_0000 and up) pass unchanged.

mod brand;
mod withheld;
mod xsave;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::KvmError;

/// Leaf 1, ECX: the APIC timer has the TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the count of logical processors is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: all logical processors of the package are cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaves that number threads, cores and so on. They are generated anew or, for AMD's, removed.
const TOPOLOGY_LEAVES: [u32; 3] = [0xb, 0x1f, 0x8000_0026];
/// Level types in leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A CPU's place in the topology.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The number of the CPU, which is also its APIC id.
    pub id: u8,
    /// The number of CPUs.
    pub cpus: u8,
}

impl Place {
    /// Returns the number of APIC id bits that number the cores of the package.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// What KVM supports, queried once for all CPUs of a machine.
///
/// KVM_GET_SUPPORTED_CPUID reads the processor on which the caller happens to run. The processors of a hybrid
/// machine differ, but the CPUs of a guest must not.
#[derive(Debug)]
pub struct Supported {
    /// What every CPU gets, except for its place.
    leaves: Vec<kvm_cpuid_entry2>,
    deadline: bool,
}

impl Supported {
    /// Queries KVM.
    pub fn by(kvm: &Kvm) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| KvmError::Refused("the list of CPUID leaves", error))?;
        let leaves = offer(supported.as_slice(), brand::of_host());
        Ok(Self { leaves, deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// Sets the CPUID of `vcpu`. Returns `true` if the guest sees MTRRs.
    pub fn set_up(&self, vcpu: &VcpuFd, place: Place) -> Result<bool, KvmError> {
        let entries = adapt(&self.leaves, place, self.deadline);
        let has_mtrrs = entries.iter().any(|entry| entry.function == 1 && entry.edx & (1 << 12) != 0);
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| KvmError::Refused("so many CPUID leaves", kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&cpuid).map_err(|error| KvmError::Refused("the CPUID leaves", error))?;
        Ok(has_mtrrs)
    }
}

/// Returns what a guest gets of what KVM supports; it is the same on every CPU.
fn offer(supported: &[kvm_cpuid_entry2], brand: brand::Brand) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = supported.to_vec();
    withheld::withhold(&mut leaves);
    xsave::make_whole(&mut leaves);
    brand::put(&mut leaves, brand);
    leaves
}

/// Returns the leaves for one CPU.
fn adapt(supported: &[kvm_cpuid_entry2], place: Place, deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|leaf| !TOPOLOGY_LEAVES.contains(&leaf.function)).copied().collect();
    let amd = is_amd(&leaves);
    for leaf in &mut leaves {
        adapt_leaf(leaf, place, deadline);
        if amd {
            adapt_amd_leaf(leaf, place);
        }
    }
    let basic_max = leaves.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for function in [0xb, 0x1f] {
        if basic_max >= function {
            leaves.extend(extended_topology(function, place));
        }
    }
    leaves
}

fn adapt_leaf(leaf: &mut kvm_cpuid_entry2, place: Place, deadline: bool) {
    let cpus = u32::from(place.cpus);
    let id = u32::from(place.id);
    match leaf.function {
        1 => {
            leaf.ebx = (leaf.ebx & 0x0000_ffff) | (1_u32 << place.core_bits()).min(255) << 16 | id << 24;
            leaf.ecx = (leaf.ecx | HYPERVISOR) & !TSC_DEADLINE;
            leaf.ecx |= if deadline { TSC_DEADLINE } else { 0 };
            leaf.edx = (leaf.edx & !HTT) | if cpus > 1 { HTT } else { 0 };
        }
        // Caches (Intel): how many APIC ids share each, and how many ids the package has for cores. As in
        // leaf 1, unused ids are counted too.
        4 if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 7;
            let ids = 1_u32 << place.core_bits();
            let sharing = if level >= 3 { ids } else { 1 };
            leaf.eax = (leaf.eax & 0x3fff) | (sharing - 1) << 14 | (ids - 1).min(63) << 26;
        }
        _ => {}
    }
}

/// Adapts the numbers that AMD has in leaves which Intel reserves.
fn adapt_amd_leaf(leaf: &mut kvm_cpuid_entry2, place: Place) {
    let cpus = u32::from(place.cpus);
    let id = u32::from(place.id);
    match leaf.function {
        0x8000_0001 => leaf.ecx = (leaf.ecx & !CMP_LEGACY) | if cpus > 1 { CMP_LEGACY } else { 0 },
        // The number of cores, and the number of APIC id bits that number them.
        0x8000_0008 => leaf.ecx = (leaf.ecx & !0xf0ff) | (cpus - 1) | place.core_bits() << 12,
        // Caches, like leaf 4.
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 7;
            let sharing = if level >= 3 { cpus } else { 1 };
            leaf.eax = (leaf.eax & !0x03ff_c000) | (sharing - 1) << 14;
        }
        // APIC id, core id with one thread per core, one node.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Returns `true` if the vendor in leaf 0 is AMD, or Hygon, whose processors follow AMD's.
fn is_amd(leaves: &[kvm_cpuid_entry2]) -> bool {
    let starts = [*b"Auth", *b"Hygo"].map(u32::from_le_bytes);
    leaves.iter().any(|leaf| leaf.function == 0 && starts.contains(&leaf.ebx))
}

/// Returns leaf 0xb or 0x1f: a thread level with one thread, a core level with all cores, and the end.
fn extended_topology(function: u32, place: Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: u32::from(place.id),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, place.core_bits(), u32::from(place.cpus), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod models;

#[cfg(test)]
mod tests {
    use super::*;

    /// Leaf 1, ECX: x2APIC.
    const X2APIC: u32 = 1 << 21;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0xd, u32::from_le_bytes(*b"Auth"), 0, 0]),
            leaf(1, 0, [0, 0x1234_0800, X2APIC | TSC_DEADLINE, 0]),
            leaf(4, 0, [0xffff_c121, 1, 2, 3]),
            leaf(4, 3, [0xffff_c163, 1, 2, 3]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(0x8000_0026, 0, [9, 9, 9, 9]),
            leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
            leaf(0x8000_0001, 0, [0, 0, 1 << 22, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x70ff, 0]),
            leaf(0x8000_001e, 0, [7, 7, 7, 7]),
        ]
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| leaf.function == function && leaf.index == index).unwrap()
    }

    #[test]
    fn every_leaf_agrees_on_a_cpus_place() {
        for cpus in [1, 2, 3, 4, 254_u8] {
            for id in [0, cpus - 1] {
                let place = Place { id, cpus };
                let leaves = adapt(&supported(), place, true);
                let one = find(&leaves, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert!((one.ebx >> 16) & 0xff >= u32::from(cpus));
                assert_eq!(one.edx & HTT != 0, cpus > 1);
                assert_eq!(one.ebx & 0xffff, 0x0800, "the rest is KVM's");
                let core = find(&leaves, 0xb, 1);
                assert_eq!((core.ebx, core.edx), (u32::from(cpus), u32::from(id)));
                assert!(1_u32 << core.eax >= u32::from(cpus));
                assert_eq!(u32::from(id) >> core.eax, 0, "one package");
                assert_eq!(find(&leaves, 0xb, 0).ebx, 1, "one thread a core");
                assert_eq!(find(&leaves, 0xb, 2).ecx, 2, "the end");
                assert_eq!(find(&leaves, 0x8000_0008, 0).ecx & 0xff, u32::from(cpus) - 1);
                assert_eq!(find(&leaves, 0x8000_001e, 0).eax, u32::from(id));
                let ids = u32::from(cpus).next_power_of_two();
                assert_eq!(find(&leaves, 4, 3).eax >> 14 & 0xfff, ids - 1, "L3 is shared");
                assert_eq!(find(&leaves, 4, 3).eax >> 26, (ids - 1).min(63), "cores of the package");
                assert_eq!(find(&leaves, 4, 0).eax >> 14 & 0xfff, 0, "L1 is not");
                assert_eq!(find(&leaves, 4, 4).eax, 0, "no cache stays none");
                assert!(!leaves.iter().any(|leaf| leaf.function == 0x8000_0026));
            }
        }
    }

    #[test]
    fn intels_reserved_leaves_stay_as_they_are() {
        let mut intel = supported();
        intel[0].ebx = u32::from_le_bytes(*b"Genu");
        let leaves = adapt(&intel, Place { id: 1, cpus: 2 }, true);
        for function in [0x8000_0001, 0x8000_0008, 0x8000_001e] {
            assert_eq!(find(&leaves, function, 0), find(&intel, function, 0), "{function:#x}");
        }
    }

    #[test]
    fn deadline_is_by_its_capability_and_kvms_leaves_stay() {
        for deadline in [true, false] {
            let leaves = adapt(&supported(), Place { id: 0, cpus: 1 }, deadline);
            let one = find(&leaves, 1, 0);
            assert_eq!(one.ecx & TSC_DEADLINE != 0, deadline);
            assert_eq!(one.ecx & (HYPERVISOR | X2APIC), HYPERVISOR | X2APIC);
            assert_eq!(find(&leaves, 0x4000_0000, 0), leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]));
        }
    }

    #[test]
    fn topology_leaves_are_given_up_to_the_highest_basic_leaf_only() {
        let mut old = supported();
        old[0].eax = 7;
        let leaves = adapt(&old, Place { id: 0, cpus: 1 }, true);
        assert!(!leaves.iter().any(|leaf| leaf.function == 0xb || leaf.function == 0x1f));
        old[0].eax = 0x1f;
        let leaves = adapt(&old, Place { id: 0, cpus: 1 }, true);
        assert_eq!(leaves.iter().filter(|leaf| leaf.function == 0x1f).count(), 3);
    }
}
