//! A command for the test guest: what travels to it, and what it says of its end.
//!
//! Owns the archive that is put behind the guest's initramfs (the command, its environment, files of
//! the user's with their libraries), the messages of the guest's launcher, and the status file. How
//! bytes get there and back is the devices' business.

mod add;
mod archive;
mod libraries;
pub mod report;
pub mod status;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use add::Add;
use archive::Archive;
use libraries::Libraries;

/// What is to be run.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// The command and its arguments.
    pub argv: Vec<OsString>,
    /// `NAME=VALUE`, later ones win.
    pub env: Vec<OsString>,
    /// Where it starts; none: `/`.
    pub workdir: Option<PathBuf>,
    /// What is added to the guest.
    pub adds: Vec<Add>,
}

/// Why the command cannot be brought to the guest.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A file could not be read.
    #[error("cannot add {path} to the guest")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something that is no file, directory or symbolic link.
    #[error("cannot add {0} to the guest: it is no file, directory or symbolic link")]
    Kind(PathBuf),
    /// More than the archive's fields count.
    #[error("cannot add {0} to the guest: a file may have at most 4 GiB")]
    TooLarge(PathBuf),
    /// A place that the guest covers.
    #[error("cannot add anything at {0}: the guest has {1} of its own there")]
    Covered(PathBuf, &'static str),
    /// A place that is no place.
    #[error("cannot add {host} at {guest}: the place in the guest is an absolute path without `..`")]
    Place {
        /// The file.
        host: PathBuf,
        /// Where it was to go.
        guest: PathBuf,
    },
    /// A library that is nowhere.
    #[error(
        "{program} needs the library {name}, which is nowhere on this host: set LD_LIBRARY_PATH to its \
         directory, or add a statically linked program"
    )]
    NoLibrary {
        /// Who needs it.
        program: PathBuf,
        /// Its name.
        name: String,
    },
    /// Not a program that a guest could run, though the user gave it as one.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        why: String,
    },
}

/// The command's archive, to be put behind an initramfs: the kernel unpacks one after another.
pub fn archive(job: &Job) -> Result<Vec<u8>, JobError> {
    let mut archive = Archive::default();
    let mut libraries = Libraries::of_this_host();
    for add in &job.adds {
        add::put(&mut archive, &mut libraries, add)?;
    }
    let mut env = Vec::new();
    if let Some(path) = libraries.path_for_the_loader() {
        env.push(path);
    }
    env.extend(job.env.iter().cloned());
    let workdir = job.workdir.as_deref().unwrap_or(Path::new("/"));
    for (name, bytes) in [
        ("argv", strings(job.argv.iter().map(OsString::as_os_str))),
        ("env", strings(env.iter().map(OsString::as_os_str))),
        ("workdir", workdir.as_os_str().as_bytes().to_vec()),
    ] {
        archive.file(&Path::new("/job").join(name), 0o644, 0, &bytes)?;
    }
    Ok(archive.finish())
}

/// Each ended by a NUL, which none can contain.
fn strings<'a>(strings: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for string in strings {
        bytes.extend(string.as_bytes());
        bytes.push(0);
    }
    bytes
}
