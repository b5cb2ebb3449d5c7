//! Text for a terminal of 80 columns: wrapped rows with a head, paths as text, and the nearest known word to one
//! that is not known.
//!
//! Owns how words are wrapped and compared, and how paths become text. Quoting is the block crate's. What is said belongs to
//! the caller.

use std::path::Path;

pub use minivmm_block::text::shell_word;

/// The least width of a terminal, in columns.
const COLUMNS: usize = 80;

/// Puts `words` after `head` and wraps them. Further lines are indented by the width of `head`.
pub fn hang(head: &str, words: &str) -> String {
    let indent = head.chars().count();
    let mut lines = String::from(head);
    let mut column = indent;
    for word in words.split(' ') {
        let width = word.chars().count();
        if column > indent && column + 1 + width > COLUMNS {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            column = indent;
        } else if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += width;
    }
    lines.truncate(lines.trim_end().len());
    lines.push('\n');
    lines
}

/// Serialises a path as text, which JSON requires. Bytes that are not UTF-8 are replaced.
pub fn path_as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Returns the candidate that `word` was most likely meant to be. It may differ by at most two typing errors,
/// or one in a word of fewer than four letters.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = if word.chars().count() < 4 { 1 } else { 2 };
    let near = candidates.into_iter().map(|candidate| (distance(word, candidate), candidate));
    near.filter(|(distance, _)| (1..=limit).contains(distance))
        .min_by_key(|(distance, _)| *distance)
        .map(|it| it.1)
}

/// Returns how many letters must be inserted, removed, replaced or swapped with their neighbour.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=other.len()).collect()];
    for (at, letter) in one.iter().enumerate() {
        let mut row = vec![at + 1];
        for (to, wanted) in other.iter().enumerate() {
            let cell = |row: &Vec<usize>, column: usize| row.get(column).copied().unwrap_or(usize::MAX / 2);
            let above = rows.get(at).map_or(usize::MAX / 2, |row| cell(row, to + 1));
            let diagonal = rows.get(at).map_or(usize::MAX / 2, |row| cell(row, to));
            let mut least = (above + 1).min(cell(&row, to) + 1).min(diagonal + usize::from(letter != wanted));
            let is_swap =
                at > 0 && to > 0 && one.get(at - 1) == Some(wanted) && other.get(to - 1) == Some(letter);
            if is_swap {
                least = least.min(rows.get(at - 1).map_or(usize::MAX / 2, |row| cell(row, to - 1)) + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows.last().and_then(|row| row.last()).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_found_and_nothing_far_away() {
        let keys = ["cache", "readonly", "serial", "queues", "queue-size"];
        for (word, meant) in [
            ("cash", Some("cache")),
            ("cahce", Some("cache")),
            ("readonyl", Some("readonly")),
            ("queue", Some("queues")),
            ("cache", None),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, keys), meant, "{word}");
        }
    }

    #[test]
    fn lines_end_before_the_edge_and_go_on_below_their_beginning() {
        let text = hang("  note  ", &"word ".repeat(40));
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() > 2, "{text}");
        assert!(lines.iter().all(|line| line.len() <= COLUMNS), "{text}");
        assert!(lines[1..].iter().all(|line| line.starts_with("        word")), "{text}");
        assert_eq!(hang("a  ", "b"), "a  b\n");
        assert_eq!(hang("a  ", ""), "a\n");
        let long = "x".repeat(100);
        assert_eq!(hang("a  ", &long), format!("a  {long}\n"));
    }
}
