//! Deliberate mistakes in production code, each as a patch in `tests/mutants`, and the suites that must
//! find it.
//!
//! A patch begins with what the mistake is, in words, and a line `Dies by: ARGUMENTS` for each suite that
//! finds it, with the arguments of `cargo test`. Here it is only seen that every patch still applies.
//! Mistakes that share one build are `tests/mistakes.rs`'.
//! `MINIVMM_MUTANTS=all cargo test --test mutants -- --nocapture` applies each to a copy of the tree, builds
//! that, and has the suites find it: some minutes (`make torture`). In the place of `all`, a part of a patch's name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Output;

use minivmm_testkit::patched::{cargo_test, copy, copy_of_the_tree, patch, words};
use minivmm_testkit::places::root;
use minivmm_testkit::skips::skip;

/// Seeds of a suite that has them (`durability`): it must find a mistake within few.
const SEEDS: &str = "10000";

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
                let places = ["tests", "crates/minivmm-block/tests"].map(|tests| root().join(tests));
                let forms = [format!("{file}.rs"), format!("{file}/main.rs")];
                places.iter().any(|tests| forms.iter().any(|form| tests.join(form).exists()))
            };
            assert!(file.map_or(suite[0] == "--lib", exists), "{name}: there is no suite {suite:?}");
        }
    }
}

/// A run that was ended, or has failed, leaves its patch in the copy.
#[test]
fn a_copy_is_what_is_copied_whatever_a_patch_has_left_in_it() {
    let place = tempfile::tempdir().unwrap();
    let (from, to) = (place.path().join("from"), place.path().join("to"));
    std::fs::create_dir_all(from.join("src")).unwrap();
    std::fs::write(from.join("src/old.rs"), "old\n").unwrap();
    copy(&from, &to);
    let patched = patch(
        &to,
        &[],
        "--- a/src/old.rs\n+++ b/src/old.rs\n@@ -1 +1 @@\n-old\n+changed\n\
         --- /dev/null\n+++ b/src/made/new.rs\n@@ -0,0 +1 @@\n+new\n",
    );
    assert!(patched.status.success() && to.join("src/made/new.rs").exists(), "{}", words(&patched));
    let kept = std::fs::metadata(from.join("src/old.rs")).unwrap().modified().unwrap();
    copy(&from, &to);
    assert_eq!(std::fs::read_to_string(to.join("src/old.rs")).unwrap(), "old\n");
    assert_eq!(std::fs::read_dir(to.join("src")).unwrap().count(), 1, "what the patch has made is gone");
    assert_eq!(std::fs::metadata(from.join("src/old.rs")).unwrap().modified().unwrap(), kept);
}

/// `cargo test` in the copy.
fn run(tree: &Path, suite: &[String], more: &[&str]) -> Output {
    let mut cargo = cargo_test(tree, &["--quiet"]);
    cargo.args(suite).args(more).env("MINIVMM_SEEDS", SEEDS).env_remove("MINIVMM_MUTANTS");
    cargo.output().unwrap()
}

/// Why a suite does not find a mistake, or the line by which it does.
fn killed_by(tree: &Path, suite: &[String]) -> Result<String, String> {
    let built = run(tree, suite, &["--no-run"]);
    if !built.status.success() {
        return Err(format!("it does not compile:\n{}", words(&built)));
    }
    let ran = run(tree, suite, &[]);
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
        skip("torture", "builds the crate once a patch; MINIVMM_MUTANTS=all, as `make torture` has it");
        return;
    };
    let mutants: Vec<_> =
        mutants().into_iter().filter(|mutant| wanted == "all" || mutant.name.contains(&wanted)).collect();
    assert!(!mutants.is_empty(), "no patch has {wanted} in its name");
    let tree = copy_of_the_tree("mutants");
    copy(root(), &tree);
    // The control: without a mistake nothing is found.
    let suites: BTreeSet<_> = mutants.iter().flat_map(|mutant| mutant.suites.clone()).collect();
    for suite in suites {
        let output = run(&tree, &suite, &[]);
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
