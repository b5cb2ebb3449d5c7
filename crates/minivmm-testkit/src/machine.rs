//! What the tests run: the guest in both forms, minivmm's command line, and images of known content.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use minivmm::layout;
use tempfile::TempDir;

use crate::places;
pub use crate::skips::skip;

/// Exit statuses of the program, as `--help` documents them.
pub const ORDERLY: i32 = 0;
/// minivmm itself has failed.
pub const FAILURE: i32 = 125;
/// `--timeout` is over.
pub const TIMED_OUT: i32 = 126;
/// The guest's kernel has panicked.
pub const GUEST_PANIC: i32 = 124;

/// The status that a code at the exit port becomes.
pub const fn exit(code: i32) -> i32 {
    code << 1 | 1
}

/// Longer than any run takes; who meets it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What the guest writes in one request.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of an [`Image`].
pub const IMAGE_BYTES: usize = 1 << 20;

/// Can tests run here? If not, says why.
pub fn kvm() -> bool {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skip("kvm", &format!("cannot open /dev/kvm: {error}"));
    }
    opened.is_ok()
}

/// Whether this process may look into one that is not dumpable, as minivmm in its sandbox is: only root of the
/// machine may, not root of a user namespace.
pub fn sees_all() -> bool {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim().to_owned();
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let all = map.split_whitespace().eq(["0", "0", "4294967295"]);
    all && u64::from_str_radix(&effective, 16).unwrap() & CAP_SYS_PTRACE != 0
}

/// Returns the arguments that let strace and /proc inspect a run. An ordinary user needs the sandbox that only logs,
/// which leaves the process dumpable; the filters are the same.
pub fn visible() -> &'static [&'static str] {
    if sees_all() { &[] } else { &["--sandbox=log"] }
}

/// Whether so many MiB of a guest's memory may be pinned, as buffers=fixed does. If not, says why.
pub fn may_lock(mib: u64) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills the structure that it is given.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) }, 0);
    let may = sees_all() || limit.rlim_cur >> 20 > mib;
    if !may {
        skip(
            "memlock",
            &format!("buffers=fixed: this user may lock {} KiB of memory (ulimit -l)", limit.rlim_cur >> 10),
        );
    }
    may
}

/// Does this KVM run guest code on the processor, or emulate CPL 0?
pub fn hardware_virtualization() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    cpuinfo
        .lines()
        .any(|line| line.starts_with("flags") && line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
}

/// How a guest is entered, and therefore which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// By the ELF entry point, in 64-bit mode.
    Elf,
    /// By the PVH entry point, in 32-bit mode.
    Pvh,
}

/// Both entries.
pub const ENTRIES: [Entry; 2] = [Entry::Elf, Entry::Pvh];

impl Entry {
    /// Returns the guest's file, which the first call builds.
    pub fn kernel(self) -> PathBuf {
        static BUILT: OnceLock<PathBuf> = OnceLock::new();
        let directory = BUILT.get_or_init(build_guests);
        directory.join(match self {
            Self::Elf => "elf.elf",
            Self::Pvh => "pvh.elf",
        })
    }

    /// Returns what the guest says first on its console.
    pub fn greeting(self) -> &'static str {
        match self {
            Self::Elf => "entered by ELF",
            Self::Pvh => "entered by PVH",
        }
    }
}

fn build_guests() -> PathBuf {
    if let Some(built) = std::env::var_os("MINIVMM_BARE") {
        return built.into();
    }
    let directory = places::tmp().join("bare");
    let script = places::root().join("guest-images/bare/build.sh");
    let built = Command::new(&script)
        .arg(&directory)
        .arg(format!("VIRTIO_MMIO_BASE={:#x}", layout::VIRTIO_MMIO))
        .arg(format!("PORT_ACPI_SLEEP_CONTROL={:#x}", layout::PORT_ACPI_SLEEP_CONTROL))
        .arg(format!("PORT_ACPI_RESET={:#x}", layout::PORT_ACPI_RESET))
        .status()
        .unwrap();
    assert!(built.success(), "{} failed", script.display());
    directory
}

/// Builds a guest in C, one of `guest-images`.
pub fn freestanding(name: &str) -> PathBuf {
    let images = places::root().join("guest-images");
    let guest = places::tmp().join(format!("{name}-guest.elf"));
    let mut build = Command::new(images.join("freestanding/build.sh"));
    assert!(build.arg(&guest).arg(images.join(name)).status().unwrap().success(), "the {name} guest");
    guest
}

/// What a run left behind.
#[derive(Debug)]
pub struct Ran {
    /// The exit status.
    pub status: i32,
    /// What came to standard output.
    pub console: String,
    /// What came to standard error.
    pub log: String,
}

impl Ran {
    /// Fails, with all that was said, unless minivmm has ended with this status.
    #[track_caller]
    pub fn expect(self, status: i32, what: &str) -> Self {
        assert_eq!(self.status, status, "{what}\n--- console\n{}\n--- log\n{}", self.console, self.log);
        self
    }
}

/// The program under test. `MINIVMM_BINARY`, and `MINIVMM_BARE` for the directory of the built
/// guests, let this test program run where there is no source tree: inside the emulated host.
pub fn binary() -> PathBuf {
    std::env::var_os("MINIVMM_BINARY").map_or_else(places::minivmm, PathBuf::from)
}

/// Returns a command with the program under test.
pub fn minivmm() -> Command {
    Command::new(binary())
}

/// A directory on a real file system, removed when dropped.
pub fn scratch() -> TempDir {
    tempfile::tempdir_in(places::target_tmp().unwrap_or_else(|| ".".into())).unwrap()
}

/// Adds what every guest here is started with.
pub fn start<'a>(command: &'a mut Command, entry: Entry, cmdline: &str) -> &'a mut Command {
    command.arg("--kernel").arg(entry.kernel()).args([
        "--initrd",
        "none",
        "--transport",
        "mmio",
        "--cmdline",
        cmdline,
    ])
}

/// Runs to the end, with `input` on standard input.
pub fn run(command: &mut Command, input: &[u8]) -> Ran {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A guest that ends early closes the pipe: what counts is what it did.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ran {
        status: output.status.code().unwrap_or_else(|| panic!("killed: {output:?}")),
        console: String::from_utf8_lossy(&output.stdout).into_owned(),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A guest without a disk, on the console of this process.
pub fn run_plain(entry: Entry, cmdline: &str, more: &[&str]) -> Ran {
    run(start(&mut minivmm(), entry, cmdline).args(["--console", "stdio", "--timeout", "60"]).args(more), b"")
}

/// Kills a process that outlives all patience, so that a hang fails instead of lasting.
pub struct Watchdog(#[allow(dead_code, reason = "dropping it calls the dog off")] Sender<()>);

impl Watchdog {
    /// Kills the child after [`PATIENCE`], unless this is dropped before.
    pub fn over(child: &Child) -> Self {
        let pid = i32::try_from(child.id()).unwrap();
        let (off, calm) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if calm.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                kill(pid, libc::SIGKILL);
            }
        });
        Self(off)
    }
}

/// Sends a signal to a process.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: kill takes two integers; `pid` is a child that this process has not reaped.
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "kill({pid}, {signal})");
}

/// An image whose every byte is known, in a directory of its own on a real file system.
pub struct Image {
    _directory: TempDir,
    /// Where the image is.
    pub path: PathBuf,
}

impl Image {
    /// Makes an image with the bytes of [`Image::before`].
    #[allow(clippy::new_without_default, reason = "it makes a file")]
    pub fn new() -> Self {
        let directory = scratch();
        // As strace names it.
        let path = directory.path().canonicalize().unwrap().join("disk.img");
        fs::write(&path, Self::before()).unwrap();
        Self { _directory: directory, path }
    }

    /// What is in it before the guest runs.
    pub fn before() -> Vec<u8> {
        (0..IMAGE_BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    /// What must be in it when the guest has written its block at sector 8.
    pub fn after() -> Vec<u8> {
        let mut bytes = Self::before();
        let block =
            (0..u32::try_from(BLOCK_BYTES / 4).unwrap()).flat_map(|i| (0x6d76_0000 + i).to_le_bytes());
        bytes.splice(8 * 512..8 * 512 + BLOCK_BYTES, block);
        bytes
    }

    /// Fails unless the image holds these bytes.
    #[track_caller]
    pub fn must_hold(&self, expected: &[u8], what: &str) {
        let found = fs::read(&self.path).unwrap();
        assert_eq!(found.len(), expected.len(), "{what}: the image's size has changed");
        let differing = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differing, None, "{what}: the image differs first at this byte");
    }

    /// Returns the value of `--disk` for the image with these keys.
    pub fn disk(&self, keys: &str) -> String {
        format!("{},{keys}", self.path.display())
    }
}
