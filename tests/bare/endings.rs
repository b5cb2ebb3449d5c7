//! Every way a machine can end, and its exit status.

use crate::machine::*;

#[test]
fn every_way_to_end_has_its_exit_status() {
    if !kvm() {
        return;
    }
    let endings = [
        ("scenario=exit=0", exit(0)),
        ("scenario=exit=7", exit(7)),
        ("scenario=exit=127", exit(127)),
        ("scenario=reset", ORDERLY),
        ("scenario=i8042", ORDERLY),
        ("scenario=poweroff", ORDERLY),
        ("scenario=panic", GUEST_PANIC),
        ("scenario=triple", FAILURE),
        ("scenario=unheard-of", exit(0x01)),
        ("", exit(0x01)),
    ];
    for entry in ENTRIES {
        for cpus in ["1", "2"] {
            for (cmdline, status) in endings {
                let what = format!("{cmdline:?} by {entry:?} with {cpus} CPUs");
                let ran = run_plain(entry, cmdline, &["--cpus", cpus]).expect(status, &what);
                assert!(ran.console.contains(entry.greeting()), "{what}: {}", ran.console);
            }
        }
    }
}

#[test]
fn a_triple_fault_shows_the_registers() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "scenario=triple", &[]).expect(FAILURE, "a triple fault");
        let log = ran.log.to_lowercase();
        for word in ["triple fault", "rip", "rsp", "cr3"] {
            assert!(log.contains(word), "no {word:?} in\n{}", ran.log);
        }
    }
}

/// On a KVM that emulates CPL 0 the instruction is missing: the program must say so and end.
#[test]
fn an_instruction_that_kvm_lacks_ends_with_registers_and_bytes() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "scenario=badinsn", &[]);
        if hardware_virtualization() {
            ran.expect(exit(0x22), "cmpxchg16b on hardware");
            continue;
        }
        let ran = ran.expect(FAILURE, "cmpxchg16b where KVM emulates");
        let log = ran.log.to_lowercase();
        for word in ["internal error", "rip", "rax", "f0 48 0f c7"] {
            assert!(log.contains(word), "no {word:?} in\n{}", ran.log);
        }
    }
}

#[test]
fn the_timeout_ends_a_machine_that_hangs() {
    if !kvm() {
        return;
    }
    for scenario in ["hang", "spin"] {
        for cpus in ["1", "2"] {
            let image = Image::new();
            let cmdline = format!("scenario={scenario}");
            let mut command = minivmm();
            start(&mut command, Entry::Elf, &cmdline).args(["--timeout", "1", "--cpus", cpus]);
            command.arg("--disk").arg(image.disk("cache=writeback"));
            run(&mut command, b"").expect(TIMED_OUT, &format!("{scenario} with {cpus} CPUs"));
        }
    }
}

#[test]
fn a_machine_with_any_memory_starts() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        for memory in ["16M", "128M", "3G", "4G", "5G"] {
            run_plain(entry, "scenario=exit=7", &["--memory", memory]).expect(exit(7), memory);
        }
    }
}
