//! The pages of `docs/`, README.md and CONTRIBUTING.md: every link and every `docs/…` that a file names leads
//! somewhere, the guide (`docs/README.md`) lists each page once, and the guide stays short.

use std::collections::BTreeSet;
use std::path::Path;

use super::{files, nothing_is_wrong, root};

/// Words that the guide may have, as `wc -w` counts them. Neither rules, dated results nor tables that tests
/// compare with the code count.
const WORDS_MAX: usize = 22_000;
const NOT_COUNTED: [&str; 3] = ["docs/requirements.md", "docs/results/", "docs/reference/"];

/// Which page lists the pages of which directory, and how its links to them begin.
const INDEXES: [(&str, &str, &str); 3] = [
    ("docs/README.md", "docs/", ""),
    ("docs/README.md", "docs/reference/", "reference/"),
    ("docs/results/README.md", "docs/results/", ""),
];

fn is_page(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

/// The guide's pages with their texts.
fn pages() -> Vec<(String, String)> {
    let mut pages = [files("docs", is_page), files("examples", is_page), files("benches", is_page)].concat();
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        pages.push((name.to_owned(), std::fs::read_to_string(root().join(name)).unwrap()));
    }
    pages
}

/// What the links of a page lead to, without those to other hosts.
fn links(page: &str) -> Vec<&str> {
    let ends = page.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    ends.map(|(target, _)| target).filter(|target| !target.contains("://")).collect()
}

/// A heading as the end of a link names it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn has_heading(page: &str, wanted: &str) -> bool {
    let headings = page.lines().filter_map(|line| line.strip_prefix('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).any(|found| found == wanted)
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let mut wrong = Vec::new();
    for (path, content) in pages() {
        let directory = root().join(&path).parent().unwrap().to_owned();
        for link in links(&content) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { root().join(&path) } else { directory.join(file) };
            let text = std::fs::read_to_string(&target).unwrap_or_default();
            if !target.exists() || !heading.is_empty() && !has_heading(&text, heading) {
                wrong.push(format!("{path}: a link to {link}, which is not there"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

/// What code, tests, scripts and messages call `docs/…`.
#[test]
fn every_page_that_a_file_names_is_there() {
    fn may_name_pages(path: &Path) -> bool {
        let kept_input = path.strip_prefix(root()).is_ok_and(|path| path.starts_with("fuzz/corpus"));
        !kept_input && path.file_name().is_none_or(|name| name != "CHANGELOG.md")
    }
    let mut wrong = Vec::new();
    for (path, content) in files(".", may_name_pages) {
        for (at, _) in content.match_indices("docs/") {
            let is_ours = !content[..at].ends_with(|c: char| c.is_alphanumeric() || "/.".contains(c));
            let inside = |c: &char| c.is_ascii_alphanumeric() || "/-_.".contains(*c);
            let name: String = content[at..].chars().take_while(inside).collect();
            let name = name.trim_end_matches('.');
            if is_ours && name.ends_with(".md") && !root().join(name).exists() {
                wrong.push(format!("{path}: {name} is not there"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn an_index_lists_each_page_once() {
    let mut wrong = Vec::new();
    for (index, directory, inside) in INDEXES {
        let text = std::fs::read_to_string(root().join(index)).unwrap();
        for (path, _) in pages() {
            let name =
                path.strip_prefix(directory).filter(|name| !name.contains('/') && *name != "README.md");
            let Some(name) = name else { continue };
            let count = text.matches(&format!("]({inside}{name})")).count();
            if count != 1 {
                wrong.push(format!("{index}: lists {path} {count} times"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn the_guide_is_short() {
    let counted = |path: &str| path == "README.md" || path.starts_with("docs/");
    let guide = pages().into_iter().filter(|(path, _)| {
        counted(path) && !NOT_COUNTED.iter().any(|beginning| path.starts_with(beginning))
    });
    let words: Vec<_> = guide.map(|(path, text)| (text.split_whitespace().count(), path)).collect();
    let all: usize = words.iter().map(|(count, _)| count).sum();
    assert!(all <= WORDS_MAX, "{all} words, {WORDS_MAX} at most: {words:?}");
}

#[test]
fn the_reader_of_links_understands_what_pages_write() {
    assert_eq!(
        links("[a](b.md), [c](d.md#e-f) ![p](top.svg) [u](ftp://host/x)"),
        ["b.md", "d.md#e-f", "top.svg"]
    );
    assert_eq!(anchor("Add a test, of `another` kind"), "add-a-test-of-another-kind");
    assert!(has_heading("# A\n\n## Limits of time\n", "limits-of-time") && !has_heading("# A\n", "b"));
}

#[test]
fn the_map_of_the_tests_names_every_suite_and_no_other() {
    let map = std::fs::read_to_string(root().join("tests/README.md")).unwrap();
    let (mut suites, mut programs) = (BTreeSet::new(), BTreeSet::new());
    let places = ["tests", "crates/minivmm-block/tests", "crates/minivmm-lab/tests"];
    let entries = places.iter().filter_map(|tests| std::fs::read_dir(root().join(tests)).ok()).flatten();
    for path in entries.map(|entry| entry.unwrap().path()) {
        let program = path.file_stem().unwrap().to_string_lossy().into_owned();
        if let Ok(main) = std::fs::read_to_string(path.join("main.rs")) {
            let modules = main.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
            suites.extend(modules.map(|module| format!("{program}::{module}")));
        } else if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        programs.insert(program);
    }
    let cells = map.lines().filter_map(|line| line.strip_prefix('|')?.split('|').nth(1));
    let names: Vec<&str> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    let mut wrong = Vec::new();
    // A program that has no place itself has one for each of its modules.
    let has_place = |name: &str| names.contains(&name);
    let program_of =
        |suite: &str| suite.split_once("::").map_or(suite.to_owned(), |(program, _)| program.into());
    let is_missing = |suite: &&String| !has_place(suite) && !has_place(&program_of(suite));
    for suite in suites.iter().filter(is_missing) {
        wrong.push(format!("tests/README.md: where is the suite {suite}?"));
    }
    let is_missing =
        |program: &&String| !has_place(program) && !suites.iter().any(|suite| program_of(suite) == **program);
    for program in programs.iter().filter(is_missing) {
        wrong.push(format!("tests/README.md: where is the suite {program}?"));
    }
    let others = ["observed", "tests/as-user"];
    let exists = |name: &str| suites.contains(name) || programs.contains(name) || others.contains(&name);
    for name in names.iter().filter(|name| !exists(name)) {
        wrong.push(format!("tests/README.md: there is no suite {name}"));
    }
    nothing_is_wrong(&wrong);
}
