//! `--add HOST[:GUEST]`: files and folders of the user's for the guest.
//!
//! Owns where they go and how they are read: modes and times are kept, symbolic links inside a
//! folder too; what is given itself is followed. Programs bring their libraries.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::JobError;
use super::archive::Archive;
use super::libraries::{self, Libraries};

/// Directories that the guest's init covers with file systems of its own.
const COVERED: [(&str, &str); 3] =
    [("/proc", "its processes"), ("/sys", "its devices"), ("/dev", "its device files")];

/// What is added, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Add {
    /// The file or folder on this host.
    pub host: PathBuf,
    /// Its place in the guest; none: the same absolute path, or, for a relative one, its name in `/`.
    pub guest: Option<PathBuf>,
}

impl Add {
    /// Reads HOST[:GUEST]. GUEST begins with a `/`; so a colon before anything else is HOST's.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (host, guest) = match text.rfind(":/") {
            Some(at) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        if host.is_empty() {
            return Err("it is HOST or HOST:GUEST, such as ./tests or ./tests:/opt/tests".into());
        }
        Ok(Self { host: host.into(), guest: guest.map(PathBuf::from) })
    }

    fn place(&self) -> Result<PathBuf, JobError> {
        let name = || self.host.file_name().map(PathBuf::from);
        let place = match &self.guest {
            // As cp has it: a slash at the end is a directory to put it into.
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
        // Without "." and double slashes.
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

/// Puts all that `add` names into the archive.
pub fn put(archive: &mut Archive, libraries: &mut Libraries, add: &Add) -> Result<(), JobError> {
    let place = add.place()?;
    if let Some((_, what)) = COVERED.into_iter().find(|(covered, _)| place.starts_with(covered)) {
        return Err(JobError::Covered(place, what));
    }
    let metadata = fs::metadata(&add.host).map_err(read(&add.host))?;
    walk(archive, libraries, &add.host, &place, &metadata, true)
}

fn read(path: &Path) -> impl FnOnce(std::io::Error) -> JobError {
    move |source| JobError::Read { path: path.into(), source }
}

fn mtime(metadata: &Metadata) -> u32 {
    u32::try_from(metadata.mtime()).unwrap_or(0)
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
        let bytes = fs::read(host).map_err(read(host))?;
        archive.file(place, metadata.mode(), mtime(metadata), &bytes)?;
        if libraries::is_elf(&bytes) {
            libraries.put_those_of(archive, host, place, &bytes, asked_for)?;
        }
        return Ok(());
    }
    if !kind.is_dir() {
        return if asked_for { Err(JobError::Kind(host.into())) } else { Ok(()) };
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
            let add = Add::parse(text).unwrap();
            assert_eq!(add.place().ok(), place.map(PathBuf::from), "{text}");
        }
        assert!(Add::parse("").is_err() && Add::parse(":/x").is_err());
    }
}
