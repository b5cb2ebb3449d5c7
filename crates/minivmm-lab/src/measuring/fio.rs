//! Runs fio on the host as a child, and reads the JSON that fio prints on the host or in a guest.
//!
//! Owns the parsing of the JSON. The caller decides on the options of a job.

use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::child::{self, EndCause};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum FioError {
    /// fio cannot be started.
    #[error("fio cannot be started on this host: install it (Debian's package fio)")]
    Start(#[source] std::io::Error),
    /// fio ended with an error.
    #[error("fio failed with status {status}: {said}")]
    Failed {
        /// Its exit status.
        status: i32,
        /// The beginning of its output.
        said: String,
    },
    /// fio reached its time limit, in seconds.
    #[error("fio had not ended after {0} s")]
    Late(u64),
    /// A stop was requested.
    #[error("stopped")]
    Interrupted,
    /// The output is not JSON or not as expected.
    #[error("cannot parse fio's output ({why}): {answer}")]
    Answer {
        /// What is wrong with it.
        why: String,
        /// The beginning of the output.
        answer: String,
    },
    /// The job met an I/O error.
    #[error("fio's job {job} failed with error {errno} ({message})")]
    Job {
        /// Name of the job.
        job: String,
        /// The error number from fio.
        errno: i64,
        /// The error number in words.
        message: String,
    },
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// The mean.
    pub mean_us: f64,
    /// The median.
    pub p50_us: f64,
    /// The 99th percentile.
    pub p99_us: f64,
    /// The 99.9th percentile.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// The reads or the writes of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Direction {
    /// Number of I/Os.
    pub ios: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Duration of the job in seconds, including a last sync (end_fsync).
    pub seconds: f64,
    /// I/Os per second of that time.
    pub iops: f64,
    /// Megabytes (10^6 bytes) per second of that time.
    pub mb_s: f64,
    /// Completion latencies; `None` if fio did not measure them.
    pub latency: Option<Latency>,
}

/// The fsyncs and fdatasyncs of a job. fio does not count the last one (end_fsync).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Syncs {
    /// Number of syncs.
    pub count: u64,
    /// Their latencies; `None` if fio did not measure them.
    pub latency: Option<Latency>,
}

/// The figures of one job, or of one group of jobs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the job.
    pub name: String,
    /// Duration in seconds.
    pub seconds: f64,
    /// The reads; `None` if there were none.
    pub read: Option<Direction>,
    /// The writes; `None` if there were none.
    pub write: Option<Direction>,
    /// The syncs; `None` if there were none.
    pub syncs: Option<Syncs>,
}

impl Summary {
    /// Returns I/Os per second, reads and writes together.
    pub fn iops(&self) -> f64 {
        self.directions().map(|direction| direction.iops).sum()
    }

    /// Returns megabytes (10^6 bytes) per second, reads and writes together.
    pub fn mb_s(&self) -> f64 {
        self.directions().map(|direction| direction.mb_s).sum()
    }

    /// Returns bytes, reads and writes together.
    pub fn bytes(&self) -> u64 {
        self.directions().map(|direction| direction.bytes).sum()
    }

    fn directions(&self) -> impl Iterator<Item = &Direction> {
        [&self.read, &self.write].into_iter().flatten()
    }
}

/// Runs fio on the host with these arguments, and returns a summary for each job. Adds the option for JSON.
pub fn on_host(arguments: &[String], limit: Duration, stop: &AtomicBool) -> Result<Vec<Summary>, FioError> {
    Ok(on_host_counted(arguments, limit, stop)?.0)
}

/// Like [`on_host`], but also returns the bytes that were read from a disk.
pub fn on_host_counted(
    arguments: &[String],
    limit: Duration,
    stop: &AtomicBool,
) -> Result<(Vec<Summary>, u64), FioError> {
    let mut command = Command::new("fio");
    command.arg("--output-format=json").args(arguments);
    let ended = child::run(&mut command, limit, stop).map_err(FioError::Start)?;
    match ended.cause {
        EndCause::Interrupted => Err(FioError::Interrupted),
        EndCause::Late => Err(FioError::Late(limit.as_secs())),
        EndCause::ByItself if ended.status != 0 => {
            let said = shortened(&format!("{}{}", ended.stderr, ended.stdout));
            Err(FioError::Failed { status: ended.status, said })
        }
        EndCause::ByItself => Ok((parse(&ended.stdout)?, ended.disk_read_bytes)),
    }
}

/// Parses the output of `fio --output-format=json`, which may begin with warnings.
pub fn parse(answer: &str) -> Result<Vec<Summary>, FioError> {
    let unusual = |why: String| FioError::Answer { why, answer: shortened(answer) };
    // Warnings may contain braces too, but not at the beginning of a line.
    let at = if answer.starts_with('{') { Some(0) } else { answer.find("\n{") };
    let json = at.and_then(|at| answer.get(at..)).ok_or_else(|| unusual("no JSON".into()))?;
    // More text may follow the JSON.
    let first = serde_json::Deserializer::from_str(json).into_iter::<Value>().next();
    let report = match first {
        Some(Ok(report)) => report,
        Some(Err(error)) => return Err(unusual(error.to_string())),
        None => return Err(unusual("no JSON".into())),
    };
    let jobs = report["jobs"].as_array().ok_or_else(|| unusual("it has no jobs".into()))?;
    jobs.iter().map(|job| summary(job, &unusual)).collect()
}

fn summary(job: &Value, unusual: &dyn Fn(String) -> FioError) -> Result<Summary, FioError> {
    let name = job["jobname"].as_str().ok_or_else(|| unusual("a job has no name".into()))?.to_owned();
    let errno = job["error"].as_i64().unwrap_or_default();
    if errno != 0 {
        let number = i32::try_from(errno).unwrap_or_default();
        return Err(FioError::Job {
            job: name,
            errno,
            message: std::io::Error::from_raw_os_error(number).to_string(),
        });
    }
    let of = |side: &str| {
        direction(&job[side]).ok_or_else(|| unusual(format!("its figures of {side} are missing")))
    };
    let (read, write) = (of("read")?, of("write")?);
    let seconds = job["job_runtime"].as_f64().unwrap_or_default() / 1000.0;
    // The field `total_ios` exists too, but fio 3.33 sets it to 0.
    let syncs = job["sync"]["lat_ns"]["N"].as_u64().filter(|&count| count > 0);
    let syncs = syncs.map(|count| Syncs { count, latency: latency(&job["sync"]["lat_ns"]) });
    Ok(Summary {
        name,
        seconds,
        read: Some(read).filter(|side| side.ios > 0),
        write: Some(write).filter(|side| side.ios > 0),
        syncs,
    })
}

fn direction(side: &Value) -> Option<Direction> {
    let (ios, bytes) = (side["total_ios"].as_u64()?, side["io_bytes"].as_u64()?);
    let seconds = side["runtime"].as_f64()? / 1000.0;
    // fio rounds the rates of a short run in its own fields.
    let rate = |amount: u64| if seconds > 0.0 { amount as f64 / seconds } else { 0.0 };
    let latency = latency(&side["clat_ns"]).or_else(|| latency(&side["lat_ns"]));
    Some(Direction { ios, bytes, seconds, iops: rate(ios), mb_s: rate(bytes) / 1e6, latency })
}

/// Returns `None` if there are no percentiles. fio omits them if nothing happened or if it was told not to
/// measure.
fn latency(value: &Value) -> Option<Latency> {
    let us = |value: &Value| value.as_f64().map(|ns| ns / 1e3);
    let at = |name: &str| us(&value["percentile"][name]);
    Some(Latency {
        mean_us: us(&value["mean"])?,
        p50_us: at("50.000000")?,
        p99_us: at("99.000000")?,
        p999_us: at("99.900000")?,
        max_us: us(&value["max"])?,
    })
}

fn shortened(text: &str) -> String {
    const MOST: usize = 1000;
    let text = text.trim();
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{} ...", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"fio: a warning {of its own kind}
{"fio version": "fio-3.33", "jobs": [{"jobname": "j", "error": 0, "job_runtime": 2001,
 "read": {"io_bytes": 0, "total_ios": 0, "runtime": 0, "clat_ns": {"min": 0, "max": 0, "mean": 0.0}},
 "write": {"io_bytes": 8192000, "total_ios": 2000, "runtime": 2000, "iops": 1234.5,
  "clat_ns": {"max": 9000, "mean": 2000.0, "percentile": {"50.000000": 1000, "99.000000": 3000, "99.900000": 4000}}},
 "sync": {"total_ios": 0, "lat_ns": {"N": 1999, "max": 9, "mean": 5.0, "percentile": {"50.000000": 4, "99.000000": 6, "99.900000": 7}}}}]}
and a word behind"#;

    #[test]
    fn its_json_is_read_with_whatever_stands_around_it() {
        let [job] = &parse(ANSWER).unwrap()[..] else { panic!() };
        let write = job.write.as_ref().unwrap();
        assert_eq!((write.ios, write.bytes, write.iops, write.mb_s), (2000, 8_192_000, 1000.0, 4.096));
        let latency = write.latency.unwrap();
        assert_eq!((latency.mean_us, latency.p50_us, latency.p99_us, latency.p999_us), (2.0, 1.0, 3.0, 4.0));
        assert_eq!((job.read.is_none(), job.syncs.as_ref().unwrap().count, job.seconds), (true, 1999, 2.001));
        assert_eq!((job.iops(), job.bytes()), (1000.0, 8_192_000));
    }

    #[test]
    fn what_is_no_answer_is_an_error_that_shows_it() {
        for (answer, word) in [
            ("", "no JSON"),
            ("bad job", "bad job"),
            ("{\"jobs\": 1}", "no jobs"),
            ("{\"jobs\": [{\"jobname\": \"j\", \"error\": 28}]}", "No space left"),
            ("{\"jobs\": [{\"jobname\": \"j\", \"error\": 0}]}", "figures of read"),
            ("{\"jobs\": [", "EOF"),
        ] {
            let error = parse(answer).unwrap_err().to_string();
            assert!(error.contains(word), "{answer}: {error}");
        }
        assert!(shortened(&"x".repeat(5000)).len() < 1100);
    }

    #[test]
    fn the_one_of_this_host_is_understood() {
        if Command::new("fio").arg("--version").output().is_err() {
            println!("skipped: there is no fio here");
            return;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = dir.path().join("f").display().to_string();
        let never = AtomicBool::new(false);
        let arguments = [
            "--name=a b",
            &format!("--filename={file}"),
            "--size=1M",
            "--rw=write",
            "--bs=4k",
            "--fdatasync=16",
            "--end_fsync=1",
        ];
        let arguments = arguments.map(str::to_owned);
        let jobs = on_host(&arguments, Duration::from_secs(60), &never).unwrap();
        let write = jobs[0].write.as_ref().unwrap();
        assert_eq!((jobs[0].name.as_str(), write.ios, write.bytes), ("a b", 256, 1 << 20), "{jobs:?}");
        assert!(jobs[0].syncs.as_ref().unwrap().count >= 15 && write.latency.is_some(), "{jobs:?}");
        let wrong = ["--name=a", "--rw=sideways"].map(str::to_owned);
        let error = on_host(&wrong, Duration::from_secs(60), &never).unwrap_err().to_string();
        assert!(error.contains("sideways") && error.contains("failed"), "{error}");
    }
}
