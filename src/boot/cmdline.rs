//! The kernel's command line: what is added to it, and where.
//!
//! Owns the position of an added parameter: before a ` -- `, after which everything is for init
//! (Documentation/admin-guide/kernel-parameters.rst).

use super::MmioDevice;
use crate::layout;

/// The command line of a guest for which none is given. The console is the serial port. A reboot uses the
/// i8042, which every kernel supports. A panic resets at once, so that a panic before the guest has loaded
/// its pvpanic driver also ends the VM.
pub const DEFAULT: &str = "console=ttyS0 reboot=k panic=-1";

/// Parameters for a guest that runs one command: probe nothing that the machine lacks, and wait for nothing.
/// The measurements are in docs/results/boot.md.
const FAST: &str = "tsc=reliable no_timer_check random.trust_cpu=on i8042.noaux i8042.nokbd \
    cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=1";

/// The parameter that tells the test guest's init to answer questions about its caches.
pub const OBSERVE: &str = "minivmm.observe";

/// The parameter that tells the test guest's init that it must find a command in its initramfs.
const JOB: &str = "minivmm.job";

/// Returns the command line of a guest at a terminal. Unless `messages` are wanted, the kernel prints only
/// errors. Programs are told the terminal's type, if `term` is a plain word.
pub fn for_terminal(line: &str, messages: bool, term: Option<&str>) -> String {
    let is_plain = |term: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "+-._".contains(c);
        !term.is_empty() && term.len() <= 64 && term.chars().all(plain)
    };
    let line = if messages { line.to_owned() } else { append(line, "quiet") };
    match term.filter(is_plain) {
        // The kernel passes parameters that it does not know to init's environment.
        Some(term) => append(&line, &format!("TERM={term}")),
        None => line,
    }
}

/// Returns the last value of the kernel parameter `name`, or `None` if `line` does not give it one.
pub fn value<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (params, _) = split(line);
    let value = |word: &'a str| word.strip_prefix(name)?.strip_prefix('=');
    params.split_whitespace().filter_map(value).next_back()
}

/// Returns `true` if the kernel parameter `name` is in `line`, with or without a value.
pub fn has(line: &str, name: &str) -> bool {
    let (params, _) = split(line);
    params.split_whitespace().any(|word| word.split('=').next() == Some(name))
}

/// Returns the command line of a guest that runs one command.
pub fn for_command(messages: bool, pci: bool) -> String {
    let quiet = if messages { "" } else { "quiet" };
    let pci = if pci { "" } else { "pci=off" };
    [pci, FAST, JOB, quiet].iter().fold(DEFAULT.to_owned(), |line, more| append(&line, more))
}

/// Why a command line cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// The line is too long.
    #[error(
        "it has {bytes} bytes, with what announces the disks, and this kernel takes at most {max}: \
         shorten --append or --cmdline"
    )]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
        /// The most bytes that the kernel takes.
        max: usize,
    },
    /// The line contains a NUL, which would end it.
    #[error("it contains a NUL character")]
    Nul,
}

/// Appends `more` to `line`: parameters to parameters, init's arguments to init's arguments.
pub fn append(line: &str, more: &str) -> String {
    let (params, init) = split(line);
    let (more_params, more_init) = split(more);
    join(&[params, more_params], &[init, more_init])
}

/// Returns `true` if `line` tells the kernel not to read ACPI's tables. As in `parse_acpi`
/// (arch/x86/kernel/acpi/boot.c), the last value that switches ACPI on or off counts.
pub fn is_without_acpi(line: &str) -> bool {
    let values = parameters(line).filter_map(|word| word.strip_prefix("acpi="));
    values.filter(|value| ["off", "on", "force"].contains(value)).last() == Some("off")
}

/// Adds the announcement of each device (drivers/virtio/virtio_mmio.c: `<size>@<base>:<irq>`), if `line`
/// tells the kernel not to read ACPI. A kernel that reads ACPI's tables finds the devices there. It would
/// find the registers of a device announced twice in use, and report an error.
pub fn announce(line: &str, devices: &[MmioDevice]) -> String {
    if !is_without_acpi(line) {
        return line.to_owned();
    }
    let announced: Vec<String> = devices
        .iter()
        .map(|device| {
            let kib = layout::VIRTIO_MMIO_STRIDE / layout::KIB;
            format!("virtio_mmio.device={kib}K@{:#x}:{}", device.base, device.irq)
        })
        .collect();
    append(line, &announced.join(" "))
}

/// Checks that a kernel which takes `bytes_max` bytes, without the NUL, takes the line.
pub fn check(line: &str, bytes_max: usize) -> Result<(), CmdlineError> {
    if line.contains('\0') {
        return Err(CmdlineError::Nul);
    }
    if line.len() > bytes_max {
        return Err(CmdlineError::TooLong { bytes: line.len(), max: bytes_max });
    }
    Ok(())
}

/// Returns `true` if the line asks Linux to reboot by a triple fault (`reboot=t` or `reboot=triple`).
pub fn reboots_by_triple_fault(line: &str) -> bool {
    parameters(line)
        .filter_map(|param| param.strip_prefix("reboot="))
        .flat_map(|modes| modes.split(','))
        .any(|mode| mode.starts_with('t'))
}

/// Returns the kernel's own parameters, without init's arguments.
pub fn parameters(line: &str) -> impl Iterator<Item = &str> {
    split(line).0.split_whitespace()
}

/// Splits a line into the kernel's parameters and, if there is a `--`, init's arguments.
fn split(line: &str) -> (&str, Option<&str>) {
    let mut quoted = false;
    let mut word_from = 0;
    for (at, character) in line.char_indices().chain([(line.len(), ' ')]) {
        match character {
            '"' => quoted = !quoted,
            _ if character.is_ascii_whitespace() && !quoted => {
                if line.get(word_from..at) == Some("--") {
                    let init = line.get(at..).unwrap_or_default();
                    return (line.get(..word_from).unwrap_or_default(), Some(init));
                }
                word_from = at + 1;
            }
            _ => {}
        }
    }
    (line, None)
}

fn join(params: &[&str], init: &[Option<&str>]) -> String {
    let mut words: Vec<&str> =
        params.iter().map(|part| part.trim()).filter(|part| !part.is_empty()).collect();
    if init.iter().any(Option::is_some) {
        words.push("--");
        words.extend(init.iter().flatten().map(|part| part.trim()).filter(|part| !part.is_empty()));
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_go_before_the_arguments_of_init() {
        for (line, more, expected) in [
            ("a", "b", "a b"),
            ("", "b", "b"),
            ("a", "", "a"),
            ("", "", ""),
            ("a -- i", "b", "a b -- i"),
            ("a -- i", "b -- j k", "a b -- i j k"),
            ("a", "b -- j", "a b -- j"),
            ("a --", "b", "a b --"),
            ("-- i", "b", "b -- i"),
            ("--", "b", "b --"),
            ("a --x y--", "b", "a --x y-- b"),
            ("a=\"x -- y\"", "b", "a=\"x -- y\" b"),
            ("a\t--\ti", "b", "a b -- i"),
            ("a=\u{fc} -- \u{e9}", "b", "a=\u{fc} b -- \u{e9}"),
        ] {
            assert_eq!(append(line, more), expected, "{line:?} + {more:?}");
        }
    }

    #[test]
    fn devices_are_announced_at_the_end_of_the_parameters() {
        let devices = [MmioDevice { base: 0xd000_0000, irq: 5 }, MmioDevice { base: 0xd000_1000, irq: 6 }];
        assert_eq!(
            announce("acpi=off -- i", &devices),
            "acpi=off virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- i"
        );
        assert_eq!(announce("acpi=off -- i", &[]), "acpi=off -- i");
    }

    #[test]
    fn devices_are_announced_only_where_the_kernel_does_not_find_them_in_acpi() {
        let devices = [MmioDevice { base: 0xd000_0000, irq: 5 }];
        for (line, announced) in [
            ("a -- i", false),
            ("acpi=off", true),
            ("acpi=off acpi=noirq", true),
            ("acpi=off acpi=on", false),
            ("acpi=force acpi=off a", true),
            ("acpi=noirq", false),
            ("acpi=off,strict xacpi=off", false),
            ("a -- acpi=off", false),
        ] {
            assert_eq!(
                announce(line, &devices).contains(" virtio_mmio.device=4K@0xd0000000:5"),
                announced,
                "{line}"
            );
        }
    }

    #[test]
    fn a_line_that_does_not_fit_is_refused() {
        assert_eq!(check("abc", 3), Ok(()));
        assert_eq!(check("abcd", 3), Err(CmdlineError::TooLong { bytes: 4, max: 3 }));
        assert_eq!(check("a\0", 3), Err(CmdlineError::Nul));
    }

    #[test]
    fn a_terminal_is_quiet_unless_messages_are_wanted_and_names_its_kind() {
        for (messages, term, expected) in [
            (false, Some("xterm-256color"), "a quiet TERM=xterm-256color -- i"),
            (true, Some("vt100"), "a TERM=vt100 -- i"),
            (true, None, "a -- i"),
            (false, Some(""), "a quiet -- i"),
            (false, Some("x init=/bin/evil"), "a quiet -- i"),
            (false, Some("\"x"), "a quiet -- i"),
        ] {
            assert_eq!(for_terminal("a -- i", messages, term), expected, "{term:?}");
        }
    }

    #[test]
    fn parameters_are_found_before_the_arguments_of_init_only() {
        for (line, value_of_root, has_root) in [
            ("root=/dev/vda", Some("/dev/vda"), true),
            ("a root=/dev/vda root=LABEL=x", Some("LABEL=x"), true),
            ("rootwait xroot=1", None, false),
            ("a -- root=/dev/vda", None, false),
            ("root", None, true),
        ] {
            assert_eq!(value(line, "root"), value_of_root, "{line}");
            assert_eq!(has(line, "root"), has_root, "{line}");
        }
    }

    #[test]
    fn a_triple_fault_is_asked_for_by_the_parameter_only() {
        for (line, asked) in [
            ("reboot=t", true),
            ("a reboot=w,triple b", true),
            ("reboot=k", false),
            ("a -- reboot=t", false),
            ("areboot=t", false),
        ] {
            assert_eq!(reboots_by_triple_fault(line), asked, "{line}");
        }
    }
}
