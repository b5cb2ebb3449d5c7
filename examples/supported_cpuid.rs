//! Prints what this host's KVM lists as supported CPUID leaves, in the form of `tests/cpuid/*.txt`: one line
//! a leaf with its subleaf, KVM's flags and EAX, EBX, ECX, EDX.

use kvm_ioctls::Kvm;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let supported = Kvm::new()?.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    for leaf in supported.as_slice() {
        println!(
            "{:08x} {:x} {:x} {:08x} {:08x} {:08x} {:08x}",
            leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
        );
    }
    Ok(())
}
