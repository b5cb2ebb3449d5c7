//! The console on pipes and in files, and the command line that the guest prints there.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::Stdio;

use minivmm_testkit::machine::*;

#[test]
fn the_guest_gets_the_command_line_and_what_append_adds() {
    if !kvm() {
        return;
    }
    for entry in ENTRIES {
        let ran = run_plain(entry, "one scenario=exit=3", &["--append", "two"]).expect(exit(3), "--append");
        let line = ran.console.lines().find(|line| line.contains("command line: ")).unwrap();
        assert!(line.contains("one scenario=exit=3 two"), "{line}");
    }
}

#[test]
fn every_byte_of_piped_input_reaches_the_guest() {
    if !kvm() {
        return;
    }
    // Longer than any FIFO. Only `q` ends the guest.
    let mut typed: Vec<u8> = (b' '..=b'~').filter(|byte| *byte != b'q').cycle().take(5000).collect();
    typed.push(b'q');
    let ran = run(
        start(&mut minivmm(), Entry::Elf, "scenario=echo").args(["--console", "stdio", "--timeout", "60"]),
        &typed,
    )
    .expect(exit(0x21), "echo");
    let echoed = ran.console.split_once("until q\r\n").expect("the prompt").1;
    assert_eq!(echoed, String::from_utf8(typed).unwrap());
}

#[test]
fn the_end_of_piped_input_is_not_the_end_of_the_machine() {
    if !kvm() {
        return;
    }
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=echo").args(["--console", "stdio", "--timeout", "2"]);
    let ran = run(&mut command, b"abc").expect(TIMED_OUT, "echo without a q");
    assert!(ran.console.ends_with("until q\r\nabc"), "{}", ran.console);
}

#[test]
fn the_console_can_be_off_or_a_file() {
    if !kvm() {
        return;
    }
    let directory = scratch();
    let path = directory.path().join("console");
    let option = format!("file={}", path.display());
    for (console, in_file) in [("off", false), (option.as_str(), true)] {
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=exit=7").args(["--timeout", "60", "--console", console]);
        let ran = run(&mut command, b"").expect(exit(7), console);
        assert!(!ran.console.contains("bare guest"), "{console}: {}", ran.console);
        assert_eq!(path.exists(), in_file, "{console}");
    }
    assert!(fs::read_to_string(path).unwrap().contains("entered by ELF"));
}

#[test]
fn a_console_that_nobody_reads_cannot_keep_the_machine_from_ending() {
    if !kvm() {
        return;
    }
    let (_unread, pipe) = std::io::pipe().unwrap();
    // SAFETY: fcntl takes integers here; `pipe` is open. The smallest pipe is full soonest.
    assert!(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0);
    let mut command = minivmm();
    start(&mut command, Entry::Elf, "scenario=chatter").args(["--console", "stdio", "--timeout", "2"]);
    let mut child = command.stdin(Stdio::null()).stdout(pipe).stderr(Stdio::null()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    assert_eq!(child.wait().unwrap().code(), Some(TIMED_OUT));
}
