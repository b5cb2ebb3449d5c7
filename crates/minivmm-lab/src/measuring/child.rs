//! Runs a child process until it ends, its time limit is reached or a stop is requested.
//!
//! Owns the process group, the way to stop it (SIGTERM, and SIGKILL if it does not react) and its output.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

pub use crate::child::EndCause;
use crate::child::Group;

/// Time that a process has to end after SIGTERM. A VM drains its disks meanwhile.
const GRACE: Duration = Duration::from_secs(20);

/// A child that has ended, and its output.
#[derive(Debug)]
pub struct EndedChild {
    /// Exit status, or 128 plus the number of the signal that killed the child.
    pub status: i32,
    /// What ended it.
    pub cause: EndCause,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Bytes that were read from a disk on its behalf, as far as the host accounts for them. Other children of
    /// this process that ended meanwhile are included.
    pub disk_read_bytes: u64,
}

/// Runs `command` without input, in a process group of its own, so that a Ctrl-C on our terminal reaches it
/// only if we pass it on. No process of the group is left afterwards.
pub fn run(command: &mut Command, limit: Duration, stop: &AtomicBool) -> io::Result<EndedChild> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let before = disk_read_bytes();
    let mut group = Group::start(command)?;
    let (stdout, stderr) = (group.child().stdout.take(), group.child().stderr.take());
    std::thread::scope(|scope| {
        let stdout = scope.spawn(|| read_all(stdout));
        let stderr = scope.spawn(|| read_all(stderr));
        let waited = wait(group, limit, stop);
        let said = |reader: std::thread::ScopedJoinHandle<'_, String>| reader.join().unwrap_or_default();
        let (stdout, stderr) = (said(stdout), said(stderr));
        let (status, cause) = waited?;
        let status = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        let disk_read_bytes = disk_read_bytes().saturating_sub(before);
        Ok(EndedChild { status, cause, stdout, stderr, disk_read_bytes })
    })
}

/// Returns the bytes read from disks by all children that were waited for (`ru_inblock`, getrusage(2)).
fn disk_read_bytes() -> u64 {
    const BLOCK_BYTES: u64 = 512;
    // SAFETY: rusage is plain numbers, for which all zeroes are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one rusage to the pointer, which is valid for it.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) } != 0 {
        return 0;
    }
    u64::try_from(usage.ru_inblock).unwrap_or(0).saturating_mul(BLOCK_BYTES)
}

/// An unreadable stream is no reason to lose the other results.
fn read_all(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        let _ = from.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait(group: Group, limit: Duration, stop: &AtomicBool) -> io::Result<(ExitStatus, EndCause)> {
    let mut cause = group.watch(Instant::now() + limit, &[stop]);
    if !matches!(cause, Ok(EndCause::ByItself)) {
        group.terminate();
        // The reason for the stop stays the same, whether or not the process ends in time.
        if let Err(error) = group.watch(Instant::now() + GRACE, &[]) {
            cause = cause.and(Err(error));
        }
    }
    Ok((group.end()?, cause?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration, stop: &AtomicBool) -> EndedChild {
        run(Command::new("sh").args(["-c", script]), limit, stop).unwrap()
    }

    #[test]
    fn what_it_said_and_how_it_ended_is_told() {
        let never = AtomicBool::new(false);
        let ended = sh("echo out; echo err >&2; exit 7", Duration::from_secs(60), &never);
        assert_eq!((ended.status, ended.cause), (7, EndCause::ByItself));
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("out\n", "err\n"));
        let ended = sh("kill -USR1 $$", Duration::from_secs(60), &never);
        assert_eq!((ended.status, ended.cause), (128 + libc::SIGUSR1, EndCause::ByItself));
    }

    #[test]
    fn what_came_from_a_disk_for_it_is_counted() {
        use minivmm::observe::control::{drop_cache, warm_cache};
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 8 << 20]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let read = || {
            let script = format!("cat '{}' >/dev/null", path.display());
            sh(&script, Duration::from_secs(60), &AtomicBool::new(false)).disk_read_bytes
        };
        drop_cache(&file).unwrap();
        let cold = read();
        assert!(cold >= 8 << 20, "{cold}");
        warm_cache(&file).unwrap();
        // Children of other tests may end meanwhile, but they do not read that much.
        let warm = read();
        assert!(warm < 4 << 20, "{warm}");
    }

    #[test]
    fn it_is_told_to_end_and_what_it_left_running_ends_too() {
        let never = AtomicBool::new(false);
        // A background process holds the pipes. If it were not killed, the test would take a minute.
        let script = "trap 'echo told; exit 3' TERM; sleep 60 & echo begun; wait";
        let ended = sh(script, Duration::from_millis(500), &never);
        assert_eq!((ended.status, ended.cause, ended.stdout.as_str()), (3, EndCause::Late, "begun\ntold\n"));
        let ended = sh("exec sleep 60", Duration::from_secs(60), &AtomicBool::new(true));
        assert_eq!((ended.status, ended.cause), (128 + libc::SIGTERM, EndCause::Interrupted));
    }
}
