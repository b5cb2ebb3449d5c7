//! How an image is opened, and who else must not have it.
//!
//! Owns the open flags, and the refusal of what this host uses itself ([`crate::files::host_use`]) or what a
//! program has by flock(2). The lock that keeps other VMs out is [`crate::disk::lock`]'s.

use std::ffi::CString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::ImageProblem;
use crate::disk::options::DiskOptions;
use crate::files::host_use::{self, HostUse};
use crate::files::locks;
use crate::text::shell_word;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Device,
}

/// Looks before opening: opening a FIFO or a tape has effects.
pub(super) fn check_kind(path: &Path) -> Result<Kind, ImageProblem> {
    let found = std::fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => missing(path),
        _ => ImageProblem::Open { flags: "at all", source },
    })?;
    let kind = found.file_type();
    if kind.is_file() {
        Ok(Kind::File)
    } else if kind.is_block_device() {
        Ok(Kind::Device)
    } else if kind.is_dir() {
        Err(ImageProblem::Kind("a directory"))
    } else if kind.is_char_device() {
        Err(ImageProblem::Kind("a character device"))
    } else {
        Err(ImageProblem::Kind("a pipe or socket"))
    }
}

/// With what was meant, where that is there.
fn missing(path: &Path) -> ImageProblem {
    if let Ok(target) = std::fs::read_link(path) {
        return ImageProblem::Dangling(target.display().to_string());
    }
    let text = path.to_string_lossy();
    // As cloud-hypervisor and QEMU have it.
    let meant = ["path=", "file="].iter().find_map(|key| text.strip_prefix(key));
    match meant.filter(|meant| Path::new(meant).exists()) {
        Some(meant) => ImageProblem::KeyBeforePath(shell_word(meant)),
        None => ImageProblem::Missing(shell_word(path)),
    }
}

/// What the image is opened with.
pub(super) fn wanted_flags(options: &DiskOptions, kind: Kind) -> libc::c_int {
    let access = if options.readonly { libc::O_RDONLY } else { libc::O_RDWR };
    let direct = if options.cache.direct { libc::O_DIRECT } else { 0 };
    // For a block device O_EXCL fails while it is mounted or otherwise in use, also where nothing else tells.
    let exclusive = kind == Kind::Device && !options.readonly && !options.shared_with_host;
    let exclusive = if exclusive { libc::O_EXCL } else { 0 };
    access | direct | exclusive
}

/// The flags that matter here, as strace writes them.
pub(super) fn flags_in_words(flags: libc::c_int) -> String {
    let access = if flags & libc::O_ACCMODE == libc::O_RDONLY { "O_RDONLY" } else { "O_RDWR" };
    let others = [(libc::O_EXCL, "O_EXCL"), (libc::O_DSYNC, "O_DSYNC"), (libc::O_DIRECT, "O_DIRECT")];
    let set = others.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
    std::iter::once(access).chain(set).collect::<Vec<_>>().join("|")
}

pub(super) fn open_file(options: &DiskOptions, kind: Kind) -> Result<File, ImageProblem> {
    let opened = OpenOptions::new()
        .read(true)
        .write(!options.readonly)
        // The access mode is what `write` says.
        .custom_flags(wanted_flags(options, kind) & !libc::O_ACCMODE | libc::O_NOCTTY)
        .open(&options.path);
    opened.map_err(|source| open_problem(options, kind, source))
}

pub(super) fn open_problem(options: &DiskOptions, kind: Kind, source: io::Error) -> ImageProblem {
    let exclusive = wanted_flags(options, kind) & libc::O_EXCL != 0;
    match source.raw_os_error() {
        Some(libc::EINVAL) if options.cache.direct => ImageProblem::NoDirect { mode: options.cache.name },
        Some(libc::EBUSY) if exclusive => ImageProblem::Open {
            flags: "exclusively: this host, or another VM, uses it (shared-with-host opens it all the same)",
            source,
        },
        _ if options.readonly => ImageProblem::Open { flags: "for reading", source },
        _ => ImageProblem::Open { flags: "for reading and writing (readonly would do with reading)", source },
    }
}

/// Whether the image may be opened as it would be, found without opening it for writing.
pub(super) fn check_access(options: &DiskOptions) -> Result<(), ImageProblem> {
    let flags = "for reading and writing (readonly would do with reading)";
    let failed = |source| ImageProblem::Open { flags, source };
    if options.readonly {
        return Ok(());
    }
    let path = CString::new(options.path.as_os_str().as_bytes())
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    // SAFETY: `path` is a string with its terminator, which the kernel only reads.
    let result =
        unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::R_OK | libc::W_OK, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(failed(io::Error::last_os_error())) }
}

/// What this host does with the image: an error where a guest that writes would destroy something, and else what
/// the user should know, if anything.
pub(super) fn check_host_use(
    options: &DiskOptions,
    found: &Metadata,
) -> Result<Option<String>, ImageProblem> {
    let uses = host_use::of(found);
    // Two that only read do each other no harm.
    let harmful: Vec<HostUse> = uses.into_iter().filter(|it| it.writes || !options.readonly).collect();
    if harmful.is_empty() {
        return Ok(None);
    }
    let uses = host_use::in_words(&harmful);
    let path = options.path.display();
    match (options.readonly, options.shared_with_host) {
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

/// Refuses what a program has by flock(2). Asked before our own lock is taken: on NFS both are one kind.
pub(super) fn check_flock(options: &DiskOptions, file: &File) -> Result<(), ImageProblem> {
    if options.shared_with_host || !locks::stays(|| locks::is_flocked(file, options.readonly)) {
        return Ok(());
    }
    let holders = locks::flock_holders(file).unwrap_or_else(|| "a program".into());
    Err(ImageProblem::Flocked { holders })
}
