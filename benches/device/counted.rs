//! Counters that the kernel keeps: system calls of a thread, stores to an address, CPU time.
//!
//! Owns perf_event_open. System calls are counted by the tracepoint that every one of them passes,
//! stores to the used index by a hardware breakpoint. Both slow down what they count, so they run
//! beside a run of their own, never beside one that is timed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const TYPE_TRACEPOINT: u32 = 2;
const TYPE_BREAKPOINT: u32 = 5;
const BREAKPOINT_STORE: u32 = 2;
const ATTR_BYTES: u32 = 128;
/// `exclude_kernel` and `exclude_hv` of struct perf_event_attr.
const ONLY_USER: u64 = 1 << 5 | 1 << 6;

/// struct perf_event_attr, as far as it is used here (perf_event_open(2)).
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_addr: u64,
    breakpoint_len: u64,
    rest: [u64; 7],
}
const _: () = assert!(size_of::<Attr>() == ATTR_BYTES as usize);

/// One counter of one thread.
pub struct Counter(File);

impl Counter {
    /// Counts every system call that `thread` enters. Root only.
    pub fn system_calls(thread: i32) -> Result<Self> {
        let config = tracepoint_id("raw_syscalls", "sys_enter")?;
        let attr = Attr { kind: TYPE_TRACEPOINT, config, ..Attr::default() };
        Self::open(attr, thread).context("system calls cannot be counted by perf_event_open (root only)")
    }

    /// Counts stores to the two bytes at `address` by `thread`.
    pub fn stores(thread: i32, address: u64) -> Result<Self> {
        let attr = Attr {
            kind: TYPE_BREAKPOINT,
            flags: ONLY_USER,
            breakpoint_type: BREAKPOINT_STORE,
            breakpoint_addr: address,
            breakpoint_len: 2,
            ..Attr::default()
        };
        Self::open(attr, thread).context("no hardware breakpoint can be had here")
    }

    fn open(mut attr: Attr, thread: i32) -> io::Result<Self> {
        attr.size = ATTR_BYTES;
        // SAFETY: `attr` is a whole perf_event_attr of the size it names; no group, no flags.
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attr, thread, -1, -1, 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made above and belongs to nobody else.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The count so far.
    pub fn read(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        (&self.0).read_exact(&mut value)?;
        Ok(u64::from_ne_bytes(value))
    }
}

/// The number of a tracepoint, from tracefs, which is mounted for the moment where it is not.
fn tracepoint_id(system: &str, event: &str) -> Result<u64> {
    let known = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"].map(PathBuf::from);
    let read = |root: &Path| std::fs::read_to_string(root.join("events").join(system).join(event).join("id"));
    let found = known.iter().find_map(|root| read(root).ok());
    let text = match found {
        Some(text) => text,
        None => {
            let mount = TemporaryTracefs::new()?;
            read(&mount.0).context("tracefs has no events for system calls")?
        }
    };
    text.trim().parse().context("the tracepoint's id is no number")
}

/// A mount of tracefs for as long as this lives.
struct TemporaryTracefs(PathBuf);

impl TemporaryTracefs {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?.keep();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tracefs", "tracefs"]).arg(&dir).stderr(Stdio::null());
        let mounted = mount.status().is_ok_and(|status| status.success());
        let this = Self(dir);
        ensure!(mounted, "tracefs cannot be mounted, so system calls are not counted (root only)");
        Ok(this)
    }
}

impl Drop for TemporaryTracefs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).stderr(Stdio::null()).status();
        // Never more than an empty directory: were the mount still there, nothing may be removed.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A CPU clock, in seconds.
pub fn cpu_seconds(clock: libc::clockid_t) -> io::Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is one valid timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// CPU time of a process so far, all its threads together, in seconds.
pub fn cpu_seconds_of(process: i32) -> io::Result<f64> {
    let mut clock = 0;
    // SAFETY: `clock` is one valid clockid_t.
    match unsafe { libc::clock_getcpuclockid(process, &raw mut clock) } {
        0 => cpu_seconds(clock),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The thread of this process that has this name. A thread names itself, so it may take a moment.
pub fn thread_named(name: &str) -> Result<i32> {
    for _ in 0..1000 {
        for task in std::fs::read_dir("/proc/self/task")? {
            let task = task?;
            let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if comm.trim() == name {
                return Ok(task.file_name().to_string_lossy().parse()?);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    anyhow::bail!("there is no thread {name}")
}
