//! One boot of the test guest under minivmm, with a script as its only job.
//!
//! Owns the command line of it and the gathering of what came out: the script's output, what was observed
//! (`--observe`), the device's own figures (`--stats`). The VM is a child process: one that hangs is
//! ended, and what it has of the host goes with it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use super::child::{self, How};
use crate::scratch_dir::ScratchDir;
use minivmm::disk::cache::CachePolicy;
use minivmm::disk::options::HostCache;
use minivmm::files::output;
use minivmm::observe::csv::Row;
use minivmm::program;

/// Where the script is in the guest.
const SCRIPT: &str = "/tmp/job";
/// The guest has ended by then, or is ended by us.
const BEYOND: Duration = Duration::from_secs(15);

/// `minivmm check` takes less than a second, and an emulated one a few.
const CHECK_MAX: Duration = Duration::from_secs(60);
/// Its exit status where Linux guests do not run.
const CHECK_SAYS_NO: i32 = 1;

/// A disk of the guest: vda, vdb, ... in their order.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// The image.
    pub image: PathBuf,
    /// The cache mode.
    pub mode: &'static CachePolicy,
    /// What the host's cache has of it when the guest starts.
    pub host_cache: HostCache,
    /// More keys of `--disk`, `KEY=VALUE` each.
    pub keys: Vec<String>,
}

impl DiskSpec {
    /// The image in that mode, the host's cache dropped.
    pub fn new(image: impl Into<PathBuf>, mode: &'static CachePolicy) -> Self {
        Self { image: image.into(), mode, host_cache: HostCache::Drop, keys: Vec::new() }
    }

    /// The argument of `--disk`. (A comma in a path is written twice.)
    fn argument(&self) -> OsString {
        let mut text = doubled_commas(&self.image);
        text.push(format!(",cache={},host-cache={}", self.mode.name, self.host_cache.name()));
        for key in &self.keys {
            text.push(format!(",{key}"));
        }
        text
    }
}

fn doubled_commas(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes();
    OsString::from_vec(
        bytes.iter().flat_map(|&b| std::iter::repeat_n(b, 1 + usize::from(b == b','))).collect(),
    )
}

/// A boot, as asked for.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The guest's disks.
    pub disks: Vec<DiskSpec>,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Its CPUs.
    pub cpus: u8,
    /// What minivmm, the guest's memory and its page cache may have of the host's memory together.
    pub host_memory_limit: Option<u64>,
    /// Between two looks at the caches.
    pub observe_interval: Duration,
    /// What the guest does: a script for its /bin/sh.
    pub script: String,
    /// What it needs besides: files of the host, and where they are in the guest.
    pub files: Vec<(PathBuf, String)>,
    /// More arguments of minivmm, such as `--transport` and `mmio`.
    pub arguments: Vec<String>,
    /// From the start of minivmm to its end; the guest is told to end by then.
    pub timeout: Duration,
}

impl Boot {
    /// A guest of 512 MiB and one CPU with these disks, for ten minutes at most.
    pub fn new(disks: Vec<DiskSpec>, script: impl Into<String>) -> Self {
        Self {
            disks,
            memory_bytes: 512 << 20,
            cpus: 1,
            host_memory_limit: None,
            observe_interval: Duration::from_millis(500),
            script: script.into(),
            files: Vec::new(),
            arguments: Vec::new(),
            timeout: Duration::from_secs(600),
        }
    }
}

/// What came out of a boot.
#[derive(Debug)]
pub struct Outcome {
    /// The script's exit status, or minivmm's (docs/running-commands.md).
    pub status: i32,
    /// Why the VM has ended.
    pub how: How,
    /// What the script said.
    pub stdout: String,
    /// What it, and minivmm, said on standard error.
    pub stderr: String,
    /// What was observed: a row for each disk and moment.
    pub rows: Vec<Row>,
    /// The device's figures (docs/statistics.md); null where minivmm has not come so far.
    pub stats: Value,
    /// From the start of minivmm to its end.
    pub seconds: f64,
}

impl Outcome {
    /// The rows of one disk, `vda` for example.
    pub fn rows_of<'a>(&'a self, disk: &'a str) -> impl DoubleEndedIterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.text("disk") == disk)
    }

    /// Whether the script ran to its end and was content.
    pub fn is_good(&self) -> bool {
        self.how == How::ByItself && self.status == 0
    }
}

/// Why there was no boot at all. How a guest ended is no error.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// minivmm.
    #[error("cannot start {program}")]
    Start {
        /// Where it is looked for.
        program: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Temporary files.
    #[error("cannot keep the guest's script and figures in a temporary directory ($TMPDIR, else /tmp)")]
    Files(#[source] io::Error),
}

impl Boot {
    /// Runs it, until the guest has ended, `stop` is set or the time is over.
    pub fn run(&self, stop: &AtomicBool) -> Result<Outcome, BootError> {
        let program = program::beside(program::VMM);
        let found = |source| BootError::Start { program: program::VMM.into(), source };
        self.run_by(&program.map_err(found)?, stop)
    }

    /// The same by this minivmm.
    pub fn run_by(&self, program: &Path, stop: &AtomicBool) -> Result<Outcome, BootError> {
        let dir = ScratchDir::new("lab").map_err(BootError::Files)?;
        let (mut command, files) = self.command(program, dir.path()).map_err(BootError::Files)?;
        log::debug!("{command:?}");
        let started = Instant::now();
        let ended = child::run(&mut command, self.timeout + BEYOND, stop);
        let seconds = started.elapsed().as_secs_f64();
        let ended = ended.map_err(|source| BootError::Start { program: program.to_owned(), source })?;
        Ok(Outcome {
            status: ended.status,
            how: ended.how,
            stdout: ended.stdout,
            stderr: ended.stderr,
            rows: files.rows(),
            stats: files.stats().unwrap_or_default(),
            seconds,
        })
    }

    /// The command line of this minivmm, with the script and what is gathered in `dir`.
    pub fn command(&self, program: &Path, dir: &Path) -> io::Result<(Command, Files)> {
        let script = dir.join("job");
        let files = Files { observed: dir.join("observed.csv"), stats: dir.join("stats.json") };
        output::write_anew(&script, &self.script)?;
        let mut command = Command::new(program);
        for disk in &self.disks {
            command.arg("--disk").arg(disk.argument());
        }
        // Where guests run was decided when the tool began.
        command.arg("--host=direct");
        command.args(["--memory", &self.memory_bytes.to_string(), "--cpus", &self.cpus.to_string()]);
        if let Some(bytes) = self.host_memory_limit {
            command.args(["--host-memory-limit", &bytes.to_string()]);
        }
        command.args(["--timeout", &self.timeout.as_secs_f64().to_string()]);
        command.arg("--observe").arg(&files.observed);
        command.args(["--observe-interval", &self.observe_interval.as_secs_f64().to_string()]);
        command.arg(joined("--stats=", &files.stats, ""));
        command.args(&self.arguments);
        command.arg("--add").arg(joined("", &script, &format!(":{SCRIPT}")));
        for (file, place) in &self.files {
            command.arg("--add").arg(joined("", file, &format!(":{place}")));
        }
        command.args(["--", "sh", SCRIPT]);
        Ok((command, files))
    }
}

/// What minivmm writes meanwhile.
#[derive(Debug)]
pub struct Files {
    observed: PathBuf,
    stats: PathBuf,
}

impl Files {
    /// What was observed so far; a VM that was killed may have left half a line.
    pub fn rows(&self) -> Vec<Row> {
        let text = std::fs::read_to_string(&self.observed).unwrap_or_default();
        let (header, lines) = text.split_once('\n').unwrap_or_default();
        lines.lines().filter_map(|line| Row::parse(header, line)).collect()
    }

    /// The statistics that were told last, if any were: read under the lock that minivmm writes them with.
    pub fn stats(&self) -> Option<Value> {
        let file = File::open(&self.stats).ok()?;
        flock(&file, FlockOperation::LockShared).ok()?;
        serde_json::from_reader(io::BufReader::new(file)).ok()
    }

    /// Differs from what it was when they have been told anew.
    pub fn stats_written(&self) -> Option<SystemTime> {
        std::fs::metadata(&self.stats).ok()?.modified().ok()
    }
}

/// Why no Linux guest runs here, if none does: a boot would only be waited for. As `minivmm check` says it.
pub fn why_no_linux(stop: &AtomicBool) -> Result<Option<String>, BootError> {
    let name = program::beside(program::VMM).unwrap_or_else(|_| program::VMM.into());
    let mut command = Command::new(&name);
    command.args(["check", "--quiet"]);
    let ended = child::run(&mut command, CHECK_MAX, stop);
    let ended = ended.map_err(|source| BootError::Start { program: name, source })?;
    Ok((ended.how == How::ByItself && ended.status == CHECK_SAYS_NO).then(|| ended.stdout.trim().to_owned()))
}

fn joined(before: &str, path: &Path, behind: &str) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text.push(behind);
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Something that takes a minivmm's arguments.
    fn fake(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("minivmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn boot(timeout: Duration) -> Boot {
        let mode = CachePolicy::by_name("writeback").unwrap();
        let mut disk = DiskSpec::new("/a,b.img", mode);
        disk.keys.push("queues=2".into());
        let files = vec![("/etc/hostname".into(), "/name".into())];
        let host_memory_limit = Some(64 << 20);
        Boot { files, host_memory_limit, timeout, ..Boot::new(vec![disk], "echo $((6 * 7))\n") }
    }

    #[test]
    fn what_was_asked_for_is_asked_of_minivmm_and_what_came_out_is_gathered() {
        let dir = tempfile::tempdir().unwrap();
        let program = fake(
            dir.path(),
            r#"echo "$@"
            for word; do
                case $word in
                --stats=*) echo '{"version": 1}' >"${word#--stats=}" ;;
                *observed.csv) printf 'time_s,disk\n0.1,vda\n0.1,vdb\n0.2,vda\n0.2' >"$word" ;;
                *:/tmp/job) sh "${word%:/tmp/job}" ;;
                esac
            done
            exit 3"#,
        );
        let outcome = boot(Duration::from_secs(60)).run_by(&program, &AtomicBool::new(false)).unwrap();
        assert_eq!(
            (outcome.status, outcome.how, outcome.is_good()),
            (3, How::ByItself, false),
            "{outcome:?}"
        );
        let (line, said) = outcome.stdout.split_once('\n').unwrap();
        assert_eq!(said, "42\n");
        for words in [
            "--disk /a,,b.img,cache=writeback,host-cache=drop,queues=2 --host=direct --memory 536870912 --cpus 1",
            " --host-memory-limit 67108864",
            " --timeout 60 --observe /",
            "--observe-interval 0.5 --stats=/",
            "--add /etc/hostname:/name -- sh /tmp/job",
        ] {
            assert!(line.contains(words), "{words} is not in {line}");
        }
        assert_eq!(outcome.stats["version"], 1);
        let times: Vec<_> = outcome.rows_of("vda").map(|row| row.number("time_s")).collect();
        assert_eq!(times, [Some(0.1), Some(0.2)]);
    }

    #[test]
    fn who_stops_waits_for_no_guest() {
        let dir = tempfile::tempdir().unwrap();
        let program = fake(dir.path(), "exec sleep 60");
        let outcome = boot(Duration::from_secs(60)).run_by(&program, &AtomicBool::new(true)).unwrap();
        assert_eq!((outcome.how, outcome.stats, outcome.rows.len()), (How::Interrupted, Value::Null, 0));
        let missing = boot(Duration::from_secs(1)).run_by(&dir.path().join("no"), &AtomicBool::new(false));
        assert!(missing.unwrap_err().to_string().contains("no"));
    }
}
