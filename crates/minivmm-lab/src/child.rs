//! A child process in its own process group, watched, and killed with its whole group whatever happens.
//!
//! Owns the group's life. However the wait for the group ends (by an error, a panic, a stop), no process of it
//! survives the drop of its [`Group`]. [`kill_all`] is for a process that exits without dropping.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, kill_process_group, pidfd_open,
    set_child_subreaper, waitpgid, waitpid,
};

use minivmm::sync::unpoisoned;

/// How often the stop flags are checked.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long to wait for a killed process to disappear. A process that the kernel holds longer is not waited
/// for.
const REAP_MAX: Duration = Duration::from_secs(1);

/// The running groups of this process, for [`kill_all`].
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// What ended the wait for a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndCause {
    /// The child ended by itself.
    ByItself,
    /// A stop flag was set.
    Interrupted,
    /// The deadline passed.
    Late,
}

/// A child process that leads a process group. Dropping it kills the group and waits for the child.
#[derive(Debug)]
pub struct Group {
    child: Child,
    group: Pid,
}

impl Group {
    /// Starts `command` in its own group, so that a Ctrl-C on our terminal reaches it only if we pass it on.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        // Held across the start, so that `kill_all` misses no group.
        let mut running = running();
        let child = command.process_group(0).spawn()?;
        let group = Pid::from_child(&child);
        running.push(group);
        Ok(Self { child, group })
    }

    /// Returns the child, so that the caller can take its streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Returns the child's process number, which the kernel does not reuse before [`Self::end`].
    pub fn pid(&self) -> Pid {
        self.group
    }

    /// Waits until the child ends by itself, one of `stops` is set, or the deadline passes.
    pub fn watch(&self, deadline: Instant, stops: &[&AtomicBool]) -> io::Result<EndCause> {
        let pidfd = pidfd_open(self.group, PidfdFlags::empty())?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).min(LOOK_EVERY);
            let left = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(EndCause::ByItself),
                Err(errno) => return Err(errno.into()),
            }
            if stops.iter().any(|stop| stop.load(Ordering::Relaxed)) {
                return Ok(EndCause::Interrupted);
            }
            if Instant::now() >= deadline {
                return Ok(EndCause::Late);
            }
        }
    }

    /// Asks the group to end, by SIGTERM.
    pub fn terminate(&self) {
        let _ = kill_process_group(self.group, Signal::TERM);
    }

    /// Kills what is left of the group, and returns how the child itself ended.
    pub fn end(mut self) -> io::Result<ExitStatus> {
        self.kill()
    }

    fn kill(&mut self) -> io::Result<ExitStatus> {
        let mut running = running();
        // The group's number is ours only until the child is waited for, so it is never signalled after that.
        if running.contains(&self.group) {
            let _ = kill_process_group(self.group, Signal::KILL);
            running.retain(|group| *group != self.group);
        }
        drop(running);
        let status = self.child.wait()?;
        // The group's orphans are our children now (`adopt_orphans`), and killed. Wait for them, because the
        // caller may remove their files.
        let until = Instant::now() + REAP_MAX;
        while let Ok(ended) = waitpgid(self.group, WaitOptions::NOHANG) {
            match ended {
                Some(_) => {}
                None if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
                None => break,
            }
        }
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn running() -> MutexGuard<'static, Vec<Pid>> {
    unpoisoned(RUNNING.lock())
}

/// Makes this process the parent of whatever its children leave behind, for as long as it lives.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(set_child_subreaper(Some(getpid()))?)
}

/// Kills every group of this process, and processes that have left their group (setsid(1)). Call it only when
/// this process is about to exit: no further group can be started.
pub fn kill_all() {
    let running = running();
    for group in running.iter() {
        let _ = kill_process_group(*group, Signal::KILL);
    }
    // A killed process's children become ours. A process that the kernel holds is not waited for.
    let until = Instant::now() + REAP_MAX;
    loop {
        let children = children();
        if children.is_empty() || Instant::now() >= until {
            break;
        }
        for child in children {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::NOHANG);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // Keeps the lock for ever: whoever is about to start a group waits for it until we exit.
    std::mem::forget(running);
}

/// Returns our children, including adopted ones. Empty on a kernel without this list (CONFIG_PROC_CHILDREN).
fn children() -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let lists =
        threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let text = lists.collect::<Vec<_>>().join(" ");
    text.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_ignores_sigterm_is_gone_when_its_owner_panics() {
        let script = "trap '' TERM; sh -c 'trap \"\" TERM; sleep 600' & echo $!; wait";
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(std::process::Stdio::piped());
        let (sender, receiver) = std::sync::mpsc::channel();
        let panicked = std::thread::spawn(move || {
            let mut group = Group::start(&mut command).unwrap();
            let mut line = String::new();
            let mut stdout = io::BufReader::new(group.child().stdout.take().unwrap());
            io::BufRead::read_line(&mut stdout, &mut line).unwrap();
            sender.send((group.group, line.trim().parse::<i32>().unwrap())).unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(panicked.join().is_err());
        let (leader, inner) = receiver.recv().unwrap();
        for pid in [leader.as_raw_nonzero().get(), inner] {
            // A zombie counts as gone: it is killed, and not yet reaped by the process that inherited it.
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_gone = || state.is_empty() || state.rsplit(')').next().unwrap().trim().starts_with('Z');
            let until = Instant::now() + Duration::from_secs(60);
            while !is_gone() && rustix::process::test_kill_process(Pid::from_raw(pid).unwrap()).is_ok() {
                assert!(Instant::now() < until, "{pid} is still there: {state}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
