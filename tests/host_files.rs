//! Files of the host that a command names: what minivmm refuses to write to, and nothing of them is lost.
//!
//! Needs neither KVM nor a guest: every refusal comes before the machine is built. What needs root (loop devices,
//! mounts) says so where it is not run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot begin has failed")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const FAILURE: i32 = 125;

/// A directory with an image, a kernel and the like: files that are not to change.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let place = Self { dir };
        for name in ["a.img", "other.img", "kernel", "initrd", "added"] {
            fs::write(place.at(name), Self::content()).unwrap();
        }
        fs::hard_link(place.at("a.img"), place.at("hard")).unwrap();
        std::os::unix::fs::symlink("a.img", place.at("soft")).unwrap();
        std::os::unix::fs::symlink("new", place.at("dangling")).unwrap();
        place
    }

    /// JSON at its beginning, so that nothing but its being an input keeps it from being replaced.
    fn content() -> Vec<u8> {
        let mut content = b"{\"text\": 1}\n".repeat(400);
        content.resize(1 << 20, b' ');
        content
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn minivmm(&self, args: &[&str]) -> Output {
        let guest = ["--kernel", "kernel", "--initrd", "initrd", "--timeout", "20"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
        command.current_dir(self.dir.path()).args(guest).args(args);
        command.output().unwrap()
    }

    /// Status 125 with these words, and every file as it was.
    fn must_refuse(&self, args: &[&str], words: &[&str]) {
        let output = self.minivmm(args);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(FAILURE), "{args:?}: {told}");
        for word in words {
            assert!(told.contains(word), "{args:?}: {word} is missing in: {told}");
        }
        for name in ["a.img", "other.img", "kernel", "initrd", "added", "hard", "soft"] {
            let path = self.at(name);
            if path.exists() {
                assert!(fs::read(path).unwrap() == Self::content(), "{args:?} changed {name}");
            }
        }
        assert!(!self.at("new").exists(), "{args:?} made a file");
    }
}

/// A lock as a VM has it on its image, as long as this lives.
fn lock(path: &Path, kind: libc::c_int, start: i64, len: i64) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: flock is plain numbers, for which all zeroes are valid.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    (wanted.l_type, wanted.l_start, wanted.l_len) = (libc::c_short::try_from(kind).unwrap(), start, len);
    // SAFETY: `wanted` is a valid flock for the length of the call.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) }, 0);
    file
}

#[test]
fn no_output_destroys_what_the_command_was_given() {
    let place = Place::new();
    for (name, input) in [
        ("a.img", "--disk a.img"),
        ("hard", "--disk a.img"),
        ("soft", "--disk a.img"),
        ("./a.img", "--disk a.img"),
        ("kernel", "--kernel kernel"),
        ("initrd", "--initrd initrd"),
        ("added", "--add added"),
    ] {
        let (console, stats) = (format!("file={name}"), format!("--stats={name}"));
        let outputs: [&[&str]; 4] =
            [&["--status-file", name], &["--console", &console], &[&stats], &["--observe", name]];
        for output in outputs {
            let args = [&["--disk", "a.img", "--add", "added"], output, &["--", "true"]].concat();
            place.must_refuse(&args, &[name, "same file as", input]);
        }
        let disk = format!("a.img,log-writes={name}");
        place.must_refuse(&["--disk", &disk, "--add", "added", "--", "true"], &[name, "same file as", input]);
    }
}

#[test]
fn two_outputs_of_one_command_are_two_files() {
    let place = Place::new();
    place
        .must_refuse(&["--status-file", "dangling", "--stats=new"], &["dangling", "writes to the same file"]);
    for (first, second) in [("new", "dangling"), ("./new", "new")] {
        let console = format!("file={first}");
        let stats = format!("--stats={second}");
        place.must_refuse(&["--console", &console, &stats], &[second, "writes to the same file"]);
    }
    let (one, two) = ("a.img,log-writes=new", "other.img,log-writes=dangling");
    place.must_refuse(&["--disk", one, "--disk", two], &["writes to the same file"]);
}

#[test]
fn an_image_of_somebody_else_is_left_alone_locked_or_not() {
    let place = Place::new();
    let whole = lock(&place.at("other.img"), libc::F_WRLCK, 0, 0);
    place.must_refuse(&["--status-file", "other.img"], &["other.img", "has locked it"]);
    place.must_refuse(&["--console", "file=other.img"], &["other.img", "has locked it"]);
    drop(whole);
    // As QEMU does.
    let byte = lock(&place.at("other.img"), libc::F_RDLCK, 100, 1);
    place.must_refuse(&["--stats=other.img"], &["other.img", "has locked it"]);
    drop(byte);
    // Nobody has it, and it is in no argument.
    File::create(place.at("zeroes.img")).unwrap().set_len(1 << 20).unwrap();
    for output in
        [&["--status-file", "zeroes.img"][..], &["--console", "file=zeroes.img"], &["--stats=zeroes.img"]]
    {
        place.must_refuse(output, &["zeroes.img", "what it holds would be lost"]);
        assert_eq!(fs::read(place.at("zeroes.img")).unwrap(), vec![0; 1 << 20]);
    }
}

#[test]
fn the_status_file_tells_of_another_output_that_is_refused() {
    let place = Place::new();
    place.must_refuse(&["--status-file", "status", "--console", "file=a.img", "--disk", "a.img"], &["a.img"]);
    let status = fs::read_to_string(place.at("status")).unwrap();
    assert!(status.contains("\"failure\"") && status.contains("same file as --disk"), "{status}");
    // An older one is replaced.
    place.must_refuse(&["--status-file", "status", "--stats=."], &["directory"]);
    let status = fs::read_to_string(place.at("status")).unwrap();
    assert!(status.contains("directory") && !status.contains("same file"), "{status}");
}

#[test]
fn standard_output_is_a_place_for_the_status_and_keeps_what_it_has() {
    let place = Place::new();
    let out = File::create(place.at("out")).unwrap();
    let mut command = Command::new("sh");
    let script = "echo before; \"$0\" --kernel kernel --initrd none --status-file /dev/stdout; echo after";
    command.current_dir(place.dir.path()).arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_minivmm"));
    assert!(command.stdout(out).output().unwrap().status.success());
    let out = fs::read_to_string(place.at("out")).unwrap();
    assert!(out.starts_with("before\n{") && out.ends_with("}\nafter\n"), "{out}");
}

#[test]
fn a_bench_report_destroys_neither_image_nor_job_file() {
    let place = Place::new();
    for (args, input) in [
        (&["bench", "--disk", "a.img", "--json", "hard"][..], "--disk a.img"),
        (&["bench", "--disk", "a.img", "--jobs", "added", "--json", "added"], "--jobs added"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm-tools"));
        let output = command.current_dir(place.dir.path()).args(args).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(FAILURE) && told.contains(input), "{args:?}: {told}");
        assert!(fs::read(place.at("a.img")).unwrap() == Place::content(), "{args:?}");
    }
}
