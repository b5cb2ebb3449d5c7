//! Boots the test guest once under minivmm, with a script as its only job.
//!
//! Owns the command line, and collects the results: the output of the script, the observation (`--observe`) and
//! the statistics of the device (`--stats`). The VM is a child process. If it hangs it is killed, which frees
//! all that it holds of the host.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use super::child::{self, EndCause};
use crate::scratch_dir::ScratchDir;
use minivmm::disk::cache::CachePolicy;
use minivmm::files::output;
use minivmm::observe::control::HostCache;
use minivmm::observe::csv::Row;
use minivmm::program;

/// Path of the script in the guest.
const SCRIPT: &str = "/tmp/job";
/// Time that minivmm has after its own timeout before it is stopped.
const BEYOND: Duration = Duration::from_secs(15);

/// Time limit of `minivmm check`. It takes less than a second, and a few seconds on an emulated host.
const CHECK_MAX: Duration = Duration::from_secs(60);
/// Exit status of `minivmm check` if no Linux guest runs here.
const CHECK_SAYS_NO: i32 = 1;

/// A disk of the guest.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// The image.
    pub image: PathBuf,
    /// The cache mode.
    pub mode: &'static CachePolicy,
    /// What the host's page cache holds of the image when the guest starts.
    pub host_cache: HostCache,
    /// More keys of `--disk`, as `KEY=VALUE`.
    pub keys: Vec<String>,
}

impl DiskSpec {
    /// Creates a disk with this image and mode. Its image is dropped from the host's page cache before the
    /// start.
    pub fn new(image: impl Into<PathBuf>, mode: &'static CachePolicy) -> Self {
        Self { image: image.into(), mode, host_cache: HostCache::Drop, keys: Vec::new() }
    }

    /// Returns the argument of `--disk`. A comma in the path is doubled.
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

/// The description of a boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The disks of the guest, in the order vda, vdb, ...
    pub disks: Vec<DiskSpec>,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// Number of CPUs of the guest.
    pub cpus: u8,
    /// Limit of the host's memory for minivmm, the guest's memory and the page cache together; `None` for no
    /// limit.
    pub host_memory_limit: Option<u64>,
    /// Time between two samples of the caches.
    pub observe_interval: Duration,
    /// The shell script that the guest runs.
    pub script: String,
    /// Files of the host, and their paths in the guest.
    pub files: Vec<(PathBuf, String)>,
    /// More arguments of minivmm, such as `--transport` and `mmio`.
    pub arguments: Vec<String>,
    /// Time limit, from the start of minivmm. minivmm stops the guest when it is reached.
    pub timeout: Duration,
}

impl Boot {
    /// Creates a boot with these disks, 512 MiB, one CPU, and a time limit of ten minutes.
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

/// The results of a boot.
#[derive(Debug)]
pub struct BootOutcome {
    /// Exit status of the script, or of minivmm (docs/running-commands.md).
    pub status: i32,
    /// Why the VM ended.
    pub cause: EndCause,
    /// Standard output of the script.
    pub stdout: String,
    /// Standard error of the script and of minivmm.
    pub stderr: String,
    /// The observation, one row for each disk and sample.
    pub rows: Vec<Row>,
    /// The statistics (docs/statistics.md); null if minivmm wrote none.
    pub stats: Value,
    /// Duration of the run of minivmm.
    pub seconds: f64,
}

impl BootOutcome {
    /// Returns the rows of one disk, for example `vda`.
    pub fn rows_of<'a>(&'a self, disk: &'a str) -> impl DoubleEndedIterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.text("disk") == disk)
    }

    /// Returns `true` if the script ended by itself with status 0.
    pub fn is_good(&self) -> bool {
        self.cause == EndCause::ByItself && self.status == 0
    }
}

/// Why there was no boot. A guest that fails is not an error.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// minivmm cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// The error that the host reported.
        source: io::Error,
    },
    /// Temporary files cannot be used.
    #[error("cannot keep the guest's script and figures in a temporary directory ($TMPDIR, else /tmp)")]
    Files(#[source] io::Error),
}

impl Boot {
    /// Runs the boot until the guest ends, `stop` is set or the time limit is reached.
    pub fn run(&self, stop: &AtomicBool) -> Result<BootOutcome, BootError> {
        let program = program::beside(program::VMM);
        let found = |source| BootError::Start { program: program::VMM.into(), source };
        self.run_by(&program.map_err(found)?, stop)
    }

    /// Runs the boot with this minivmm.
    pub fn run_by(&self, program: &Path, stop: &AtomicBool) -> Result<BootOutcome, BootError> {
        let dir = ScratchDir::new("lab").map_err(BootError::Files)?;
        let (mut command, files) = self.command(program, dir.path()).map_err(BootError::Files)?;
        log::debug!("{command:?}");
        let started = Instant::now();
        let ended = child::run(&mut command, self.timeout + BEYOND, stop);
        let seconds = started.elapsed().as_secs_f64();
        let ended = ended.map_err(|source| BootError::Start { program: program.to_owned(), source })?;
        Ok(BootOutcome {
            status: ended.status,
            cause: ended.cause,
            stdout: ended.stdout,
            stderr: ended.stderr,
            rows: files.rows(),
            stats: files.stats().unwrap_or_default(),
            seconds,
        })
    }

    /// Returns the command line for this minivmm, and the files that it writes. The script and these files are
    /// in `dir`.
    pub fn command(&self, program: &Path, dir: &Path) -> io::Result<(Command, OutputFiles)> {
        let script = dir.join("job");
        let files = OutputFiles { observed: dir.join("observed.csv"), stats: dir.join("stats.json") };
        output::write_anew(&script, &self.script)?;
        let mut command = Command::new(program);
        for disk in &self.disks {
            command.arg("--disk").arg(disk.argument());
        }
        // This process already runs on the host that was chosen for guests, so minivmm must not choose another.
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

/// The files that minivmm writes while it runs.
#[derive(Debug)]
pub struct OutputFiles {
    observed: PathBuf,
    stats: PathBuf,
}

impl OutputFiles {
    /// Returns what was observed so far. An incomplete last line, left by a VM that was killed, is skipped.
    pub fn rows(&self) -> Vec<Row> {
        let text = std::fs::read_to_string(&self.observed).unwrap_or_default();
        let (header, lines) = text.split_once('\n').unwrap_or_default();
        lines.lines().filter_map(|line| Row::parse(header, line)).collect()
    }

    /// Returns the latest statistics; `None` if there are none. The file is read under the lock that minivmm
    /// holds while it writes.
    pub fn stats(&self) -> Option<Value> {
        let file = File::open(&self.stats).ok()?;
        flock(&file, FlockOperation::LockShared).ok()?;
        serde_json::from_reader(io::BufReader::new(file)).ok()
    }

    /// Returns when the statistics were last written. It changes with each new report.
    pub fn stats_written(&self) -> Option<SystemTime> {
        std::fs::metadata(&self.stats).ok()?.modified().ok()
    }
}

/// Asks `minivmm check` whether Linux guests run here. Returns its reason if they do not, so that no boot is
/// tried in vain.
pub fn why_no_linux(stop: &AtomicBool) -> Result<Option<String>, BootError> {
    let name = program::beside(program::VMM).unwrap_or_else(|_| program::VMM.into());
    let mut command = Command::new(&name);
    command.args(["check", "--quiet"]);
    let ended = child::run(&mut command, CHECK_MAX, stop);
    let ended = ended.map_err(|source| BootError::Start { program: name, source })?;
    Ok((ended.cause == EndCause::ByItself && ended.status == CHECK_SAYS_NO)
        .then(|| ended.stdout.trim().to_owned()))
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

    /// Makes a program that takes the arguments of minivmm and runs `script`.
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
            (outcome.status, outcome.cause, outcome.is_good()),
            (3, EndCause::ByItself, false),
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
        assert_eq!(
            (outcome.cause, outcome.stats, outcome.rows.len()),
            (EndCause::Interrupted, Value::Null, 0)
        );
        let missing = boot(Duration::from_secs(1)).run_by(&dir.path().join("no"), &AtomicBool::new(false));
        assert!(missing.unwrap_err().to_string().contains("no"));
    }
}
