//! fio: on the host as a child, in a guest as the command; and what it says.
//!
//! Owns the reading of its JSON. Which options a job has is the caller's business.

use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::child::{self, How};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum FioError {
    /// It is not there.
    #[error("fio cannot be started on this host: install it (Debian's package fio)")]
    Start(#[source] std::io::Error),
    /// It says why.
    #[error("fio failed with status {status}: {said}")]
    Failed {
        /// Its own.
        status: i32,
        /// Its words.
        said: String,
    },
    /// Its time was over.
    #[error("fio had not ended after {0} s")]
    Late(u64),
    /// All was to stop.
    #[error("stopped")]
    Interrupted,
    /// No JSON, or an unusual one.
    #[error("fio's answer cannot be understood ({why}): {answer}")]
    Answer {
        /// What is wrong with it.
        why: String,
        /// Its beginning.
        answer: String,
    },
    /// An I/O error within the job.
    #[error("fio's job {job} met error {errno} ({message})")]
    Job {
        /// Its name.
        job: String,
        /// As fio tells it.
        errno: i64,
        /// The same in words.
        message: String,
    },
}

/// Completion latencies, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Of all.
    pub mean_us: f64,
    /// Half are faster.
    pub p50_us: f64,
    /// One in a hundred is slower.
    pub p99_us: f64,
    /// One in a thousand is slower.
    pub p999_us: f64,
    /// The slowest.
    pub max_us: f64,
}

/// Reads, or writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Direction {
    /// How many.
    pub ios: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long the job ran, a last sync (end_fsync) included, in seconds.
    pub seconds: f64,
    /// I/Os a second of that time.
    pub iops: f64,
    /// Megabytes (10^6) a second of that time.
    pub mb_s: f64,
    /// From the submission to the end of each; nothing where fio was not to measure it.
    pub latency: Option<Latency>,
}

/// fsync and fdatasync of the job; a last one (end_fsync) is not counted by fio.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Syncs {
    /// How many.
    pub count: u64,
    /// Of each.
    pub latency: Option<Latency>,
}

/// One job, or one group of jobs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// How long it ran by the clock, in seconds.
    pub seconds: f64,
    /// Where it has read.
    pub read: Option<Direction>,
    /// Where it has written.
    pub write: Option<Direction>,
    /// Where it has synced.
    pub syncs: Option<Syncs>,
}

impl Summary {
    /// I/Os a second, reads and writes together.
    pub fn iops(&self) -> f64 {
        self.directions().map(|direction| direction.iops).sum()
    }

    /// Megabytes (10^6) a second, together.
    pub fn mb_s(&self) -> f64 {
        self.directions().map(|direction| direction.mb_s).sum()
    }

    /// Bytes, together.
    pub fn bytes(&self) -> u64 {
        self.directions().map(|direction| direction.bytes).sum()
    }

    fn directions(&self) -> impl Iterator<Item = &Direction> {
        [&self.read, &self.write].into_iter().flatten()
    }
}

/// Runs fio on the host with these arguments; a summary for each job. JSON is asked for here.
pub fn on_host(arguments: &[String], limit: Duration, stop: &AtomicBool) -> Result<Vec<Summary>, FioError> {
    Ok(on_host_counted(arguments, limit, stop)?.0)
}

/// The same, and the bytes that had to come from a disk for all of it.
pub fn on_host_counted(
    arguments: &[String],
    limit: Duration,
    stop: &AtomicBool,
) -> Result<(Vec<Summary>, u64), FioError> {
    let mut command = Command::new("fio");
    command.arg("--output-format=json").args(arguments);
    let ended = child::run(&mut command, limit, stop).map_err(FioError::Start)?;
    match ended.how {
        How::Interrupted => Err(FioError::Interrupted),
        How::Late => Err(FioError::Late(limit.as_secs())),
        How::ByItself if ended.status != 0 => {
            let said = shortened(&format!("{}{}", ended.stderr, ended.stdout));
            Err(FioError::Failed { status: ended.status, said })
        }
        How::ByItself => Ok((parse(&ended.stdout)?, ended.disk_read_bytes)),
    }
}

/// The summaries in fio's answer (`--output-format=json`), which may begin with words of warning.
pub fn parse(answer: &str) -> Result<Vec<Summary>, FioError> {
    let unusual = |why: String| FioError::Answer { why, answer: shortened(answer) };
    // Words of warning have braces too, but not at the beginning of a line.
    let at = if answer.starts_with('{') { Some(0) } else { answer.find("\n{") };
    let json = at.and_then(|at| answer.get(at..)).ok_or_else(|| unusual("no JSON".into()))?;
    // Behind it there may be more.
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
    // `total_ios` is there too, and 0 in fio 3.33.
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
    // Of what fio tells itself a short run's rate is rounded.
    let rate = |amount: u64| if seconds > 0.0 { amount as f64 / seconds } else { 0.0 };
    let latency = latency(&side["clat_ns"]).or_else(|| latency(&side["lat_ns"]));
    Some(Direction { ios, bytes, seconds, iops: rate(ios), mb_s: rate(bytes) / 1e6, latency })
}

/// fio leaves out the percentiles of what has not happened, or was not to be measured.
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
