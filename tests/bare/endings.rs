//! Every way a machine can end, and its exit status.

use minivmm_testkit::machine::*;

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

#[test]
fn a_disk_that_hangs_is_named_and_waited_for_no_longer_than_stop_timeout_says() {
    if !kvm() {
        return;
    }
    for (keys, limit, told) in [
        ("cache=writeback,fault=delay=300s:flush", "1", false),
        ("cache=none,engine=sync,fault=delay=300s:flush", "4", true),
    ] {
        let image = Image::new();
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=io").args(["--console", "stdio", "--timeout", "2"]);
        let begun = std::time::Instant::now();
        let ran = run(command.args(["--disk", &image.disk(keys), "--stop-timeout", limit]), b"");
        let log = ran.expect(125, keys).log;
        // Two seconds of the guest's, which waits for its FLUSH.
        let seconds: f64 = limit.parse().unwrap();
        let took = begun.elapsed().as_secs_f64();
        assert!((2.0 + seconds..seconds + 30.0).contains(&took), "{keys}: {took}");
        let requests = format!("requests in flight: 1 of {}", image.path.display());
        assert!(log.contains(&format!("gave up waiting for {requests}")), "{log}");
        let waits = format!("waiting for {requests}; after {limit} s gives up");
        assert_eq!(log.contains(&waits), told, "{log}");
    }
}
