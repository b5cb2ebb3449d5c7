//! What is told of a guest that ends without a word of its command: its last lines, on standard error and in the
//! status file, and limits of time.

use std::fs;

use minivmm_testkit::machine::*;

/// A run with a command that no bare guest will start, and its status file.
fn with_command(cmdline: &str, more: &[&str]) -> (Ran, serde_json::Value) {
    let directory = scratch();
    let (initrd, status) = (directory.path().join("initrd"), directory.path().join("status.json"));
    fs::write(&initrd, "070701").unwrap();
    let mut command = minivmm();
    command.arg("--kernel").arg(Entry::Elf.kernel()).arg("--initrd").arg(&initrd);
    command.args(["--cmdline", cmdline, "--status-file"]).arg(&status).args(more).args(["--", "true"]);
    let ran = run(&mut command, b"");
    let told = serde_json::from_slice(&fs::read(status).unwrap()).unwrap();
    (ran, told)
}

fn lines_of(told: &serde_json::Value) -> Vec<&str> {
    told["kernel_messages"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect()
}

#[test]
fn a_guest_that_never_reports_is_ended_with_its_last_lines() {
    if !kvm() {
        return;
    }
    let (ran, told) = with_command("scenario=hang", &["--boot-timeout", "1"]);
    let log = ran.expect(FAILURE, "a guest that says nothing").log;
    for words in ["has not reported within 1 s", "minivmm-job", "--boot-timeout", "  bare guest: halting\n"] {
        assert!(log.contains(words), "no {words:?} in {log}");
    }
    assert_eq!((told["cause"].as_str(), told["exit_status"].as_i64()), (Some("boot-timeout"), Some(125)));
    assert!(lines_of(&told).contains(&"bare guest: halting"), "{told}");

    // What has been seen already is not shown twice.
    let (ran, told) = with_command("scenario=hang", &["--boot-timeout", "1", "-v"]);
    let log = ran.expect(FAILURE, "with -v").log;
    assert_eq!(log.matches("bare guest: halting").count(), 1, "{log}");
    assert!(lines_of(&told).contains(&"bare guest: halting"), "{told}");

    // No limit but --timeout.
    let (ran, told) = with_command("scenario=spin", &["--boot-timeout", "0", "--timeout", "2"]);
    let log = ran.expect(TIMED_OUT, "--timeout").log;
    assert!(log.contains("  bare guest: spinning\n"), "{log}");
    assert_eq!(told["cause"], "timeout");
}

#[test]
fn a_flood_of_lines_is_told_by_its_last_forty() {
    if !kvm() {
        return;
    }
    let (ran, told) = with_command("scenario=chatter", &["--boot-timeout", "1"]);
    let log = ran.expect(FAILURE, "chatter").log;
    assert!((39..=40).contains(&log.matches("  bare guest: chatter\n").count()), "{log}");
    assert_eq!(lines_of(&told).len(), 40);
}

#[test]
fn a_panic_is_told_from_its_first_line_on_and_does_nothing_to_the_terminal() {
    if !kvm() {
        return;
    }
    // One that resets; and one that stays, which nobody waits for.
    for cmdline in ["scenario=oops", "scenario=oops stay"] {
        let (ran, told) = with_command(cmdline, &["--boot-timeout", "100"]);
        let log = ran.expect(GUEST_PANIC, cmdline).log;
        assert!(log.contains("  [    0.000002] BUG: kernel NULL pointer dereference"), "{log}");
        assert!(log.contains("Kernel panic - not syncing: Fatal exception"), "{log}");
        assert!(!log.contains("all is well"), "{log}");
        assert!(!log.contains(['\x1b', '\x07']) && log.contains("\\u{1b}[2J"), "{log:?}");
        assert!(log.trim_end().ends_with("the guest's kernel has panicked"), "{log}");
        let lines = lines_of(&told);
        assert_eq!(lines.len(), 3, "{told}");
        assert!(lines[2].ends_with("Kernel panic - not syncing: Fatal exception"), "{told}");
    }
}

#[test]
fn a_guest_that_ends_without_reporting_shows_its_last_lines_too() {
    if !kvm() {
        return;
    }
    for (scenario, cause, line) in [
        ("reset", "no-report", "command line: scenario=reset"),
        ("triple", "failure", "a fault without an IDT"),
    ] {
        let (ran, told) = with_command(&format!("scenario={scenario}"), &[]);
        let log = ran.expect(FAILURE, scenario).log;
        assert!(log.contains(&format!("  bare guest: {line}\n")), "{log}");
        assert_eq!(told["cause"], cause);
        assert!(lines_of(&told).iter().any(|shown| shown.ends_with(line)), "{told}");
    }
}

#[test]
fn without_a_command_the_console_tells_it_unless_it_leads_elsewhere() {
    if !kvm() {
        return;
    }
    let ran = run_plain(Entry::Elf, "scenario=oops", &[]).expect(GUEST_PANIC, "on the terminal");
    assert!(ran.console.contains("Kernel panic") && !ran.log.contains("Kernel panic"), "{ran:?}");
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=oops").args(["--console", "off", "--timeout", "60"]);
    let ran = run(&mut command, b"").expect(GUEST_PANIC, "with the console off");
    assert!(
        ran.log.contains("  [    0.000004] Kernel panic - not syncing: Fatal exception\n"),
        "{}",
        ran.log
    );
}

#[test]
fn what_cannot_go_into_the_guests_memory_is_refused_before_it_is_read() {
    if !kvm() {
        return;
    }
    let directory = scratch();
    let add = directory.path().join("large");
    let file = fs::File::create(&add).unwrap();
    for (mib, memory, words) in [
        (5 << 10, "512M", "4 GiB or more"),
        (150, "256M", "needs --memory 512M, and has 256M"),
        (3 << 10, "8G", "bring large files on a disk"),
    ] {
        file.set_len(mib << 20).unwrap();
        let (ran, told) =
            with_command("scenario=hang", &["--memory", memory, "--add", add.to_str().unwrap()]);
        let log = ran.expect(FAILURE, words).log;
        assert!(log.contains(words), "no {words:?} in {log}");
        assert_eq!(told["cause"], "failure");
    }
}

#[test]
fn a_kernel_or_an_initrd_that_is_no_file_is_refused_without_waiting() {
    if !kvm() {
        return;
    }
    let directory = scratch();
    let (fifo, large) = (directory.path().join("fifo"), directory.path().join("large"));
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let file = fs::File::create(&large).unwrap();
    file.set_len(5 << 30).unwrap();
    let kernel = Entry::Elf.kernel();
    for (kernel, initrd, words) in [
        (&fifo, "none", "a FIFO"),
        (&"/dev/zero".into(), "none", "a character device"),
        (&large, "none", "unknown format"),
        (&kernel, fifo.to_str().unwrap(), "a FIFO"),
        (&kernel, "/dev/zero", "a character device"),
        (&kernel, "/", "a directory"),
        (&kernel, large.to_str().unwrap(), "this kernel takes"),
    ] {
        let mut command = minivmm();
        command.arg("--kernel").arg(kernel).args(["--initrd", initrd, "--timeout", "60"]);
        let ran = run(&mut command, b"").expect(FAILURE, words);
        assert!(ran.log.contains(words), "no {words:?} in {}", ran.log);
    }
}
