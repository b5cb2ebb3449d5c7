//! No two files of a crate need each other: a reader can begin with the one that stands below.
//!
//! A room's own file (`disk/image.rs`) and its parts (`disk/image/fate.rs`) are one piece: what lies between
//! those is not looked at, and neither are tests.

use std::collections::{BTreeMap, BTreeSet};

use super::{CRATES, code, is_test, nothing_is_wrong, rust_files};

/// A file of a crate as the path of its module: `disk::image` is `["disk", "image"]`.
type Module = Vec<String>;

/// The module of a file, by its path below `src`.
fn module_of(path: &str) -> Module {
    let inside = path.trim_start_matches('/').trim_end_matches(".rs");
    let inside = inside.strip_suffix("/mod").unwrap_or(inside);
    inside.split('/').map(str::to_owned).collect()
}

/// The paths that begin with `crate::` or `super::` in code, each as its words; lists in braces are taken apart.
fn paths(text: &str) -> Vec<Vec<&str>> {
    let mut found = Vec::new();
    for prefix in ["crate::", "super::"] {
        for (at, _) in text.match_indices(prefix) {
            let before = text[..at].chars().next_back();
            if before.is_none_or(|c| !c.is_alphanumeric() && !"_:$".contains(c)) {
                take_path(&text[at..], &mut Vec::new(), &mut found);
            }
        }
    }
    found
}

/// Takes one path, or each of a list, and returns what follows.
fn take_path<'a>(text: &'a str, before: &mut Vec<&'a str>, found: &mut Vec<Vec<&'a str>>) -> &'a str {
    let depth = before.len();
    let mut rest = text.trim_start();
    loop {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if let Some(list) = after.strip_prefix('{').filter(|_| word.is_empty()) {
            rest = take_list(list, before, found);
            break;
        }
        before.push(word);
        let Some(next) = after.strip_prefix("::") else {
            found.push(before.clone());
            rest = after;
            break;
        };
        rest = next;
    }
    before.truncate(depth);
    rest
}

fn take_list<'a>(mut text: &'a str, before: &mut Vec<&'a str>, found: &mut Vec<Vec<&'a str>>) -> &'a str {
    loop {
        text = take_path(text, before, found);
        // A new name (`as x`) is of no interest.
        let end = text.find([',', '}']).unwrap_or(text.len());
        let Some(rest) = text[end..].strip_prefix(',') else {
            return text.get(end + 1..).unwrap_or_default();
        };
        text = rest.trim_start();
        if let Some(rest) = text.strip_prefix('}') {
            return rest;
        }
    }
}

/// The file that `path` leads to, from the file of `from`.
fn target(path: &[&str], from: &Module, files: &BTreeSet<Module>) -> Option<Module> {
    let mut full = if path.first() == Some(&"super") { from.clone() } else { Module::new() };
    for word in path {
        match *word {
            "crate" => {}
            "super" => {
                full.pop();
            }
            word => full.push(word.to_owned()),
        }
    }
    while !full.is_empty() && !files.contains(&full) {
        full.pop();
    }
    (!full.is_empty()).then_some(full)
}

/// What each file needs, without its own room and its own parts.
fn needs(files: &[(Module, String)]) -> BTreeMap<Module, BTreeSet<Module>> {
    let known: BTreeSet<Module> = files.iter().map(|file| file.0.clone()).collect();
    let of = |(module, content): &(Module, String)| {
        let shipped = content.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let text: Vec<&str> = code(shipped).map(|(_, line)| line).collect();
        let text = text.join("\n");
        let targets = paths(&text).into_iter().filter_map(|path| target(&path, module, &known));
        let others = targets.filter(|other| !other.starts_with(module) && !module.starts_with(other));
        (module.clone(), others.collect())
    };
    files.iter().map(of).collect()
}

/// A way from `module` back to itself, if there is one.
fn circle(module: &Module, needs: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    let mut seen = BTreeSet::new();
    let mut ways = vec![vec![module.clone()]];
    while let Some(way) = ways.pop() {
        for next in way.last().and_then(|last| needs.get(last)).into_iter().flatten() {
            let longer = [way.as_slice(), std::slice::from_ref(next)].concat();
            if next == module {
                return Some(longer);
            }
            if seen.insert(next.clone()) {
                ways.push(longer);
            }
        }
    }
    None
}

fn words(way: &[Module]) -> String {
    way.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(" -> ")
}

#[test]
fn no_two_files_of_a_crate_need_each_other() {
    let mut wrong = Vec::new();
    for member in &CRATES {
        let shipped = rust_files(member.sources).into_iter().filter(|(path, _)| !is_test(path));
        let files: Vec<(Module, String)> = shipped
            .map(|(path, content)| (module_of(path.strip_prefix(member.sources).unwrap()), content))
            .filter(|(module, _)| !["lib", "main"].contains(&module[0].as_str()))
            .collect();
        let needs = needs(&files);
        assert!(needs.values().map(BTreeSet::len).sum::<usize>() > files.len() / 2, "{}", member.name);
        wrong.extend(needs.keys().filter_map(|module| circle(module, &needs)).map(|way| words(&way)));
    }
    nothing_is_wrong(&wrong);
}

#[test]
fn the_reader_of_paths_finds_circles_and_no_others() {
    let found =
        paths("use crate::{a::{self, B}, c as d}; let x = super::super::e::f(); my_crate::g; self::h;");
    let expected: [&[&str]; 4] =
        [&["crate", "a", "self"], &["crate", "a", "B"], &["crate", "c"], &["super", "super", "e", "f"]];
    assert_eq!(found, expected);
    let files = |texts: &[(&str, &str)]| -> Vec<(Module, String)> {
        texts.iter().map(|(path, text)| (module_of(path), (*text).to_owned())).collect()
    };
    let first = |texts| {
        let needs = needs(&files(texts));
        needs.keys().find_map(|module| circle(module, &needs)).map(|way| words(&way))
    };
    assert_eq!(first(&[("a.rs", "use crate::b::C;"), ("b.rs", "use super::a::D;")]).unwrap(), "a -> b -> a");
    assert_eq!(
        first(&[("a.rs", "use crate::b::C;"), ("b.rs", "#[cfg(test)]\nmod tests { use crate::a; }")]),
        None
    );
    assert_eq!(first(&[("a/mod.rs", "use b::C;"), ("a/b.rs", "use super::D;")]), None);
}
