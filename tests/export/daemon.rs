//! A running `minivmm export`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minivmm_testkit::{machine, tools};

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The daemon, its directory and its log.
pub struct Daemon {
    pub child: Child,
    dir: PathBuf,
}

/// Returns `minivmm export` with `words`, in `dir`.
pub fn command(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(tools::minivmm());
    let log = std::fs::File::options().append(true).create(true).open(dir.join("log")).unwrap();
    command.arg("export").args(words).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command
}

impl Daemon {
    /// Exports `disk` on the socket `s`. Returns when it is there.
    pub fn start(dir: &Path, disk: &str) -> Self {
        Self::with(dir, &["--disk", disk, "--socket", "s"])
    }

    /// Starts it with these words. Returns when the socket `s` is there, and is this daemon's.
    pub fn with(dir: &Path, words: &[&str]) -> Self {
        let mut daemon = Self { child: command(dir, words).spawn().unwrap(), dir: dir.to_owned() };
        until("the socket is there", || {
            daemon.assert_alive();
            std::os::unix::net::UnixStream::connect(dir.join("s")).is_ok()
        });
        daemon
    }

    #[track_caller]
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the daemon has ended with {status}: {}", self.log());
        }
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }

    /// Waits until the log has `words`.
    #[track_caller]
    pub fn says(&self, words: &str) {
        until(&format!("{words}: {}", self.log()), || self.log().contains(words));
    }

    pub fn signal(&self, number: i32) {
        machine::kill(i32::try_from(self.child.id()).unwrap(), number);
    }

    /// Kills it in whatever it does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in order, and returns its exit status.
    #[track_caller]
    pub fn end(mut self) -> i32 {
        self.assert_alive();
        self.signal(libc::SIGTERM);
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("{status}: {}", self.log()));
            }
            assert!(begin.elapsed() < PATIENCE, "it does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The statistics of the first disk, which `--stats=stats` lets SIGUSR1 write.
    pub fn stats(&self) -> serde_json::Value {
        let path = self.dir.join("stats");
        let before = std::fs::metadata(&path).unwrap().modified().unwrap();
        self.signal(libc::SIGUSR1);
        let mut found = None;
        until("the statistics are there", || {
            let is_new = std::fs::metadata(&path).unwrap().modified().unwrap() != before;
            found = std::fs::read(&path).ok().filter(|_| is_new);
            found.as_ref().is_some_and(|it| serde_json::from_slice::<serde_json::Value>(it).is_ok())
        });
        serde_json::from_slice::<serde_json::Value>(&found.unwrap()).unwrap()["disks"][0].clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `is_so`.
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
