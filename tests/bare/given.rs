//! What a user gives that cannot be, as far as it takes a machine to find out, and names of files that are unusual
//! and can be.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output};

use minivmm_testkit::machine::*;
use minivmm_testkit::tools;

/// What `minivmm log` tells of a write log. Beside a minivmm that `MINIVMM_BINARY` names, the tools lie already.
pub fn listed(log: &Path) -> Output {
    if std::env::var_os("MINIVMM_BINARY").is_none() {
        tools::minivmm();
    }
    minivmm().arg("log").arg(log).output().unwrap()
}

const USAGE: i32 = 2;

/// `bytes`, with the directory's path in the place of `%`.
fn named(directory: &tempfile::TempDir, bytes: &[u8]) -> OsString {
    let mut name = Vec::new();
    for &byte in bytes {
        match byte {
            b'%' => name.extend_from_slice(directory.path().as_os_str().as_bytes()),
            byte => name.push(byte),
        }
    }
    OsStr::from_bytes(&name).to_owned()
}

#[test]
fn paths_of_any_bytes_are_paths() {
    if !kvm() {
        return;
    }
    let directory = scratch();
    let path = |bytes: &[u8]| named(&directory, bytes);
    fs::write(path(b"%/\xff,.img"), Image::before()).unwrap();
    fs::copy(Entry::Elf.kernel(), path(b"%/k\xff")).unwrap();
    let mut command = minivmm();
    command.arg("--kernel").arg(path(b"%/k\xff")).args(["--initrd", "none", "--transport", "mmio"]);
    command.args(["--cmdline", "scenario=io", "--timeout", "60"]);
    command.arg("--disk").arg(path(b"%/\xff,,.img,cache=writeback,log-writes=%/l\xfe"));
    command.arg("--console").arg(path(b"file=%/c\xfd"));
    command.arg("--status-file").arg(path(b"%/s\xfc"));
    command.arg(path(b"--stats=%/t\xfb")).arg("--observe").arg(path(b"%/o\xfa"));
    run(&mut command, b"").expect(exit(0x20), "names that are no UTF-8");
    assert_eq!(fs::read(path(b"%/\xff,.img")).unwrap(), Image::after());
    for (name, word) in [
        (&b"%/c\xfd"[..], "entered by ELF"),
        (b"%/s\xfc", "exit-port"),
        (b"%/t\xfb", "\u{fffd},.img"),
        (b"%/o\xfa", "time_s,"),
    ] {
        let text = fs::read_to_string(path(name)).unwrap();
        assert!(text.contains(word), "{word} is missing in {text}");
    }
    let log = listed(path(b"%/l\xfe").as_ref());
    assert!(log.status.success() && String::from_utf8_lossy(&log.stdout).contains("flush"), "{log:?}");
    let told = minivmm().args(["--explain", "--json", "--disk"]).arg(path(b"%/\xff,,.img")).output().unwrap();
    assert!(
        told.status.success() && String::from_utf8_lossy(&told.stdout).contains("\u{fffd},.img"),
        "{told:?}"
    );
}

#[test]
fn memory_that_cannot_be_had_is_refused_with_size_reason_and_what_can() {
    if !kvm() {
        return;
    }
    for size in ["900G", "1T", "8T", "16T"] {
        let ran = run_plain(Entry::Elf, "scenario=exit=7", &["--memory", size]);
        // A host that can give it does.
        if ran.status == exit(7) {
            continue;
        }
        let log = &ran.log;
        match ran.status {
            USAGE => {
                let why = log.contains("bits of physical address") || log.contains("more than 8T");
                assert!(log.contains(size) && why, "{size}: {log}");
            }
            FAILURE => {
                let asked = size
                    .strip_suffix('T')
                    .map_or(size.to_owned(), |tib| format!("{}G", tib.parse::<u64>().unwrap() << 10));
                assert!(log.contains(&asked) && log.contains("--memory"), "{size}: {log}");
                assert!(log.contains("is the most") || log.contains("less"), "{size}: {log}");
            }
            other => panic!("{size}: status {other}: {log}"),
        }
    }
}

#[test]
fn memory_that_this_process_may_not_have_is_refused_with_size_and_limit() {
    if !kvm() {
        return;
    }
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh"]).arg(binary());
    start(&mut command, Entry::Elf, "scenario=exit=7").args(["--memory", "3G", "--timeout", "60"]);
    let log = run(&mut command, b"").expect(FAILURE, "3G of 2G").log;
    assert!(log.contains("cannot map 3G of guest memory (--memory)"), "{log}");
    assert!(log.contains("ulimit -v") && log.contains("1953M"), "{log}");
}

#[test]
fn a_program_is_no_kernel() {
    if !kvm() {
        return;
    }
    let mut command = minivmm();
    let command = command.args(["--kernel", "/bin/ls", "--initrd", "none", "--console", "off"]);
    let log = run(command, b"").expect(FAILURE, "ls").log;
    assert!(log.contains("/bin/ls") && log.contains("kernel"), "{log}");
    assert!(log.starts_with("minivmm: error: "), "{log}");
}

#[test]
fn holes_of_an_image_in_memory_cannot_be_warmed_and_the_error_says_so() {
    if !kvm() {
        return;
    }
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else { return skip("tmpfs", "no /dev/shm") };
    let path = directory.path().join("holes.img");
    File::create(&path).unwrap().set_len(IMAGE_BYTES as u64).unwrap();
    let warm = |status| {
        let mut command = minivmm();
        start(&mut command, Entry::Elf, "scenario=io").args([
            "--console",
            "off",
            "--timeout",
            "60",
            "--disk",
        ]);
        command.arg(format!("{},cache=writeback,host-cache=warm", path.display()));
        run(&mut command, b"").expect(status, "warm on tmpfs").log
    };
    let log = warm(FAILURE);
    for word in ["holes.img", "tmpfs", "1048576 of its bytes are holes", "fallocate"] {
        assert!(log.contains(word), "{word}: {log}");
    }
    assert_eq!(fs::read(&path).unwrap(), vec![0; IMAGE_BYTES], "nothing was written");
    // As the error has it.
    fs::write(&path, Image::before()).unwrap();
    warm(exit(0x20));
    assert_eq!(fs::read(&path).unwrap(), Image::after());
}

#[test]
fn a_host_without_proc_is_told_what_is_missing() {
    if !kvm() {
        return;
    }
    let can = Command::new("unshare").args(["-m", "umount", "-l", "/proc"]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        return skip("root", "no right to unmount /proc in a mount namespace of one's own");
    }
    let image = Image::new();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "umount -l /proc; exec \"$@\"", "sh"]).arg(binary());
    start(&mut command, Entry::Elf, "scenario=io").args(["--console", "off", "--timeout", "60", "--disk"]);
    command.arg(&image.path);
    let ran = run(&mut command, b"").expect(FAILURE, "no /proc");
    let path = image.path.display().to_string();
    assert!(ran.log.contains(&path) && ran.log.contains("is /proc mounted?"), "{}", ran.log);
    image.must_hold(&Image::before(), "nothing was written");
}
