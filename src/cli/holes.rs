//! A warning before fio reads an image that was never written.
//!
//! Owns the question whether a guest's command is a benchmark that reads, and whether an image has holes. A
//! hole is read without any disk access, so such a result measures memory. `minivmm bench` fills its images
//! itself.

use std::ffi::OsString;
use std::fs::File;

use rustix::fs::{SeekFrom, seek};

use super::command::CommandArgs;
use crate::disk_options::DiskOptions;

impl CommandArgs {
    /// Warns, once for each disk, that fio would read parts of the image that were never written.
    pub fn warn_of_holes(&self, disks: &[DiskOptions]) {
        if !reads_with_fio(self.words()) {
            return;
        }
        for disk in disks {
            // An unusable image is reported when the machine is built.
            let Some((hole, bytes)) = File::open(&disk.config.path).ok().as_ref().and_then(first_hole) else {
                continue;
            };
            log::warn!(
                "{}: bytes from {hole} on (of {bytes}) were never written. Reading such a hole needs no disk, so fio's figures \
                 would be too good: have fio write the image first (--rw=write), or use `minivmm bench`",
                disk.config.path.display()
            );
        }
    }
}

/// Returns `true` if these words run fio with a job that reads what it has not written itself. A job file may
/// do so.
fn reads_with_fio(words: &[OsString]) -> bool {
    let text: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let words: Vec<&str> = text.iter().flat_map(|word| word.split_whitespace()).collect();
    let Some(at) = words.iter().position(|word| word.rsplit('/').next() == Some("fio")) else { return false };
    let mut kinds = words[at..].iter().filter_map(|word| {
        let value = word.trim_start_matches('-').strip_prefix("rw=")?;
        value.split([':', ',']).next()
    });
    match kinds.clone().next() {
        None => true,
        Some(_) => kinds.any(|kind| !matches!(kind, "write" | "randwrite" | "trim" | "randtrim")),
    }
}

/// Returns where the first hole of a regular file begins, and the file's size; `None` if there is no hole.
fn first_hole(file: &File) -> Option<(u64, u64)> {
    let found = file.metadata().ok().filter(|found| found.is_file() && found.len() > 0)?;
    let hole = seek(file, SeekFrom::Hole(0)).ok()?;
    (hole < found.len()).then_some((hole, found.len()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_command_reads_with_fio_where_a_job_of_it_reads() {
        for (line, reads) in [
            ("fio --name=t --rw=randread", true),
            ("/usr/bin/fio --name=t --rw=rw", true),
            ("fio jobs.fio", true),
            ("fio --name=t --rw=randwrite --verify=crc32c", false),
            ("fio --name=w --rw=write --name=r --rw=read", true),
            ("cat --rw=read", false),
            ("echo", false),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(reads_with_fio(&words), reads, "{line}");
            assert_eq!(reads_with_fio(&["sh".into(), "-c".into(), line.into()]), reads, "sh -c {line}");
        }
    }

    #[test]
    fn a_hole_is_found_and_a_written_file_has_none() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(first_hole(&file), None);
        file.write_all(&[1; 65536]).unwrap();
        assert_eq!(first_hole(&file), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(first_hole(&file), Some((65536, 1 << 20)));
    }
}
