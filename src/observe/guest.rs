//! The guest's own view of its caches and disks, received through a port of the console device.
//!
//! Owns the protocol; `vmm` owns the port. In the test guest `minivmm-observe` (guest-images/guest/observe.c)
//! answers. Other guests do not, and nothing depends on an answer.
//!
//! The question is one byte. The answer is a line: `cached KIB buffers KIB shmem KIB dirty KIB writeback KIB`,
//! and for each disk `disk NAME READS SECTORS WRITES SECTORS FLUSHES`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// The question.
const QUESTION: &[u8] = b"?";
/// Most bytes of an answer. A longer line is discarded.
const LINE_BYTES_MAX: usize = 64 * 1024;
const SECTOR_BYTES: u64 = 512;

/// What a guest reports about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestView {
    /// Cached in /proc/meminfo: pages of files, including files in memory.
    pub cached_bytes: u64,
    /// Buffers in /proc/meminfo: pages of block devices.
    pub buffers_bytes: u64,
    /// Shmem in /proc/meminfo: the part of `cached_bytes` that belongs to files in memory (tmpfs).
    pub shmem_bytes: u64,
    /// Dirty in /proc/meminfo.
    pub dirty_bytes: u64,
    /// Writeback in /proc/meminfo.
    pub writeback_bytes: u64,
    /// The virtio disks.
    pub disks: Vec<GuestDisk>,
}

/// Counters of one disk, from /sys/block/NAME/stat in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestDisk {
    /// Name of the disk: vda, vdb, ...
    pub name: String,
    /// Number of completed reads.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Number of completed writes.
    pub writes: u64,
    /// Bytes of those.
    pub written_bytes: u64,
    /// Number of completed FLUSHes (field 16); `None` on kernels before Linux 5.5.
    pub flushes: Option<u64>,
}

impl GuestView {
    /// Returns the pages of files and devices in bytes, without files in memory. The unpacked initramfs may
    /// still count, so only the difference between two views is due to disks.
    pub fn page_cache_bytes(&self) -> u64 {
        (self.cached_bytes + self.buffers_bytes).saturating_sub(self.shmem_bytes)
    }

    /// Returns the disk with this name.
    pub fn disk(&self, name: &str) -> Option<&GuestDisk> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// Parses a line from the guest. The guest is not trusted: any line that is not valid gives `None`.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let mut view = Self::default();
        while let Some(key) = words.next() {
            if key == "disk" {
                view.disks.push(disk(&mut words)?);
                continue;
            }
            let field = match key {
                "cached" => &mut view.cached_bytes,
                "buffers" => &mut view.buffers_bytes,
                "shmem" => &mut view.shmem_bytes,
                "dirty" => &mut view.dirty_bytes,
                "writeback" => &mut view.writeback_bytes,
                _ => return None,
            };
            // No guest has that much memory, and the shift must not overflow.
            let kib: u64 = words.next()?.parse().ok().filter(|kib| *kib < 1 << 50)?;
            *field = kib << 10;
        }
        (view.cached_bytes > 0).then_some(view)
    }
}

fn disk<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<GuestDisk> {
    let name = words.next()?.to_owned();
    let mut number = || words.next()?.parse::<u64>().ok();
    let (reads, read, writes, written) = (number()?, number()?, number()?, number()?);
    Some(GuestDisk {
        name,
        reads,
        read_bytes: read.saturating_mul(SECTOR_BYTES),
        writes,
        written_bytes: written.saturating_mul(SECTOR_BYTES),
        // The guest writes a hyphen if its kernel does not count FLUSHes.
        flushes: words.next().and_then(|word| word.parse().ok()),
    })
}

/// The host's end of the port. Questions go out and lines come in.
#[derive(Debug)]
pub struct GuestEnd {
    questions: File,
    answers: File,
    line: Vec<u8>,
    asked: bool,
    last: Option<(GuestView, Instant)>,
}

impl GuestEnd {
    /// Creates the end from the two pipes of a port.
    pub fn new(questions: File, answers: File) -> Self {
        Self { questions, answers, line: Vec::new(), asked: false, last: None }
    }

    /// Asks the guest and waits at most `patience` for the answer. Returns the newest view and its age.
    pub fn ask(&mut self, patience: Duration) -> Option<(GuestView, Duration)> {
        if !self.asked {
            // At most one byte is unread, so the pipe has room.
            self.asked = self.questions.write_all(QUESTION).is_ok();
        }
        let until = Instant::now() + patience;
        while self.asked && self.wait_until(until) {
            if let Err(error) = self.read() {
                log::debug!("the guest's view ends: {error}");
                break;
            }
        }
        self.newest()
    }

    /// Returns the newest view and its age, without asking.
    pub fn newest(&self) -> Option<(GuestView, Duration)> {
        self.last.as_ref().map(|(view, at)| (view.clone(), at.elapsed()))
    }

    fn wait_until(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let timeout_ms = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX);
        let mut asked = libc::pollfd { fd: self.answers.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one valid pollfd.
        let ready = unsafe { libc::poll(&raw mut asked, 1, timeout_ms) };
        ready > 0 && asked.revents & libc::POLLIN != 0
    }

    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let count = self.answers.read(&mut bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.line.extend(bytes.iter().take(count));
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            self.asked = false;
            if let Some(view) = GuestView::parse(&String::from_utf8_lossy(&line)) {
                self.last = Some((view, Instant::now()));
            }
        }
        if self.line.len() > LINE_BYTES_MAX {
            self.line.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_view_and_nonsense_is_none() {
        let line =
            "cached 100 buffers 20 shmem 3 dirty 4 writeback 5 disk vda 1 2 3 4 5 disk vdb 6 7 8 9 -\n";
        let view = GuestView::parse(line).unwrap();
        assert_eq!((view.cached_bytes, view.page_cache_bytes()), (100 << 10, 117 << 10));
        assert_eq!((view.dirty_bytes, view.writeback_bytes), (4 << 10, 5 << 10));
        let vda = view.disk("vda").unwrap();
        assert_eq!((vda.reads, vda.read_bytes, vda.writes, vda.written_bytes), (1, 1024, 3, 2048));
        assert_eq!((vda.flushes, view.disk("vdb").unwrap().flushes), (Some(5), None));
        assert!(view.disk("vdc").is_none());
        for wrong in [
            "",
            "cached",
            "cached x",
            "cached 1 other 2",
            "cached 1 disk vda 1 2",
            "cached 9999999999999999999",
        ] {
            assert_eq!(GuestView::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn whoever_answers_late_is_asked_once() {
        let (mut asked, questions) = io::pipe().unwrap();
        let (answers, mut answer) = io::pipe().unwrap();
        let file = |fd: std::os::fd::OwnedFd| File::from(fd);
        let mut end = GuestEnd::new(file(questions.into()), file(answers.into()));
        for _ in 0..3 {
            assert_eq!(end.ask(Duration::from_millis(1)), None);
        }
        let mut bytes = [0; 16];
        assert_eq!(asked.read(&mut bytes).unwrap(), 1, "one question");
        // The answer arrives in two pieces.
        answer.write_all(b"cached 8 dirt").unwrap();
        assert_eq!(end.ask(Duration::from_millis(1)), None);
        answer.write_all(b"y 4\n").unwrap();
        let (view, age) = end.ask(Duration::from_secs(60)).unwrap();
        assert_eq!((view.cached_bytes, view.dirty_bytes), (8192, 4096));
        assert!(age < Duration::from_secs(30), "it did not wait for more: {age:?}");
        // The next call asks again, and returns the old view meanwhile.
        assert!(end.ask(Duration::from_millis(1)).is_some());
        assert_eq!(asked.read(&mut bytes).unwrap(), 1);
    }
}
