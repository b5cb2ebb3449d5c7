//! The only place that opens a file for output.
//!
//! Owns the rule that nothing which a command was given is destroyed. Some paths are refused before anything is
//! emptied:
//!
//! - the same file as an input, or as another output of the command
//! - an image that a VM has locked or that this host uses
//! - a block device, or a directory
//! - a regular file that holds anything but an older output of the same kind
//!
//! Pipes, terminals and other character devices are accepted. A path that names a descriptor of ours
//! (/dev/stdout) means that descriptor.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::host_use;
use super::identity::{FileId, Spot, own_descriptor};
use super::locks;

/// How many bytes of an older output are checked.
const FIRST_BYTES: u64 = 4096;

/// The option that names a guest's disk.
pub const DISK: &str = "--disk";
/// The descriptors that we print to.
const STREAMS: [(RawFd, &str); 2] = [(1, "standard output"), (2, "standard error")];

/// The kind of content that an output has. An older output of the same kind may be replaced.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    /// The name of an older output: "an older write log".
    pub name: &'static str,
    /// Returns `true` if these are the first bytes of a possible older output. Not called for empty files.
    pub is_older: fn(first: &[u8]) -> bool,
}

/// JSON, HTML, or whatever a guest or a program prints. Disk images, kernels and archives are no text: they
/// have a NUL byte near their beginning.
pub const TEXT: Content = Content { name: "text", is_older: is_text };

/// An output that becomes an image again. Whoever makes the image checks the size.
pub const IMAGE: Content = Content { name: "an image", is_older: |_| true };

fn is_text(first: &[u8]) -> bool {
    !first.contains(&0)
}

/// A file that a command writes to.
#[derive(Debug, Clone)]
pub struct Output {
    /// The option that names it: "--status-file".
    pub option: &'static str,
    /// The path as given.
    pub path: PathBuf,
    /// The kind of content that is written to it.
    pub content: Content,
}

/// A file that a command reads, or uses as a disk.
#[derive(Debug, Clone)]
pub struct Input {
    /// The option that names it: "--disk".
    pub option: &'static str,
    /// The path as given.
    pub path: PathBuf,
}

/// All files that one command names.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// The files that it only reads, and its disks.
    pub inputs: Vec<Input>,
    /// The files that it writes anew.
    pub outputs: Vec<Output>,
}

/// Why a file is not written to. Nothing has been changed then.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {option} to {path}: {problem}")]
pub struct OutputRefused {
    /// The option that names the output.
    pub option: &'static str,
    /// The path as given.
    pub path: String,
    /// What is wrong with it.
    pub problem: Box<Problem>,
}

/// What is wrong with an output.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each says it")]
#[non_exhaustive]
pub enum Problem {
    #[error("it is a directory")]
    Directory,
    #[error("it is a block device, whose content would be overwritten")]
    BlockDevice,
    #[error("it is the same file as {option} {path}, which would be destroyed: give another name")]
    Input { option: &'static str, path: String },
    #[error("{option} writes to the same file: give each a file of its own")]
    Output { option: String },
    #[error("another VM, or another program, has locked it as its own: give another name")]
    Locked,
    #[error("this host uses it: {0}; give another name")]
    InUse(String),
    #[error("it exists and is not {0}; what it holds would be lost: remove it, or give another name")]
    Content(&'static str),
    #[error("it exists and cannot be read, so minivmm cannot tell what would be lost: {0}")]
    Unreadable(io::Error),
    #[error("it cannot be created in the directory {directory}: {why}")]
    Place { directory: String, why: io::Error },
    #[error("{0}")]
    Host(io::Error),
}

/// An opened output.
#[derive(Debug)]
pub struct Opened {
    /// The file to write to.
    pub file: File,
    /// `true` if it is a regular file that belongs to us, so that it can be rewritten from its beginning.
    /// `false` for a pipe, a device, or a descriptor that we were started with: those can only be written on.
    pub is_ours: bool,
}

/// What happens to the content of an older output when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Older {
    Empty,
    Keep,
}

impl Output {
    /// Returns an output that holds text.
    pub fn text(option: &'static str, path: impl Into<PathBuf>) -> Self {
        Self { option, path: path.into(), content: TEXT }
    }

    fn refused(&self, problem: Problem) -> OutputRefused {
        OutputRefused {
            option: self.option,
            path: self.path.display().to_string(),
            problem: Box::new(problem),
        }
    }

    fn is(&self, other: &Self) -> bool {
        self.option == other.option && self.path == other.path
    }
}

impl Inventory {
    /// Returns the refusal of every output that would be refused. Changes nothing.
    pub fn check(&self) -> Vec<OutputRefused> {
        let check = |(at, output): (usize, &Output)| {
            let earlier = self.outputs.get(..at).unwrap_or_default();
            self.look(output, earlier).map_err(|problem| output.refused(problem)).err()
        };
        let stdout = self.check_stdout().err();
        stdout.into_iter().chain(self.outputs.iter().enumerate().filter_map(check)).collect()
    }

    /// Refuses if standard output is a disk (`>> disk.img`), which must not be printed to.
    pub fn check_stdout(&self) -> Result<(), OutputRefused> {
        let disks = self.inputs.iter().filter(|input| input.option == DISK).cloned().collect();
        let disks = Inventory { inputs: disks, outputs: Vec::new() };
        let stdout = Output::text("standard output", "/proc/self/fd/1");
        match fs::metadata(&stdout.path) {
            Ok(found) if is_writable(1) => {
                disks.compare_inputs(&Spot::Exists(found)).map_err(|problem| stdout.refused(problem))
            }
            _ => Ok(()),
        }
    }

    /// Opens `output` and empties it.
    pub fn open(&self, output: &Output) -> Result<Opened, OutputRefused> {
        self.opened(output, Older::Empty).map_err(|problem| output.refused(problem))
    }

    /// Opens `output`. An older one keeps its content until it is replaced.
    pub fn open_unchanged(&self, output: &Output) -> Result<Opened, OutputRefused> {
        self.opened(output, Older::Keep).map_err(|problem| output.refused(problem))
    }

    fn opened(&self, output: &Output, older: Older) -> Result<Opened, Problem> {
        let others: Vec<Output> = self.outputs.iter().filter(|other| !other.is(output)).cloned().collect();
        self.look(output, &others)?;
        if let Some(file) = own_descriptor(&output.path).and_then(writable_descriptor) {
            return Ok(Opened { file, is_ours: false });
        }
        let file = File::options().write(true).create(true).truncate(false).open(&output.path);
        let file = file.map_err(Problem::Host)?;
        let found = file.metadata().map_err(Problem::Host)?;
        // Checked again through the descriptor, because the path may have changed in between.
        self.compare(&Spot::Exists(found.clone()), output, &others)?;
        if !found.is_file() {
            return Ok(Opened { file, is_ours: false });
        }
        if locks::stays(|| locks::is_locked(&file, false)) {
            return Err(Problem::Locked);
        }
        if older == Older::Empty {
            file.set_len(0).map_err(Problem::Host)?;
        }
        Ok(Opened { file, is_ours: true })
    }

    /// Checks everything that can be checked without opening the file for writing.
    fn look(&self, output: &Output, others: &[Output]) -> Result<(), Problem> {
        if let Some(descriptor) = own_descriptor(&output.path)
            && is_writable(descriptor)
        {
            // Whoever started us opened it for output. But it may be a disk (`>> disk.img`).
            let Ok(found) = fs::metadata(&output.path) else { return Ok(()) };
            return self.compare_inputs(&Spot::Exists(found));
        }
        let spot = Spot::of(&output.path).map_err(|why| place_problem(&output.path, why))?;
        if let Spot::Exists(found) = &spot {
            let kind = found.file_type();
            if kind.is_dir() {
                return Err(Problem::Directory);
            }
            self.compare(&spot, output, others)?;
            if kind.is_block_device() {
                return Err(Problem::BlockDevice);
            }
            if kind.is_file() {
                return look_at_older(output, found);
            }
            return Ok(());
        }
        self.compare(&spot, output, others)?;
        let Spot::New { directory, .. } = &spot else { return Ok(()) };
        may_write(directory, libc::W_OK | libc::X_OK)
            .map_err(|why| Problem::Place { directory: directory.display().to_string(), why })
    }

    fn compare(&self, spot: &Spot, output: &Output, others: &[Output]) -> Result<(), Problem> {
        self.compare_inputs(spot)?;
        // Several outputs may share a pipe or a device.
        if matches!(spot, Spot::Exists(found) if !found.is_file() && !found.file_type().is_block_device()) {
            return Ok(());
        }
        let is_same = |path: &Path| Spot::of(path).is_ok_and(|other| other.is_same(spot));
        if let Some(other) = others.iter().find(|other| !other.is(output) && is_same(&other.path)) {
            return Err(Problem::Output { option: format!("{} {}", other.option, other.path.display()) });
        }
        if others.iter().any(|other| other.is(output)) {
            return Err(Problem::Output { option: format!("another {}", output.option) });
        }
        for (descriptor, name) in STREAMS {
            if is_writable(descriptor) && is_same(Path::new(&format!("/proc/self/fd/{descriptor}"))) {
                return Err(Problem::Output { option: name.into() });
            }
        }
        Ok(())
    }

    fn compare_inputs(&self, spot: &Spot) -> Result<(), Problem> {
        let is_same = |input: &&Input| Spot::of(&input.path).is_ok_and(|other| other.is_same(spot));
        // A character device (--kernel /dev/null) has nothing to lose.
        if matches!(spot, Spot::Exists(found) if !found.is_file() && !found.file_type().is_block_device()) {
            return Ok(());
        }
        match self.inputs.iter().find(is_same) {
            Some(Input { option, path }) => Err(Problem::Input { option, path: path.display().to_string() }),
            None => Ok(()),
        }
    }
}

/// Checks that nobody uses an existing regular file, and that replacing it loses nothing.
fn look_at_older(output: &Output, found: &Metadata) -> Result<(), Problem> {
    let uses = host_use::of(found);
    if !uses.is_empty() {
        return Err(Problem::InUse(host_use::in_words(&uses)));
    }
    may_write(&output.path, libc::W_OK).map_err(Problem::Host)?;
    let file = match File::open(&output.path) {
        Ok(file) => file,
        Err(_) if found.len() == 0 => return Ok(()),
        Err(error) => return Err(Problem::Unreadable(error)),
    };
    if locks::stays(|| locks::is_locked(&file, false)) {
        return Err(Problem::Locked);
    }
    let mut first = Vec::new();
    (&file).take(FIRST_BYTES).read_to_end(&mut first).map_err(Problem::Unreadable)?;
    if first.is_empty() || (output.content.is_older)(&first) {
        return Ok(());
    }
    Err(Problem::Content(output.content.name))
}

fn place_problem(path: &Path, why: io::Error) -> Problem {
    match path.parent() {
        Some(directory) if directory != Path::new("") && fs::metadata(directory).is_err() => {
            Problem::Place { directory: directory.display().to_string(), why }
        }
        _ => Problem::Host(why),
    }
}

/// Asks the host whether this user may write to `path`, without trying.
fn may_write(path: &Path, how: libc::c_int) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    // SAFETY: `path` is a string with its terminator, which the kernel only reads.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), how, libc::AT_EACCESS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_writable(descriptor: RawFd) -> bool {
    // SAFETY: F_GETFL takes no argument and touches no memory.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// Returns a second descriptor of the same open file, which shares its position.
fn writable_descriptor(descriptor: RawFd) -> Option<File> {
    if !is_writable(descriptor) {
        return None;
    }
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor, which is ours alone, and touches no memory.
    unsafe {
        let new = libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 3);
        (new >= 0).then(|| File::from_raw_fd(new))
    }
}

/// Empties the output that [`Inventory::open_unchanged`] has opened, if it belongs to us.
pub fn emptied(opened: Opened) -> io::Result<File> {
    if opened.is_ours {
        opened.file.set_len(0)?;
    }
    Ok(opened.file)
}

/// Creates a file where none exists. Only for directories of our own.
pub fn make_new(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

/// Creates a file in place of an older one, whose content remains for whoever has it open. Only for directories
/// of our own.
pub fn make_anew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => make_new(path),
    }
}

/// Does the same as [`make_anew`], and writes `content`.
pub fn write_anew(path: &Path, content: impl AsRef<[u8]>) -> io::Result<()> {
    make_anew(path)?.write_all(content.as_ref())
}

/// Puts `text` at the output's path, as a whole or not at all. Replaces nothing but an older output.
pub fn replace(output: &Output, text: &str) -> Result<(), OutputRefused> {
    let replaced = || {
        Inventory::default().look(output, &[])?;
        let directory = output.path.parent().filter(|it| *it != Path::new("")).unwrap_or(Path::new("."));
        let mut name = output.path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = directory.join(name);
        let written = write_anew(&part, text).and_then(|()| fs::rename(&part, &output.path));
        written.map_err(Problem::Host)
    };
    replaced().map_err(|problem| output.refused(problem))
}

/// Checks whether an image of `bytes` bytes may be made at the output's path. A regular file there must be an
/// older image of that size that nobody uses, or be empty.
pub fn may_become_image(output: &Output, inputs: Vec<Input>, bytes: u64) -> Result<(), OutputRefused> {
    let looked = || {
        Inventory { inputs, outputs: Vec::new() }.look(output, &[])?;
        match fs::metadata(&output.path) {
            Ok(found) if !found.is_file() => Err(Problem::Content("a regular file")),
            Ok(found) if found.len() != bytes && found.len() > 0 => {
                Err(Problem::Content("an older image of the same size"))
            }
            _ => Ok(()),
        }
    };
    looked().map_err(|problem| output.refused(problem))
}

/// Opens a log for reading and writing, or creates it. The caller locks it and checks its content.
pub fn open_log(output: &Output, image: FileId) -> Result<File, OutputRefused> {
    let opened = || {
        Inventory::default().look(output, &[])?;
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&output.path);
        let file = file.map_err(Problem::Host)?;
        let found = file.metadata().map_err(Problem::Host)?;
        match found.is_file() {
            true if FileId::of(&found) == image => {
                Err(Problem::Input { option: "its own", path: "--disk".into() })
            }
            true => Ok(file),
            false => Err(Problem::Content("a regular file")),
        }
    };
    opened().map_err(|problem| output.refused(problem))
}

/// Opens, or creates, a record that grows from run to run. The caller checks what it holds.
pub fn open_record(path: &Path) -> io::Result<File> {
    File::options().create(true).read(true).append(true).open(path)
}

#[cfg(test)]
mod tests;
