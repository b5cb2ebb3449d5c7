//! The last lines that the guest's kernel printed, kept for the report of its end.
//!
//! Owns how much is kept, which lines are shown, and that they do no harm where they are shown: a guest may
//! print anything, including terminal control sequences.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex};

use crate::sync::unpoisoned;

/// The number of bytes kept of the output: some hundred lines.
const KEPT_BYTES: usize = 64 * 1024;
/// The number of lines that are shown if no line says what went wrong.
const LAST_LINES: usize = 40;
/// The maximum number of lines shown from the line that says what went wrong: at the beginning, and at the
/// end.
const FIRST_LINES_MAX: usize = 120;
const LAST_LINES_MAX: usize = 60;
/// The number of characters of a line that are shown.
const LINE_CHARS_MAX: usize = 240;

/// Beginnings of the lines that Linux prints when something goes wrong (arch/x86/kernel/dumpstack.c,
/// arch/x86/mm/fault.c, kernel/panic.c, lib/bug.c).
const BEGINNINGS: [&str; 10] = [
    "BUG: ",
    "kernel BUG at ",
    "Oops",
    "Kernel panic - not syncing",
    "general protection fault",
    "Unable to handle ",
    "double fault",
    "stack segment: ",
    "watchdog: BUG: ",
    "Initramfs unpacking failed",
];

/// Beginnings of the lines in which Linux prints the reason before it panics (init/main.c, init/do_mounts.c).
const REASONS: [&str; 6] = [
    "check access for rdinit=",
    "Failed to execute ",
    "Starting init: ",
    "/dev/root: Can't open blockdev",
    "VFS: Cannot open root device",
    "No filesystem could mount root",
];
/// How many lines before a panic are searched for its reason; the list of partitions is among them.
const REASON_LINES: usize = 60;

/// The last part of the guest's output. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct KernelLog(Arc<Mutex<Ring>>);

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// `true` if older bytes were dropped, so that the first line may have lost its beginning.
    is_cut: bool,
}

impl KernelLog {
    /// Keeps `bytes`, and drops the oldest to make room for them.
    pub fn feed(&self, bytes: &[u8]) {
        let mut ring = unpoisoned(self.0.lock());
        let kept = bytes.get(bytes.len().saturating_sub(KEPT_BYTES)..).unwrap_or_default();
        let excess = (ring.bytes.len() + kept.len()).saturating_sub(KEPT_BYTES);
        ring.is_cut |= excess > 0 || kept.len() < bytes.len();
        ring.bytes.drain(..excess);
        ring.bytes.extend(kept);
    }

    /// Returns the lines to be shown: from the first that says what went wrong, with its reason, or the last
    /// 40.
    pub fn lines(&self) -> Vec<String> {
        let mut ring = unpoisoned(self.0.lock());
        let is_cut = ring.is_cut;
        let mut lines: Vec<&[u8]> = ring.bytes.make_contiguous().split(|&byte| byte == b'\n').collect();
        if is_cut && lines.len() > 1 {
            lines.remove(0);
        }
        let mut lines: Vec<&[u8]> = lines.into_iter().map(<[u8]>::trim_ascii_end).collect();
        while lines.last().is_some_and(|line| line.is_empty()) {
            lines.pop();
        }
        let from = lines.iter().position(|line| begins_with(line, &BEGINNINGS)).map(|at| {
            let before = at.saturating_sub(REASON_LINES);
            let reason = lines[before..at].iter().position(|line| begins_with(line, &REASONS));
            reason.map_or(at, |reason| before + reason)
        });
        let from = from.unwrap_or_else(|| lines.len().saturating_sub(LAST_LINES));
        shorten(lines.get(from..).unwrap_or_default())
    }
}

/// Returns the first and the last of many lines, each made harmless.
fn shorten(lines: &[&[u8]]) -> Vec<String> {
    let left_out = lines.len().saturating_sub(FIRST_LINES_MAX + LAST_LINES_MAX);
    if left_out == 0 {
        return lines.iter().map(|line| harmless(line)).collect();
    }
    let (first, rest) = lines.split_at(FIRST_LINES_MAX);
    let mut shown: Vec<_> = first.iter().map(|line| harmless(line)).collect();
    shown.push(format!("({left_out} lines left out)"));
    shown.extend(rest.iter().skip(left_out).map(|line| harmless(line)));
    shown
}

fn begins_with(line: &[u8], beginnings: &[&str]) -> bool {
    let text = without_time(line);
    beginnings.iter().any(|beginning| text.starts_with(beginning.as_bytes()))
}

/// Returns the line without the `[    1.234567] ` and `[   T1] ` that printk may put before it.
pub fn without_time(line: &[u8]) -> &[u8] {
    let mut text = line;
    while let Some(rest) = text.strip_prefix(b"[") {
        let Some(end) = rest.windows(2).position(|pair| pair == b"] ") else { break };
        text = rest.get(end + 2..).unwrap_or_default();
    }
    text
}

/// Returns the line in characters that do nothing to a terminal, shortened if it is too long.
fn harmless(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut shown = String::new();
    for character in text.chars().take(LINE_CHARS_MAX) {
        match character {
            '\t' => shown.push(' '),
            character if character.is_control() || turns_text_round(character) => {
                let _ = write!(shown, "\\u{{{:x}}}", u32::from(character));
            }
            character => shown.push(character),
        }
    }
    let more = text.chars().count().saturating_sub(LINE_CHARS_MAX);
    if more > 0 {
        let _ = write!(shown, " ({more} characters more)");
    }
    shown
}

/// Returns `true` if a character changes the direction of the text after it, or is invisible (Unicode, UAX
/// #9).
fn turns_text_round(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(output: &[u8]) -> Vec<String> {
        let log = KernelLog::default();
        // One byte at a time, as a serial port delivers it.
        output.chunks(1).for_each(|byte| log.feed(byte));
        log.lines()
    }

    #[test]
    fn what_went_wrong_begins_the_lines() {
        let oops = "[    0.1] hello\r\n[    1.5] BUG: kernel NULL pointer dereference, address: 0\r\n[    1.5] #PF: x\r\n\
                    [    1.5][    T1] Oops: 0000 [#1]\r\n[    1.6] Kernel panic - not syncing: Fatal exception\r\n";
        let found = lines(oops.as_bytes());
        assert_eq!(found.len(), 4, "{found:?}");
        assert_eq!(found[0], "[    1.5] BUG: kernel NULL pointer dereference, address: 0");
        assert_eq!(lines(b"a\r\nKernel panic - not syncing: VFS\r\n"), ["Kernel panic - not syncing: VFS"]);
        // The reason why there is no init is printed before.
        let no_root = "[ 1.0] check access for rdinit=/nosuch failed: -2, ignoring\r\n[ 1.1] List of all partitions:\r\n\
                       [ 1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n";
        assert!(lines(no_root.as_bytes())[0].contains("rdinit=/nosuch"), "{:?}", lines(no_root.as_bytes()));
        assert_eq!(lines(no_root.as_bytes()).len(), 3);
        let long_ago = format!("Starting init: x\n{}Kernel panic - not syncing: y\n", "a\n".repeat(80));
        assert_eq!(lines(long_ago.as_bytes()), ["Kernel panic - not syncing: y"]);
        // A line that merely quotes such a message is none.
        assert_eq!(lines(b"echo BUG: x\r\n\r\n"), ["echo BUG: x"]);
        assert!(lines(b"").is_empty() && lines(b"\r\n\r\n").is_empty());
    }

    #[test]
    fn of_many_lines_the_last_are_shown_or_the_first_and_the_last() {
        let many = |from: usize, to: usize| (from..to).map(|n| format!("line {n}\n")).collect::<String>();
        let found = lines(many(0, 100).as_bytes());
        assert_eq!((found.len(), found[0].as_str(), found[39].as_str()), (40, "line 60", "line 99"));
        let found = lines(format!("{}Oops: 0\n{}", many(0, 10), many(10, 1000)).as_bytes());
        assert_eq!((found.len(), found[0].as_str()), (181, "Oops: 0"));
        assert_eq!((found[120].as_str(), found[180].as_str()), ("(811 lines left out)", "line 999"));
    }

    #[test]
    fn no_byte_does_anything_to_a_terminal() {
        for byte in 0..=u8::MAX {
            for line in lines(&[b'a', byte, b'b', b'\n']) {
                assert!(!line.chars().any(char::is_control), "{byte:#x}: {line:?}");
            }
        }
        assert_eq!(lines(b"\x1b]0;title\x07 \x1b[2J\n"), ["\\u{1b}]0;title\\u{7} \\u{1b}[2J"]);
        assert_eq!(lines("\u{202e}abc \u{9b}2J ünï\n".as_bytes()), ["\\u{202e}abc \\u{9b}2J ünï"]);
    }

    #[test]
    fn a_line_without_an_end_and_a_flood_take_a_bounded_place() {
        let log = KernelLog::default();
        log.feed(&[b'x'; 10 * KEPT_BYTES]);
        assert_eq!(log.lines().len(), 1);
        assert!(log.lines()[0].len() < 300);
        for _ in 0..100 {
            log.feed(&[b'y'; 1000]);
            log.feed(b"\n");
        }
        let ring = log.0.lock().unwrap();
        assert!(ring.bytes.len() <= KEPT_BYTES && ring.bytes.capacity() <= 4 * KEPT_BYTES);
    }
}
