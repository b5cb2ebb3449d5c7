//! From the console's output to the guest's requests.
//!
//! Owns the grammar of the guest's log (numbers are hexadecimal; other lines are passed over):
//!
//! ```text
//! @N FLUSH WCE WRITEBACK     negotiated (00 or 01), and the `writeback` byte; before the first request
//!                            and, with nothing in flight, whenever it changes
//! @S NUMBER W SECTOR COUNT   is about to submit a write of COUNT sectors
//! @S NUMBER F                is about to submit a FLUSH
//! @A NUMBER STATUS           has seen the end of the request
//! ```
//!
//! Two clocks are kept apart. The *order* of lines is the guest's own program order and exact however
//! late the console is. The *position* in the trace is exact in one direction: an `@A` cannot be
//! written out before the guest has seen the end. An `@S` is written out before the submission only by
//! a console that is written through at once; a log that shows it is not is refused.

use std::collections::HashMap;
use std::ops::Range;

use super::host::Output;
use super::parse::Position;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the image; whether the rule of virtio 5.2.6.2 (a) or (b) demands that it be stable
    /// before it is complete.
    Write {
        bytes: Range<u64>,
        stable: bool,
    },
    Flush,
}

#[derive(Debug)]
pub struct Request {
    pub number: u64,
    pub kind: Kind,
    /// Where the last byte of `@S` was out: not after the submission.
    pub submitted: Position,
    pub submitted_order: usize,
    pub ended: Option<Ended>,
}

#[derive(Debug)]
pub struct Ended {
    pub ok: bool,
    /// Where the first byte of `@A` went out: not before the guest saw the end.
    pub position: Position,
    pub order: usize,
    pub time: String,
}

impl Request {
    /// The end, if it was told and was OK.
    pub fn acknowledged(&self) -> Option<&Ended> {
        self.ended.as_ref().filter(|ended| ended.ok)
    }
}

struct Line {
    text: String,
    first: Position,
    last: Position,
    time: String,
}

fn lines(console: &[Output]) -> Vec<Line> {
    let mut found = Vec::new();
    let mut current: Option<(Vec<u8>, Position, String)> = None;
    for output in console {
        for &byte in &output.bytes {
            let (text, first, time) =
                current.get_or_insert_with(|| (Vec::new(), output.entry, output.time.clone()));
            if byte == b'\n' {
                let text = String::from_utf8_lossy(text).trim_end().to_owned();
                found.push(Line { text, first: *first, last: output.exit, time: std::mem::take(time) });
                current = None;
            } else {
                text.push(byte);
            }
        }
    }
    found
}

/// The requests by their submissions.
pub fn requests(console: &[Output]) -> Result<Vec<Request>, String> {
    let mut found: Vec<Request> = Vec::new();
    let mut by_number: HashMap<u64, usize> = HashMap::new();
    let mut stable = None;
    for (order, line) in lines(console).into_iter().enumerate() {
        let wrong = |what: &str| format!("the guest's log: {what}: {:?}", line.text);
        let words: Vec<&str> = line.text.split(' ').collect();
        let number = |at: usize| {
            let word = words.get(at).copied().unwrap_or_default();
            u64::from_str_radix(word, 16).map_err(|_| wrong("a hexadecimal number is missing"))
        };
        match words[0] {
            "@N" => {
                let (flush, wce, writeback) = (number(1)? != 0, number(2)? != 0, number(3)? != 0);
                stable = Some(if wce { !writeback } else { !flush });
            }
            "@S" => {
                let kind = match words.get(2) {
                    Some(&"W") => {
                        let stable = stable.ok_or_else(|| wrong("no @N before the first write"))?;
                        let start = number(3)?.checked_mul(512).ok_or_else(|| wrong("too far out"))?;
                        let length = number(4)?.checked_mul(512).ok_or_else(|| wrong("too long"))?;
                        let end = start.checked_add(length).ok_or_else(|| wrong("too far out"))?;
                        Kind::Write { bytes: start..end, stable }
                    }
                    Some(&"F") => Kind::Flush,
                    _ => return Err(wrong("neither W nor F")),
                };
                let number = number(1)?;
                if by_number.insert(number, found.len()).is_some() {
                    return Err(wrong("this number was there before"));
                }
                let submitted = line.last;
                found.push(Request { number, kind, submitted, submitted_order: order, ended: None });
            }
            "@A" => {
                let at = *by_number.get(&number(1)?).ok_or_else(|| wrong("never submitted"))?;
                let request = &mut found[at];
                if request.ended.is_some() {
                    return Err(wrong("ended before"));
                }
                if request.submitted >= line.first {
                    return Err(wrong("written out together with its @S: the console is buffered"));
                }
                let ok = number(2)? == 0;
                request.ended = Some(Ended { ok, position: line.first, order, time: line.time.clone() });
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Err("the guest's log is not in what was written to the console that was named: look in the trace for \
            a write of \"@\", which tells the descriptor and its name"
            .into());
    }
    Ok(found)
}
