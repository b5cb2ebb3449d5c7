//! A memory limit for experiments: puts this process into a cgroup v2 of its own with memory.max.
//!
//! Owns the creation of the cgroup, the move into it and its removal. The limit covers all memory that the
//! process uses: guest memory that was touched, and the page cache that it fills.

use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Why no limit can be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// There is no cgroup v2, or it has no memory controller.
    #[error(
        "this host has no cgroup v2 with a memory controller (cgroup v1 has it, or the kernel was built without; \
         systemd.unified_cgroup_hierarchy=1 on the kernel's command line gives it to v2)"
    )]
    NoController,
    /// This process may not use the controller.
    #[error(
        "cannot {what} {path} (as root it can be; or start minivmm by `systemd-run --user --scope -p Delegate=yes`)"
    )]
    Refused {
        /// The operation that failed.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error that the kernel reported.
        source: io::Error,
    },
    /// No cgroup can give this controller to a child.
    #[error(
        "cgroup {0} has processes of its own and gives its children no memory controller (cgroup v2: no internal \
         processes); start minivmm by `systemd-run --user --scope -p Delegate=yes`"
    )]
    NoPlace(PathBuf),
}

/// A cgroup of its own for this process, until it is dropped.
#[derive(Debug)]
pub struct MemoryLimit {
    group: PathBuf,
    /// cgroup.procs of the cgroup that this process came from. It is opened at the start, because the sandbox
    /// does not allow that at the end.
    back: Option<File>,
    remover: Option<Remover>,
}

/// A process outside the cgroup that removes it when we have ended, even if we are killed.
#[derive(Debug)]
struct Remover {
    process: libc::pid_t,
    /// Our end of a pipe. The remover sees the end of the pipe when we drop it or are killed.
    alive: Option<PipeWriter>,
}

impl MemoryLimit {
    /// Limits this process, and the children that it starts later, to `bytes` of memory. Swap is disabled if
    /// the kernel allows it.
    pub fn of_this_process(bytes: u64) -> Result<Self, LimitError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (root, before) = own_group(&mounts, &own).ok_or(LimitError::NoController)?;
        let parent = find_parent(&root, &before)?;
        let group = parent.join(format!("minivmm-{}", std::process::id()));
        // A process with our number may have been killed and left its cgroup behind, which then has no
        // processes.
        let _ = fs::remove_dir(&group);
        fs::create_dir(&group).map_err(refused("make the cgroup", &group))?;
        let back = OpenOptions::new().write(true).open(before.join("cgroup.procs")).ok();
        let remover =
            Remover::start(&group).map_err(refused("start a process that removes the cgroup", &group))?;
        let limit = Self { group, back, remover: Some(remover) };
        limit.write("memory.max", bytes)?;
        // A kernel without swap has no such file.
        let _ = fs::write(limit.group.join("memory.swap.max"), "0");
        limit.write("cgroup.procs", u64::from(std::process::id()))?;
        Ok(limit)
    }

    /// Returns the path of the cgroup. Its memory.current, memory.stat and memory.pressure describe its use.
    pub fn group(&self) -> &Path {
        &self.group
    }

    fn write(&self, file: &str, value: u64) -> Result<(), LimitError> {
        let path = self.group.join(file);
        fs::write(&path, value.to_string()).map_err(refused("write to", &path))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // A cgroup with processes cannot be removed, so we leave it first. A cgroup that remains limits nobody.
        if let Some(back) = &mut self.back {
            let _ = back.write_all(std::process::id().to_string().as_bytes());
        }
        drop(self.remover.take());
    }
}

/// Pause between two attempts to remove the cgroup while a process in it still exits.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(10);
const TRIES_MAX: u32 = 1000;

impl Remover {
    /// Starts the remover, as a copy of this thread alone.
    fn start(group: &Path) -> io::Result<Self> {
        let (ours, alive) = io::pipe()?;
        // SAFETY: the copy only reads, removes a directory and sleeps until it exits. None of this takes a lock
        // that another thread may have held.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(alive);
                remove_when_ended(ours, group);
                // SAFETY: ends the copy without running the destructors and exit handlers of this process.
                unsafe { libc::_exit(0) }
            }
            process => Ok(Self { process, alive: Some(alive) }),
        }
    }
}

fn remove_when_ended(mut alive: PipeReader, group: &Path) {
    // Nothing is ever written to the pipe, so this returns when it is closed. read_exact repeats a read that a
    // signal interrupts.
    let _ = alive.read_exact(&mut [0]);
    for _ in 0..TRIES_MAX {
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(RETRY_AFTER),
            _ => return,
        }
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        self.alive = None;
        // SAFETY: waits for our child, and a null pointer stands for no status.
        unsafe { libc::waitpid(self.process, std::ptr::null_mut(), 0) };
    }
}

fn refused(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LimitError {
    let path = path.to_owned();
    move |source| LimitError::Refused { what, path, source }
}

/// Returns where cgroup v2 is mounted, and the path of this process's cgroup.
fn own_group(mounts: &str, own: &str) -> Option<(PathBuf, PathBuf)> {
    let mount = mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4))?
    })?;
    let group = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = PathBuf::from(mount);
    let own = root.join(group);
    Some((root, own))
}

/// Returns a cgroup whose children have the memory controller: our own or the one above it, because a cgroup
/// with processes cannot give controllers to its children.
fn find_parent(root: &Path, own: &Path) -> Result<PathBuf, LimitError> {
    let has = |group: &Path, file: &str| {
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        text.split_whitespace().any(|controller| controller == "memory")
    };
    if !has(root, "cgroup.controllers") {
        return Err(LimitError::NoController);
    }
    let hands_on = |group: &Path| has(group, "cgroup.subtree_control");
    let above = own.parent().filter(|_| own != root);
    if let Some(group) = [Some(own), above].into_iter().flatten().find(|group| hands_on(group)) {
        return Ok(group.to_owned());
    }
    // The root may have both processes and controllers, and a delegated cgroup may contain only us.
    for group in [Some(own), above].into_iter().flatten().filter(|group| has(group, "cgroup.controllers")) {
        let file = group.join("cgroup.subtree_control");
        match fs::write(&file, "+memory") {
            Ok(()) => return Ok(group.to_owned()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(refused("write to", &file)(error)),
        }
    }
    Err(LimitError::NoPlace(own.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_below_the_mount() {
        let mounts = "30 23 0:26 / /proc rw - proc proc rw\n31 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let found = own_group(mounts, "1:cpu:/x\n0::/user.slice/a.scope\n").unwrap();
        assert_eq!(found.1, Path::new("/sys/fs/cgroup/user.slice/a.scope"));
        assert_eq!(own_group(mounts, "0::/\n").unwrap().1, Path::new("/sys/fs/cgroup/"));
        assert_eq!(own_group("30 23 0:26 / /c rw - cgroup cgroup rw,memory\n", "0::/\n"), None);
        assert_eq!(own_group(mounts, "4:memory:/x\n"), None);
    }

    #[test]
    fn the_parent_is_one_that_hands_the_controller_on() {
        let tree = tempfile::tempdir().unwrap();
        let root = tree.path();
        let own = root.join("slice/scope");
        fs::create_dir_all(&own).unwrap();
        let put = |group: &Path, file: &str, text: &str| fs::write(group.join(file), text).unwrap();
        assert!(matches!(find_parent(root, &own), Err(LimitError::NoController)));
        put(root, "cgroup.controllers", "cpu memory\n");
        assert!(matches!(find_parent(root, &own), Err(LimitError::NoPlace(_))));
        put(&root.join("slice"), "cgroup.subtree_control", "memory pids\n");
        assert_eq!(find_parent(root, &own).unwrap(), root.join("slice"));
        put(&own, "cgroup.subtree_control", "memory\n");
        assert_eq!(find_parent(root, &own).unwrap(), own);
    }
}
