//! `docs/requirements.md` and the citations of its rules: each citation has an entry, each entry names
//! files that exist and a test that cites it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{files, is_test, nothing_is_wrong, root};

const PAGE: &str = "docs/requirements.md";
/// The letters of the families. A citation is one of them with a number from 1 to 99, no longer word around it.
const FAMILIES: [char; 10] = ['S', 'Q', 'M', 'P', 'B', 'H', 'E', 'D', 'I', 'R'];

/// What people write: code, scripts, documents. Neither kept inputs of fuzzers nor generated pages.
fn is_written_by_hand(path: &Path) -> bool {
    let Ok(path) = path.strip_prefix(root()) else { return false };
    let known = ["rs", "c", "h", "S", "sh", "md", "toml", "mk", "patch"];
    match path.extension() {
        Some(extension) => known.iter().any(|known| extension == *known),
        None => !path.starts_with("fuzz/corpus"),
    }
}

/// The rules that a text cites. Ranges cite their ends.
fn citations(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let is_citation = |word: &&str| {
        let number = word.strip_prefix(FAMILIES).unwrap_or_default();
        let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
        is_number && (1..=2).contains(&number.len()) && !number.starts_with('0')
    };
    words.filter(is_citation).map(str::to_owned).collect()
}

/// What of a file is test: all of it below a `tests/`, else what follows `#[cfg(test)]`.
fn test_part<'a>(path: &str, content: &'a str) -> &'a str {
    if is_test(path) {
        return content;
    }
    content.split_once("#[cfg(test)]\nmod tests {").map_or("", |(_, tests)| tests)
}

/// The rules of the page by their number, each as one line without its number.
fn entries(page: &str) -> BTreeMap<String, String> {
    let paragraphs = page.split("\n\n").filter_map(|paragraph| paragraph.trim().strip_prefix("**"));
    let numbered = paragraphs.filter_map(|rest| rest.split_once("** "));
    numbered.map(|(number, text)| (number.to_owned(), text.replace('\n', " "))).collect()
}

/// The paths between backticks.
fn paths(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).filter(|path| path.contains('/')).collect()
}

#[test]
fn every_citation_of_a_rule_has_its_entry() {
    let known = entries(&std::fs::read_to_string(root().join(PAGE)).unwrap());
    let mut wrong = Vec::new();
    for (path, content) in files(".", is_written_by_hand) {
        for (at, line) in content.lines().enumerate() {
            for number in citations(line).iter().filter(|number| !known.contains_key(*number)) {
                wrong.push(format!("{path}:{}: {number} is no rule of {PAGE}", at + 1));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn every_rule_has_its_source_its_file_and_a_test_that_cites_it() {
    let page = std::fs::read_to_string(root().join(PAGE)).unwrap();
    let known = entries(&page);
    assert!(FAMILIES.iter().all(|family| known.contains_key(&format!("{family}1"))), "{:?}", known.keys());
    let mut wrong = Vec::new();
    let written = page.lines().filter(|line| line.starts_with("**")).count();
    if written != known.len() {
        wrong.push(format!("{PAGE}: it begins {written} rules, under {} numbers", known.len()));
    }
    for (number, text) in &known {
        let parts = text.split_once(" From ").and_then(|(rule, rest)| {
            let (source, rest) = rest.split_once(" Enforced in ")?;
            let (enforced, shown) = rest.split_once(" Shown by ")?;
            (!rule.is_empty() && !source.is_empty()).then_some((paths(enforced), paths(shown)))
        });
        let Some((enforced, shown)) =
            parts.filter(|(enforced, shown)| !enforced.is_empty() && !shown.is_empty())
        else {
            wrong.push(format!("{PAGE}: {number} needs a rule, `From`, `Enforced in` and `Shown by`"));
            continue;
        };
        for path in enforced.iter().filter(|path| !root().join(path).is_file()) {
            wrong.push(format!("{PAGE}: {number} names {path}, which does not exist"));
        }
        for path in shown {
            let content = std::fs::read_to_string(root().join(path)).unwrap_or_default();
            if !citations(test_part(path, &content)).contains(number) {
                wrong.push(format!("{PAGE}: {number} is shown by {path}, where no test cites it"));
            }
        }
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn the_reader_of_citations_tells_rules_from_look_alikes() {
    for (text, expected) in [
        ("it stays so (B5, R12): \"I3: a FLUSH\"", vec!["B5", "I3", "R12"]),
        ("R1–R6, R9 to R23", vec!["R1", "R23", "R6", "R9"]),
        ("/// Shows S1.", vec!["S1"]),
        // An address map, a type of sleep, a chipset of three digits, an optimisation, a claim of 2008, a standard.
        ("E820 S5_SLEEP_TYPE I440FX -O2 T10 A1 C11 B R0 R07 mR1 R1a xR2 0xB5", vec![]),
    ] {
        assert_eq!(citations(text).into_iter().collect::<Vec<_>>(), expected, "{text}");
    }
    let found = entries("## B: a family\n\n**B5** Writes\nare stable. Shown by `tests/b.rs`.\n");
    assert_eq!(found["B5"], "Writes are stable. Shown by `tests/b.rs`.");
    assert_eq!(paths(&found["B5"]), ["tests/b.rs"]);
}
