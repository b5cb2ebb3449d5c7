//! A KVM that refuses: strace answers its requests in its place, once, for a while, or for ever.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_testkit::machine::*;

/// strace over minivmm, its calls of ioctl written to `log`; `inject` is what strace makes of them.
fn strace(log: &Path, inject: Option<&str>) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=ioctl", "-o"]).arg(log);
    if let Some(inject) = inject {
        strace.args(["-e", &format!("inject=ioctl:{inject}")]);
    }
    strace.arg(binary());
    strace
}

/// Whether such a test can run.
fn ready() -> bool {
    let there = Command::new("strace").arg("-V").output().is_ok();
    if !there {
        skip("strace", "strace is not installed, KVM's answers cannot be replaced");
    }
    there && kvm()
}

/// Which of the main thread's calls of ioctl creates the first VM, counted from 1.
fn number_of_create_vm(log: &Path) -> usize {
    let log = fs::read_to_string(log).unwrap();
    let main = log.split_whitespace().next().unwrap();
    let ours = log.lines().filter(|line| line.starts_with(main));
    ours.take_while(|line| !line.contains("KVM_CREATE_VM")).count() + 1
}

#[test]
fn an_eagain_of_kvm_run_that_lasts_is_reported_with_cause_and_remedy() {
    if !ready() {
        return;
    }
    let directory = scratch();
    let log = directory.path().join("strace");
    // No thread but a CPU's makes so many.
    let mut strace = strace(&log, Some("error=EAGAIN:when=1000+"));
    start(&mut strace, Entry::Elf, "scenario=chatter").args(["--console", "off", "--timeout", "60"]);
    let begin = Instant::now();
    let ran = run(&mut strace, b"").expect(FAILURE, "EAGAIN for ever");
    for words in ["CPU 0 cannot go on", "KVM_RUN has failed", "os error 11", "ulimit -u", "pids.max"] {
        assert!(ran.log.contains(words), "{words} is missing in {}", ran.log);
    }
    assert!(begin.elapsed() < Duration::from_secs(50), "it was reported, not ended by --timeout");
    let refused = fs::read_to_string(&log).unwrap();
    let refused =
        refused.lines().filter(|line| line.contains("KVM_RUN") && line.contains("INJECTED")).count();
    assert!((12..60).contains(&refused), "{refused} attempts in a second");
}

#[test]
fn a_few_eagains_as_a_cpu_that_was_just_started_gets_them_are_overcome() {
    if !ready() {
        return;
    }
    let directory = scratch();
    let log = directory.path().join("strace");
    let mut strace = strace(&log, Some("error=EAGAIN:when=1000..1009"));
    start(&mut strace, Entry::Elf, "scenario=chatter").args(["--console", "off", "--timeout", "3"]);
    let ran = run(&mut strace, b"").expect(TIMED_OUT, "ten times EAGAIN");
    let log = fs::read_to_string(&log).unwrap();
    let refused = |line: &&str| line.contains("INJECTED");
    assert!(log.lines().filter(refused).any(|line| line.contains("KVM_RUN")), "{}", ran.log);
    let after = log.lines().skip_while(|line| !refused(line)).filter(|line| !refused(line));
    assert!(after.filter(|line| line.contains("KVM_RUN")).count() > 10, "the guest went on");
}

#[test]
fn a_request_that_a_signal_interrupts_is_repeated_in_a_run_and_in_check() {
    if !ready() {
        return;
    }
    let directory = scratch();
    let log = directory.path().join("strace");
    let run_it = |inject: Option<&str>| {
        let mut strace = strace(&log, inject);
        start(&mut strace, Entry::Elf, "scenario=exit=7").args(["--console", "off", "--timeout", "60"]);
        run(&mut strace, b"").expect(exit(7), inject.unwrap_or("nothing"));
    };
    run_it(None);
    let number = number_of_create_vm(&log);
    run_it(Some(&format!("error=EINTR:when={number}..{}", number + 2)));
    assert_eq!(fs::read_to_string(&log).unwrap().matches("INJECTED").count() % 3, 0);
    let check = |inject: Option<&str>| {
        let output = strace(&log, inject).args(["check", "--json"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    check(None);
    let number = number_of_create_vm(&log);
    let report = check(Some(&format!("error=EINTR:when={number}")));
    assert!(report.contains("can be created"), "{report}");
}

#[test]
fn another_hypervisor_that_holds_the_processor_is_named_in_a_run_and_in_check() {
    if !ready() {
        return;
    }
    let directory = scratch();
    let log = directory.path().join("strace");
    let run_it = |inject: Option<&str>, status: i32| {
        let mut strace = strace(&log, inject);
        start(&mut strace, Entry::Elf, "scenario=exit=7").args(["--console", "off", "--timeout", "60"]);
        run(&mut strace, b"").expect(status, inject.unwrap_or("nothing"))
    };
    run_it(None, exit(7));
    let number = number_of_create_vm(&log);
    let ran = run_it(Some(&format!("error=EBUSY:when={number}")), FAILURE);
    assert!(ran.log.contains("VirtualBox") && ran.log.contains("vboxdrv"), "{}", ran.log);

    let check = |inject: Option<&str>| strace(&log, inject).args(["check", "--json"]).output().unwrap();
    check(None);
    let number = number_of_create_vm(&log);
    let busy = check(Some(&format!("error=EBUSY:when={number}")));
    let report = String::from_utf8(busy.stdout).unwrap();
    assert_eq!(busy.status.code(), Some(1), "{report}");
    assert!(report.contains("another hypervisor") && report.contains("vboxdrv"), "{report}");
    assert!(!report.contains("emulates kernel code"), "{report}");
}
