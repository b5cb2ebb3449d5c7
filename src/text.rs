//! Text for a terminal of 80 columns: rows of a mark, a label and wrapped words.
//!
//! Owns the wrapping and nothing else; what is said is the caller's.

/// What a terminal has at least.
const COLUMNS: usize = 80;

/// `words` behind `head`; what does not fit goes on below, indented as wide as `head` is.
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
