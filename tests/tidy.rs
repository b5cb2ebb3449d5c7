//! The house rules that a compiler does not know: who may use whom, what a file opens with, what no
//! file contains (`docs/architecture.md`; the map of a crate is its `lib.rs`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/pages.rs"]
mod pages;
#[path = "tidy/requirements.rs"]
mod requirements;

use std::path::{Path, PathBuf};

/// A crate of the workspace.
struct Crate {
    /// Its own name in Rust code.
    name: &'static str,
    sources: &'static str,
    /// Which modules each module may name: its crate's, and those of the crates that its crate depends on.
    /// Dependencies point down; a module may always name itself. `None`: everything.
    layers: &'static [(&'static str, Option<&'static [&'static str]>)],
    /// Modules that stand alone, and may be named in `layers`.
    alone: &'static [&'static str],
    /// Crates of the workspace that it may name.
    may_name: &'static [&'static str],
}

const CRATES: [Crate; 4] = [
    Crate {
        name: "minivmm_block",
        sources: "crates/minivmm-block/src",
        layers: &BLOCK_LAYERS,
        alone: &BLOCK_ALONE,
        may_name: &[],
    },
    Crate { name: "minivmm", sources: "src", layers: &LAYERS, alone: &ALONE, may_name: &["minivmm_block"] },
    Crate {
        name: "minivmm_export",
        sources: "crates/minivmm-export/src",
        layers: &EXPORT_LAYERS,
        alone: &EXPORT_ALONE,
        may_name: &["minivmm", "minivmm_block"],
    },
    Crate {
        name: "minivmm_lab",
        sources: "crates/minivmm-lab/src",
        layers: &LAB_LAYERS,
        alone: &LAB_ALONE,
        may_name: &["minivmm", "minivmm_block"],
    },
];

const BLOCK_LAYERS: [(&str, Option<&[&str]>); 5] = [
    ("blk", Some(&["virtio", "disk", "mem", "ratelimit", "slab", "threads"])),
    ("disk", Some(&["files", "text", "mem", "ratelimit", "slab", "threads"])),
    ("virtio", Some(&["mem"])),
    ("files", Some(&["text"])),
    ("mem", Some(&[])),
];
const BLOCK_ALONE: [&str; 4] = ["ratelimit", "slab", "text", "threads"];

const LAYERS: [(&str, Option<&[&str]>); 21] = [
    ("main", None),
    ("cli", None),
    ("vmm", None),
    ("check", None),
    ("disk_options", Some(&["disk", "observe", "virtio", "text"])),
    (
        "disks",
        Some(&[
            "disk",
            "disk_options",
            "files",
            "observe",
            "sandbox",
            "signals",
            "stats",
            "terminal",
            "threads",
        ]),
    ),
    ("hosts", Some(&["check", "kvm", "program", "text"])),
    ("stats", Some(&["disk"])),
    ("sandbox", Some(&["terminal"])),
    ("vcpu", Some(&["kvm", "bus", "mem", "layout", "ratelimit"])),
    ("kvm", Some(&["bus", "pci", "mem", "layout", "ratelimit"])),
    ("boot", Some(&["mem", "layout"])),
    ("observe", Some(&["disk", "explain", "files", "sandbox"])),
    ("explain", Some(&["blk", "virtio", "disk", "files", "mem", "text"])),
    ("console", Some(&["virtio", "mem", "ratelimit", "sandbox"])),
    ("job", Some(&[])),
    ("virtio", Some(&["bus", "pci", "mem", "ratelimit"])),
    ("pci", Some(&["bus", "mem", "layout", "ratelimit"])),
    ("devices", Some(&["bus", "layout", "ratelimit"])),
    // What the layers stand on.
    ("bus", Some(&[])),
    ("terminal", Some(&[])),
];
const ALONE: [&str; 4] = ["layout", "text", "program", "signals"];

const EXPORT_LAYERS: [(&str, Option<&[&str]>); 11] = [
    ("main", None),
    ("cli", None),
    ("explain", Some(&["daemon", "text"])),
    (
        "daemon",
        Some(&[
            "backend",
            "blk",
            "disk_options",
            "disks",
            "files",
            "mem",
            "sandbox",
            "serve",
            "signals",
            "socket",
            "stats",
            "table",
        ]),
    ),
    ("serve", Some(&["backend", "message", "ratelimit", "sandbox"])),
    ("handler", Some(&["backend", "inflight", "ring", "table"])),
    ("backend", Some(&["blk", "disk", "inflight", "mem", "notify", "ratelimit", "ring", "table", "virtio"])),
    ("ring", Some(&["notify", "table", "virtio"])),
    ("inflight", Some(&["mem", "virtio"])),
    ("table", Some(&["mem"])),
    ("notify", Some(&["virtio"])),
];
const EXPORT_ALONE: [&str; 2] = ["message", "socket"];

const LAB_LAYERS: [(&str, Option<&[&str]>); 7] = [
    ("main", None),
    ("cli", None),
    ("crash", Some(&["disk", "files", "text", "child", "estimate", "scratch_dir"])),
    ("bench", Some(&["measuring", "disk", "explain", "files", "observe", "text", "estimate", "scratch_dir"])),
    (
        "study",
        Some(&[
            "measuring",
            "crash",
            "disk",
            "observe",
            "files",
            "program",
            "child",
            "estimate",
            "scratch_dir",
        ]),
    ),
    ("measuring", Some(&["disk", "observe", "explain", "files", "program", "child", "scratch_dir"])),
    ("top", Some(&["observe", "terminal"])),
];
const LAB_ALONE: [&str; 3] = ["child", "scratch_dir", "estimate"];

/// Modules that stand alone and that anybody may name: what std and the eventfd crate lack.
const EVERYWHERE: [&str; 2] = ["sync", "doorbell"];

/// Inside a layer: (who, must not name).
const FORBIDDEN: [(&str, &[&str]); 3] = [
    // A device does not know its transport. (The block device is a crate that has none.)
    ("console", &["virtio::mmio", "virtio::pci", "virtio::core"]),
    // Transports share the register machine, and know nothing of each other.
    ("virtio/mmio", &["virtio::pci", "super::pci"]),
    ("virtio/pci", &["virtio::mmio", "super::mmio"]),
];

/// Only these name the KVM crates: the rest runs in tests without /dev/kvm.
const KVM_CRATES: [&str; 2] = ["kvm_ioctls", "kvm_bindings"];
const MAY_NAME_KVM: [&str; 6] =
    ["src/kvm", "src/vcpu.rs", "src/vmm", "src/boot/cpu.rs", "src/check.rs", "src/check/"];

/// What makes, empties or replaces a file: only `files` does, which looks first at what would be lost.
const MAKING: [&str; 7] = [
    "File::create",
    ".create(true)",
    ".create_new(true)",
    ".truncate(true)",
    "fs::write(",
    "fs::copy(",
    "O_CREAT",
];
/// These write to files of the kernel's that are no files of anybody's: cgroups.
/// The verdict on KVM is no path of a user's: a private file, made under a name that nobody has prepared.
const MAY_MAKE: [&str; 3] =
    ["crates/minivmm-block/src/files/", "src/observe/limit.rs", "src/hosts/verdict.rs"];

/// What no Rust file contains, put together so that this one does not either.
const NEVER: [(&str, &str); 5] =
    [("to", "do!"), ("unimple", "mented!"), ("db", "g!("), ("#[ign", "ore"), ("Co-authored", "-by")];

/// What the tests share: a crate, and no part of what is shipped.
const TESTKIT: &str = "crates/minivmm-testkit/src";

const LINES_MAX: usize = 600;
/// Tables of cases make tests longer.
const TEST_LINES_MAX: usize = 700;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `directory` that `wanted` wants, as (path from the root, content).
fn files(directory: &str, wanted: fn(&Path) -> bool) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let is_built = name == "target" || path.ends_with("guest-images/build");
            if path.is_symlink() || is_built || name == ".git" {
                continue;
            } else if path.is_dir() {
                directories.push(path);
            } else if wanted(&path)
                && let Ok(content) = std::fs::read_to_string(&path)
            {
                found.push((path.strip_prefix(root()).unwrap().display().to_string(), content));
            }
        }
    }
    found
}

fn rust_files(directory: &str) -> Vec<(String, String)> {
    files(directory, |path| path.extension().is_some_and(|extension| extension == "rs"))
}

/// Whether a file below the root is only tests.
fn is_test(path: &str) -> bool {
    path.starts_with("tests/")
        || path.starts_with(TESTKIT)
        || path.contains("/tests/")
        || path.ends_with("/tests.rs")
}

/// The lines of a file that are code, with their numbers from 1.
fn code(content: &str) -> impl Iterator<Item = (usize, &str)> {
    content
        .lines()
        .enumerate()
        .map(|(at, line)| (at + 1, line.split("//").next().unwrap_or(line)))
        .filter(|(_, line)| !line.trim().is_empty())
}

/// The module of the crate's root that a file below its `sources` belongs to.
fn module<'a>(path: &'a str, sources: &str) -> &'a str {
    let inside = path.strip_prefix(sources).unwrap().trim_start_matches('/');
    inside.split(['/', '.']).next().unwrap()
}

/// What is shipped of all crates.
fn sources() -> Vec<(String, String)> {
    CRATES.iter().flat_map(|member| rust_files(member.sources)).collect()
}

/// Whether `text` has `word` where no longer identifier contains it.
fn names(text: &str, word: &str) -> bool {
    let inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(|(at, _)| {
        !inside(text[..at].chars().next_back()) && !inside(text[at + word.len()..].chars().next())
    })
}

/// The modules that the paths in a file's code begin with: `crate::a`, `minivmm::a`, and each of
/// `use crate::{a, b::c}`, of all crates of the workspace.
fn named_modules(content: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let text: Vec<(usize, &str)> = code(content).collect();
    for (at, &(number, line)) in text.iter().enumerate() {
        let prefixes = ["crate::", "minivmm::", "minivmm_block::", "minivmm_export::", "minivmm_lab::"];
        for (start, prefix) in prefixes.iter().flat_map(|prefix| line.match_indices(prefix)) {
            if line[..start].ends_with(|c: char| c == '$' || c == '_' || c.is_alphanumeric()) {
                continue;
            }
            // A list may go on over the next lines.
            let mut rest = line[start + prefix.len()..].to_owned();
            if rest.starts_with('{') {
                let following = text[at + 1..].iter().map(|(_, line)| *line);
                rest.extend(following.take_while(|line| !line.contains(';')));
                found.extend(first_names(&rest).into_iter().map(|name| (number, name)));
            } else {
                found.push((number, identifier(&rest)));
            }
        }
    }
    found.retain(|(_, name)| name.starts_with(|c: char| c.is_ascii_lowercase()));
    found
}

fn identifier(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The names at the outermost level of `{a, b::{c, d}, e}`.
fn first_names(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut fresh) = (0, Vec::new(), false);
    for (at, c) in list.char_indices() {
        match c {
            '{' => {
                depth += 1;
                fresh = depth == 1;
            }
            '}' => depth -= 1,
            ',' => fresh = depth == 1,
            c if c.is_whitespace() => {}
            _ if fresh && depth == 1 => {
                names.push(identifier(&list[at..]));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

fn nothing_is_wrong(wrong: &[String]) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn dependencies_point_down() {
    let mut wrong = Vec::new();
    for member in &CRATES {
        for (path, content) in rust_files(member.sources) {
            let who = module(&path, member.sources);
            if who == "lib" {
                continue;
            }
            let nothing: &[&str] = &[];
            let allowed = match member.layers.iter().find(|layer| layer.0 == who) {
                Some((_, None)) => continue,
                Some((_, Some(allowed))) => *allowed,
                None if member.alone.contains(&who) || EVERYWHERE.contains(&who) => nothing,
                None => {
                    wrong.push(format!("{path}: give the module {who} its place in tests/tidy.rs"));
                    continue;
                }
            };
            for (line, name) in named_modules(&content) {
                // A macro at the crate's root is named like a module: it lives in `ratelimit`.
                let name = if name == "warn_limited" { "ratelimit".to_owned() } else { name };
                let may_name = [allowed, &EVERYWHERE].concat().contains(&name.as_str());
                if name != who && !may_name {
                    wrong.push(format!("{path}:{line}: {who} may not use {name}"));
                }
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn a_crate_names_only_crates_that_it_stands_on() {
    let mut wrong = Vec::new();
    for member in &CRATES {
        let may_name = |name: &str| name == member.name || member.may_name.contains(&name);
        for (path, content) in rust_files(member.sources) {
            let others = CRATES.iter().map(|other| other.name).chain(["minivmm_testkit"]);
            for other in others.filter(|name| !may_name(name)) {
                // A message may name the program; a path or a `use` names the crate.
                let path_of = |text: &str| {
                    text.contains(&format!("{other}::")) || text.contains(&format!("use {other}"))
                };
                let found = code(&content).filter(|(_, text)| names(text, other) && path_of(text));
                wrong.extend(found.map(|(line, _)| format!("{path}:{line}: may not use {other}")));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn every_crate_of_the_workspace_is_known_here() {
    let entries = std::fs::read_dir(root().join("crates")).unwrap();
    for path in entries.map(|entry| entry.unwrap().path()) {
        let sources = format!("crates/{}/src", path.file_name().unwrap().to_string_lossy());
        let is_known = sources == TESTKIT || CRATES.iter().any(|member| member.sources == sources);
        assert!(is_known, "{sources}: add it to CRATES");
    }
}

#[test]
fn a_layer_keeps_its_own_secrets() {
    let mut wrong = Vec::new();
    for (path, content) in rust_files("src") {
        for (who, forbidden) in FORBIDDEN {
            if !path.strip_prefix("src/").unwrap().starts_with(who) {
                continue;
            }
            for (line, text) in code(&content) {
                for name in forbidden.iter().filter(|name| names(text, name)) {
                    wrong.push(format!("{path}:{line}: {who} may not name {name}"));
                }
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn only_the_machine_itself_names_the_kvm_crates() {
    let mut wrong = Vec::new();
    for (path, content) in sources() {
        if MAY_NAME_KVM.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        for (line, text) in code(&content) {
            for name in KVM_CRATES.iter().filter(|name| names(text, name)) {
                wrong.push(format!("{path}:{line}: names {name}; only {MAY_NAME_KVM:?} may"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn files_are_made_and_emptied_in_one_place() {
    let mut wrong = Vec::new();
    for (path, content) in sources() {
        if MAY_MAKE.iter().any(|place| path.starts_with(place)) || path.ends_with("/tests.rs") {
            continue;
        }
        let shipped = content.split("#[cfg(test)]").next().unwrap_or_default();
        for (line, text) in code(shipped) {
            for how in MAKING.iter().filter(|how| text.contains(*how)) {
                wrong.push(format!("{path}:{line}: {how}: let files::output open it"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn every_file_opens_with_what_it_owns() {
    let mut wrong = Vec::new();
    for (path, content) in ["src", "crates", "tests", "benches", "fuzz"].map(rust_files).concat() {
        let first = content.lines().next().unwrap_or_default();
        if !first.starts_with("//! ") {
            wrong.push(format!("{path}: does not open with //! and what it owns"));
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn nothing_is_left_for_later_and_no_test_is_switched_off() {
    let mut wrong = Vec::new();
    for (path, content) in ["src", "crates", "tests", "benches", "fuzz"].map(rust_files).concat() {
        for (line, text) in content.lines().enumerate().map(|(at, line)| (at + 1, line)) {
            for (a, b) in NEVER.iter().filter(|(a, b)| text.contains(&format!("{a}{b}"))) {
                wrong.push(format!("{path}:{line}: {a}{b}"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn a_file_can_be_read_in_one_sitting() {
    let mut wrong = Vec::new();
    for directory in ["src", "crates", "tests", "benches", "fuzz"] {
        for (path, content) in rust_files(directory) {
            let most = if is_test(&path) { TEST_LINES_MAX } else { LINES_MAX };
            let lines = content.lines().count();
            if lines > most {
                wrong.push(format!("{path}: {lines} lines, {most} at most"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn scripts_and_tests_name_no_url() {
    // A mirror is taken from the machine's own configuration when it is needed.
    fn is_script(path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let inside = |place: &str| path.strip_prefix(root()).is_ok_and(|path| path.starts_with(place));
        name == "Makefile"
            || name.ends_with(".mk")
            || name.ends_with(".sh")
            || [".ci", "guest-images", "tests", "fuzz"].into_iter().any(inside)
                && ![".md", ".lock"].iter().any(|ending| name.ends_with(ending))
    }
    let (plain, secure) = (format!("http:{}", "//"), format!("https:{}", "//"));
    let mut wrong = Vec::new();
    for (path, content) in files(".", is_script) {
        for (at, line) in content.lines().enumerate() {
            if line.contains(&plain) || line.contains(&secure) {
                wrong.push(format!("{path}:{}: a URL", at + 1));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn the_reader_of_use_lines_understands_what_rust_writes() {
    for (text, expected) in [
        ("use crate::mem::{self, Ram};", vec!["mem"]),
        ("use crate::{bus, mem::{Ram, Iov}, virtio::core};", vec!["bus", "mem", "virtio"]),
        ("pub(crate) use crate::{\n    bus::Bus,\n    layout,\n};", vec!["bus", "layout"]),
        ("let a = crate::disk::Image::open(crate::layout::KIB);", vec!["disk", "layout"]),
        ("use minivmm::vmm::run;", vec!["vmm"]),
        ("use minivmm_lab::{bench, crash::log};", vec!["bench", "crash"]),
        ("// use crate::vmm;", vec![]),
        ("/// [`crate::disk`]", vec![]),
        ("$crate::warn()", vec![]),
        ("use linux_crate::vmm;", vec![]),
        ("use crate::Bar;", vec![]),
    ] {
        let found: Vec<String> = named_modules(text).into_iter().map(|(_, name)| name).collect();
        assert_eq!(found, expected, "{text}");
    }
    assert!(names("use kvm_ioctls::Cap;", "kvm_ioctls") && !names("my_kvm_ioctls", "kvm_ioctls"));
}
