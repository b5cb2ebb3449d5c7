//! What the user types and what minivmm ends with, as far as it needs neither KVM nor a kernel.

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use minivmm_testkit::tools;

const USAGE: i32 = 2;
const FAILURE: i32 = 125;

/// minivmm in `directory`, where no test guest is.
fn minivmm(directory: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(tools::minivmm());
    command.current_dir(directory).env_remove("MINIVMM_GUEST").args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_is_right() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("there.img"), "").unwrap();
    std::fs::write(directory.path().join("comma,readonly"), "").unwrap();
    for (args, word) in [
        (&["--memory", "512"][..], "did you mean 512M"),
        (&["--memory", "1.5G"], "512M, 4G"),
        (&["--memory", "1M"], "less than 16M"),
        (&["--memory", "1"], "did you mean 16M"),
        (&["--cpus", "0"], "from 1 to 254"),
        (&["--cpus", "255"], "from 1 to 254"),
        (&["--cpus", "two"], "from 1 to 254"),
        (&["--console", "pty"], "stdio, stderr, off, or file=PATH"),
        (&["--console", "stdio", "--", "true"], "stderr, off or file=PATH"),
        (&["--initrd", "none", "--", "true"], "--initrd none cannot be used with a COMMAND"),
        (&["--add", "a"], "COMMAND"),
        (&["--env", "=x", "--", "true"], "NAME=VALUE"),
        (&["--timeout", "0"], "above 0"),
        (&["--timeout", "soon"], "above 0"),
        (&["--disk", "a.img,cache=never"], "cache"),
        (&["--disk", "a.img,colour=red"], "colour"),
        (&["--verbose", "--quiet"], "cannot be used with"),
        (&["--no-such-option"], "--no-such-option"),
        (&["a.img"], "a.img"),
        (&["there.img"], "--disk there.img"),
        (&["chek"], "did you mean 'check'?"),
        (&["stduy"], "did you mean 'study'?"),
        (&["frobnicate"], "study"),
        (&["--stats", "s.json"], "use --stats=s.json"),
        (&["-m", "512"], "--memory 512M"),
        (&["-smp", "2"], "--cpus 2"),
        (&["-drive", "file=a.img,if=virtio,cache=none"], "--disk a.img,cache=none"),
        (&["-hda", "a.img"], "--disk a.img"),
        (&["-kernel", "bzImage"], "--kernel bzImage"),
        (&["-append", "x"], "--append x"),
        (&["--"], "no COMMAND after --"),
        (&["--transport", "pcie"], "pci, mmio"),
        (&["--sandbox", "no"], "on, log, off"),
        (&["study", "--only", "T99"], "there is no experiment T99"),
        (&["--disk", "a.img,chache=none"], "did you mean 'cache'?"),
        (
            &["--disk", "a.img,cache=None"],
            "invalid cache=None: expected one of none, writethrough, writeback",
        ),
        (&["--disk", "a.img,ro"], "unknown key 'ro'; did you mean 'readonly'?"),
        (&["--disk", "a.img,serial="], "1 to 20 bytes"),
        (&["--disk", "comma,readonly"], "comma,,readonly"),
        (&["--disk", "a.img", "--cache", "none"], "--disk IMAGE,cache=VALUE"),
        (&["--readonly"], "is a key of --disk"),
        (&["--explain"], "--disk"),
        (&["--json", "--disk", "a.img"], "--explain"),
        (&["check", "--json", "--quiet"], "cannot be used with"),
        (&["check", "--disk", "a.img"], "--disk"),
        (&["log"], "FILE"),
        (&["crash", "x.log"], "--base"),
        (&["bench"], "--disk"),
        (&["bench", "--disk", "a.img,cache=none"], "--modes gives the modes"),
        (&["bench", "--disk", "a.img,readonly"], "only reads"),
        (&["bench", "--disk", "a.img", "--modes", "none,fast"], "'fast' is not a cache mode"),
        (&["bench", "--disk", "a.img", "--rounds", "0"], "from 1 on"),
        (&["bench", "--disk", "a.img", "--size", "64"], "less than 1M"),
        (&["bench", "--disk", "a.img", "--seconds", "0"], "1..=86400"),
        (&["bench", "--disk", "a.img", "--host-cache", "cold"], "drop"),
        (&["bench", "--disk", "a.img", "--only", "nosuch"], "there is no job nosuch"),
        (&["--console", "sdtio"], "stdio, stderr, off, or file=PATH"),
        (&["--host", "here"], "auto, direct or emulated"),
        (&["crash", "x.log", "--base", "b", "--at", "noon"], "mark=NAME"),
        (&["--disk", "a.img,fault=fail:fsync"], "read, write, flush, discard"),
        (&["--disk", "a.img,log-writes"], "FILE"),
    ] {
        let output = minivmm(directory.path(), args);
        assert_eq!(output.status.code(), Some(USAGE), "{args:?}");
        assert!(stderr(&output).contains(word), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).starts_with("minivmm: error: "), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn a_path_may_be_any_bytes_and_what_may_not_is_named() {
    use std::os::unix::ffi::OsStrExt;
    let directory = tempfile::tempdir().unwrap();
    let run = |args: &[&[u8]]| {
        let mut command = Command::new(tools::minivmm());
        let args = args.iter().map(|arg| std::ffi::OsStr::from_bytes(arg));
        command.current_dir(directory.path()).args(args).output().unwrap()
    };
    for (option, value) in
        [(&b"--append"[..], &b"a\xff"[..]), (b"--cmdline", b"a\xff"), (b"--memory", b"a\xff")]
    {
        let output = run(&[option, value, b"--", b"x\xfe"]);
        assert_eq!(output.status.code(), Some(USAGE));
        let text = stderr(&output);
        assert!(text.starts_with("minivmm: error: 'a\u{fffd}' is not UTF-8"), "{text}");
    }
    // Missing, and therefore named.
    for args in [
        &[&b"--disk"[..], b"d\xff.img"][..],
        &[b"--explain", b"--disk", b"d\xff.img,cache=unsafe"],
        &[b"--add", b"d\xff.img:/x", b"--", b"true"],
        &[b"--console", b"file=d\xff.img/x"],
        &[b"log", b"d\xff.img"],
        &[b"crash", b"d\xff.img", b"--base", b"b"],
    ] {
        let guest = [&b"--kernel"[..], b"k", b"--initrd", b"i"];
        let own = matches!(args[0], b"log" | b"crash");
        let output = run(&[if own { &[][..] } else { &guest[..] }, args].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(FAILURE), "{text}");
        assert!(text.contains("d\u{fffd}.img") && !text.contains("UTF-8"), "{text}");
    }
}

#[test]
fn help_is_a_command_too_and_what_cannot_be_written_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    for (args, word) in
        [(&["help"][..], "--disk"), (&["help", "crash"], "--base"), (&["help", "study"], "--only")]
    {
        let output = minivmm(directory.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        assert!(String::from_utf8_lossy(&output.stdout).contains(word), "{args:?}");
    }
    for args in [&["--help"][..], &["-h"], &["--version"], &["help", "log"], &["crash", "--help"], &["check"]]
    {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_minivmm"));
        let output = command.args(args).stdout(full).stderr(std::process::Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(FAILURE), "{args:?}");
        assert!(stderr(&output).contains("cannot write to standard output"), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn help_names_every_option_key_and_status() {
    let directory = tempfile::tempdir().unwrap();
    let output = minivmm(directory.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    for word in [
        "--kernel",
        "--initrd",
        "--append",
        "--cmdline",
        "--memory",
        "--cpus",
        "--disk",
        "--console",
        "--add",
        "--env",
        "--workdir",
        "--status-file",
        "--timeout",
        "--explain",
        "check",
        "log",
        "crash",
        "fault=",
        "log-writes=",
        "Guest:",
        "Machine:",
        "Disks:",
        "Running:",
        "Examples:",
        "--stats",
        "cache=",
        "readonly",
        "serial=",
        "queue-size=",
        "block-size=",
        "discard=",
        "format=raw",
        "Ctrl-A x",
        "MINIVMM_GUEST",
        "124",
        "125",
        "126",
        "128+n",
        "2v+1",
    ] {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
}

#[test]
fn an_error_is_printed_once_with_what_it_is_about() {
    let directory = tempfile::tempdir().unwrap();
    for (args, words) in [
        (
            &["--disk", "missing.img", "--kernel", "k", "--initrd", "none"][..],
            &["missing.img", "truncate"][..],
        ),
        (&["--explain", "--disk", "missing.img"], &["missing.img", "truncate"]),
        (&["log", "gone.log"], &["gone.log", "No such file"]),
        (&["crash", "gone.log", "--base", "x.img"], &["gone.log", "No such file"]),
        (&["log", "/proc/self/exe"], &["/proc/self/exe", "not a write log"]),
        (&["--console", "file=no/such/file", "--kernel", "k", "--initrd", "none"], &["no/such/file"]),
        (
            &["--kernel", "k", "--initrd", "i", "--add", "gone", "--", "x"],
            &["cannot add gone", "No such file"],
        ),
        (
            &["--kernel", "k", "--initrd", "i", "--add", "/etc/passwd:/proc/p", "--", "x"],
            &["/proc/p", "of its own"],
        ),
        (
            &["--kernel", "k", "--initrd", "i", "--add", "/etc/passwd:/a/../b", "--", "x"],
            &["/a/../b", "without `..`"],
        ),
        (
            &["--kernel", "k", "--initrd", "i", "--add", "/dev/null:/n", "--", "x"],
            &["/dev/null", "not a file"],
        ),
        (
            &["--kernel", "k", "--initrd", "none", "--status-file", "no/dir/file"],
            &["--status-file", "No such file"],
        ),
    ] {
        let output = minivmm(directory.path(), args);
        assert_eq!(output.status.code(), Some(FAILURE), "{args:?}");
        let text = stderr(&output);
        assert!(text.starts_with("minivmm: error: ") && text.matches("error: ").count() == 1, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn the_status_file_tells_of_a_failure_too() {
    let directory = tempfile::tempdir().unwrap();
    let args = ["--status-file", "status.json", "--kernel", "k", "--initrd", "none", "--disk", "gone.img"];
    assert_eq!(minivmm(directory.path(), &args).status.code(), Some(FAILURE));
    let text = std::fs::read_to_string(directory.path().join("status.json")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&status["version"], &status["exit_status"]), (&1.into(), &FAILURE.into()));
    assert_eq!(status["cause"], "failure");
    assert!(status["message"].as_str().unwrap().contains("gone.img"), "{text}");
    assert!(status["command"].is_null() && status["seconds"]["boot"].is_null(), "{text}");
    assert!(status["seconds"]["total"].is_number());
}

#[test]
fn a_missing_test_guest_is_looked_for_where_the_variable_says_and_nowhere_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(tools::minivmm());
    command.arg("--host=direct").current_dir(directory.path()).env("MINIVMM_GUEST", "/nowhere");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(FAILURE));
    let text = stderr(&output);
    for word in ["vmlinuz and initrd.cpio", "looked in /nowhere;", "make guest", "--kernel"] {
        assert!(text.contains(word), "{word} is missing in: {text}");
    }
}
