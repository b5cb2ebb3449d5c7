//! strace's log, or what the eye has seen, as calls on one image, each with how far the guest's console had come.

use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_testkit::eye::Operation;
use serde_json::Value;

use super::calls;

/// strace with all that the log is made of.
pub fn strace(log: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-s", "256", "-e"]);
    strace.arg(
        "trace=openat,write,writev,fdatasync,fsync,sync_file_range,pwrite64,pwritev,pwritev2,pread64,preadv,preadv2,\
         fallocate,io_uring_enter,io_submit",
    );
    strace.arg("-o").arg(log);
    strace
}

/// Where the guest's console goes, so that the log knows it from other writes.
pub fn console(image: &Path) -> PathBuf {
    image.with_extension("console")
}

/// What the guest says behind each of a driver's requests, and the calls that were told for it. The
/// byte is set, and said, before the write; its sync may come a moment later.
pub fn stages(driver: &Value) -> Vec<(&'static str, Vec<String>)> {
    let write = [calls(&driver["on_setting"]), calls(&driver["write"]["calls"])].concat();
    let mut stages = vec![("wrote", write)];
    if driver["negotiates_flush"].as_bool().unwrap() {
        stages.push(("flushed", calls(&driver["flush"]["calls"])));
    }
    stages.push(("discarded", calls(&driver["discard"]["calls"])));
    stages.push(("zeroed", calls(&driver["write_zeroes"]["calls"])));
    stages.push(("read back", calls(&driver["read"]["calls"])));
    stages.push(("reset the device", vec![]));
    stages
}

/// The calls on one image, and the guest's console.
#[derive(Debug, Default)]
pub struct Log {
    /// The flags that the image was opened with, those that matter, for writing if at all.
    pub opened: Option<String>,
    console: String,
    calls: Vec<(usize, String)>,
}

impl Log {
    pub fn read(log: &Path, image: &Path) -> Self {
        let text = std::fs::read_to_string(log).unwrap();
        let mut read = Self::default();
        let directory = image.parent().unwrap().to_str().unwrap();
        for line in text.lines() {
            read.line(line, image.to_str().unwrap(), directory);
        }
        read
    }

    /// The same of what the eye has seen of these files: image, console, the image's directory.
    pub fn seen(operations: &[Operation]) -> Self {
        let mut read = Self::default();
        let mut ring = Inline::default();
        for operation in operations {
            let offset = read.console.len();
            match operation.file {
                Some(0) => {
                    read.opened.get_or_insert_with(|| opened(operation.file_flags));
                    read.calls.extend(ring.call(operation).map(|call| (offset, call)));
                }
                Some(1) if operation.name == "write" => {
                    let len = usize::try_from(operation.result).unwrap();
                    let text = String::from_utf8_lossy(operation.bytes.get(..len).unwrap());
                    read.console += &text.replace(['\r', '\n'], "");
                }
                Some(2) if operation.name == "fsync" => {
                    read.calls.push((offset, "fsync(directory)".into()));
                }
                _ => {}
            }
        }
        assert!(!ring.is_pending(), "refused, and nothing done instead: {:?}", read.calls);
        read
    }

    fn line(&mut self, line: &str, image: &str, directory: &str) {
        let Some((_, line)) = line.split_once(' ') else { return };
        let Some((name, arguments)) = line.trim_start().split_once('(') else { return };
        if ["write", "writev"].contains(&name)
            && arguments.contains(&format!("<{}>", console(Path::new(image)).display()))
        {
            let text = arguments.split('"').nth(1).unwrap_or_default();
            self.console += &text.replace("\\r", "").replace("\\n", "");
        } else if name == "openat" && arguments.contains(image) {
            self.open(arguments);
        } else if name == "fsync" && arguments.contains(&format!("<{directory}>")) {
            self.calls.push((self.console.len(), "fsync(directory)".into()));
        } else if arguments.contains(&format!("<{image}>")) && name != "openat" {
            self.calls.push((self.console.len(), call(name, arguments)));
        }
    }

    fn open(&mut self, arguments: &str) {
        assert!(!arguments.contains("O_DSYNC") && !arguments.contains("O_SYNC"), "{arguments}");
        let access = if arguments.contains("O_RDWR") { "O_RDWR" } else { "O_RDONLY" };
        // The look at the first bytes goes through /proc/self/fd.
        if !arguments.contains("/proc/") && self.opened.is_none() {
            let direct = if arguments.contains("O_DIRECT") { "|O_DIRECT" } else { "" };
            self.opened = Some(format!("{access}{direct}"));
        }
    }

    /// All calls.
    pub fn calls(&self) -> Vec<&str> {
        self.calls.iter().map(|(_, call)| call.as_str()).collect()
    }

    /// The calls cut into the stages of `expected`: what came before the guest began to say that it
    /// had done something belongs to that. "start" ends with the guest's first word; "end" is the rest.
    pub fn cut(
        &self,
        expected: &[(&'static str, Vec<String>)],
        what: &str,
    ) -> Vec<(&'static str, Vec<String>)> {
        let (mut at, mut after) = (0, None);
        let mut stages = Vec::new();
        for &(stage, _) in expected {
            let begin = match stage {
                "start" => self.console.find("bare guest:").expect(what),
                "end" => usize::MAX - 1,
                said => {
                    let said = format!("bare guest: {said}");
                    at + self.console[at..].find(&said).unwrap_or_else(|| panic!("{what}: {said}: {self:?}"))
                }
            };
            let mine = |&&(offset, _): &&(usize, String)| {
                after.is_none_or(|after| offset > after) && offset <= begin
            };
            stages.push((stage, self.calls.iter().filter(mine).map(|(_, call)| call.clone()).collect()));
            after = Some(begin);
            at = begin.saturating_add(1).min(self.console.len());
        }
        stages
    }
}

/// A call by its name, and its flags that decide about stability and about what the page cache keeps.
fn call(name: &str, arguments: &str) -> String {
    if name == "fallocate" {
        return format!("{name}({})", arguments.split(", ").nth(1).unwrap_or_default());
    }
    // strace before 6.14 does not know the name of 0x80.
    let flags = arguments.rsplit_once(", ").map_or("", |it| it.1);
    let has = |names: &[&str]| names.iter().any(|name| flags.contains(name));
    let known = [("RWF_DSYNC", has(&["RWF_DSYNC"])), ("RWF_DONTCACHE", has(&["RWF_DONTCACHE", "0x80"]))];
    let set: Vec<_> = known.iter().filter(|flag| flag.1).map(|flag| flag.0).collect();
    match (name, set.is_empty()) {
        ("preadv2" | "pwritev2", false) => format!("{name}({})", set.join("|")),
        _ => name.to_owned(),
    }
}

fn opened(flags: u64) -> String {
    let has = |flag: libc::c_int| flags & u64::try_from(flag).unwrap() != 0;
    assert!(!has(libc::O_DSYNC) && !has(libc::O_SYNC), "{flags:#x}");
    let access = if has(libc::O_RDWR) { "O_RDWR" } else { "O_RDONLY" };
    format!("{access}{}", if has(libc::O_DIRECT) { "|O_DIRECT" } else { "" })
}

/// Flags as linux/fs.h and linux/io_uring.h have them.
const RWF_DSYNC: u64 = 2;
const FSYNC_DATASYNC: u64 = 1;

/// The tries without the ring: (call, what may follow it, both as they are told, without and with RWF_DONTCACHE). One that succeeds stands for both, and so does
/// what follows one that was refused; after EOPNOTSUPP that alone does. A write is alone here, so it is a call.
const TRIES: [(&str, [&str; 3], [&str; 2]); 2] = [
    (
        "preadv2",
        ["IORING_OP_READ"; 3],
        [
            "preadv2(RWF_NOWAIT), else IORING_OP_READ",
            "preadv2(RWF_NOWAIT|RWF_DONTCACHE), else IORING_OP_READ(RWF_DONTCACHE)",
        ],
    ),
    (
        "pwritev2",
        ["pwritev", "pwritev2", "IORING_OP_WRITE"],
        [
            "pwritev2(RWF_NOWAIT), else pwritev if alone, else IORING_OP_WRITE",
            "pwritev2(RWF_NOWAIT|RWF_DONTCACHE), else pwritev2(RWF_DONTCACHE) if alone, else \
             IORING_OP_WRITE(RWF_DONTCACHE)",
        ],
    ),
];

/// RWF_DONTCACHE of linux/fs.h.
const RWF_DONTCACHE: u64 = 0x80;

#[derive(Default)]
struct Inline {
    refused: [bool; 2],
    given_up: [bool; 2],
}

impl Inline {
    /// The operation in the words of `--explain`.
    fn call(&mut self, operation: &Operation) -> Option<String> {
        let flags = operation.flags;
        let (dontcache, others) = (flags & RWF_DONTCACHE != 0, flags & !RWF_DONTCACHE);
        let plain = |entry: &str| operation.name == entry && others == 0;
        for (at, (call, next, told)) in TRIES.into_iter().enumerate() {
            let told = told[usize::from(dontcache)];
            if operation.name == call && others == u64::try_from(libc::RWF_NOWAIT).unwrap() {
                assert!(!self.given_up[at], "tried again after EOPNOTSUPP: {operation:?}");
                self.refused[at] = operation.result < 0;
                self.given_up[at] = operation.has_failed_with(libc::EOPNOTSUPP);
                return (!self.refused[at]).then(|| told.to_owned());
            }
            if next.into_iter().any(plain) && (self.given_up[at] || self.refused[at]) {
                self.refused[at] = false;
                return Some(told.to_owned());
            }
        }
        Some(in_words(operation.name, flags))
    }

    fn is_pending(&self) -> bool {
        self.refused.contains(&true)
    }
}

/// An entry, or a call, with the flags that matter. An entry that blocks has the name of the call that the worker makes
/// instead where it is alone: which of the two it was depends on how quick the guest is.
fn in_words(name: &str, flags: u64) -> String {
    let name = match name {
        "IORING_OP_FALLOCATE" => "fallocate",
        "IORING_OP_WRITE" if flags & RWF_DSYNC != 0 => "pwritev2",
        "IORING_OP_FSYNC" if flags == FSYNC_DATASYNC => return "fdatasync".to_owned(),
        name => name,
    };
    let flags = match (name, flags) {
        ("fallocate", 3) => "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE",
        ("fallocate", 0x11) => "FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE",
        ("pwritev2", RWF_DSYNC) => "RWF_DSYNC",
        ("pwritev2", 0x82) => "RWF_DSYNC|RWF_DONTCACHE",
        ("IORING_OP_READ" | "IORING_OP_WRITE" | "preadv2" | "pwritev2", RWF_DONTCACHE) => "RWF_DONTCACHE",
        (_, 0) => return name.to_owned(),
        (_, other) => return format!("{name}({other:#x})"),
    };
    format!("{name}({flags})")
}
