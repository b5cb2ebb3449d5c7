//! Kernel parameters with which Linux does not find, or cannot use, what this machine has.
//!
//! Owns what each of them costs on this machine, so that the run reports it before the guest hangs. The
//! sentence names the parameter, the consequence, and what to do. `docs/reference/kernel-parameters.md` lists
//! the kernels that were tried.

use super::cmdline;

/// The transports of the guest's devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Devices {
    /// `true` if a device is behind PCI.
    pub pci: bool,
    /// `true` if a device is behind virtio-mmio.
    pub mmio: bool,
}

/// Returns a sentence for each caveat about the parameters in `line`.
pub fn of(line: &str, devices: Devices) -> Vec<String> {
    let has = |name: &str, value: &str| {
        cmdline::parameters(line)
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .flat_map(|values| values.split(','))
            .any(|found| found == value)
    };
    let is_there = |name: &str| cmdline::parameters(line).any(|word| word == name);
    let mut caveats = Vec::new();
    let mut say = |when: bool, parameter: &str, consequence: &str| {
        if when {
            caveats.push(format!("the kernel's parameter {parameter}: {consequence}"));
        }
    };
    let no_acpi = cmdline::is_without_acpi(line);
    say(
        no_acpi,
        "acpi=off",
        "a kernel without CONFIG_X86_MPPARSE and CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (Debian's) then has no interrupt \
         for a disk over PCI, and finds none over virtio-mmio: leave it out, or take a kernel that has both",
    );
    say(no_acpi, "acpi=off", "the guest cannot switch the power off: let it end by a reset (`reboot -f`)");
    for parameter in ["nolapic", "disableapic"] {
        say(
            is_there(parameter) && devices.pci && no_acpi,
            parameter,
            "PCI devices interrupt by messages (MSI-X) alone, which it forbids, so the guest gets no disk: leave it out",
        );
        say(
            is_there(parameter) && !no_acpi,
            parameter,
            "a kernel that reads ACPI then has no interrupt controller (ACPI is hardware-reduced here, without 8259s), so \
             neither a device nor a timer interrupts, and the guest gets no disk: leave it out",
        );
    }
    for (parameter, instead) in [("noapic", "leave it out"), ("nosmp", "use --cpus 1 or maxcpus=1 instead")] {
        // Without ACPI a kernel uses the 8259s instead, provided that it finds the devices at all.
        let forbidden = is_there(parameter) && !no_acpi;
        say(
            forbidden && devices.mmio,
            parameter,
            &format!(
                "virtio-mmio devices interrupt through the I/O APIC alone, which it forbids, so the guest gets no \
                 disk: {instead}"
            ),
        );
        say(
            forbidden,
            parameter,
            &format!(
                "the serial port has no interrupt then, so no program of the guest's can open it, and only kernel \
                 messages appear: {instead}"
            ),
        );
    }
    for (parameter, there) in [("acpi=noirq", has("acpi", "noirq")), ("pci=noacpi", has("pci", "noacpi"))] {
        say(
            there && !no_acpi,
            parameter,
            "a kernel without CONFIG_X86_MPPARSE (Debian's) then uses no interrupt controller, not even the local APIC, so \
             the guest gets no disk: leave it out, or take a kernel that has it",
        );
    }
    say(
        has("pci", "nomsi") && devices.pci,
        "pci=nomsi",
        "PCI devices interrupt by messages (MSI-X) alone, which it forbids, so the guest gets no disk: use --transport \
         mmio",
    );
    say(
        has("pci", "off") && devices.pci,
        "pci=off",
        "the guest does not look for the PCI bus that its devices are on: use --transport mmio",
    );
    caveats
}

#[cfg(test)]
mod tests {
    use super::*;

    const PCI: Devices = Devices { pci: true, mmio: false };
    const MMIO: Devices = Devices { pci: false, mmio: true };

    #[test]
    fn each_parameter_is_named_with_what_to_do_where_it_costs_something() {
        const NO_MPS: &str = "CONFIG_X86_MPPARSE";
        const NO_DISK: &str = "gets no disk";
        const NO_TIMER: &str = "hardware-reduced";
        const NO_CONSOLE: &str = "only kernel messages";
        for (line, devices, parameter, expected) in [
            ("console=ttyS0 reboot=k panic=-1", PCI, "", &[][..]),
            ("acpi=off", PCI, "acpi=off", &[NO_MPS, "reboot -f"]),
            ("acpi=off", MMIO, "acpi=off", &[NO_MPS, "reboot -f"]),
            ("acpi=force", MMIO, "", &[]),
            ("acpi=off acpi=on", MMIO, "", &[]),
            ("pci=nomsi", PCI, "pci=nomsi", &["--transport mmio"]),
            ("pci=noaer,nomsi quiet", PCI, "pci=nomsi", &["--transport mmio"]),
            ("pci=nomsi", MMIO, "", &[]),
            ("pci=off", PCI, "pci=off", &["--transport mmio"]),
            ("pci=off", MMIO, "", &[]),
            ("nolapic", PCI, "nolapic", &[NO_TIMER]),
            ("disableapic", MMIO, "disableapic", &[NO_TIMER]),
            ("noapic", PCI, "noapic", &[NO_CONSOLE]),
            ("noapic", MMIO, "noapic", &[NO_DISK, NO_CONSOLE]),
            ("nosmp", PCI, "nosmp", &["maxcpus=1"]),
            ("nosmp", MMIO, "nosmp", &[NO_DISK, "--cpus 1"]),
            ("acpi=noirq", PCI, "acpi=noirq", &[NO_MPS]),
            ("acpi=noirq", MMIO, "acpi=noirq", &[NO_MPS]),
            ("pci=noaer,noacpi", PCI, "pci=noacpi", &[NO_MPS]),
            ("pci=noacpi", MMIO, "pci=noacpi", &[NO_MPS]),
            ("pci=noacpi acpi=off noapic nosmp", MMIO, "acpi=off", &[NO_MPS, "reboot -f"]),
            ("quiet -- nolapic acpi=off", PCI, "", &[]),
            ("xacpi=off nolapic_timer", PCI, "", &[]),
        ] {
            let found = of(line, devices);
            assert_eq!(found.len(), expected.len(), "{line}: {found:?}");
            for (sentence, word) in found.iter().zip(expected) {
                assert!(sentence.contains(word), "{line}: {sentence}");
                assert!(
                    sentence.starts_with(&format!("the kernel's parameter {parameter}: ")),
                    "{line}: {sentence}"
                );
            }
        }
    }

    #[test]
    fn without_acpi_the_8259s_serve_all_but_pci() {
        let of_nolapic = |devices| {
            let mut found = of("acpi=off nolapic noapic nosmp", devices);
            found.retain(|sentence| !sentence.contains("acpi=off:"));
            found
        };
        assert_eq!(of_nolapic(MMIO), [""; 0]);
        let found = of_nolapic(PCI);
        assert!(matches!(&found[..], [one] if one.contains("parameter nolapic: PCI devices")), "{found:?}");
    }
}
