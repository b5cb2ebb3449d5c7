//! `--add HOST[:GUEST]`: the user's files and folders for the guest.
//!
//! Owns where they go and how they are read. Modes and times are kept, and so are symbolic links inside a
//! folder; a link that is itself given is followed. Programs bring their libraries. File contents stay in
//! place until the guest's memory is filled.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use super::JobError;
use super::archive::Archive;
use super::elf::{self, Image};
use super::host_file::{mtime, open, put_content, read};
use super::libraries::Libraries;

/// Directories that the guest's init covers with file systems of its own.
const COVERED: [(&str, &str); 3] =
    [("/proc", "its processes"), ("/sys", "its devices"), ("/dev", "its device files")];

/// What is added, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Add {
    /// The file or folder on this host.
    pub host: PathBuf,
    /// Its path in the guest. `None`: the same absolute path or, if `host` is relative, its name in `/`.
    pub guest: Option<PathBuf>,
}

impl Add {
    /// Parses `HOST[:GUEST]`. GUEST begins with a `/`, so a colon before anything else belongs to HOST.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let (host, guest) = match bytes.windows(2).rposition(|pair| pair == b":/") {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        if host.is_empty() {
            return Err("it is HOST or HOST:GUEST, such as ./tests or ./tests:/opt/tests".into());
        }
        let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        Ok(Self { host: path(host), guest: guest.map(path) })
    }

    fn place(&self) -> Result<PathBuf, JobError> {
        let name = || self.host.file_name().map(PathBuf::from);
        let place = match &self.guest {
            // As with cp, a slash at the end names a directory to put it into.
            Some(guest) if guest.as_os_str().as_bytes().ends_with(b"/") => {
                name().map(|name| guest.join(name))
            }
            Some(guest) => Some(guest.clone()),
            None if self.host.is_absolute() => Some(self.host.clone()),
            None => fs::canonicalize(&self.host)
                .ok()
                .and_then(|path| name().or_else(|| path.file_name().map(PathBuf::from)))
                .or_else(name)
                .map(|name| Path::new("/").join(name)),
        };
        // Remove "." and double slashes.
        let place: Option<PathBuf> = place.map(|place| place.components().collect());
        let fine = |place: &PathBuf| {
            place.is_absolute()
                && place.file_name().is_some()
                && !place.components().any(|part| part == Component::ParentDir)
        };
        place.filter(fine).ok_or_else(|| JobError::Place {
            host: self.host.clone(),
            guest: self.guest.clone().unwrap_or_else(|| self.host.clone()),
        })
    }
}

/// Puts everything that `add` names into the archive.
pub fn put(archive: &mut Archive, libraries: &mut Libraries, add: &Add) -> Result<(), JobError> {
    let place = add.place()?;
    if let Some((_, what)) = COVERED.into_iter().find(|(covered, _)| place.starts_with(covered)) {
        return Err(JobError::Covered(place, what));
    }
    let metadata = fs::metadata(&add.host).map_err(read(&add.host))?;
    walk(archive, libraries, &add.host, &place, &metadata, true)
}

fn walk(
    archive: &mut Archive,
    libraries: &mut Libraries,
    host: &Path,
    place: &Path,
    metadata: &Metadata,
    asked_for: bool,
) -> Result<(), JobError> {
    let kind = metadata.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(host).map_err(read(host))?;
        return archive.link(place, mtime(metadata), &target);
    }
    if kind.is_file() {
        return put_file(archive, libraries, host, place, asked_for);
    }
    if !kind.is_dir() {
        let what = what_else(metadata);
        if asked_for {
            return Err(JobError::Kind(host.into(), what));
        }
        log::warn!("{} is {what} and was not added", host.display());
        return Ok(());
    }
    archive.directory(place, metadata.mode(), mtime(metadata))?;
    let mut entries: Vec<PathBuf> = fs::read_dir(host)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(read(host))?;
    entries.sort();
    for entry in entries {
        let Some(name) = entry.file_name() else { continue };
        let metadata = fs::symlink_metadata(&entry).map_err(read(&entry))?;
        walk(archive, libraries, &entry, &place.join(name), &metadata, false)?;
    }
    Ok(())
}

/// Describes what is no file, directory or link.
fn what_else(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_block_device() => "a block device (--disk gives it to the guest)",
        () => "a device",
    }
}

/// Adds a regular file, and the libraries that it needs.
fn put_file(
    archive: &mut Archive,
    libraries: &mut Libraries,
    host: &Path,
    place: &Path,
    asked_for: bool,
) -> Result<(), JobError> {
    let file = open(host).map_err(read(host))?;
    put_content(archive, &file, host, place, 0)?;
    match elf::read(&file) {
        Ok(Image::Native(needs)) => libraries.put_those_of(archive, host, place, needs, asked_for),
        Ok(Image::Foreign | Image::None) => Ok(()),
        Err(error) if asked_for => Err(JobError::Damaged { path: host.into(), why: error.to_string() }),
        Err(error) => {
            log::info!("{}: {error}", host.display());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_the_one_that_was_meant() {
        for (text, place) in [
            ("/usr/bin/jq", Some("/usr/bin/jq")),
            ("/usr/bin/jq:/bin/jq", Some("/bin/jq")),
            ("/usr/bin/jq:/opt/", Some("/opt/jq")),
            ("Cargo.toml", Some("/Cargo.toml")),
            ("./src/lib.rs", Some("/lib.rs")),
            ("src/job/..", Some("/src")),
            ("a:b:/c", Some("/c")),
            ("a:/x/../c", None),
            ("a:/", Some("/a")),
            ("/", None),
        ] {
            let add = Add::parse(text.as_ref()).unwrap();
            assert_eq!(add.place().ok(), place.map(PathBuf::from), "{text}");
        }
        let bytes = Add::parse(OsStr::from_bytes(b"h\xff:/g\xfe")).unwrap();
        assert_eq!(bytes.host.as_os_str().as_bytes(), b"h\xff");
        assert_eq!(bytes.guest.unwrap().as_os_str().as_bytes(), b"/g\xfe");
        assert!(["", ":/x"].iter().all(|wrong| Add::parse(wrong.as_ref()).is_err()));
    }
}
