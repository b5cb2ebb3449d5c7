//! What guests get on many processors. `tests/cpuid` has what KVM lists as supported on each: captured, or
//! written down from what the processor and that version of KVM are known to have.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use kvm_bindings::kvm_cpuid_entry2;

use super::withheld::{Bits, Register, WITHHELD};
use super::{Place, adapt, brand, offer};

/// What is expected of a model: the rows of the table that remove something from it, its XCR0 and IA32_XSS,
/// and the length of all their components in the standard and the compacted form.
struct Expected {
    model: &'static str,
    withheld: &'static [&'static str],
    xcr0: u64,
    xss: u64,
    bytes: (u32, u32),
}

const COUNTERS: &str = "performance counters";
const PT: &str = "Processor Trace";
const VMX: &str = "VMX, SMX";
const SVM: &str = "SVM, SKINIT";
const SEV: &str = "SME, SEV";

/// Makes a row of [`MODELS`].
const fn expected(
    model: &'static str,
    withheld: &'static [&'static str],
    xcr0: u64,
    xss: u64,
    bytes: (u32, u32),
) -> Expected {
    Expected { model, withheld, xcr0, xss, bytes }
}

const MODELS: &[Expected] = &[
    expected("sapphire-rapids-linux-6.1", &[VMX, COUNTERS, PT, "SGX", "TSX"], 0x2e7, 0, (0xa88, 0x988)),
    expected("granite-rapids", &[VMX, COUNTERS, PT], 0x2e7, 0, (0xa88, 0x988)),
    expected("granite-rapids-amx-permitted", &[VMX], 0x602e7, 0, (0x2b00, 0x2a00)),
    expected("diamond-rapids-in-part", &[VMX, COUNTERS], 0x207, 0, (0xa88, 0x348)),
    expected("skylake-client", &[VMX, COUNTERS, PT, "TSX"], 0x1f, 0, (0x440, 0x3c0)),
    expected("alder-lake", &[VMX, COUNTERS, PT], 0x207, 0, (0xa88, 0x348)),
    expected("skylake-x-without-xsave", &[VMX], 0, 0, (0x240, 0)),
    expected("penryn", &[VMX], 3, 0, (0x240, 0)),
    expected("zen2", &[SVM, COUNTERS], 7, 0, (0x340, 0x340)),
    expected("zen3-software-kvm", &[], 0xe7, 0, (0x980, 0)),
    expected("zen4", &[SVM, SEV, COUNTERS], 0x2e7, 0, (0x988, 0x988)),
    expected("zen5-shadow-stacks", &[SVM], 0x2e7, 0x1800, (0x988, 0x9b0)),
];

const BRAND: brand::Brand = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]];

fn directory() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cpuid")
}

fn supported(model: &str) -> Vec<kvm_cpuid_entry2> {
    let text = std::fs::read_to_string(directory().join(format!("{model}.txt"))).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let numbers: Vec<u32> =
                line.split_whitespace().map(|number| u32::from_str_radix(number, 16).unwrap()).collect();
            let [function, index, flags, eax, ebx, ecx, edx] = numbers[..] else { panic!("{model}: {line}") };
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        })
        .collect()
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).copied().unwrap_or_default()
}

/// Returns those of `bits` that are set.
fn set(leaves: &[kvm_cpuid_entry2], bits: &Bits) -> u32 {
    bits.register(&mut find(leaves, bits.0, bits.1)).map_or(0, |register| *register & bits.3)
}

fn is_zero(leaf: &kvm_cpuid_entry2) -> bool {
    leaf.eax | leaf.ebx | leaf.ecx | leaf.edx == 0
}

#[test]
fn every_capture_is_expected_something_of() {
    let files: BTreeSet<String> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(files, MODELS.iter().map(|expected| expected.model.to_owned()).collect());
}

#[test]
fn each_model_loses_what_is_withheld_and_nothing_else() {
    for expected in MODELS {
        let model = expected.model;
        let before = supported(model);
        let after = offer(&before, BRAND);
        let mut withheld = Vec::new();
        for row in &WITHHELD {
            let bits = row.bits.iter().any(|bits| set(&before, bits) != 0);
            let leaves = before.iter().any(|leaf| row.leaves.contains(&leaf.function) && !is_zero(leaf));
            if bits || leaves {
                withheld.push(row.name);
            }
            assert!(row.bits.iter().all(|bits| set(&after, bits) == 0), "{model}: {} is left", row.name);
            let left = after.iter().find(|leaf| row.leaves.contains(&leaf.function) && !is_zero(leaf));
            assert!(left.is_none(), "{model}: {left:?} is left");
        }
        assert_eq!(withheld, expected.withheld, "{model}");
        // The leaves that no edit has a reason to touch are unchanged.
        for leaf in &before {
            let untouched = [0, 2, 4, 0xb, 0x4000_0000, 0x4000_0001, 0x8000_0000, 0x8000_0005, 0x8000_0006]
                .contains(&leaf.function);
            assert!(!untouched || find(&after, leaf.function, leaf.index) == *leaf, "{model}: {leaf:?}");
        }
    }
}

#[test]
fn xsave_components_are_whole_and_their_sizes_agree_on_each_model() {
    for Expected { model, xcr0, xss, bytes, .. } in MODELS {
        let leaves = offer(&supported(model), BRAND);
        let (user, more) = (find(&leaves, 0xd, 0), find(&leaves, 0xd, 1));
        assert_eq!((user.eax, user.edx), (u32::try_from(*xcr0).unwrap(), 0), "{model}: XCR0");
        assert_eq!((more.ecx, more.edx), (u32::try_from(*xss).unwrap(), 0), "{model}: IA32_XSS");
        assert_eq!((user.ebx, user.ecx, more.ebx), (bytes.0, bytes.0, bytes.1), "{model}: sizes");
        let described: u64 = leaves
            .iter()
            .filter(|leaf| leaf.function == 0xd && leaf.index > 1)
            .map(|leaf| 1 << leaf.index)
            .sum();
        assert_eq!(described, (xcr0 | xss) & !3, "{model}: subleaves");
    }
}

#[test]
fn amx_is_given_whole_or_not_at_all() {
    let amx = [
        Bits(7, 0, Register::Edx, 1 << 22 | 1 << 24 | 1 << 25),
        Bits(7, 1, Register::Eax, 1 << 21),
        Bits(7, 1, Register::Edx, 1 << 8),
        Bits(0xd, 1, Register::Eax, 1 << 4),
    ];
    for (model, permitted) in [
        ("sapphire-rapids-linux-6.1", false),
        ("granite-rapids", false),
        ("diamond-rapids-in-part", false),
        ("granite-rapids-amx-permitted", true),
    ] {
        let leaves = offer(&supported(model), BRAND);
        let given = set(&leaves, &amx[0]) == amx[0].3 && set(&leaves, &amx[3]) != 0;
        let none = amx.iter().all(|bits| set(&leaves, bits) == 0);
        assert_eq!((given, none), (permitted, !permitted), "{model}");
        let described = leaves.iter().any(|leaf| [0x1d, 0x1e].contains(&leaf.function) && !is_zero(leaf));
        assert_eq!(described, permitted, "{model}: leaves 0x1d and 0x1e");
    }
}

#[test]
fn features_go_with_their_components_and_stay_with_them() {
    let features = |model: &str, bits: Bits| set(&offer(&supported(model), BRAND), &bits) != 0;
    let avx512 = Bits(7, 0, Register::Ebx, 1 << 16);
    let avx10 = Bits(7, 1, Register::Edx, 1 << 19);
    let apx = Bits(7, 1, Register::Edx, 1 << 21);
    let shadow_stacks = Bits(7, 0, Register::Ecx, 1 << 7);
    let mpx = Bits(7, 0, Register::Ebx, 1 << 14);
    let avx = Bits(1, 0, Register::Ecx, 1 << 28);
    for (model, bits, there) in [
        ("diamond-rapids-in-part", avx512, false),
        ("diamond-rapids-in-part", avx10, false),
        ("diamond-rapids-in-part", apx, false),
        ("diamond-rapids-in-part", shadow_stacks, false),
        ("diamond-rapids-in-part", avx, true),
        ("sapphire-rapids-linux-6.1", avx512, true),
        ("zen4", avx512, true),
        ("zen5-shadow-stacks", shadow_stacks, true),
        ("skylake-client", mpx, true),
        ("alder-lake", avx, true),
        // Half-precision conversions are encoded like AVX, and this host lists them without AVX.
        ("skylake-x-without-xsave", Bits(1, 0, Register::Ecx, 1 << 29), false),
    ] {
        assert_eq!(features(model, bits), there, "{model}: {bits:?}");
    }
    // Without XSAVE, no feature that needs it is offered.
    let mut old = supported("alder-lake");
    old.retain(|leaf| leaf.function != 0xd);
    assert_eq!(set(&offer(&old, BRAND), &avx), 0);
    // A component without its offset and size does not count.
    let mut odd = supported("alder-lake");
    odd.retain(|leaf| (leaf.function, leaf.index) != (0xd, 9));
    let odd = offer(&odd, BRAND);
    assert_eq!((find(&odd, 0xd, 0).eax, find(&odd, 0xd, 0).ecx), (7, 0x340));
    assert_eq!(set(&odd, &Bits(7, 0, Register::Ecx, 1 << 3)), 0, "protection keys");
}

#[test]
fn the_hosts_name_is_put_where_kvm_has_none() {
    for Expected { model, .. } in MODELS {
        let leaves = offer(&supported(model), BRAND);
        for (function, wanted) in (0x8000_0002..).zip(BRAND) {
            let leaf = find(&leaves, function, 0);
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], wanted, "{model}");
            assert_eq!(leaves.iter().filter(|leaf| leaf.function == function).count(), 1, "{model}");
        }
    }
    let mut named = supported("zen4");
    named.iter_mut().filter(|leaf| leaf.function == 0x8000_0003).for_each(|leaf| leaf.ecx = 7);
    assert_eq!(find(&offer(&named, BRAND), 0x8000_0002, 0).eax, 0, "KVM's own name stays");
    let mut old = supported("zen4");
    old.retain(|leaf| leaf.function < 0x8000_0000);
    assert_eq!(find(&offer(&old, BRAND), 0x8000_0002, 0).eax, 0, "no extended leaves, no name");
}

#[test]
fn all_leaves_about_topology_agree_on_each_model() {
    for Expected { model, .. } in MODELS {
        let supported = offer(&supported(model), BRAND);
        let is_amd = find(&supported, 0, 0).ebx == u32::from_le_bytes(*b"Auth");
        for cpus in [1, 2, 3, 8, 254_u8] {
            let ids = u32::from(cpus).next_power_of_two();
            for id in [0, cpus - 1] {
                let what = format!("{model}: CPU {id} of {cpus}");
                let leaves = adapt(&supported, Place { id, cpus }, true);
                let one = find(&leaves, 1, 0);
                assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xff), (id.into(), ids.min(255)), "{what}");
                for function in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= find(&leaves, 0, 0).eax) {
                    let (thread, core) = (find(&leaves, function, 0), find(&leaves, function, 1));
                    assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, id.into()), "{what}");
                    assert_eq!((1 << core.eax, core.ebx, core.edx), (ids, cpus.into(), id.into()), "{what}");
                }
                for cache in leaves.iter().filter(|leaf| leaf.function == 4 && leaf.eax & 0x1f != 0) {
                    let sharing = if cache.eax >> 5 & 7 >= 3 { ids } else { 1 };
                    assert_eq!(cache.eax >> 14 & 0xfff, sharing - 1, "{what}: {cache:?}");
                    assert_eq!(cache.eax >> 26, (ids - 1).min(63), "{what}: {cache:?}");
                }
                if is_amd {
                    let size = find(&leaves, 0x8000_0008, 0).ecx;
                    assert_eq!((size & 0xff, 1 << (size >> 12 & 15)), (u32::from(cpus) - 1, ids), "{what}");
                    let own = find(&leaves, 0x8000_001e, 0);
                    assert_eq!((own.eax, own.ebx, own.ecx), (id.into(), id.into(), 0), "{what}");
                }
            }
        }
    }
}

/// Returns the table of `docs/reference/cpuid.md`, as the code has it.
fn table() -> String {
    let mut table = String::from("| withheld | where CPUID has it | why |\n|---|---|---|\n");
    for row in &WITHHELD {
        let mut places: Vec<String> = row.leaves.iter().map(|leaf| format!("leaf {leaf:#x}")).collect();
        for Bits(leaf, subleaf, register, bits) in row.bits {
            let subleaf = if *subleaf == 0 { String::new() } else { format!(".{subleaf}") };
            places.push(format!("{leaf:#x}{subleaf} {}{}", name(*register), numbers(*bits)));
        }
        let _ = writeln!(table, "| {} | {} | {} |", row.name, places.join("; "), row.reason);
    }
    table
}

fn name(register: Register) -> String {
    format!("{register:?}").to_uppercase()
}

/// Lists the numbers of the set bits or, if most are set, of those that are not.
fn numbers(bits: u32) -> String {
    let list = |bits: u32| {
        let set = (0..32).filter(|bit| bits & 1 << bit != 0);
        set.map(|bit| bit.to_string()).collect::<Vec<_>>().join(", ")
    };
    match bits.count_ones() {
        32 => String::new(),
        17.. => format!(" but {}", list(!bits)),
        _ => format!(" {}", list(bits)),
    }
}

#[test]
fn the_docs_have_the_table() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/cpuid.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    assert!(docs.contains(&table()), "docs/reference/cpuid.md should have:\n{}", table());
}
