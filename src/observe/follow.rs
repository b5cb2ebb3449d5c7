//! Reads the file of an observation while it grows.
//!
//! Owns the division into complete lines, and the question whether more may come: the writer holds a lock on
//! the file (flock(2)) as long as it lives, however it ends.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use super::csv::{self, Row};

/// Most bytes of a first line. A file with a longer one is not an observation. It may have no end, so no more
/// of it is read.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// The first line of the file is not that of an observation.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("its first line is not that of a file of --observe")]
pub struct NotAnObservation;

/// Reads rows as they are appended.
#[derive(Debug)]
pub struct Follower {
    file: File,
    waiting: Vec<u8>,
    header: Option<String>,
}

/// Takes the lock of a writer. Returns `false` if another writer holds it.
pub fn lock_as_writer(file: &File) -> io::Result<bool> {
    // SAFETY: flock takes two numbers.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        error => Err(error),
    }
}

impl Follower {
    /// Follows `file` from its beginning.
    pub fn new(file: File) -> Self {
        Self { file, waiting: Vec::new(), header: None }
    }

    /// Returns `true` if a writer still holds its lock.
    pub fn is_written(&self) -> bool {
        let fd = self.file.as_raw_fd();
        // SAFETY: flock takes two numbers. A lock that the first call takes is released at once.
        unsafe { libc::flock(fd, libc::LOCK_SH | libc::LOCK_NB) != 0 || libc::flock(fd, libc::LOCK_UN) != 0 }
    }

    /// Returns the rows that were appended since the last call.
    pub fn read(&mut self) -> io::Result<Result<Vec<Row>, NotAnObservation>> {
        if self.header.is_none() && !self.read_header()? {
            return Ok(Err(NotAnObservation));
        }
        let Some(header) = self.header.clone() else { return Ok(Ok(Vec::new())) };
        self.file.read_to_end(&mut self.waiting)?;
        let whole = self.waiting.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let text: Vec<u8> = self.waiting.drain(..whole).collect();
        let text = String::from_utf8_lossy(&text);
        Ok(Ok(text.lines().filter_map(|line| Row::parse(&header, line)).collect()))
    }

    /// Reads the first line if it is complete. Returns `false` if the file is not an observation.
    fn read_header(&mut self) -> io::Result<bool> {
        let room = HEADER_BYTES_MAX.saturating_sub(self.waiting.len());
        self.file.by_ref().take(room as u64).read_to_end(&mut self.waiting)?;
        let Some(end) = self.waiting.iter().position(|byte| *byte == b'\n') else {
            return Ok(self.waiting.len() < HEADER_BYTES_MAX);
        };
        let line: Vec<u8> = self.waiting.drain(..=end).collect();
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        // A view needs these two columns. The others may differ between versions.
        let first_two = [line.split(',').next(), line.split(',').nth(1)];
        let is_ours = csv::columns().take(2).eq(first_two.into_iter().flatten());
        self.header = is_ours.then_some(line);
        Ok(is_ours)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn rows_come_when_they_are_whole_and_the_end_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.csv");
        let mut writer = File::create(&path).unwrap();
        assert!(lock_as_writer(&writer).unwrap());
        assert!(!lock_as_writer(&File::open(&path).unwrap()).unwrap(), "one writer");
        let mut follower = Follower::new(File::open(&path).unwrap());
        assert_eq!(follower.read().unwrap(), Ok(vec![]));
        let mut come = |text: &str| {
            writer.write_all(text.as_bytes()).unwrap();
            follower
                .read()
                .unwrap()
                .unwrap()
                .iter()
                .map(|row| row.text("disk").to_owned())
                .collect::<Vec<_>>()
        };
        for (text, rows) in [("time_s,di", vec![]), ("sk\n0,v", vec![]), ("da\n1,vdb\n2", vec!["vda", "vdb"])]
        {
            assert_eq!(come(text), rows, "{text}");
        }
        assert!(follower.is_written());
        drop(writer);
        assert!(!follower.is_written());

        fs::write(&path, "hello\nworld\n").unwrap();
        assert_eq!(Follower::new(File::open(&path).unwrap()).read().unwrap(), Err(NotAnObservation));
        for endless in ["/dev/zero", "/dev/urandom"] {
            let mut follower = Follower::new(File::open(endless).unwrap());
            assert_eq!(follower.read().unwrap(), Err(NotAnObservation), "{endless}");
        }
    }
}
