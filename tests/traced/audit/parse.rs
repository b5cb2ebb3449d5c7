//! From the lines of `strace -f -y` to system calls in their order.
//!
//! Owns the joining of `<unfinished ...>` with `resumed`, and what a call's arguments and result are.
//! Knows nothing of images or guests.
//!
//! The order of calls is that of the *lines*, not of the times printed on them: strace is one process
//! that writes a line when it handles the entry or the exit of a call, and the thread stands still
//! until it has. So what a thread does because another one's call has ended is a later line, always,
//! while microseconds tie and clocks are set. A call on one line has ended before anything else went
//! on. Times, where they are there, are for the reader only.

use std::collections::HashMap;

/// A place in the trace: each line has two, its beginning (entries) and its end (exits).
pub type Position = usize;

/// What a call has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The number, and what `-y` says of it where it is a descriptor.
    Ok(i64, String),
    /// The name of the error. EINTR and the kernel's ERESTART* are errors too: nothing was done.
    Err(String),
    /// The trace ends first, or the process did.
    None,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    pub arguments: Vec<String>,
    pub answer: Answer,
    pub entry: Position,
    /// [`Position::MAX`] where it never ended.
    pub exit: Position,
    /// The time of the entry as printed, or nothing.
    pub time: String,
}

impl Call {
    /// An argument, or nothing where the call has fewer.
    pub fn argument(&self, at: usize) -> &str {
        self.arguments.get(at).map_or("", String::as_str)
    }

    pub fn number(&self, at: usize) -> Option<u64> {
        self.argument(at).parse().ok()
    }
}

/// A descriptor as `-y` prints it: `8</tmp/disk.img>`.
pub fn descriptor(argument: &str) -> Option<(i32, &str)> {
    let (number, rest) = argument.split_once('<')?;
    let path = rest.strip_suffix('>')?;
    Some((number.parse().ok()?, path.strip_suffix(" (deleted)").unwrap_or(path)))
}

/// The calls, by their entries. An error names the line and what is wrong with it.
pub fn calls(trace: &str) -> Result<Vec<Call>, String> {
    let mut found: Vec<Call> = Vec::new();
    let mut begun: HashMap<u32, (usize, String)> = HashMap::new();
    for (number, line) in trace.lines().enumerate() {
        let wrong = |what: &str| format!("line {} of the trace: {what}: {line}", number + 1);
        let (thread, time, text) = prefix(line);
        if text.is_empty()
            || text.starts_with("---")
            || text.starts_with("+++")
            || text.starts_with("strace:")
        {
            continue;
        }
        if let Some(rest) = text.strip_prefix("<... ") {
            let (_, rest) = rest.split_once(" resumed>").ok_or_else(|| wrong("no name behind `<...`"))?;
            // One that was begun before strace was attached says nothing of its arguments.
            let Some((at, head)) = begun.remove(&thread) else { continue };
            let (_, arguments, answer) = whole(&(head + rest)).ok_or_else(|| wrong("not understood"))?;
            let call = &mut found[at];
            (call.arguments, call.answer, call.exit) = (arguments, answer, 2 * number + 1);
        } else if let Some(head) = text.strip_suffix("<unfinished ...>") {
            let name = head.split('(').next().unwrap_or_default();
            let arguments = split(head.get(name.len() + 1..).unwrap_or_default().trim_end()).0;
            begun.insert(thread, (found.len(), head.trim_end().to_owned()));
            let (name, time) = (name.to_owned(), time.to_owned());
            let answer = Answer::None;
            found.push(Call { name, arguments, answer, entry: 2 * number, exit: Position::MAX, time });
        } else {
            let (name, arguments, answer) = whole(text).ok_or_else(|| wrong("not understood"))?;
            let exit = if answer == Answer::None { Position::MAX } else { 2 * number + 1 };
            found.push(Call { name, arguments, answer, entry: 2 * number, exit, time: time.to_owned() });
        }
    }
    Ok(found)
}

/// Thread (0 where there is none: without `-f`), time, and the rest of a line.
fn prefix(line: &str) -> (u32, &str, &str) {
    let mut text = line.trim_start();
    let mut thread = 0;
    // Without -o, strace writes [pid 7].
    if let Some((number, rest)) = text.strip_prefix("[pid").and_then(|rest| rest.split_once(']')) {
        thread = number.trim().parse().unwrap_or(0);
        text = rest.trim_start();
    } else if let Some((number, rest)) = text.split_once(' ')
        && let Ok(number) = number.parse()
    {
        thread = number;
        text = rest.trim_start();
    }
    match text.split_once(' ') {
        Some((time, rest))
            if time.starts_with(|c: char| c.is_ascii_digit())
                && time.chars().all(|c| c.is_ascii_digit() || c == ':' || c == '.') =>
        {
            (thread, time, rest.trim_start())
        }
        _ => (thread, "", text),
    }
}

/// `name(arguments) = answer <duration>`.
fn whole(text: &str) -> Option<(String, Vec<String>, Answer)> {
    let (name, rest) = text.split_once('(')?;
    let (arguments, rest) = split(rest);
    let rest = rest.strip_prefix(')')?.trim_start().strip_prefix('=')?.trim_start();
    Some((name.to_owned(), arguments, answer(rest)))
}

fn answer(text: &str) -> Answer {
    let mut words = text.splitn(2, ' ');
    let (first, more) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let name = more.split(' ').next().unwrap_or_default();
    match first {
        "-1" => Answer::Err(name.to_owned()),
        "?" if name.starts_with("ERESTART") => Answer::Err(name.to_owned()),
        "?" => Answer::None,
        _ => {
            let digits = first.split('<').next().unwrap_or_default();
            let number = match digits.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok().map(u64::cast_signed),
                None => digits.parse().ok(),
            };
            // A descriptor's path may have spaces in it.
            let path = text.strip_prefix(digits).and_then(|rest| rest.strip_prefix('<'));
            let path = path.and_then(|rest| rest.split('>').next()).unwrap_or_default();
            number.map_or(Answer::None, |number| Answer::Ok(number, path.to_owned()))
        }
    }
}

/// Cuts at the commas outside of strings, brackets and descriptors' paths, up to the parenthesis that
/// closes the call; returns what is left from there.
fn split(text: &str) -> (Vec<String>, &str) {
    let (mut arguments, mut begin, mut depth) = (Vec::new(), 0, 0_u32);
    let (mut quoted, mut path, mut escaped) = (false, false, false);
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if quoted {
            match c {
                '\\' => escaped = true,
                '"' => quoted = false,
                _ => {}
            }
        } else if path {
            path = c != '>';
        } else {
            match c {
                '"' => quoted = true,
                '<' if before.is_ascii_digit() || before == 'D' => path = true,
                '(' | '[' | '{' => depth += 1,
                ')' if depth == 0 => {
                    push(&mut arguments, &text[begin..at]);
                    return (arguments, &text[at..]);
                }
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    push(&mut arguments, &text[begin..at]);
                    begin = at + 1;
                }
                _ => {}
            }
        }
        before = c;
    }
    push(&mut arguments, &text[begin..]);
    (arguments, "")
}

fn push(arguments: &mut Vec<String>, text: &str) {
    let text = text.trim();
    if !text.is_empty() {
        arguments.push(text.to_owned());
    }
}

/// The bytes of every string in an argument: a buffer, or the `iov_base`s of a vector. None where
/// strace has cut one short.
pub fn bytes(argument: &str) -> Option<Vec<u8>> {
    let (mut found, mut rest) = (Vec::new(), argument);
    while let Some((_, inside)) = rest.split_once('"') {
        let end = unescape(inside, &mut found)?;
        rest = inside.get(end + 1..)?;
        if rest.starts_with("...") {
            return None;
        }
    }
    Some(found)
}

/// One C string up to its closing quote, whose place is returned.
fn unescape(text: &str, into: &mut Vec<u8>) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            b'"' => return Some(at),
            b'\\' => {
                at += 1;
                let c = *bytes.get(at)?;
                if let Some(simple) = b"n\nr\rt\tv\x0bf\x0c".chunks(2).find(|pair| pair[0] == c) {
                    into.push(simple[1]);
                } else if c == b'x' {
                    into.push(u8::from_str_radix(text.get(at + 1..at + 3)?, 16).ok()?);
                    at += 2;
                } else if matches!(c, b'0'..=b'7') {
                    let digits = bytes[at..].iter().take(3).take_while(|c| matches!(c, b'0'..=b'7')).count();
                    into.push(u8::from_str_radix(text.get(at..at + digits)?, 8).ok()?);
                    at += digits - 1;
                } else {
                    into.push(c);
                }
            }
            other => into.push(other),
        }
        at += 1;
    }
}
