//! Parameters of Linux' with which it does not find, or cannot use, what this machine has.
//!
//! Owns what each of them costs here, so that the run says it before the guest hangs: the sentence names the
//! parameter, the consequence, and what to do. Which kernels were tried is in `docs/guest-images.md`.

use super::cmdline;

/// How the guest reaches its devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Devices {
    /// Some over PCI.
    pub pci: bool,
    /// Some over virtio-mmio.
    pub mmio: bool,
}

/// What is to be said of the parameters in `line`, one sentence each.
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
    let no_acpi = has("acpi", "off");
    say(
        no_acpi && devices.mmio,
        "acpi=off",
        "a kernel without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (Debian's) then finds no virtio-mmio device, hence no \
         disk: use --transport pci, which it finds by its ports",
    );
    say(no_acpi, "acpi=off", "the guest cannot switch the power off: let it end by a reset (`reboot -f`)");
    let no_lapic = is_there("nolapic") || is_there("disableapic");
    for (there, parameter) in [
        (has("pci", "nomsi"), "pci=nomsi"),
        (no_lapic, if is_there("nolapic") { "nolapic" } else { "disableapic" }),
    ] {
        say(
            there && devices.pci,
            parameter,
            "PCI devices interrupt by messages (MSI-X) alone, which it forbids, so the guest gets no disk: use \
             --transport mmio",
        );
    }
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
        for (line, devices, expected) in [
            ("console=ttyS0 reboot=k panic=-1", PCI, &[][..]),
            ("acpi=off", PCI, &["reboot -f"]),
            ("acpi=off", MMIO, &["--transport pci", "reboot -f"]),
            ("acpi=force", MMIO, &[]),
            ("pci=nomsi", PCI, &["--transport mmio"]),
            ("pci=noaer,nomsi quiet", PCI, &["--transport mmio"]),
            ("pci=nomsi", MMIO, &[]),
            ("pci=off", PCI, &["--transport mmio"]),
            ("pci=off", MMIO, &[]),
            ("nolapic", PCI, &["--transport mmio"]),
            ("disableapic", PCI, &["--transport mmio"]),
            ("quiet -- nolapic acpi=off", PCI, &[]),
            ("xacpi=off nolapic_timer", PCI, &[]),
        ] {
            let found = of(line, devices);
            assert_eq!(found.len(), expected.len(), "{line}: {found:?}");
            for (sentence, word) in found.iter().zip(expected) {
                assert!(sentence.contains(word), "{line}: {sentence}");
                // Of a list behind a `=` one part is named.
                let named = sentence.split([' ', ':']).nth(3).unwrap();
                assert!(named.split('=').all(|part| line.contains(part)), "{line}: {sentence}");
            }
        }
    }
}
