//! From system calls to what was done to one image and what was written to the console.
//!
//! Owns which calls write, which make stable, and which hide what they do. A call that only starts
//! write-out (sync_file_range) or drops a cache (BLKFLSBUF) makes nothing stable and is not a sync.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::parse::{Answer, Call, Position, bytes, descriptor};

/// Which file a descriptor must name.
#[derive(Debug, Clone)]
pub enum File {
    /// Its path, as the kernel knows it (absolute, symbolic links followed).
    Path(String),
    /// Its number: a pipe or a terminal.
    Number(i32),
}

impl File {
    fn is(&self, argument: &str) -> bool {
        let Some((number, path)) = descriptor(argument) else { return false };
        match self {
            Self::Path(wanted) => path == wanted,
            Self::Number(wanted) => number == *wanted,
        }
    }
}

#[derive(Debug)]
pub struct Write {
    /// Bytes of the image: those that the kernel said it wrote, none where it failed.
    pub bytes: Range<u64>,
    pub entry: Position,
    pub exit: Position,
    /// Stable when it ended: RWF_DSYNC, RWF_SYNC, O_DSYNC or O_SYNC.
    pub dsync: bool,
}

#[derive(Debug)]
pub struct Sync {
    pub entry: Position,
    pub exit: Position,
    /// None: it succeeded.
    pub error: Option<String>,
    pub time: String,
}

/// Output of the guest, piece by piece.
#[derive(Debug)]
pub struct Output {
    pub bytes: Vec<u8>,
    pub entry: Position,
    pub exit: Position,
    pub time: String,
}

#[derive(Debug, Default)]
pub struct Host {
    pub writes: Vec<Write>,
    pub syncs: Vec<Sync>,
    pub console: Vec<Output>,
    /// Calls through which the image can be reached without our seeing it, and how often.
    pub hidden: BTreeMap<String, usize>,
}

impl Host {
    pub fn new(calls: &[Call], image: &str, console: &File) -> Result<Self, String> {
        let image = File::Path(image.to_owned());
        let mut host = Self::default();
        // Descriptors of the image whose every write is stable.
        let mut stable = HashSet::new();
        for call in calls {
            follow_descriptors(call, &image, &mut stable);
            host.take_hidden(call, &image);
            let Answer::Ok(count, _) = call.answer else {
                host.take_failure(call, &image, &stable);
                continue;
            };
            let count = u64::try_from(count).unwrap_or(0);
            match call.name.as_str() {
                "write" | "writev" if console.is(call.argument(0)) => {
                    host.console.push(output(call, count)?);
                }
                _ if !image.is(call.argument(0)) => {}
                "pwrite64" | "pwrite" | "pwritev" | "pwritev2" => {
                    host.take_write(call, count, is_dsync(call, &stable));
                }
                "fallocate"
                    if ["ZERO_RANGE", "PUNCH_HOLE"].iter().any(|way| call.argument(1).contains(way)) =>
                {
                    let (Some(start), Some(length)) = (call.number(2), call.number(3)) else { continue };
                    let bytes = start..start + length;
                    host.writes.push(Write { bytes, entry: call.entry, exit: call.exit, dsync: false });
                }
                "fdatasync" | "fsync" => host.syncs.push(sync(call, None)),
                _ => {}
            }
        }
        Ok(host)
    }

    fn take_write(&mut self, call: &Call, count: u64, dsync: bool) {
        if let Some(start) = call.number(3) {
            let bytes = start..start.saturating_add(count);
            self.writes.push(Write { bytes, entry: call.entry, exit: call.exit, dsync });
        }
    }

    /// A failed sync is one whose data may be gone. One that was interrupted has not begun. Of a
    /// stable write nobody can tell which has failed, the write or its sync.
    fn take_failure(&mut self, call: &Call, image: &File, stable: &HashSet<i32>) {
        let Answer::Err(error) = &call.answer else { return };
        if !image.is(call.argument(0)) {
            return;
        }
        let loses_data = ["EIO", "ENOSPC", "EDQUOT"].contains(&error.as_str());
        let was_sync = match call.name.as_str() {
            "fdatasync" | "fsync" => true,
            "pwrite64" | "pwrite" | "pwritev" | "pwritev2" => {
                self.take_write(call, 0, false);
                is_dsync(call, stable)
            }
            _ => false,
        };
        if was_sync && loses_data {
            self.syncs.push(sync(call, Some(error.clone())));
        }
    }

    fn take_hidden(&mut self, call: &Call, image: &File) {
        let mapped = || {
            call.argument(2).contains("PROT_WRITE")
                && call.argument(3).contains("MAP_SHARED")
                && image.is(call.argument(4))
        };
        let hides = match call.name.as_str() {
            "io_uring_enter" | "io_submit" | "sync" | "syncfs" | "msync" => true,
            "mmap" => mapped(),
            "write" | "writev" => image.is(call.argument(0)),
            "sendfile" => image.is(call.argument(0)),
            "copy_file_range" | "splice" => image.is(call.argument(2)),
            "ioctl" => image.is(call.argument(0)) && call.argument(1).contains("BLKZEROOUT"),
            "pwritev2" => image.is(call.argument(0)) && call.number(3).is_none(),
            _ => false,
        };
        if hides {
            *self.hidden.entry(call.name.clone()).or_default() += 1;
        }
    }
}

/// Whether a write that succeeds is stable: by its flags, or by those of its descriptor.
fn is_dsync(call: &Call, stable: &HashSet<i32>) -> bool {
    let by_flag = call.argument(4).split('|').any(|flag| flag == "RWF_DSYNC" || flag == "RWF_SYNC");
    by_flag || descriptor(call.argument(0)).is_some_and(|(number, _)| stable.contains(&number))
}

fn sync(call: &Call, error: Option<String>) -> Sync {
    Sync { entry: call.entry, exit: call.exit, error, time: call.time.clone() }
}

fn output(call: &Call, count: u64) -> Result<Output, String> {
    let mut bytes = bytes(call.argument(1)).ok_or_else(|| {
        format!("at {}: strace has cut the console's output short: give it -s 4096", call.time)
    })?;
    bytes.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    Ok(Output { bytes, entry: call.entry, exit: call.exit, time: call.time.clone() })
}

/// Keeps account of which descriptors of the image were opened with O_DSYNC or O_SYNC.
fn follow_descriptors(call: &Call, image: &File, stable: &mut HashSet<i32>) {
    let Answer::Ok(number, path) = &call.answer else { return };
    let Ok(number) = i32::try_from(*number) else { return };
    let open_flags = match call.name.as_str() {
        "open" => call.argument(1),
        "openat" | "openat2" => call.argument(2),
        "dup" | "dup2" | "dup3" | "fcntl" if image.is(call.argument(0)) && !path.is_empty() => {
            if descriptor(call.argument(0)).is_some_and(|(old, _)| stable.contains(&old)) {
                stable.insert(number);
            }
            return;
        }
        "close" => {
            if let Some((closed, _)) = descriptor(call.argument(0)) {
                stable.remove(&closed);
            }
            return;
        }
        _ => return,
    };
    stable.remove(&number);
    let is_stable = open_flags.split(['|', ',', '=', '}']).any(|flag| flag == "O_DSYNC" || flag == "O_SYNC");
    if is_stable && image.is(&format!("{number}<{path}>")) {
        stable.insert(number);
    }
}
