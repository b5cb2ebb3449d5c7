//! Words of error messages: quoted for a shell, and the nearest known word to one that is not known.
//!
//! Owns how words are quoted and compared. What is said belongs to the caller.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Quotes the word for a shell, because commands in messages are meant to be pasted.
pub fn shell_word(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./=,:+@%".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return word.to_string_lossy().into_owned();
    }
    let escaped: Vec<u8> =
        bytes.iter().flat_map(|byte| if *byte == b'\'' { b"'\\''".to_vec() } else { vec![*byte] }).collect();
    format!("'{}'", OsString::from_vec(escaped).to_string_lossy())
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
    fn words_are_quoted_where_a_shell_would_take_them_apart() {
        for (word, expected) in
            [("img,cache=none", "img,cache=none"), ("a b", "'a b'"), ("", "''"), ("it's", r"'it'\''s'")]
        {
            assert_eq!(shell_word(word), expected);
        }
    }
}
