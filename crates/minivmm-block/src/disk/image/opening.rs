//! How an image is opened, and who must not be using it meanwhile.
//!
//! Owns the open flags. Owns also the refusal of an image that this host itself uses
//! ([`crate::files::host_use`]) or that a program has locked by flock(2). The lock that keeps other VMs out
//! belongs to [`crate::disk::lock`].

use std::ffi::CString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::ImageProblem;
use crate::disk::config::DiskConfig;
use crate::files::host_use::{self, HostUse};
use crate::files::locks;
use crate::text::shell_word;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    File,
    Device,
}

/// Checks the file's type before it is opened, because opening a FIFO or a tape has side effects.
pub(super) fn check_kind(path: &Path) -> Result<FileKind, ImageProblem> {
    let found = std::fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => missing(path),
        _ => ImageProblem::Open { flags: "at all", source },
    })?;
    let kind = found.file_type();
    if kind.is_file() {
        Ok(FileKind::File)
    } else if kind.is_block_device() {
        Ok(FileKind::Device)
    } else if kind.is_dir() {
        Err(ImageProblem::Kind("a directory"))
    } else if kind.is_char_device() {
        Err(ImageProblem::Kind("a character device"))
    } else {
        Err(ImageProblem::Kind("a pipe or socket"))
    }
}

/// Explains a missing file, with the path that was probably meant if that one exists.
fn missing(path: &Path) -> ImageProblem {
    if let Ok(target) = std::fs::read_link(path) {
        return ImageProblem::Dangling(target.display().to_string());
    }
    let text = path.to_string_lossy();
    // Spellings of cloud-hypervisor and QEMU.
    let meant = ["path=", "file="].iter().find_map(|key| text.strip_prefix(key));
    match meant.filter(|meant| Path::new(meant).exists()) {
        Some(meant) => ImageProblem::KeyBeforePath(shell_word(meant)),
        None => ImageProblem::Missing(shell_word(path)),
    }
}

/// Returns the flags to open the image with.
pub(super) fn wanted_flags(config: &DiskConfig, kind: FileKind) -> libc::c_int {
    let access = if config.readonly { libc::O_RDONLY } else { libc::O_RDWR };
    let direct = if config.cache.direct { libc::O_DIRECT } else { 0 };
    // O_EXCL on a block device fails while it is mounted or otherwise in use, even where nothing else reports
    // that.
    let exclusive = kind == FileKind::Device && !config.readonly && !config.shared_with_host;
    let exclusive = if exclusive { libc::O_EXCL } else { 0 };
    access | direct | exclusive
}

/// Writes the flags that matter here as strace does.
pub(super) fn flags_in_words(flags: libc::c_int) -> String {
    let access = if flags & libc::O_ACCMODE == libc::O_RDONLY { "O_RDONLY" } else { "O_RDWR" };
    let others = [(libc::O_EXCL, "O_EXCL"), (libc::O_DSYNC, "O_DSYNC"), (libc::O_DIRECT, "O_DIRECT")];
    let set = others.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
    std::iter::once(access).chain(set).collect::<Vec<_>>().join("|")
}

pub(super) fn open_file(config: &DiskConfig, kind: FileKind) -> Result<File, ImageProblem> {
    let opened = OpenOptions::new()
        .read(true)
        .write(!config.readonly)
        // `write` above sets the access mode.
        .custom_flags(wanted_flags(config, kind) & !libc::O_ACCMODE | libc::O_NOCTTY)
        .open(&config.path);
    opened.map_err(|source| open_problem(config, kind, source))
}

pub(super) fn open_problem(config: &DiskConfig, kind: FileKind, source: io::Error) -> ImageProblem {
    let exclusive = wanted_flags(config, kind) & libc::O_EXCL != 0;
    match source.raw_os_error() {
        Some(libc::EINVAL) if config.cache.direct => ImageProblem::NoDirect { mode: config.cache.name },
        Some(libc::EBUSY) if exclusive => ImageProblem::Open {
            flags: "exclusively: this host, or another VM, uses it (shared-with-host opens it all the same)",
            source,
        },
        _ if config.readonly => ImageProblem::Open { flags: "for reading", source },
        _ => ImageProblem::Open { flags: "for reading and writing (readonly would do with reading)", source },
    }
}

/// Checks whether the image could be opened as asked, without opening it for writing.
pub(super) fn check_access(config: &DiskConfig) -> Result<(), ImageProblem> {
    let flags = "for reading and writing (readonly would do with reading)";
    let failed = |source| ImageProblem::Open { flags, source };
    if config.readonly {
        return Ok(());
    }
    let path = CString::new(config.path.as_os_str().as_bytes())
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    // SAFETY: `path` is a string with its terminator, which the kernel only reads.
    let result =
        unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::R_OK | libc::W_OK, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(failed(io::Error::last_os_error())) }
}

/// Checks what this host does with the image. Returns an error if a writing guest would destroy something.
/// Otherwise returns what the user should know, or `None`.
pub(super) fn check_host_use(config: &DiskConfig, found: &Metadata) -> Result<Option<String>, ImageProblem> {
    let uses = host_use::of(found);
    // Two readers do each other no harm.
    let harmful: Vec<HostUse> = uses.into_iter().filter(|it| it.writes || !config.readonly).collect();
    if harmful.is_empty() {
        return Ok(None);
    }
    let uses = host_use::in_words(&harmful);
    let path = config.path.display();
    match (config.readonly, config.shared_with_host) {
        (true, true) => Ok(None),
        (true, false) => Ok(Some(format!(
            "{path}: this host uses it and may write to it: {uses}. The guest only reads, and may find a file system that \
             changes beneath it (shared-with-host says that this is meant)"
        ))),
        (false, true) => Ok(Some(format!(
            "{path}: this host uses it too: {uses}. shared-with-host says that this is meant; two writers that do not \
             know of each other destroy a file system"
        ))),
        (false, false) => Err(ImageProblem::InUse { uses }),
    }
}

/// Refuses an image that a program has locked by flock(2). Call it before our own lock is taken: on NFS both
/// are one kind of lock.
pub(super) fn check_flock(config: &DiskConfig, file: &File) -> Result<(), ImageProblem> {
    if config.shared_with_host || !locks::stays(|| locks::is_flocked(file, config.readonly)) {
        return Ok(());
    }
    let holders = locks::flock_holders(file).unwrap_or_else(|| "a program".into());
    Err(ImageProblem::Flocked { holders })
}
