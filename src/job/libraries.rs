//! The shared libraries of a program, found as the dynamic loader finds them (ld.so(8)).
//!
//! Owns the search: DT_RPATH, LD_LIBRARY_PATH, DT_RUNPATH, /etc/ld.so.cache, the default directories. In the
//! guest each library keeps its host's path, or its place relative to the program ($ORIGIN). The guest has no
//! cache, so directories that only the cache knows go into LD_LIBRARY_PATH there. Libraries opened by
//! dlopen(3) cannot be found here.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::JobError;
use super::archive::Archive;
use super::elf::{self, Image, Needs};
use super::host_file;

/// Directories that loaders search by default: Debian's, and those of other distributions.
const DEFAULT_DIRECTORIES: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
/// A limit on images for one program; no chain of libraries is that deep.
const PROGRAMS_MAX: usize = 10_000;

/// The libraries of this host, and the directories that the guest's loader must be told.
pub struct Libraries {
    /// The directories of LD_LIBRARY_PATH on this host.
    given: Vec<PathBuf>,
    /// Name and path of each cached library, in the cache's order.
    cache: Vec<(String, PathBuf)>,
    /// Directories in the guest that its loader does not search by default.
    unusual: BTreeSet<PathBuf>,
}

/// A program or library whose libraries are to be found.
struct Object {
    host: PathBuf,
    guest: PathBuf,
    needs: Needs,
    /// DT_RPATH of the images that need it: directories on the host and in the guest.
    inherited: Vec<(PathBuf, PathBuf)>,
}

impl Libraries {
    /// Reads where this host's loader would search.
    pub fn of_this_host() -> Self {
        let given = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let given = std::env::split_paths(&given).filter(|path| path.is_absolute()).collect();
        let cache = fs::read("/etc/ld.so.cache").map(|bytes| parse_cache(&bytes)).unwrap_or_default();
        Self { given, cache, unusual: BTreeSet::new() }
    }

    /// Returns the setting of LD_LIBRARY_PATH for the guest, or `None` if it needs none.
    pub fn path_for_the_loader(&self) -> Option<OsString> {
        let joined = std::env::join_paths(&self.unusual).ok().filter(|joined| !joined.is_empty())?;
        let mut variable = OsString::from("LD_LIBRARY_PATH=");
        variable.push(joined);
        Some(variable)
    }

    /// Puts the loader and the libraries that an image `needs` into the archive, and what those need in turn.
    /// A missing library is an error if the user has `asked_for` this very file, otherwise a warning.
    pub fn put_those_of(
        &mut self,
        archive: &mut Archive,
        host: &Path,
        guest: &Path,
        needs: Needs,
        asked_for: bool,
    ) -> Result<(), JobError> {
        let first = Object {
            // $ORIGIN is the directory of the file itself, not of a link to it.
            host: fs::canonicalize(host).unwrap_or_else(|_| host.into()),
            guest: guest.into(),
            needs,
            inherited: Vec::new(),
        };
        let mut waiting = vec![first];
        let mut seen = 0;
        while let Some(object) = waiting.pop() {
            seen += 1;
            let needed = self.put_one(archive, &object).and_then(|found| match found {
                Found::All(found) => Ok(found),
                Found::Missing(name, found) => {
                    let error = JobError::NoLibrary { program: object.host.clone(), name };
                    if asked_for {
                        return Err(error);
                    }
                    log::warn!("{error}");
                    Ok(found)
                }
            });
            match needed {
                Ok(found) if seen < PROGRAMS_MAX => waiting.extend(found),
                Ok(_) => {}
                Err(JobError::Damaged { path, why }) if !asked_for => log::info!("{}: {why}", path.display()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts what one image itself names into the archive.
    fn put_one(&mut self, archive: &mut Archive, object: &Object) -> Result<Found, JobError> {
        let needs = &object.needs;
        if let Some(interpreter) = needs.interpreter.as_deref().map(Path::new)
            && interpreter.is_absolute()
        {
            put_file(archive, interpreter, interpreter)?;
        }
        let rpath = directories(&needs.rpaths, object);
        let runpath = directories(&needs.runpaths, object);
        let mut inherited = object.inherited.clone();
        inherited.extend(rpath);
        let mut found = Vec::new();
        let mut missing = None;
        for name in &needs.libraries {
            let before = if runpath.is_empty() { inherited.as_slice() } else { &[] };
            match self.find(name, before, &runpath) {
                Some((host, guest)) if archive.has(&guest) => drop(host),
                Some((host, guest)) => {
                    let needs = put_file(archive, &host, &guest)?;
                    let host = fs::canonicalize(&host).unwrap_or(host);
                    found.push(Object { host, guest, needs, inherited: inherited.clone() });
                }
                None => missing = Some(name.clone()),
            }
        }
        Ok(match missing {
            None => Found::All(found),
            Some(name) => Found::Missing(name, found),
        })
    }

    /// Returns the path of a library on the host, and its path in the guest.
    fn find(
        &mut self,
        name: &str,
        before: &[(PathBuf, PathBuf)],
        runpath: &[(PathBuf, PathBuf)],
    ) -> Option<(PathBuf, PathBuf)> {
        if name.contains('/') {
            return is_library(Path::new(name)).then(|| (name.into(), name.into()));
        }
        let join = |(host, guest): &(PathBuf, PathBuf)| (host.join(name), guest.join(name));
        let same = |path: PathBuf| (path.clone(), path);
        if let Some(found) = before.iter().map(join).find(|(host, _)| is_library(host)) {
            return Some(found);
        }
        let given = self.given.iter().map(|directory| directory.join(name)).find(|path| is_library(path));
        if let Some(path) = given {
            return Some(self.unusual_place(same(path)));
        }
        if let Some(found) = runpath.iter().map(join).find(|(host, _)| is_library(host)) {
            return Some(found);
        }
        let cached = self.cache.iter().filter(|(cached, _)| cached == name).map(|(_, path)| path.clone());
        let default = DEFAULT_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
        let path = cached.chain(default).find(|path| is_library(path))?;
        Some(self.unusual_place(same(path)))
    }

    fn unusual_place(&mut self, found: (PathBuf, PathBuf)) -> (PathBuf, PathBuf) {
        if let Some(directory) = found.1.parent()
            && !DEFAULT_DIRECTORIES.iter().any(|usual| directory == Path::new(usual))
        {
            self.unusual.insert(directory.into());
        }
        found
    }
}

enum Found {
    All(Vec<Object>),
    Missing(String, Vec<Object>),
}

/// Returns the directories of a search path, on the host and in the guest.
fn directories(paths: &[String], object: &Object) -> Vec<(PathBuf, PathBuf)> {
    let origin = |place: &Path| place.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
    let (host, guest) = (origin(&object.host), origin(&object.guest));
    let with = |path: &str, origin: &str| {
        PathBuf::from(path.replace("${ORIGIN}", origin).replace("$ORIGIN", origin))
    };
    let parts = paths.iter().flat_map(|path| path.split(':')).filter(|path| !path.is_empty());
    parts.map(|path| (with(path, &host), tidy(&with(path, &guest)))).collect()
}

/// Returns the path without `..`, which the archive's paths must not have.
fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => _ = tidy.pop(),
            std::path::Component::CurDir => {}
            other => tidy.push(other),
        }
    }
    tidy
}

/// Puts one library or loader into the archive, following links, and returns what it needs itself.
fn put_file(archive: &mut Archive, host: &Path, guest: &Path) -> Result<Needs, JobError> {
    let failed = |source| JobError::Read { path: host.into(), source };
    let file = host_file::open(host).map_err(failed)?;
    host_file::put_content(archive, &file, host, guest, 0o555)?;
    match elf::read(&file) {
        Ok(Image::Native(needs)) => Ok(needs),
        Ok(Image::Foreign | Image::None) => Ok(Needs::default()),
        Err(why) => Err(JobError::Damaged { path: host.into(), why: why.to_string() }),
    }
}

/// Returns `true` if there is an x86-64 image at `path`; loaders skip others.
fn is_library(path: &Path) -> bool {
    host_file::open(path).is_ok_and(|file| matches!(elf::read(&file), Ok(Image::Native(_))))
}

/// Parses ld.so's cache (glibc, sysdeps/generic/dl-cache.h, `struct cache_file_new`). Returns names and paths
/// of libraries for this architecture, except those for special processors.
fn parse_cache(bytes: &[u8]) -> Vec<(String, PathBuf)> {
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER_BYTES: usize = 48;
    const ENTRY_BYTES: usize = 24;
    /// FLAG_ELF_LIBC6 | FLAG_X8664_LIB64
    const X86_64: u32 = 0x0303;
    // A cache in an older format may come first.
    let Some(from) = bytes.windows(MAGIC.len()).position(|window| window == MAGIC) else { return Vec::new() };
    let cache = bytes.get(from..).unwrap_or_default();
    let number = |at: usize| {
        let bytes = cache.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let string = |at: u32| {
        let rest = cache.get(usize::try_from(at).ok()?..)?;
        let end = rest.iter().position(|&byte| byte == 0)?;
        String::from_utf8(rest.get(..end)?.to_vec()).ok()
    };
    let count = number(MAGIC.len()).and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    let entry = |index: usize| {
        let at = HEADER_BYTES + index * ENTRY_BYTES;
        let usable = number(at)? == X86_64 && number(at + 16)? == 0 && number(at + 20)? == 0;
        let (name, path) = (string(number(at + 4)?)?, string(number(at + 8)?)?);
        usable.then(|| (name, PathBuf::from(path)))
    };
    // The count is limited to the entries that the file has room for.
    (0..count.min(cache.len() / ENTRY_BYTES)).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_brings_its_loader_and_its_c_library() {
        let program = std::env::current_exe().unwrap();
        let mut archive = Archive::default();
        let mut libraries = Libraries::of_this_host();
        let Image::Native(needs) = elf::read(&fs::File::open(&program).unwrap()).unwrap() else {
            panic!("a test is an ELF image")
        };
        libraries.put_those_of(&mut archive, &program, Path::new("/test"), needs, true).unwrap();
        let promised = String::from_utf8(archive.promised().to_vec()).unwrap();
        for name in ["/libc.so.6\0", "/ld-linux-x86-64.so.2\0"] {
            assert!(promised.contains(name), "{promised}");
        }
        assert_eq!(libraries.path_for_the_loader(), None);
    }

    #[test]
    fn a_cache_that_is_cut_or_wild_is_read_as_far_as_it_goes() {
        let whole = fs::read("/etc/ld.so.cache").unwrap_or_default();
        let all = parse_cache(&whole).len();
        for end in (0..whole.len()).step_by(997) {
            assert!(parse_cache(&whole[..end]).len() <= all);
        }
        let mut wild = b"glibc-ld.so.cache1.1".to_vec();
        wild.extend([0xff; 200]);
        assert!(parse_cache(&wild).is_empty());
    }

    #[test]
    fn origin_is_the_hosts_on_the_host_and_the_guests_in_the_guest() {
        let object = Object {
            host: "/home/me/build/bin/tool".into(),
            guest: "/opt/bin/tool".into(),
            needs: Needs::default(),
            inherited: Vec::new(),
        };
        let expected = vec![
            (PathBuf::from("/home/me/build/bin/../lib"), PathBuf::from("/opt/lib")),
            (PathBuf::from("/srv"), PathBuf::from("/srv")),
        ];
        assert_eq!(directories(&["$ORIGIN/../lib:/srv".into()], &object), expected);
    }
}
