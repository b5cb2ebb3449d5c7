//! Text for a terminal of 80 columns: wrapped rows with a head, and paths as text.
//!
//! Owns how words are wrapped and how paths become text. Quoting is the block crate's. What is said belongs to
//! the caller.

use std::path::Path;

pub use minivmm_block::text::{nearest, shell_word};

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

#[cfg(test)]
mod tests {
    use super::*;

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
