//! Deliberate mistakes in production code, each as a patch in `tests/mutants`, and the suites that must
//! find it.
//!
//! A patch begins with what the mistake is, in words, and a line `Dies by: ARGUMENTS` for each suite that
//! finds it, with the arguments of `cargo test`. Here it is only seen that every patch still applies.
//! `MINIVMM_MUTANTS=all cargo test --test mutants -- --nocapture` applies each to a copy of the tree, builds
//! that, and has the suites find it: some minutes (`make torture`). In the place of `all`, a part of a patch's name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Seeds of a suite that has them (`tests/durability`): it must find a mistake within few.
const SEEDS: &str = "10000";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A mistake.
struct Mutant {
    name: String,
    patch: String,
    /// Arguments of `cargo test`, one a suite.
    suites: Vec<Vec<String>>,
}

fn mutants() -> Vec<Mutant> {
    let entries = std::fs::read_dir(root().join("tests/mutants")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: &PathBuf| {
        let patch = std::fs::read_to_string(path).unwrap();
        let suites = patch.lines().filter_map(|line| line.strip_prefix("Dies by: "));
        let words = |suite: &str| suite.split_whitespace().map(str::to_owned).collect();
        Mutant {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            suites: suites.map(words).collect(),
            patch,
        }
    };
    paths.iter().map(read).collect()
}

/// What `patch` says to a patch, in a tree.
fn patch(tree: &Path, arguments: &[&str], patch: &str) -> Output {
    let mut child = Command::new("patch")
        .args(["--strip=1", "--force", "--no-backup-if-mismatch", "--reject-file=-"])
        .args(arguments)
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run patch: {error}; apt-get install patch"));
    child.stdin.take().unwrap().write_all(patch.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

#[test]
fn every_patch_applies_and_says_what_finds_it() {
    let mutants = mutants();
    assert!(mutants.len() >= 10, "{} patches", mutants.len());
    for Mutant { name, patch: text, suites } in &mutants {
        let output = patch(root(), &["--dry-run"], text);
        assert!(
            output.status.success(),
            "tests/mutants/{name}.patch does not apply any more: make the same mistake in the code as it is \
             now.\n{}",
            words(&output)
        );
        let told = text.split("\n\n").next().is_some_and(|first| first.ends_with('.'));
        assert!(told, "{name}: what is the mistake?");
        assert!(!suites.is_empty(), "{name}: what finds it?");
        for suite in suites {
            let file = suite.iter().skip_while(|word| *word != "--test").nth(1);
            let exists = |file: &String| {
                let tests = root().join("tests");
                tests.join(format!("{file}.rs")).exists() || tests.join(file).join("main.rs").exists()
            };
            assert!(file.map_or(suite[0] == "--lib", exists), "{name}: there is no suite {suite:?}");
        }
    }
}

/// Makes `to` like `from`, without touching what is the same already, which need not be built again.
fn copy(from: &Path, to: &Path) {
    const NOT_BUILT_FROM: [&str; 5] = ["target", ".git", "build", "corpus", "mutants"];
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, copied) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            if !NOT_BUILT_FROM.iter().any(|name| entry.file_name() == *name) {
                copy(&path, &copied);
            }
        } else if path.is_file() && std::fs::read(&path).ok() != std::fs::read(&copied).ok() {
            std::fs::copy(&path, &copied).unwrap();
        }
    }
}

/// `cargo test` in the copy.
fn cargo_test(tree: &Path, suite: &[String], more: &[&str]) -> Output {
    Command::new(env!("CARGO"))
        // One build of the crate for all suites: with the feature that most of them need.
        .args(["test", "--release", "--locked", "--quiet", "--features", "mutants"])
        .args(suite)
        .args(more)
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", tree.with_file_name("build"))
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_INCREMENTAL", "true")
        .env("RUST_BACKTRACE", "0")
        .env("MINIVMM_SEEDS", SEEDS)
        .env_remove("MINIVMM_MUTANTS")
        .output()
        .unwrap()
}

/// Why a suite does not find a mistake, or the line by which it does.
fn killed_by(tree: &Path, suite: &[String]) -> Result<String, String> {
    let built = cargo_test(tree, suite, &["--no-run"]);
    if !built.status.success() {
        return Err(format!("it does not compile:\n{}", words(&built)));
    }
    let ran = cargo_test(tree, suite, &[]);
    let said = words(&ran);
    if ran.status.success() {
        return Err(format!("{suite:?} finds nothing"));
    }
    let mut lines = said.lines().skip_while(|line| !line.contains("panicked at")).skip(1);
    lines.next().map(str::to_owned).ok_or(format!("{suite:?} has failed without a test:\n{said}"))
}

#[test]
fn every_patch_dies() {
    let Ok(wanted) = std::env::var("MINIVMM_MUTANTS") else {
        println!("skipped: builds the crate once a patch; MINIVMM_MUTANTS=all, as `make torture` has it");
        return;
    };
    let mutants: Vec<_> =
        mutants().into_iter().filter(|mutant| wanted == "all" || mutant.name.contains(&wanted)).collect();
    assert!(!mutants.is_empty(), "no patch has {wanted} in its name");
    let tree = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants/tree");
    copy(root(), &tree);
    // The control: without a mistake nothing is found.
    let suites: BTreeSet<_> = mutants.iter().flat_map(|mutant| mutant.suites.clone()).collect();
    for suite in suites {
        let output = cargo_test(&tree, &suite, &[]);
        assert!(output.status.success(), "{suite:?} fails without a mistake:\n{}", words(&output));
        println!("no mistake: {} finds none", suite.join(" "));
    }
    let mut survivors = Vec::new();
    for Mutant { name, patch: text, suites } in &mutants {
        let applied = patch(&tree, &[], text);
        assert!(applied.status.success(), "{name}: {}", words(&applied));
        for suite in suites {
            match killed_by(&tree, suite) {
                Ok(line) => println!("{name} dies by {}: {line}", suite.join(" ")),
                Err(why) => survivors.push(format!("{name}: {why}")),
            }
        }
        copy(root(), &tree);
    }
    assert!(survivors.is_empty(), "{}", survivors.join("\n"));
}
