//! `--host`: where a Linux guest runs, and what is said where this machine's KVM cannot run one.
//!
//! Owns the copies of the binary beside a pretended emulated host, whose script writes down how it was called. On a
//! machine whose KVM runs Linux nothing is refused; which of the two this is, `check` says.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use minivmm_testkit::skips::skip;
use minivmm_testkit::tools;
use tempfile::TempDir;

/// A tree with both binaries as built, a kernel that bears Linux's marks, and perhaps an emulated host.
struct Tree {
    directory: TempDir,
}

impl Tree {
    fn new() -> Self {
        let tree = Self { directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() };
        let release = tree.path("target/release");
        fs::create_dir_all(&release).unwrap();
        for name in ["minivmm", "minivmm-tools"] {
            let built = tools::minivmm().with_file_name(name);
            // A link would be resolved: /proc/self/exe has the file's own name.
            fs::hard_link(&built, release.join(name))
                .or_else(|_| fs::copy(&built, release.join(name)).map(|_| ()))
                .unwrap();
        }
        let mut linux = vec![0; 4096];
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        fs::write(tree.path("bzImage"), linux).unwrap();
        fs::write(tree.path("freestanding"), b"\x7fELF, and nothing else").unwrap();
        fs::write(tree.path("a b.img"), vec![0; 1 << 20]).unwrap();
        tree
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The script, which prints its arguments, one a line, and ends with 7.
    fn with_script(self, is_built: bool) -> Self {
        let script = self.path("guest-images/emuhost");
        fs::create_dir_all(self.path("guest-images/build/host")).unwrap();
        fs::write(&script, "#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        if is_built {
            fs::write(self.path("guest-images/build/host/manifest"), "").unwrap();
        }
        self
    }

    /// Runs minivmm in the tree, with a verdict of its own.
    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(self.path("target/release/minivmm"))
            .args(arguments)
            .current_dir(self.directory.path())
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env_remove("MINIVMM_GUEST")
            .env_remove("MINIVMM_GUEST_BUILD")
            .output()
            .unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn lines(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// Whether this machine's KVM cannot run Linux. If it can, says so.
fn linux_runs_nowhere() -> bool {
    let checked = Command::new(env!("CARGO_BIN_EXE_minivmm")).args(["check", "--quiet"]).output().unwrap();
    if checked.status.success() {
        skip("no-kernel", "Linux guests run on this machine");
    }
    !checked.status.success()
}

const GUEST: [&str; 6] = ["--kernel", "bzImage", "--initrd", "none", "--disk", "a b.img,cache=none"];

#[test]
fn where_linux_does_not_run_it_is_refused_within_a_second_with_the_line_to_type() {
    if !linux_runs_nowhere() {
        return;
    }
    let tree = Tree::new().with_script(true);
    let begin = Instant::now();
    let first = tree.run(&GUEST);
    let took = begin.elapsed();
    assert_eq!(first.status.code(), Some(125), "{first:?}");
    let line = format!(
        "\n  {} --host=auto --kernel bzImage --initrd none --disk 'a b.img,cache=none'\n",
        tree.path("target/release/minivmm").display()
    );
    assert!(said(&first).contains(&line) && said(&first).contains("no"), "{}", said(&first));
    assert!(
        said(&first).contains("--host=direct") && said(&first).contains("minivmm check"),
        "{}",
        said(&first)
    );
    // One second on a machine that does nothing else; the probes give up after two each.
    assert!(took < Duration::from_secs(8), "{took:?}");
    let second = tree.run(&GUEST);
    assert_eq!(said(&second), said(&first), "by the verdict that was kept");
}

#[test]
fn the_verdict_is_kept_for_this_boot_and_decides_without_a_probe() {
    let tree = Tree::new().with_script(true);
    let kept = tree.path("run/minivmm/kvm.json");
    tree.run(&["check", "--quiet"]);
    let Ok(text) = fs::read_to_string(&kept) else {
        assert!(linux_runs_nowhere(), "without KVM nothing is certain");
        return;
    };
    assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    // Another verdict, of the same boot and device: it counts.
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["linux_runs"] = false.into();
    value["verdict"] = "no Linux here, says this test".into();
    fs::write(&kept, value.to_string()).unwrap();
    let refused = tree.run(&GUEST);
    assert_eq!(refused.status.code(), Some(125));
    assert!(
        said(&refused).contains("error: no Linux here, says this test. In the emulated host"),
        "{}",
        said(&refused)
    );
    // Neither that of another boot, nor one that others could have written.
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(!said(&tree.run(&GUEST)).contains("says this test"));
    value["of"]["boot"] = "another".into();
    fs::write(&kept, value.to_string()).unwrap();
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!said(&tree.run(&GUEST)).contains("says this test"));
}

#[test]
fn auto_hands_over_says_so_in_one_line_and_passes_the_status_on() {
    if !linux_runs_nowhere() {
        return;
    }
    let tree = Tree::new().with_script(true);
    let mut arguments = vec!["--host=auto", "--memory", "4G"];
    arguments.extend(GUEST.map(|word| if word == "none" { "bzImage" } else { word }));
    arguments.extend(["--", "ls", "--host=x"]);
    let ran = tree.run(&arguments);
    assert_eq!(ran.status.code(), Some(7), "{ran:?}");
    assert_eq!(said(&ran).lines().count(), 1, "{}", said(&ran));
    assert!(said(&ran).contains("handing over to the emulated host"), "{}", said(&ran));
    let lines = lines(&ran);
    let binary = tree.path("target/release/minivmm").canonicalize().unwrap().display().to_string();
    let expected = [
        "run",
        "--timeout",
        "0",
        "--memory",
        "5120",
        "--binary",
        &binary,
        "--",
        "minivmm",
        "--host=direct",
        "--memory",
        "4G",
        "--kernel",
        "bzImage",
        "--initrd",
        "bzImage",
        "--disk",
        "a b.img,cache=none",
        "--",
        "ls",
        "--host=x",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn emulated_is_what_was_asked_for_on_every_machine() {
    let tree = Tree::new().with_script(true);
    let ran = tree.run(&["--host", "emulated", "--kernel", "freestanding", "--initrd", "none"]);
    assert_eq!(ran.status.code(), Some(7), "{ran:?}");
    assert_eq!(said(&ran), "");
    assert!(lines(&ran).ends_with(&["--kernel", "freestanding", "--initrd", "none"].map(str::to_owned)));
    for (tree, line) in [
        (Tree::new().with_script(false), "make -C "),
        (Tree::new(), "make emuhost     (in minivmm's source tree)"),
    ] {
        let ran = tree.run(&["--host=emulated"]);
        assert_eq!(ran.status.code(), Some(125));
        assert!(
            said(&ran).contains("the emulated host is not built") && said(&ran).contains(line),
            "{}",
            said(&ran)
        );
    }
}

#[test]
fn a_guest_that_is_no_linux_and_one_that_is_to_run_here_are_tried() {
    let tree = Tree::new().with_script(true);
    for host in [&[][..], &["--host=auto"], &["--host=direct"]] {
        let ran = tree.run(&[host, &["--kernel", "freestanding", "--initrd", "none"]].concat());
        assert!(said(&ran).contains("freestanding") && ran.stdout.is_empty(), "{host:?}: {ran:?}");
    }
    // A probe's threads, in a process that goes on as a VMM, would be threads before the sandbox.
    assert!(!tree.path("run").exists(), "nothing was probed for a guest that is no Linux");
    // The loader looks at it, or KVM: whichever it is, this machine was tried.
    let ran = tree.run(&[&["--host=direct"][..], &GUEST].concat());
    assert!(!said(&ran).contains("--host=auto") && ran.stdout.is_empty(), "{ran:?}");
    let wrong = tree.run(&["--host=here"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(said(&wrong).contains("auto, direct or emulated"), "{}", said(&wrong));
}

#[test]
fn study_and_bench_ask_the_same_before_they_make_anything() {
    if !linux_runs_nowhere() {
        return;
    }
    let tree = Tree::new().with_script(true);
    for (arguments, rest) in [
        (&["study", "--quick", "--out", "s"][..], "study --host=auto --quick --out s"),
        (&["bench", "--disk", "b.img", "--size", "1M"], "bench --host=auto --disk b.img --size 1M"),
    ] {
        let ran = tree.run(arguments);
        assert_eq!(ran.status.code(), Some(125), "{ran:?}");
        let line = format!("\n  {} {rest}\n", tree.path("target/release/minivmm").display());
        assert!(said(&ran).contains(&line), "{}", said(&ran));
        assert!(!tree.path("s").exists() && !tree.path("b.img").exists());
        let handed = tree.run(&[&arguments[..1], &["--host=auto"], &arguments[1..]].concat());
        assert_eq!(handed.status.code(), Some(7), "{handed:?}");
        let words = lines(&handed).join(" ");
        assert!(words.ends_with(&format!("-- minivmm {}", rest.replace("auto", "direct"))), "{words}");
    }
}

#[test]
fn a_study_whose_steps_fail_ends_with_a_failure_and_names_the_first() {
    let tree = Tree::new();
    // No test guest is found, so no step can boot one.
    let ran = tree.run(&["study", "--host=direct", "--quick", "--rounds", "1", "--only", "T1", "--out", "s"]);
    assert_eq!(ran.status.code(), Some(125), "{ran:?}");
    assert!(
        said(&ran).contains("has failed") && said(&ran).contains("the study is not whole"),
        "{}",
        said(&ran)
    );
    assert!(tree.path("s/study.html").exists(), "the page is there all the same");
}
