//! A command for the test guest: what is sent to it, and what it reports of its end.
//!
//! Owns the archive that is appended to the guest's initramfs (the command, its environment, the user's files
//! with their libraries), the launcher's messages, and the status file. The devices carry the bytes there and
//! back.

mod add;
mod archive;
mod elf;
mod host_file;
mod libraries;
pub mod report;
pub mod status;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use add::Add;
use archive::Content;
pub use archive::{Archive, Part};
use libraries::Libraries;

/// What is to be run.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// The command and its arguments.
    pub argv: Vec<OsString>,
    /// The environment as `NAME=VALUE`; of equal names the last counts.
    pub env: Vec<OsString>,
    /// The working directory; `None` is `/`.
    pub workdir: Option<PathBuf>,
    /// The files that are added to the guest.
    pub adds: Vec<Add>,
}

/// Why the command cannot be sent to the guest.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A file could not be read.
    #[error("cannot add {path} to the guest")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// It is neither a file, a directory nor a symbolic link.
    #[error("cannot add {0} to the guest: it is {1}, not a file, directory or symbolic link")]
    Kind(PathBuf, &'static str),
    /// It has more bytes than the archive's fields can count.
    #[error(
        "cannot add {0} to the guest: it has 4 GiB or more, and added files take up guest memory; \
         put it on a disk (--disk {0},readonly)"
    )]
    TooLarge(PathBuf),
    /// A file that reports no length went on past the limit.
    #[error("cannot add {0} to the guest: it reports no length, and has more than 16 MiB")]
    Endless(PathBuf),
    /// The path is one that minivmm itself needs.
    #[error(
        "cannot add anything at {0}: minivmm puts the command there; choose another place (--add HOST:GUEST)"
    )]
    Reserved(PathBuf),
    /// The guest covers the path with a file system of its own.
    #[error("cannot add anything at {0}: the guest mounts a file system of its own there, for {1}")]
    Covered(PathBuf, &'static str),
    /// The path in the guest is not usable.
    #[error("cannot add {host} at {guest}: the path in the guest must be absolute and without `..`")]
    Place {
        /// The file.
        host: PathBuf,
        /// The path that it was to get.
        guest: PathBuf,
    },
    /// A library was not found.
    #[error(
        "{program} needs the library {name}, which is nowhere on this host: set LD_LIBRARY_PATH to its \
         directory, or add a statically linked program"
    )]
    NoLibrary {
        /// The program that needs it.
        program: PathBuf,
        /// The library's name.
        name: String,
    },
    /// It is a damaged ELF file, although the user named it explicitly.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The reader's error.
        why: String,
    },
}

/// The command's files in the guest: its arguments, its environment, its directory, the list of what the
/// guest must find, and the mark at the end. `guest-images/guest/job.c` reads them.
const PLACES: [&str; 5] = ["/job/argv", "/job/env", "/job/workdir", "/job/promised", "/job/end"];

/// Returns the archive that is appended to an initramfs; the kernel unpacks one after another. The command
/// comes first, then what is added, then a mark. A guest whose memory is too small for all of it can thus
/// still report that.
pub fn archive(job: &Job) -> Result<Archive, JobError> {
    let mut added = Archive::default();
    let mut libraries = Libraries::of_this_host();
    for add in &job.adds {
        add::put(&mut added, &mut libraries, add)?;
    }
    if let Some(place) = PLACES.iter().map(Path::new).find(|place| added.has(place)) {
        return Err(JobError::Reserved(place.into()));
    }
    let mut env = Vec::new();
    if let Some(path) = libraries.path_for_the_loader() {
        env.push(path);
    }
    env.extend(job.env.iter().cloned());
    let workdir = job.workdir.as_deref().unwrap_or(Path::new("/")).as_os_str().as_bytes().to_vec();
    let argv = strings(job.argv.iter().map(OsString::as_os_str));
    let env = strings(env.iter().map(OsString::as_os_str));
    let promised = added.promised().to_vec();
    let [argv_at, env_at, workdir_at, promised_at, end_at] = PLACES.map(Path::new);
    let mut archive = Archive::default();
    for (place, bytes) in [(argv_at, &argv), (env_at, &env), (workdir_at, &workdir), (promised_at, &promised)]
    {
        archive.file(place, 0o644, 0, Content::Bytes(bytes))?;
    }
    archive.append(added);
    archive.file(end_at, 0o644, 0, Content::Bytes(b""))?;
    archive.finish();
    Ok(archive)
}

/// Joins the strings, each ended by a NUL, which none of them can contain.
fn strings<'a>(strings: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for string in strings {
        bytes.extend(string.as_bytes());
        bytes.push(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn job(adds: &[&str]) -> Job {
        let adds = adds.iter().map(|add| Add::parse(add.as_ref()).unwrap()).collect();
        Job { argv: vec!["echo".into()], adds, ..Job::default() }
    }

    #[test]
    fn the_command_travels_before_what_is_added_and_the_mark_behind_it() {
        let mut host = tempfile::NamedTempFile::new().unwrap();
        host.write_all(&[b'x'; 100_000]).unwrap();
        let archive = archive(&job(&[&format!("{}:/big", host.path().display())])).unwrap();
        let bytes = archive::tests::bytes_of(&archive);
        let at = |name: &[u8]| bytes.windows(name.len()).position(|window| window == name).unwrap();
        let order = [&b"job/argv\0"[..], b"job/promised\0", b"big\0", b"job/end\0", b"TRAILER!!!\0"].map(at);
        assert!(order.is_sorted(), "{order:?}");
        at(b"f 100000 /big\0");
        // The file's content is not in this process's memory.
        let held: usize = archive
            .parts()
            .iter()
            .map(|part| match part {
                Part::Bytes(bytes) => bytes.len(),
                Part::File { .. } => 0,
            })
            .sum();
        assert!(held < 4096, "{held}");
    }

    #[test]
    fn the_places_of_the_command_are_not_to_be_added_to() {
        let host = tempfile::NamedTempFile::new().unwrap();
        for place in PLACES {
            let error = archive(&job(&[&format!("{}:{place}", host.path().display())])).unwrap_err();
            assert!(matches!(error, JobError::Reserved(_)), "{error}");
        }
        archive(&job(&[&format!("{}:/job/data", host.path().display())])).unwrap();
    }

    #[test]
    fn what_says_no_length_is_read_and_what_is_no_file_is_refused_without_waiting() {
        let archive = archive(&job(&["/proc/self/status:/status"])).unwrap();
        let bytes = archive::tests::bytes_of(&archive);
        assert!(bytes.windows(6).any(|window| window == b"VmRSS:"));
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for (path, word) in [(fifo.as_path(), "FIFO"), (Path::new("/dev/zero"), "device")] {
            let error = super::archive(&job(&[&path.display().to_string()])).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        // Inside a folder, such files are skipped.
        super::archive(&job(&[&directory.path().display().to_string()])).unwrap();
    }

    #[test]
    fn five_gibibytes_are_refused_before_a_byte_is_read() {
        let host = tempfile::NamedTempFile::new().unwrap();
        host.as_file().set_len(5 << 30).unwrap();
        let error = archive(&job(&[&host.path().display().to_string()])).unwrap_err();
        assert!(error.to_string().contains("4 GiB"), "{error}");
    }
}
